"""Causal convolution of the next tokens, against torch's conv1d and causal-conv1d's CUDA kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.causal_conv1d_update import causal_conv1d_update
from ...kernels.routing import Route
from ..peaks import Floor
from .causal_conv1d import CHANNELS, convolve
from .upstream import extension
from .workload import Advance, Calls, Index, SequenceWorkload, normal, size


@dataclass(frozen=True, kw_only=True)
class CausalConv1dUpdate(SequenceWorkload):
    op = "causal_conv1d_update"
    directions = ("forward",)
    per_sample = frozenset(("x", "state"))

    seqlen: int = size(1, "tokens of a sample that come next")
    dim: int = size(4096, "channels")
    width: int = size(4, "taps, 2 to 4", least=2, most=4)

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = {
            "x": (self.batch, self.seqlen, self.dim),
            "state": (self.batch, self.width - 1, self.dim),
            "weight": (self.dim, self.width),
            "bias": (self.dim,),
        }
        return {n: normal(generator, *s, dtype=self.torch_dtype) for n, s in shapes.items()}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))

        def step(state: Tensor) -> Tensor:
            return causal_conv1d_update(x, state, weight, bias, activation="silu", route=route)

        return {"forward": Advance(step, inputs["state"])}

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        peers: dict[str, Callable[[], Calls]] = {"torch conv1d": partial(by_conv1d, inputs)}
        if inputs["x"].device.type == "cuda":
            peers["causal_conv1d CUDA"] = partial(upstream_cuda, inputs)
        return peers

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The last channels, of all samples: torch's conv1d over the state and the tokens."""
        some = slice(max(0, self.dim - CHANNELS), None)
        index: Index = (slice(0, self.samples), slice(None), some)
        state, x = (cast(inputs[name][index]) for name in ("state", "x"))
        weight, bias = (cast(inputs[name][some]) for name in ("weight", "bias"))
        tokens = torch.cat((state, x), 1)
        yield "out", index, convolve(tokens, weight, bias)[:, self.width - 1 :]
        yield "state", index, tokens[:, self.seqlen :]

    def floor(self, direction: str) -> Floor:
        elements = self.tokens * self.dim
        of_state = self.samples * (self.width - 1) * self.dim
        return Floor(
            bytes=2 * (elements + of_state) * self.itemsize,
            mufu=2 * elements,
            instructions=20 * elements,
        )


def by_conv1d(inputs: dict[str, Tensor]) -> Calls:
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))

    def step(state: Tensor) -> Tensor:
        tokens = torch.cat((state, x), 1)
        state.copy_(tokens[:, x.shape[1] :])
        return convolve(tokens, weight, bias)[:, state.shape[1] :]

    return {"forward": Advance(step, inputs["state"])}


def upstream_cuda(inputs: dict[str, Tensor]) -> Calls:
    """causal-conv1d's kernel on views of ours: it takes channels that lie last."""
    kernels = extension("causal_conv1d_cuda")
    weight, bias = inputs["weight"], inputs["bias"]
    x = inputs["x"].transpose(1, 2)

    def step(state: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernels.causal_conv1d_update(x, state.transpose(1, 2), weight, bias, out, True, None, None)
        return out.transpose(1, 2)

    return {"forward": Advance(step, inputs["state"])}
