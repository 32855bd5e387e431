"""What many tests share: error budgets and hand-made routes."""

import torch
from torch import Tensor

from tossup.kernels.routing import Route


def budget(oracle: Tensor, same_precision: Tensor) -> float:
    """The largest error allowed: twice what torch loses in the same precision, plus a rounding.

    oracle: the float64 reference. same_precision: the reference run in the dtype under test.
    """
    error = (same_precision.double() - oracle).abs().max()
    return 2 * (error + torch.finfo(same_precision.dtype).eps * oracle.abs().max()).item()


def route_of(*samples: int, batch: int, device: str = "cpu") -> Route:
    """A route over `samples`. What lies behind its count points far outside, so that use shows."""
    padded = torch.full((batch,), 10**6, dtype=torch.int32)
    padded[: len(samples)] = torch.tensor(samples, dtype=torch.int32)
    count = torch.tensor(len(samples), dtype=torch.int32)
    return Route(count.to(device), padded.to(device))
