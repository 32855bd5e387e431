"""torch's own repetition. Differentiable by autograd; float64 stays float64."""

from torch import Tensor

from ..routing import Route, put, take


def repeat_groups_reference(x: Tensor, group: int, repeats: int, route: Route | None) -> Tensor:
    groups = take(route, x).unflatten(-1, (-1, group))
    return put(route, groups.repeat_interleave(repeats, dim=-2).flatten(-2), len(x))
