"""CPU backend: a branch on the host, where the count and the flag are."""

from torch import Tensor

from ..precision import wide


def accumulate_into(
    totals: list[Tensor], gradients: list[Tensor], written: Tensor | None, count: Tensor | None
) -> None:
    if count is not None and int(count) == 0:
        return
    add = written is not None and int(written) > 0
    for total, gradient in zip(totals, gradients, strict=True):
        gradient = gradient.view_as(total)
        total.copy_(gradient.to(wide(gradient.dtype)) + total if add else gradient)
