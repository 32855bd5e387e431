"""Which tokens belong together: padding masks and packed sequences, as the mixers' ops take them.

Tokens stay in place. `seq_idx` numbers the sequences of a row: the states of scans and convolutions
start anew wherever it changes, and attention sees no further.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernels.flash_attention import bounds_of

# What tells where packed sequences begin: Tossup's name, and transformers' two
PACKED_KWARGS = frozenset({"cu_seqlens", "cu_seq_lens_q", "seq_idx"})
# All that `packing_of` follows
PACKING_KWARGS = PACKED_KWARGS | {"attention_mask", "position_ids", "packing"}

KNOWN = WeakTensorKeyDictionary()  # what `remembered` made of masks and positions


@dataclass
class Packing:
    """Sequences inside a (batch, seqlen) block of tokens.

    seq_idx: (batch, seqlen) int32; tokens of a row see each other while they stay the same.
    padded: whether 0 stands for padding.
    """

    seq_idx: Tensor
    padded: bool
    _bounds: Tensor | None = field(default=None, init=False)

    @property
    def bounds(self) -> Tensor:
        """As attention takes them. Each token of padding sees itself alone."""
        if self._bounds is None:
            self._bounds = bounds_of(self.seq_idx, 0 if self.padded else None)
        return self._bounds

    def rows(self, samples: Tensor) -> "Packing":
        part = Packing(self.seq_idx[samples], self.padded)
        if self._bounds is not None:
            part._bounds = self._bounds[:, samples]
        return part


def packing_of(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    left: int | None,
    *,
    packing: Packing | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    waits: bool = True,
    **_: object,
) -> Packing | None:
    """The sequences in hidden_states (batch, seqlen, …); None where each row is one.

    attention_mask: (batch, seqlen), non-zero where a token counts, with padding on either side; or
        what transformers hands to attention, (batch or 1, 1, seqlen, seqlen), boolean or 0 where a
        key is seen: causal, with padding, packed sequences, and windows.
    left: how many tokens before its own a query of the mixer sees, -1 for all. None is a scan, for
        which a mask's windows are no matter; chunks, beyond which nothing is seen, are sequences to
        it.
    packing: what this function returned, for all layers: it goes before everything else.
    cu_seqlens, cu_seq_lens_q: (sequences + 1,) int32, with a batch of one row of all sequences.
    seq_idx: (batch, seqlen), the number of each token's sequence.
    position_ids: of a batch of one row, (1, seqlen): a sequence begins where they do not go on, as
        transformers' own attention takes them. Of other batches they say nothing.
    A mask of transformers tells of all that the others do, and goes before them.
    waits: whether the host may ask the device what a mask and positions hold. If not, rows that
        are whole get a Packing too, and a mask that cannot be followed is an error of the device.

    Raises ValueError where anything has another shape, excludes another, or cannot be followed.
    """
    if packing is not None:
        return packing
    batch, seqlen = shape = hidden_states.shape[:2]
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask must be a tensor, got {type(attention_mask).__name__}: "
            "attn_implementation='sdpa' makes one"
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        return remembered(packing_of_attention, attention_mask, *shape, left, waits)
    bounds = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    if attention_mask is not None:
        for name, other in (("cu_seqlens", bounds), ("seq_idx", seq_idx)):
            if other is not None:
                raise ValueError(f"attention_mask and {name} exclude each other, got both")
        return remembered(packing_of_padding, attention_mask, *shape, waits)
    if bounds is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens goes with a batch of one row, got {batch} rows")
        return remembered(packing_of_bounds, bounds, seqlen)
    if seq_idx is not None:
        if seq_idx.shape != (batch, seqlen):
            raise ValueError(
                f"seq_idx must be of shape ({batch}, {seqlen}), got {tuple(seq_idx.shape)}"
            )
        return remembered(packing_of_numbers, seq_idx)
    if position_ids is not None and batch == 1 and position_ids.shape == (1, seqlen):
        return remembered(packing_of_positions, position_ids, waits)
    return None


def remembered(
    make: Callable[..., Packing | None], told: Tensor, *others: int | None
) -> Packing | None:
    """make(told, *others), once for all layers that are told the same: it may wait for the device.

    It is kept as long as the tensor is, and until torch sees it written. A CUDA graph makes its
    own, as a replay is told something else.
    """
    if torch.compiler.is_compiling() or told.is_inference():  # neither counts writes
        return make(told, *others)
    if told.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(told, *others)
    if torch._C._functorch.is_functorch_wrapped_tensor(told) or is_foreign(told):
        return make(told, *others)
    version, known = KNOWN.get(told, (None, {}))
    if version != told._version:
        known = {}
        KNOWN[told] = told._version, known
    key = make, torch.is_inference_mode_enabled(), *others
    if key not in known:
        known[key] = make(told, *others)
    return known[key]


def is_foreign(tensor: Tensor) -> bool:
    """Whether the memory is another library's, which it may write unseen; a DataLoader's workers
    share torch's own."""
    return not (tensor.untyped_storage().resizable() or tensor.is_shared())


