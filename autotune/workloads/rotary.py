"""Rotary position embedding, against transformers' formula, as it stands and fused by torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.rotary import rotary, rotary_angles
from ...kernels.routing import Route
from ..peaks import Floor
from .workload import Calls, Index, SequenceWorkload, by_torch, differentiable, normal, option, size


@dataclass(frozen=True, kw_only=True)
class Rotary(SequenceWorkload):
    op = "rotary"
    per_sample = frozenset(("x", "dout"))

    heads: int = size(32, "heads")
    head_dim: int = size(128, "channels of a head, all of which turn; even", least=2)
    interleaved: bool = option(False, "pairs are neighbours, and not half a head apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"head_dim takes an even number, got {self.head_dim}")

    def angles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return rotary_angles(torch.arange(self.seqlen, device=device), self.head_dim)

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = self.batch, self.seqlen, self.heads, self.head_dim
        return {name: normal(generator, *shape, dtype=self.torch_dtype) for name in ("x", "dout")}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        cos, sin = self.angles(inputs["x"].device)
        forward = partial(rotary, cos=cos, sin=sin, interleaved=self.interleaved, route=route)
        return differentiable(forward, inputs)

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        return by_torch(self.turn(inputs["x"]), inputs)

    def turn(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The formula of transformers' Llama, or GPT-J where pairs are neighbours, with its tables
        of every channel's angle, in the dtype and on the device of `like`."""
        cos, sin = (
            (angle.repeat_interleave(2, -1) if self.interleaved else torch.cat((angle, angle), -1))
            .unsqueeze(-2)
            .to(like.dtype)
            for angle in self.angles(like.device)
        )

        def forward(x: Tensor) -> Tensor:
            if self.interleaved:
                across = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            else:
                first, second = x.chunk(2, -1)
                across = torch.cat((-second, first), -1)
            return x * cos + across * sin

        return forward

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The last sample's last head, by transformers' formula, which is none of ours."""
        index: Index = (
            slice(self.samples - 1, self.samples),
            slice(None),
            slice(self.heads - 1, None),
        )
        parts = {name: cast(x[index]) for name, x in inputs.items()}
        results = differentiable(self.turn(parts["x"]), parts)["forward+backward"]()
        for name, value in results.items():
            yield name, index, value.detach()

    def floor(self, direction: str) -> Floor:
        """The same backward, which turns by the opposite angles."""
        elements = self.tokens * self.heads * self.head_dim
        of_angles = 4 * self.seqlen * self.head_dim
        return Floor(bytes=2 * elements * self.itemsize + of_angles, instructions=3 * elements)
