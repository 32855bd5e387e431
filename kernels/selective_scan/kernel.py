"""Triton kernels and launchers: a program sweeps a tile of channels through the tokens.

The states of a tile live in registers, one or two channels to a lane, so that a token costs each of
them one exp2 and no shuffle; with more than 16 states, warps share them, and add up their parts of
the output. The forward pass keeps the state before each chunk of CHUNK tokens, in float32. The
backward pass goes through the chunks from the last to the first, replays each from the state it
keeps, and then sweeps it in reverse. Shares of dB and dC are added up in one order, so the same
bits come out.

Where too few channels fill the GPU, the length is split as well: `local_kernel` sweeps each segment
from zeros, `carry_kernel` takes the states across the segments, for twice the exp2.

Floor, per token and channel, with N states (per SM and cycle: 16 MUFU, 128 lanes of the other
pipes; 20 bytes at 4.8 TB/s, on an H200):

    forward    N exp2: at N = 16, 1 cycle, and 2 for softplus and 1 for SiLU. About 4 N other
               instructions (decay, input, state, output): 0.5 cycles. 8 bytes of u, delta, z and
               out in 16 bits, and 4 N / CHUNK of kept states: 0.5 cycles.
    backward   2 N exp2, the replay's and the sweep's: 2 cycles. About 14 N other instructions,
               5 of them shuffles that add dB and dC up over the channels: 1.75 cycles.

So exp2 binds, at 16 states per cycle and SM forward and half of that backward: an H200 at 1.98 GHz
takes at least 0.51 and 1.0 ms for 8 · 4096 tokens of 4096 channels with 16 states. How near the
kernels come: not measured.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..launch import cdiv, next_power_of_2, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..target import arch, processors
from .backward_kernel import backward_kernel, group_kernel
from .forward_kernel import forward_kernel
from .ops import CHUNKS
from .segment_kernel import carry_kernel, local_kernel

CHUNK = CHUNKS["triton"]
SHORTEST = 4 * CHUNK  # tokens of a segment that are worth two more launches


def width_of(states: int, backward: bool) -> int:
    """The channels of a tile: as many as lanes, as long as its states fit into registers."""
    most_states = 128 if arch() >= 90 else 32
    return 16 if backward and states > most_states else 32


def configure(
    u: Tensor, states: int, run: int, varying: bool, gated: bool, packed: bool, backward: bool
) -> dict[str, int]:
    """The tile, its warps, and the tokens whose loads go out together.

    states: a power of two. run: consecutive channels that share both B and C. varying: whether both
    B and C do, from token to token. gated, packed: whether there are z and seq_idx.
    """
    batch, seqlen, dim = u.shape
    width = width_of(states, backward)
    shared = runs_of(run, dim, width) == 1
    wide = u.element_size() > 2
    facts = {
        "dtype": str(u.dtype), "states": states, "run": math.gcd(run, 128) if shared else run,
        "varying": varying, "gated": gated, "packed": packed,
    }  # fmt: skip
    sizes = {"channels": (batch * dim, 65536), "seqlen": (seqlen, 16384)}
    kernel = f"selective_scan.{'backward' if backward else 'forward'}"
    untuned = heuristic(states, backward, shared and varying, wide, batch * dim, run)
    chosen = configs.choose(kernel, facts, sizes, untuned)
    if CHUNK % chosen["TOKENS"]:
        raise ValueError(f"TOKENS of {kernel} must divide {CHUNK}, got {chosen['TOKENS']}")
    options = {"STATES": states, **chosen}
    if backward and states <= 8:
        options["maxnreg"] = 224  # or ptxas aims at 128 registers, and spills a few
    return options


def heuristic(
    states: int, backward: bool, light: bool, wide: bool, channels: int, run: int
) -> dict[str, int]:
    """What a launch takes untuned. Found by compiling offline.

    light: whether the channels of a tile share both B and C, which both vary; otherwise they need
    registers of their own. wide: whether inputs have more than 16 bits. channels: of all samples
    together. run: consecutive channels that share both.
    """
    width = width_of(states, backward)
    if not backward and light and not wide and states <= 16 and arch() >= 90:
        # Two channels to a lane share what B and C take, if there are channels for as many warps
        if run % (2 * width) == 0 and channels >= 2 * width * 8 * processors():
            return {"BLOCK_DIM": 2 * width, "TOKENS": 2, "num_warps": 1}
    tokens = 4 if light and states < 64 else 2
    if backward or states > 128 or arch() < 90:
        tokens = 2 if light and states <= (16 if backward else 32) else 1
    return {
        "BLOCK_DIM": width,
        "TOKENS": tokens,
        "num_warps": max(states * width // 512, 1),
    }


def runs_of(run: int, dim: int, width: int) -> int:
    """How many runs of channels a tile of `width` lanes covers."""
    of_run = next_power_of_2(run)
    return 1 if of_run >= width or run == dim else width // of_run


def segment_of(seqlen: int, warps: int) -> int:
    """Tokens of a segment, a multiple of CHUNK: all of them where `warps` warps fill the GPU.

    That takes 8 per multiprocessor, 2 for each of its schedulers. Fewer than half of them share the
    length out, for twice the work.
    """
    segments = 8 * processors() // max(warps, 1)
    chunks = cdiv(seqlen, CHUNK)
    segment = max(cdiv(chunks, max(segments, 1)) * CHUNK, SHORTEST)
    return min(segment, chunks * CHUNK)


class Cut(NamedTuple):
    """How channels and tokens are cut into programs: tiles × samples × segments.

    run: consecutive channels that share both B and C. blocks: the shares of dB and dC that a token
    has. segment: tokens. even: whether no lane is without a channel and no turn without a token.
    constants: those of all kernels.
    """

    run: int
    blocks: int
    tiles: int
    segment: int
    segments: int
    even: bool
    constants: dict[str, Any]


def cut(u: Tensor, A: Tensor, B: Tensor, C: Tensor, z, seq_idx, backward: bool) -> Cut:
    batch, seqlen, dim = u.shape
    states = next_power_of_2(A.shape[1])
    run = math.gcd(*(dim // x.shape[2] if x.ndim == 4 else dim for x in (B, C)))
    varying, gated, packed = B.ndim == C.ndim == 4, z is not None, seq_idx is not None
    options = configure(u, states, run, varying, gated, packed, backward)
    width = options["BLOCK_DIM"]
    runs = runs_of(run, dim, width)
    blocks = dim // run * cdiv(run, width)
    tiles = cdiv(blocks, runs)
    segment = segment_of(seqlen, batch * tiles * options["num_warps"])
    constants = {"STATE": A.shape[1], "RUNS": runs, **options}
    even = runs == 1 and run % width == 0 and seqlen % options["TOKENS"] == 0
    return Cut(run, blocks, tiles, segment, cdiv(seqlen, segment), even, constants)


def plane(weights: Tensor) -> Tensor:
    """(dim, state) as the kernels read it: (state, dim), float32, contiguous."""
    return weights.t().contiguous().float()


def at_edges(
    edge, x, delta, A, operand, z, delta_bias, seq_idx, count, samples, delta_softplus, cut, reverse
):
    """The state before each segment or, reversed, the gradient of that after it; and its strides.

    edge: what is there before the first segment or after the last, (batch, dim, state).
    A, operand: as the kernels read them.
    """
    batch, of_dim, of_state = strides(edge, 3)
    edge_strides = batch, 0, of_state, of_dim
    if cut.segments == 1:
        return edge, edge_strides
    batch, seqlen, dim = x.shape
    states = x.new_empty((batch, cut.segments, len(A), dim), dtype=torch.float32)
    steps = x.new_empty((batch, cut.segments, dim), dtype=torch.float32)
    broken = x.new_empty((batch, cut.segments, cut.tiles), dtype=torch.int32)
    local_kernel[(cut.tiles, batch, cut.segments - 1)](
        x, delta, A, operand, z, delta_bias, seq_idx, count, samples, states, steps, broken,
        seqlen, dim, cut.run, cut.segment, operand.shape[-2],
        x.stride(), delta.stride(), operand.stride(), strides(z, 3), *strides(delta_bias, 1),
        strides(seq_idx, 2),
        SOFTPLUS=delta_softplus, REVERSE=reverse, CONSTANT=operand.ndim == 2,
        **cut.constants,
    )  # fmt: skip
    shared = {name: value for name, value in cut.constants.items() if name != "TOKENS"}
    carry_kernel[(cut.tiles, batch)](
        edge, A, states, steps, broken, count, samples, dim, cut.run, cut.segments, edge_strides,
        REVERSE=reverse, **shared,
    )  # fmt: skip
    return states, states.stride()


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus,
    into=(None, None),
):  # fmt: skip
    """into: memory for out and kept, each sample's contiguous, or None for each."""
    refuse_float64(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state,
    )  # fmt: skip
    batch, seqlen, dim = u.shape
    state = A.shape[1]
    refuse_more_samples_than_programs(batch)
    if state > 256:
        raise ValueError(f"A must have at most 256 states for impl='triton', got {state}")
    pieces = cut(u, A, B, C, z, seq_idx, backward=False)
    A, B, C = (plane(x) if x.ndim == 2 else x for x in (A, B, C))
    before, before_strides = at_edges(
        initial_state, u, delta, A, B, None, delta_bias, seq_idx, count, samples, delta_softplus,
        pieces, reverse=False,
    )  # fmt: skip
    final_state = u.new_empty((batch, dim, state), dtype=torch.float32)
    out, kept = into
    if out is None:
        out = u.new_empty(u.shape)
    if kept is None:
        chunks = cdiv(seqlen, CHUNK)
        kept = u.new_empty((batch, chunks, state, dim), dtype=torch.float32)
    forward_kernel[(pieces.tiles, batch, pieces.segments)](
        u, delta, A, B, C, D, z, delta_bias, before, seq_idx, count, samples,
        out, final_state, kept,
        seqlen, dim, pieces.run, pieces.segment, B.shape[-2], C.shape[-2],
        u.stride(), delta.stride(), B.stride(), C.stride(), *strides(D, 1), strides(z, 3),
        *strides(delta_bias, 1), before_strides, strides(seq_idx, 2), out.stride(0), kept.stride(0),
        SOFTPLUS=delta_softplus, CONSTANT_B=B.ndim == 2, CONSTANT_C=C.ndim == 2,
        CHUNK=CHUNK, EVEN=pieces.even, **pieces.constants,
    )  # fmt: skip
    return out, final_state, kept


