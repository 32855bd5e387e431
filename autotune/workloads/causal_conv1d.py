"""Causal convolution, against torch's conv1d and causal-conv1d's CUDA kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.causal_conv1d import causal_conv1d
from ...kernels.routing import Route
from ..peaks import Floor
from .upstream import extension
from .workload import Calls, Index, Results, SequenceWorkload, differentiable, normal, size

CHANNELS = 64  # that are compared


@dataclass(frozen=True, kw_only=True)
class CausalConv1d(SequenceWorkload):
    op = "causal_conv1d"
    per_sample = frozenset(("x", "dout"))

    dim: int = size(4096, "channels")
    width: int = size(4, "taps, 2 to 4", least=2, most=4)

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        of_token = self.batch, self.seqlen, self.dim
        make = partial(normal, generator, dtype=self.torch_dtype)
        shapes = {"x": of_token, "weight": (self.dim, self.width), "bias": (self.dim,)}
        return {name: make(*shape) for name, shape in (shapes | {"dout": of_token}).items()}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        return differentiable(partial(causal_conv1d, activation="silu", route=route), inputs)

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        peers: dict[str, Callable[[], Calls]] = {
            "torch conv1d": partial(differentiable, convolve, inputs)
        }
        if inputs["x"].device.type == "cuda":
            peers["causal_conv1d CUDA"] = partial(upstream_cuda, inputs)
        return peers

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The last channels, of all samples: torch's conv1d, which is none of ours."""
        every, some = slice(None), slice(max(0, self.dim - CHANNELS), None)
        of_x: Index = slice(0, self.samples), every, some
        index = {"x": of_x, "dout": of_x, "weight": (some,), "bias": (some,), "out": of_x}
        parts = {name: cast(x[index[name]]) for name, x in inputs.items()}
        for name, value in differentiable(convolve, parts)["forward+backward"]().items():
            yield name, index[name if name == "out" else name[1:]], value.detach()

    def floor(self, direction: str) -> Floor:
        elements = self.tokens * self.dim
        if direction == "forward":
            return Floor(
                bytes=2 * elements * self.itemsize, mufu=2 * elements, instructions=20 * elements
            )
        return Floor(
            bytes=3 * elements * self.itemsize, mufu=8 * elements, instructions=60 * elements
        )


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """From and to the layout that a projection gives and takes; conv1d's has time last."""
    dim, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=dim)).transpose(1, 2)


def upstream_cuda(inputs: dict[str, Tensor]) -> Calls:
    """causal-conv1d's two kernels on views of ours: it has a path for channels that lie last."""
    kernels = extension("causal_conv1d_cuda")
    weight, bias = inputs["weight"], inputs["bias"]
    x, dout = (inputs[name].transpose(1, 2) for name in ("x", "dout"))

    def forward() -> Results:
        out = torch.empty_like(x)
        kernels.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        return {"out": out.transpose(1, 2)}

    def backward() -> Results:
        dx = torch.empty_like(x)
        dweight, dbias = (torch.zeros_like(t, dtype=torch.float32) for t in (weight, bias))
        kernels.causal_conv1d_bwd(
            x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, True
        )
        found = {"dx": dx.transpose(1, 2), "dweight": dweight, "dbias": dbias}
        return {name: value.to(x.dtype) for name, value in found.items()}

    return {
        "forward": forward,
        "backward": backward,
        "forward+backward": lambda: forward() | backward(),
    }
