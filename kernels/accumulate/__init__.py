"""Gradients of small parameters into the memory that holds their sums, by a route."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_written
from ..routing import Route
from .reference import accumulate_reference

__all__ = ["accumulate_into"]


def accumulate_into(
    totals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    written: Tensor | None = None,
    route: Route | None = None,
    impl: Impl = "auto",
) -> None:
    """Store each gradient in its total, or add it; with no active sample, leave the total alone.

    totals: contiguous, any floating dtype and shape. gradients: as many, each contiguous and of as
        many elements as its total, any floating dtype.
    written: int32, shape (), on the device: how often the totals were written before. If it is
        above 0, add to what they hold; if it is 0, or None, store. It is not changed.
    route: whose gradients these are; None is everybody's.
    Sums are in float32, or in float64 where the gradient is, and rounded once. Without gradients of
    its own. Raises ValueError where a shape or a dtype is not as above.
    """
    if len(totals) != len(gradients):
        raise ValueError(
            f"gradients must be as many as totals, got {len(gradients)} and {len(totals)}"
        )
    for total, gradient in zip(totals, gradients, strict=True):
        if total.numel() != gradient.numel():
            raise ValueError(
                "each gradient must have as many elements as its total, got "
                f"{tuple(gradient.shape)} for {tuple(total.shape)}"
            )
        for name, tensor in (("totals", total), ("gradients", gradient)):
            if not tensor.is_contiguous() or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must be contiguous and floating, got {tensor.dtype} with strides "
                    f"{tensor.stride()} and shape {tuple(tensor.shape)}"
                )
    check_written(written)
    if not totals:
        return
    count = None if route is None else route.count
    chosen = resolve_for(impl, *totals, *gradients, written, count)
    with torch.no_grad():
        if chosen == "reference":
            accumulate_reference(totals, gradients, written, route)
            return
        from .ops import accumulate_into_op

        accumulate_into_op(list(totals), list(gradients), written, count, chosen)
