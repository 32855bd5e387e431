"""Which tokens belong together: padding masks and packed sequences, as the mixers' ops take them.

A padded batch is packed before attention and unpacked after it. Scans and convolutions stay in
place: `seq_idx` numbers the sequences of a row, and their state starts anew wherever it changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# What tells where packed sequences begin: Tossup's name, and transformers' two
PACKED_KWARGS = frozenset({"cu_seqlens", "cu_seq_lens_q", "seq_idx"})


KNOWN = WeakTensorKeyDictionary()  # what `remembered` made of masks and positions


@dataclass(frozen=True)
class Packing:
    """Sequences inside a (batch, seqlen) block of tokens.

    seq_idx: (batch, seqlen) integers; tokens of a row see each other while they stay the same.
    padded: whether 0 stands for padding.
    bounds: what `cu_seqlens` is, where that is known already.
    """

    seq_idx: Tensor
    padded: bool
    bounds: Tensor | None = None

    @cached_property
    def tokens(self) -> Tensor | None:
        """Flat positions of the tokens that count, in order; None means all of them."""
        return self.seq_idx.flatten().nonzero()[:, 0] if self.padded else None

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int32, where each packed sequence begins."""
        if self.bounds is not None:
            return self.bounds
        rows = torch.arange(len(self.seq_idx), device=self.seq_idx.device)
        places = torch.stack((rows[:, None].expand_as(self.seq_idx), self.seq_idx), -1)
        packed = self.pack(places)  # the row and the number of each token
        begins = (packed.diff(dim=0) != 0).any(1).nonzero()[:, 0] + 1
        return F.pad(F.pad(begins, (1, 0)), (0, 1), value=len(packed)).int()

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, …) to (total, …)."""
        flat = x.flatten(0, 1)
        return flat if self.tokens is None else flat[self.tokens]

    def unpack(self, packed: Tensor, batch: int, seqlen: int) -> Tensor:
        """(total, …) to (batch, seqlen, …), zero where padding stands."""
        if self.tokens is None:
            return packed.unflatten(0, (batch, seqlen))
        flat = packed.new_zeros((batch * seqlen, *packed.shape[1:]))
        return flat.index_copy(0, self.tokens, packed).unflatten(0, (batch, seqlen))


def packing_of(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    left: int | None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: object,
) -> Packing | None:
    """The sequences in hidden_states (batch, seqlen, …); None where each row is one.

    attention_mask: (batch, seqlen), non-zero where a token counts, with padding on either side; or
        what transformers hands to attention, (batch or 1, 1, seqlen, seqlen), boolean or 0 where a
        key is seen: causal, with padding, packed sequences, and windows.
    left: how many tokens before its own a query of the mixer sees, -1 for all. None is a scan, for
        which a mask's windows are no matter; chunks, beyond which nothing is seen, are sequences to
        it. Padding has to stand aside, but for attention without a window.
    cu_seqlens, cu_seq_lens_q: (sequences + 1,) int32, with a batch of one row of all sequences.
    seq_idx: (batch, seqlen), the number of each token's sequence.
    position_ids: of a batch of one row, (1, seqlen): a sequence begins where they do not go on, as
        transformers' own attention takes them. Of other batches they say nothing.
    A mask of transformers tells of all that the others do, and goes before them.
    Raises ValueError where anything has another shape, excludes another, or cannot be followed.
    """
    batch, seqlen = shape = hidden_states.shape[:2]
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask must be a tensor, got {type(attention_mask).__name__}: "
            "attn_implementation='sdpa' makes one"
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        return remembered(packing_of_attention, attention_mask, *shape, left)
    bounds = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    if attention_mask is not None:
        for name, other in (("cu_seqlens", bounds), ("seq_idx", seq_idx)):
            if other is not None:
                raise ValueError(f"attention_mask and {name} exclude each other, got both")
        return remembered(packing_of_padding, attention_mask, *shape, left)
    if bounds is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens goes with a batch of one row, got {batch} rows")
        positions = torch.arange(seqlen, device=bounds.device)
        numbers = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)
        return Packing(numbers.int()[None], False, bounds)
    if seq_idx is not None:
        if seq_idx.shape != (batch, seqlen):
            raise ValueError(
                f"seq_idx must be of shape ({batch}, {seqlen}), got {tuple(seq_idx.shape)}"
            )
        return Packing(seq_idx.int(), False)
    if position_ids is not None and batch == 1 and position_ids.shape == (1, seqlen):
        return remembered(packing_of_positions, position_ids)
    return None


def remembered(
    make: Callable[..., Packing | None], told: Tensor, *others: int | None
) -> Packing | None:
    """make(told, *others), once for all layers that are told the same: the host waits for it.

    It is kept as long as the tensor is, and until torch sees it written.
    """
    if told.is_inference() or torch.compiler.is_compiling():  # neither counts writes
        return make(told, *others)
    version, known = KNOWN.get(told, (None, {}))
    if version != told._version:
        known = {}
        KNOWN[told] = told._version, known
    key = make, torch.is_inference_mode_enabled(), *others
    if key not in known:
        known[key] = make(told, *others)
    return known[key]


def packing_of_positions(position_ids: Tensor) -> Packing | None:
    breaks = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
    return Packing(breaks.cumsum(1).int(), False) if breaks.any() else None


def packing_of_padding(mask: Tensor, batch: int, seqlen: int, left: int | None) -> Packing | None:
    if mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask is a padding mask of shape ({batch}, {seqlen}), "
            f"got {tuple(mask.shape)}"
        )
    counts = mask.bool()
    begins = counts & ~F.pad(counts[:, :-1], (1, 0))
    whole, holes = torch.stack((counts.all(), (begins.sum(1) > 1).any())).tolist()
    if holes and left != -1:
        raise ValueError(
            "attention_mask must pad the sides alone: scans and windows do not pass over padding"
        )
    return None if whole else Packing(counts.int(), True)


def packing_of_attention(mask: Tensor, batch: int, seqlen: int, left: int | None) -> Packing | None:
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
    whole, wrong_anywhere = torch.stack(((numbers == 1).all(), wrong.any())).tolist()
    if wrong_anywhere:
        raise ValueError(
            "attention_mask must be causal, with padding and packed sequences at most"
            + ("" if left is None else ", and no window that is narrower than the mixer's own")
        )
    return None if whole else Packing(numbers.int().expand(batch, -1), True)
