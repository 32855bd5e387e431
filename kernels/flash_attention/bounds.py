"""Where the sequences begin and end that lie one after the other in rows of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_seq_idx


def bounds_of(seq_idx: Tensor, padding: int | None = None) -> Tensor:
    """What `flash_attention` takes as bounds. The host does not wait for it.

    seq_idx: integers (batch, seqlen), the number of each token's sequence: one begins wherever it
        changes.
    padding: the number that stands for no sequence, of whose tokens each is by itself, so that
        it costs least; None where there is no padding.

    Returns int32 (2, batch, seqlen), contiguous: of each token, the place in its row where its
    sequence begins, and that behind its end.
    Raises ValueError where seq_idx is not as above.
    """
    if seq_idx.ndim != 2:
        raise ValueError(f"seq_idx must be (batch, seqlen), got {tuple(seq_idx.shape)}")
    check_seq_idx(seq_idx, *seq_idx.shape)
    places = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    parts = seq_idx[:, 1:] != seq_idx[:, :-1]  # a token from the one before it
    if padding is not None:
        parts = parts | (seq_idx[:, 1:] == padding)
    first, last = F.pad(parts, (1, 0), value=True), F.pad(parts, (0, 1), value=True)
    begins = torch.where(first, places, 0).cummax(1).values
    ends = torch.where(last, places + 1, len(places)).flip(1).cummin(1).values.flip(1)
    return torch.stack((begins, ends)).int()
