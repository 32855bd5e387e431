"""A workload's calls on meta tensors, in which its kernels are launched as they would be on a GPU.

On meta tensors torch asks an op for nothing but shapes. Within `launching` it calls the launchers
instead, which `offline` then lets compile for a GPU that need not be there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.library import MUTATING
from ..kernels.routing import Route
from .workloads import Calls, Workload


def calls_on_meta(workload: Workload) -> Calls:
    """The workload's own calls; nothing is allocated."""
    with FakeTensorMode():
        fake = workload.inputs(torch.Generator())
    route = None
    if workload.active is not None:
        count = torch.empty((), dtype=torch.int32, device="meta")
        route = Route(count, count.new_empty(workload.batch))
    return workload.ours({name: like(x) for name, x in fake.items()}, route)


def like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Launching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPDEFS:
            func = OPDEFS[name]._init_fn
        elif name in MUTATING:
            func = MUTATING[name].function
        return func(*args, **(kwargs or {}))


@contextmanager
def launching() -> Iterator[None]:
    """Within, ops on meta tensors run their Triton launchers."""
    before = os.environ.get("TOSSUP_IMPL")
    os.environ["TOSSUP_IMPL"] = "triton"
    try:
        with Launching():
            yield
    finally:
        if before is None:
            del os.environ["TOSSUP_IMPL"]
        else:
            os.environ["TOSSUP_IMPL"] = before
