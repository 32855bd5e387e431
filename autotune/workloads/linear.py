"""Linear layers and their two gradients, against torch's matrix products (cuBLAS on a GPU)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.linear import linear, weight_gradient_into
from ...kernels.routing import Route
from ..peaks import Floor
from .workload import Calls, Index, Results, SequenceWorkload, normal, size

TOKENS, ROWS = 256, 64  # of a sample and of the weight's gradient, that are compared


@dataclass(frozen=True, kw_only=True)
class Linear(SequenceWorkload):
    op = "linear"
    directions = ("forward", "dgrad", "wgrad")
    per_sample = frozenset(("x", "dout"))

    in_features: int = size(2048, "channels in")
    out_features: int = size(2048, "channels out")

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        tokens, dtype = (self.batch, self.seqlen), self.torch_dtype
        weight = normal(generator, self.out_features, self.in_features, dtype=torch.float32)
        return {
            "x": normal(generator, *tokens, self.in_features, dtype=dtype),
            "dout": normal(generator, *tokens, self.out_features, dtype=dtype),
            "weight": (weight * self.in_features**-0.5).to(dtype),
        }

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        x, dout, weight = (inputs[name] for name in ("x", "dout", "weight"))
        dweight = torch.empty_like(weight)

        def weight_gradient() -> Results:
            weight_gradient_into(dweight, dout, x, route=route)
            return {"dweight": dweight}

        return {
            "forward": lambda: {"out": linear(x, weight, route=route)},
            "dgrad": lambda: {"dx": linear(dout, weight.t(), route=route)},
            "wgrad": weight_gradient,
        }

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        on_gpu = inputs["x"].device.type == "cuda"
        return {"cuBLAS" if on_gpu else "torch": lambda: torch_products(inputs)}

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """Some tokens of the last sample; rows of the weight's gradient, over all tokens."""
        some: Index = (
            slice(self.samples - 1, self.samples),
            slice(max(0, self.seqlen - TOKENS), None),
        )
        rows = slice(max(0, self.out_features - ROWS), None)
        x, dout, weight = (inputs[name] for name in ("x", "dout", "weight"))
        yield "out", some, F.linear(cast(x[some]), cast(weight))
        yield "dx", some, cast(dout[some]) @ cast(weight)
        above = cast(dout[..., rows]).flatten(0, 1)
        yield "dweight", (rows,), above.t() @ cast(x).flatten(0, 1)

    def floor(self, direction: str) -> Floor:
        activations = self.tokens * (self.in_features + self.out_features)
        return Floor(
            bytes=(activations + self.in_features * self.out_features) * self.itemsize,
            **self.products(self.flops(direction)),
        )

    def flops(self, direction: str) -> float:
        return 2.0 * self.tokens * self.in_features * self.out_features


def torch_products(inputs: dict[str, Tensor]) -> Calls:
    x, dout, weight = (inputs[name] for name in ("x", "dout", "weight"))
    flat, above = x.flatten(0, 1), dout.flatten(0, 1)
    return {
        "forward": lambda: {"out": F.linear(x, weight)},
        "dgrad": lambda: {"dx": dout @ weight},
        "wgrad": lambda: {"dweight": above.t() @ flat},
    }
