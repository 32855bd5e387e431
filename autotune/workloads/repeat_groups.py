"""Groups of channels repeated, against torch's expand and what torch makes of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.repeat_groups import repeat_groups
from ...kernels.routing import Route
from ..peaks import Floor
from .workload import Calls, Index, SequenceWorkload, by_torch, differentiable, normal, size


@dataclass(frozen=True, kw_only=True)
class RepeatGroups(SequenceWorkload):
    op = "repeat_groups"
    per_sample = frozenset(("x", "dout"))

    dim: int = size(1024, "channels that are repeated")
    group: int = size(16, "channels of a group; divides dim", divides="dim")
    repeats: int = size(4, "copies of each group")

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        widths = {"x": self.dim, "dout": self.dim * self.repeats}
        return {
            name: normal(generator, self.batch, self.seqlen, width, dtype=self.torch_dtype)
            for name, width in widths.items()
        }

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        forward = partial(repeat_groups, group=self.group, repeats=self.repeats, route=route)
        return differentiable(forward, inputs)

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        return by_torch(self.expand, inputs)

    def expand(self, x: Tensor) -> Tensor:
        """As transformers' repeat_kv does it."""
        groups = x.unflatten(-1, (-1, 1, self.group))
        return groups.expand(-1, -1, -1, self.repeats, -1).reshape(*x.shape[:2], -1)

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The last sample, by an index for every channel that there is afterwards."""
        index: Index = (slice(self.samples - 1, self.samples),)
        x, dout = (cast(inputs[name][index]) for name in ("x", "dout"))
        channels = torch.arange(self.dim, device=x.device).view(-1, self.group)
        source = channels.repeat_interleave(self.repeats, 0).flatten()
        yield "out", index, x[..., source]
        yield "dx", index, torch.zeros_like(x).index_add_(-1, source, dout)

    def floor(self, direction: str) -> Floor:
        elements = self.tokens * self.dim
        added = 0 if direction == "forward" else elements * self.repeats
        return Floor(bytes=elements * (1 + self.repeats) * self.itemsize, instructions=added)