def backward(
    dout, dfinal_state, kept,
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus,
    into=(None, None, None),
):  # fmt: skip
    """into: memory for dB, dC and dz, or None for each. kept: each sample's is contiguous."""
    batch, seqlen, dim = u.shape
    state = A.shape[1]
    pieces = cut(u, A, B, C, z, seq_idx, backward=True)
    a, b, c = (plane(x) if x.ndim == 2 else x for x in (A, B, C))
    behind, behind_strides = at_edges(
        dfinal_state, dout, delta, a, c, z, delta_bias, seq_idx, count, samples, delta_softplus,
        pieces, reverse=True,
    )  # fmt: skip
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    into_B, into_C, dz = into
    dz = z.new_empty(z.shape) if z is not None and dz is None else dz
    dinitial_state = None if initial_state is None else initial_state.new_empty((batch, dim, state))
    rows = state * (1 + (B.ndim == 2) + (C.ndim == 2)) + 2
    # Places past the route's last write nothing
    fresh = u.new_empty if count is None else u.new_zeros
    shares = fresh((batch, pieces.segments, rows, dim), dtype=torch.float32)
    dB, dC = (
        None
        if x.ndim == 2
        else u.new_empty((batch, seqlen, pieces.blocks, state), dtype=torch.float32)
        for x in (B, C)
    )
    constants = pieces.constants
    programs = batch * pieces.segments * pieces.tiles
    scratch = u.new_empty(
        (programs, CHUNK // constants["TOKENS"], constants["STATES"], constants["BLOCK_DIM"]),
        dtype=torch.float32,
    )
    backward_kernel[(pieces.tiles, batch, pieces.segments)](
        dout, behind, kept, scratch, u, delta, a, b, c, D, z, delta_bias, seq_idx,
        count, samples, du, ddelta, dB, dC, dz, dinitial_state, shares,
        seqlen, dim, pieces.run, pieces.segment, pieces.blocks, b.shape[-2], c.shape[-2],
        dout.stride(), behind_strides, u.stride(), delta.stride(), b.stride(), c.stride(),
        *strides(D, 1), strides(z, 3), *strides(delta_bias, 1), strides(seq_idx, 2),
        strides(dz, 3), kept.stride(0),
        SOFTPLUS=delta_softplus, CONSTANT_B=B.ndim == 2, CONSTANT_C=C.ndim == 2,
        CHUNK=CHUNK, EVEN=pieces.even, ROWS=rows, **pieces.constants,
    )  # fmt: skip
    of_A, of_D, of_bias, of_B, of_C = shares.sum((0, 1)).split(
        (state, 1, 1, state * (B.ndim == 2), state * (C.ndim == 2))
    )
    return (
        du,
        ddelta,
        own(of_A.t(), A),
        own(of_B.t(), B) if B.ndim == 2 else sum_groups(dB, B, count, samples, into_B),
        own(of_C.t(), C) if C.ndim == 2 else sum_groups(dC, C, count, samples, into_C),
        None if D is None else own(of_D[0], D),
        dz,
        None if delta_bias is None else own(of_bias[0], delta_bias),
        dinitial_state,
    )


def own(part: Tensor, like: Tensor) -> Tensor:
    """A part of the sums, contiguous, in memory of its own and in the dtype of `like`."""
    return part.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def sum_groups(shares: Tensor, operand: Tensor, count, samples, out: Tensor | None) -> Tensor:
    batch, seqlen, groups, state = operand.shape
    out = operand.new_empty(operand.shape) if out is None else out
    tokens = 32
    group_kernel[(cdiv(seqlen, tokens), batch, groups)](
        shares, out, count, samples, seqlen, groups, shares.shape[2] // groups, out.stride(),
        STATE=state, STATES=next_power_of_2(state), TOKENS=tokens,
    )  # fmt: skip
    return out
