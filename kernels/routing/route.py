"""A route: one layer's, one mixer's view of the mixer table."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

MaybeT = TypeVar("MaybeT", Tensor, Tensor | None)


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


def tensors_of(route: Route | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """The route as a torch.library op takes it: count and samples, or None and None.

    Raises ValueError for a route of another batch, whose samples may lie outside of this one.
    """
    if route is None:
        return None, None
    if route.samples.shape != (batch,):
        raise ValueError(
            f"route must be of {batch} samples, as the tensors are, got samples of shape "
            f"{tuple(route.samples.shape)}"
        )
    return route.count, route.samples


def snapshot(count: Tensor | None, samples: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The route as it is now. A backward needs it, as the live table moves on to the next step."""
    return (None, None) if count is None or samples is None else (count.clone(), samples.clone())


def take(route: Route | None, tensor: MaybeT) -> MaybeT:
    """The route's samples of a (batch, …) tensor, if there is one; all of them without a route."""
    if route is None or tensor is None:
        return tensor
    return tensor[rows_of(*tensors_of(route, tensor.shape[0]))]


def put(route: Route | None, rows: Tensor, batch: int) -> Tensor:
    """Place the route's rows in a (batch, …) tensor that holds NaN elsewhere. Differentiable."""
    if route is None:
        return rows
    out = rows.new_full((batch, *rows.shape[1:]), float("nan"))
    return out.index_copy(0, route.samples[: int(route.count)].long(), rows)


def place(
    rows: Tensor | slice,
    values: Tensor,
    batch: int,
    dtype: torch.dtype,
    *,
    copy: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """The active samples' values as rows of a contiguous (batch, …) tensor, the others unwritten.

    rows: from `rows_of`.
    copy: the values are a view into what nobody else shall keep alive.
    into: write them there, and return that.
    """
    if into is not None:
        into[rows] = values.to(into.dtype)
        return into
    if isinstance(rows, slice):
        return values.to(dtype, copy=copy, memory_format=torch.contiguous_format).contiguous()
    out = values.new_empty((batch, *values.shape[1:]), dtype=dtype)
    out[rows] = values.to(dtype)
    return out
