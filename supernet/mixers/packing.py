"""Which tokens belong together: padding masks and packed sequences, as the mixers' ops take them.

A padded batch is packed before attention and unpacked after it. Scans and convolutions stay in
place: `seq_idx` numbers the sequences of a row, and their state starts anew wherever it changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Sequences inside a (batch, seqlen) block of tokens.

    seq_idx: (batch, seqlen) int32; tokens attend within equal numbers only.
    cu_seqlens: (sequences + 1,) int32, where each packed sequence begins.
    tokens: flat positions of the tokens that count, in order; None means all of them.
    """

    seq_idx: Tensor
    cu_seqlens: Tensor
    tokens: Tensor | None

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
    batch: int, seqlen: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Packing | None:
    """The packing that a padding mask or cumulative lengths describe; None where neither is given.

    attention_mask: (batch, seqlen), non-zero where a token counts, with padding on either side; or
        that mask made causal, (batch, 1, seqlen, seqlen), as transformers hands it to attention.
    cu_seqlens: (sequences + 1,) int32, with a batch of one row that holds all sequences.
    """
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other, got both")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens goes with a batch of one row, got {batch} rows")
        positions = torch.arange(seqlen, device=cu_seqlens.device)
        seq_idx = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
        return Packing(seq_idx.int()[None], cu_seqlens, None)
    if attention_mask is None:
        return None
    if attention_mask.shape[1:] == (1, seqlen, seqlen):
        attention_mask = padding_mask_of(attention_mask).expand(batch, -1)
    if attention_mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask is a padding mask of shape ({batch}, {seqlen}), "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Packing(mask.int(), cu_seqlens, mask.flatten().nonzero()[:, 0])


def padding_mask_of(attention_mask: Tensor) -> Tensor:
    """The (batch, seqlen) padding mask behind a causal (batch, 1, seqlen, seqlen) one.

    Boolean, or additive with 0 where a key is seen, as transformers makes them. Its last query sees
    every token that counts. Raises ValueError where a query of a token that counts sees anything
    but the tokens before it, as in windowed and packed masks.
    """
    rows = attention_mask[:, 0]
    sees = rows if rows.dtype == torch.bool else rows == 0
    counts = sees[:, -1]
    causal = torch.ones_like(sees[0]).tril() & counts[:, None]
    if not torch.equal(sees & counts[..., None], causal & counts[..., None]):
        raise ValueError("attention_mask is neither a padding mask nor causal with padding")
    return counts
