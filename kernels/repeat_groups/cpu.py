"""CPU backend: a copy between views, and a sum over one, for the active samples only."""

from torch import Tensor

from ..precision import wide
from ..routing import rows_of


def repeat(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None
) -> None:
    rows = rows_of(count, samples)
    once = x.unflatten(-1, (-1, 1, group))[rows]
    copies(out, x, group)[rows] = once.to(out.dtype)


def add_up(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None
) -> None:
    rows = rows_of(count, samples)
    sums = copies(x, out, group)[rows].sum(-2, dtype=wide(x.dtype))
    out.unflatten(-1, (-1, group))[rows] = sums.to(out.dtype)


def copies(repeated: Tensor, once: Tensor, group: int) -> Tensor:
    """As a view (batch, seqlen, groups, copies, group)."""
    return repeated.unflatten(-1, (once.shape[-1] // group, -1, group))
