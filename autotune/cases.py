"""Launches that stand for what is shipped: each op in the shapes that choose its configurations.

Tensors are on the meta device, so nothing is allocated and nothing runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """op: the folder in kernels/. name: dtype, shape, options. launch: calls the op's launchers."""

    op: str
    name: str
    launch: Callable[[], Any]


def kernels_of(op: str) -> ModuleType:
    return import_module(f"...kernels.{op}.kernel", __name__)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def route_over(batch: int) -> tuple[Tensor, Tensor]:
    """A route's count and samples."""
    return meta(dtype=torch.int32), meta(batch, dtype=torch.int32)


def short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def draws() -> Iterator[Case]:
    from ..kernels.routing import Strategy

    for kind in ("uniform", "weighted", "full_layout", "sandwich"):
        for layouts, batch in (((), 8), (((0, 1) * 12,), 200)):
            weights = (1, 2, 3, 4, 5) if kind == "weighted" else None
            strategy = Strategy(5, kind, weights, layouts, (0.5,) * len(layouts), 1, 0, True)

            def launch(strategy: Strategy = strategy, batch: int = batch) -> None:
                step = meta(dtype=torch.int64)
                kernels_of("routing").draw(strategy, 0, step, range(24), batch, step.device)

            yield Case("routing", f"{kind}, {len(layouts)} layouts, batch {batch}", launch)


CASES: tuple[Case, ...] = (*draws(),)
