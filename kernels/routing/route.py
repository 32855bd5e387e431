"""A route: one layer's, one mixer's view of the mixer table."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Route:
    """The samples of a batch that take one mixer in one layer. Both tensors live on the device.

    count: int32, shape (): how many samples take this mixer.
    samples: int32, shape (batch,): their indices, in order, in the first `count` places; the rest
        is undefined.
    """

    count: Tensor
    samples: Tensor


def rows_of(count: Tensor | None, samples: Tensor | None) -> Tensor | slice:
    """The route as an index, for backends that may read it (the CPU's)."""
    if count is None or samples is None:
        return slice(None)
    return samples[: int(count)].long()


def take(route: Route | None, tensor: Tensor) -> Tensor:
    """The route's samples of a (batch, …) tensor; all of them where there is no route."""
    return tensor if route is None else tensor[rows_of(route.count, route.samples)]


def put(route: Route | None, rows: Tensor, batch: int) -> Tensor:
    """Place the route's rows in a (batch, …) tensor that holds NaN elsewhere. Differentiable."""
    if route is None:
        return rows
    out = rows.new_full((batch, *rows.shape[1:]), float("nan"))
    return out.index_copy(0, route.samples[: int(route.count)].long(), rows)
