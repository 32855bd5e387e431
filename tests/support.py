"""What many tests share: implementations, error budgets, seeded numbers and hand-made routes."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tossup.autotune.workloads.workload import ALLOWED
from tossup.kernels.routing import Route

# The most exact dtype of every implementation: Triton takes no float64.
EXACT = {"reference": torch.float64, "cpu": torch.float64, "triton": torch.float32}
every_impl = pytest.mark.parametrize("impl", EXACT)
every_backend = pytest.mark.parametrize("impl", ["cpu", "triton"])
only_triton = pytest.mark.parametrize("impl", ["triton"])


def budget(oracle: Tensor, same_precision: Tensor) -> float:
    """The largest error allowed: ALLOWED times what torch loses in the same precision, and a
    rounding.

    oracle: the float64 reference. same_precision: the reference run in the dtype under test.
    """
    error = (same_precision.double() - oracle).abs().max()
    return ALLOWED * (error + torch.finfo(same_precision.dtype).eps * oracle.abs().max()).item()


def assert_within_budget(
    got: Tensor | Iterable[Tensor],
    exact: Tensor | Iterable[Tensor],
    same_precision: Tensor | Iterable[Tensor],
) -> None:
    """That errors are within `budget`, of one tensor or of several; infinities are the oracle's."""
    columns = [[c] if isinstance(c, Tensor) else c for c in (got, exact, same_precision)]
    for place, (ours, oracle, plain) in enumerate(zip(*columns, strict=True)):
        assert ours.dtype == plain.dtype, place
        assert ours.shape == oracle.shape == plain.shape, place
        finite = ~oracle.isinf()
        assert torch.equal(ours[~finite].double(), oracle[~finite].double()), place
        if finite.any():
            error = (ours.double() - oracle)[finite].abs().max()
            assert error <= budget(oracle[finite], plain[finite]), place


def seeded(seed: int) -> torch.Generator:
    """Random numbers on the device where tensors are made by default."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def far_apart(x: Tensor) -> Tensor:
    """The same numbers in bfloat16, the last axis strided so that its offsets take 64 bits.

    Of the memory between them, 4 GB for 64 numbers, hardly a page is touched.
    """
    stride = 2**31 // (x.shape[-1] - 2)
    others = torch.empty(x.shape[:-1]).stride()
    far = torch.empty_strided(x.shape, (*others, stride), dtype=torch.bfloat16)
    return far.copy_(x)


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that whoever reads what nobody wrote is found out.

    So do bytes, in which slots lie: set to ones, they are NaN in every floating dtype.
    """
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            fresh = allocate(*args, **kwargs)
            if fresh.dtype == torch.uint8:
                return fresh.fill_(255)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(owner, name, poisoned)


def route_of(*samples: int, batch: int) -> Route:
    """A route over `samples`. What lies behind its count points far outside, so that use shows."""
    padded = torch.full((batch,), 10**6, dtype=torch.int32)
    padded[: len(samples)] = torch.tensor(samples, dtype=torch.int32)
    return Route(torch.tensor(len(samples), dtype=torch.int32), padded)