def packing_of_numbers(seq_idx: Tensor) -> Packing:
    # A copy, as what is remembered of a tensor must not keep it
    return Packing(seq_idx.to(torch.int32, copy=True), False)


def packing_of_bounds(cu_seqlens: Tensor, seqlen: int) -> Packing:
    places = torch.arange(seqlen, device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    return Packing(numbers.int()[None], False)


def packing_of_positions(position_ids: Tensor, waits: bool) -> Packing | None:
    breaks = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
    if waits and not breaks.any():
        return None
    return Packing(breaks.cumsum(1).int(), False)


def packing_of_padding(mask: Tensor, batch: int, seqlen: int, waits: bool) -> Packing | None:
    if mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask is a padding mask of shape ({batch}, {seqlen}), "
            f"got {tuple(mask.shape)}"
        )
    counts = mask.bool()
    begins = counts & ~F.pad(counts[:, :-1], (1, 0))
    return judged(
        Packing(counts.int(), True),
        counts.all(),
        (begins.sum(1) > 1).any(),
        "attention_mask must pad the sides alone: mixers do not pass over padding",
        waits,
    )


def packing_of_attention(
    mask: Tensor, batch: int, seqlen: int, left: int | None, waits: bool
) -> Packing | None:
    """Of a mask of queries and keys: a sequence begins at each token that does not see the one
    before it. What that comes to is compared with the whole mask."""
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, seqlen, seqlen):
        raise ValueError(
            f"attention_mask of queries and keys must be ({batch}, 1, {seqlen}, {seqlen}), "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            "attention_mask of queries and keys must be boolean, or 0 where a key is seen and"
            f" negative elsewhere, got {mask.dtype}"
        )
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    # A query of padding sees nothing, or in some versions of transformers everything
    counts = sees.diagonal(dim1=1, dim2=2) & ~F.pad(sees[:, :-1, -1], (0, 1))
    begins = counts & ~F.pad(sees.diagonal(-1, 1, 2) & counts[:, :-1], (1, 0))
    numbers = begins.cumsum(1) * counts
    expected = (numbers[:, :, None] == numbers[:, None, :]).tril()
    if left is None:
        wrong = sees & ~expected
    else:
        wrong = (sees ^ expected).triu(-left if left >= 0 else -seqlen)
    wrong = wrong & counts[..., None]
    if mask.dtype != torch.bool:
        wrong = wrong | (mask[:, 0] > 0)  # of zeros and ones, whose ones are seen
    return judged(
        Packing(numbers.int().expand(batch, -1), True),
        (numbers == 1).all(),
        wrong.any(),
        "attention_mask must be causal, with padding and packed sequences at most"
        + ("" if left is None else ", and no window narrower than the mixer's window_size"),
        waits,
    )


def judged(
    packing: Packing, whole: Tensor, wrong: Tensor, message: str, waits: bool
) -> Packing | None:
    """The packing; None where the rows are whole, if the host may wait to know.

    whole, wrong: booleans (). Where wrong, ValueError, or else an error of the device's own.
    """
    if not waits:
        torch._assert_async(~wrong, message)
        return packing
    is_whole, is_wrong = torch.stack((whole, wrong)).tolist()
    if is_wrong:
        raise ValueError(message)
    return None if is_whole else packing
