"""Repeat groups of channels, as grouped-query attention repeats the heads of keys and values.

    out[(g · repeats + r) · group + i] = x[g · group + i]    for r < repeats, i < group

Mamba in Apriel's grouped form repeats x so (Wang et al. 2024, "The Mamba in the Llama", section 2).
The gradient of a channel is the sum over its copies'.
"""

from torch import Tensor

from ..backend import Impl, resolve_for
from ..routing import Route, tensors_of
from .reference import repeat_groups_reference

__all__ = ["repeat_groups"]


def repeat_groups(
    x: Tensor, group: int, repeats: int, *, route: Route | None = None, impl: Impl = "auto"
) -> Tensor:
    """Repeat every group of `group` channels `repeats` times, its copies side by side.

    x: (batch, seqlen, dim), float16, bfloat16, float32 or float64; any strides.
    group: channels of a group, a divisor of dim.
    repeats: copies of each group, at least 1.
    route: the samples to work on; the rows of others are left unwritten in the result and in x's
        gradient. None means all.
    Returns a contiguous (batch, seqlen, dim · repeats) in x's dtype. The gradient is summed in
    float32 or x's wider dtype, in one order. Deterministic.
    Raises ValueError where a shape, a dtype or a number is not as above.
    """
    check(x, group, repeats)
    routed = tensors_of(route, x.shape[0])
    impl = resolve_for(impl, x, *routed)
    if impl == "reference":
        return repeat_groups_reference(x, group, repeats, route)
    from .ops import apply

    return apply(x, group, repeats, *routed, impl)


def check(x: Tensor, group: int, repeats: int) -> None:
    if x.ndim != 3 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(
            "x must be floating, (batch, seqlen, dim) with at least one channel,"
            f" got {x.dtype} {tuple(x.shape)}"
        )
    if group < 1 or x.shape[2] % group:
        raise ValueError(f"group must divide the {x.shape[2]} channels of x, got {group}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
