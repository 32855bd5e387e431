"""What the Triton kernels share: tiles of channels, steps, and loads that go out together."""

import triton
import triton.language as tl

from ..exponentials import softplus


@triton.jit
def step_of(delta, bias, there, SOFTPLUS: tl.constexpr):
    """The step size, and the number that the softplus got. Lanes that are not there make no step,
    which leaves their states as they are."""
    raw = delta.to(tl.float32)
    if bias is not None:
        raw += bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return tl.where(there, step, 0.0), raw


@triton.jit
def channels_of(tile, dim, run, BLOCK_DIM: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr):
    """A tile's channels, int64, and which of its lanes have one.

    A run is `run` consecutive channels that share both B and C. A tile lies within one run, or
    covers RUNS short ones, each on a power of two lanes. EVEN: every lane has a channel, and every
    turn all its tokens, which saves what would ask.
    """
    lanes = tl.arange(0, BLOCK_DIM)
    if RUNS == 1:
        blocks = tl.cdiv(run, BLOCK_DIM)
        first = (tile // blocks).to(tl.int64) * run
        offset = tile % blocks * BLOCK_DIM + lanes
    else:
        first = (tile * RUNS + lanes // (BLOCK_DIM // RUNS)).to(tl.int64) * run
        offset = lanes % (BLOCK_DIM // RUNS)
        offset = tl.where(first < dim, offset, run)
    inside = offset < run
    if EVEN:
        inside = tl.full([BLOCK_DIM], 1, tl.int1)
    return first + offset, inside


@triton.jit
def token_of(first, j, last, EVEN: tl.constexpr):
    """The j-th token from the first of a turn; the last that there is, where there are no more."""
    t = first + j
    if not EVEN:
        t = tl.minimum(t, last)
    return t


@triton.jit
def load_plane(ptr, dim, columns, held):
    """[STATES, BLOCK_DIM] of a (state, dim) plane, with zeros where nothing is held."""
    rows = tl.arange(0, held.shape[0])[:, None] * dim
    return tl.load((ptr + columns)[None, :] + rows, mask=held, other=0.0)


@triton.jit
def store_plane(ptr, plane, dim, columns, held):
    rows = tl.arange(0, held.shape[0])[:, None] * dim
    tl.store((ptr + columns)[None, :] + rows, plane, mask=held)


@triton.jit
def load_edge(ptr, stride, sample, segment, columns, held):
    """[STATES, BLOCK_DIM] of (batch, segment, state, dim), in float32. None is zero."""
    edge = tl.zeros(held.shape, tl.float32)
    if ptr is not None:
        n = tl.arange(0, held.shape[0]).to(tl.int64)
        ptrs = ptr + sample * stride[0] + segment * stride[1]
        ptrs += n[:, None] * stride[2] + columns[None, :] * stride[3]
        edge = tl.load(ptrs, mask=held, other=0.0).to(tl.float32)
    return edge


@triton.jit
def load_weights(ptr, stride, channels):
    """A number for each channel, in float32. None stays None."""
    weights = None
    if ptr is not None:
        weights = tl.load(ptr + channels * stride).to(tl.float32)
    return weights


@triton.jit
def rows_of(ptr, stride, sample, channels):
    """Where a sample's first token of (batch, seqlen, dim) begins."""
    return ptr + sample * stride[0] + channels * stride[2]


@triton.jit
def load_turn(rows, pitches, first, last, TOKENS: tl.constexpr, EVEN: tl.constexpr):
    """TOKENS tokens of several tensors: for each a tuple of [BLOCK_DIM].

    rows: see `rows_of`. pitches: the strides of a token.
    """
    turn = ()
    for i in tl.static_range(len(rows)):
        tokens = ()
        for j in tl.static_range(TOKENS):
            tokens += (tl.load(rows[i] + token_of(first, j, last, EVEN) * pitches[i]),)
        turn += (tokens,)
    return turn


@triton.jit
def at(inside, t, seqlen, EVEN: tl.constexpr):
    """`inside`, where there is a token t. The interpreter splats numbers, but no truth values."""
    if not EVEN:
        inside = inside & (tl.full(inside.shape, t, tl.int64) < seqlen)
    return inside


@triton.jit
def operand_of(
    ptr, stride, groups, sample, tile, channels, dim, run, held,
    RUNS: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """B or C: its plane, if it is constant, or else where it begins for a sample's first token, for
    all channels of the tile or for each one.

    stride: (batch, token, group, state).
    """
    if CONSTANT:
        operand = load_plane(ptr, dim, channels, held)
    else:
        if RUNS == 1:
            group = (tile // tl.cdiv(run, channels.shape[0]) * run // (dim // groups)).to(tl.int64)
        else:
            group = channels // (dim // groups)
        operand = ptr + sample * stride[0] + group * stride[2]
    return operand


@triton.jit
def load_operands(
    operand, first, last, stride,
    STATE: tl.constexpr, STATES: tl.constexpr, RUNS: tl.constexpr, CONSTANT: tl.constexpr,
    TOKENS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """B or C of TOKENS tokens. operand: see `operand_of`."""
    turn = ()
    for j in tl.static_range(TOKENS):
        if CONSTANT:
            turn += (operand,)
        else:
            t = token_of(first, j, last, EVEN)
            turn += (load_operand(operand, t, stride, STATE, STATES, RUNS),)
    return turn


@triton.jit
def load_operand(ptrs, t, stride, STATE: tl.constexpr, STATES: tl.constexpr, RUNS: tl.constexpr):
    """B or C of token t as it lies in memory, with zeros past the last state.

    [STATES] if the tile shares it, otherwise [STATES, BLOCK_DIM]. The latter is put together from
    pieces that one lane loads at once: of a wider one, Triton would give each lane a part.
    """
    ptrs += t * stride[1]
    if RUNS == 1:
        n = tl.arange(0, STATES).to(tl.int64)
        if STATE == STATES:
            operand = tl.load(ptrs + n * stride[3])
        else:
            operand = tl.load(ptrs + n * stride[3], mask=n < STATE, other=0.0)
    else:
        WIDTH: tl.constexpr = 128 // ptrs.dtype.element_ty.primitive_bitwidth
        PIECE: tl.constexpr = min(WIDTH, STATES) if STATE % min(WIDTH, STATES) == 0 else 1
        pieces = ()
        for i in tl.static_range(STATES // PIECE):
            # [PIECE, BLOCK_DIM]
            n = i * PIECE + tl.arange(0, PIECE).to(tl.int64)[:, None]
            if i * PIECE < STATE:
                pieces += (tl.load(ptrs[None, :] + n * stride[3]),)
            else:
                pieces += (tl.zeros([PIECE, ptrs.shape[0]], ptrs.dtype.element_ty),)
        for _ in tl.static_range(8):  # halvings of at most 256 states
            if len(pieces) > 1:
                pairs = ()
                for i in tl.static_range(len(pieces) // 2):
                    pairs += (stacked(pieces[2 * i], pieces[2 * i + 1]),)
                pieces = pairs
        operand = pieces[0]
    return operand


@triton.jit
def stacked(upper, lower):
    pair = tl.permute(tl.join(upper, lower), (2, 0, 1))
    return tl.reshape(pair, [2 * upper.shape[0], upper.shape[1]])


@triton.jit
def widened(x):
    """x in float32.

    Of the bfloat16 in the upper half of a register one instruction makes a float32, which clears
    the lower half. Compilers see it where bits are shifted, and take two where they are converted.
    """
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        wide = (bits << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def beside_states(operand):
    """A token's B or C as it was loaded, in a form that goes with [STATES, BLOCK_DIM]."""
    operand = widened(operand)
    if len(operand.shape) == 1:
        operand = operand[:, None]
    return operand


@triton.jit
def continuing(seq_idx_ptr, stride, sample, first, last, TOKENS: tl.constexpr):
    """Whether each of TOKENS tokens belongs to the sequence of the one before it, as the very first
    one does. Of None nothing is said."""
    turn = ()
    if seq_idx_ptr is not None:
        ptr = seq_idx_ptr + sample * stride[0]
        for j in tl.static_range(TOKENS):
            t = tl.minimum(first + j, last)
            before = tl.minimum(tl.maximum(first + j - 1, 0), last)
            turn += (tl.load(ptr + t * stride[1]) == tl.load(ptr + before * stride[1]),)
    return turn
