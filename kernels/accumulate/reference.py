"""The textbook sums."""

from collections.abc import Sequence

from torch import Tensor

from ..precision import wide
from ..routing import Route


def accumulate_reference(
    totals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    written: Tensor | None,
    route: Route | None,
) -> None:
    if route is not None and int(route.count) == 0:
        return
    for total, gradient in zip(totals, gradients, strict=True):
        value = gradient.view_as(total).to(wide(gradient.dtype))
        if written is not None and int(written) > 0:
            value = value + total
        total.copy_(value)
