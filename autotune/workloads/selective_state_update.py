"""One token's step of the selective scan, against mamba-ssm: its reference on a CPU, its Triton
kernel on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.routing import Route
from ...kernels.selective_state_update import selective_state_update
from ...kernels.selective_state_update.reference import selective_state_update_reference
from ..peaks import Floor
from .upstream import mamba_ssm
from .workload import Advance, Calls, Index, Workload, normal, size

OF_CHANNELS = ("A", "D", "dt_bias")  # by channel and by no sample


@dataclass(frozen=True, kw_only=True)
class SelectiveStateUpdate(Workload):
    op = "selective_state_update"
    directions = ("forward",)
    per_sample = frozenset(("state", "x", "dt", "B", "C", "z"))

    dim: int = size(4096, "channels")
    state: int = size(16, "states of a channel")
    groups: int = size(1, "groups of B and C; divides dim", divides="dim")

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """With a gate, a skip and softplus, and numbers as Mamba begins with: A is -1, -2, …, and
        steps are around 0.01. The state, A, D and the bias are float32."""
        of_token, of_group = (self.batch, self.dim), (self.batch, self.groups, self.state)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "dt", "z"), of_token)
        shapes |= dict.fromkeys(("B", "C"), of_group)
        made = {n: normal(generator, *s, dtype=self.torch_dtype) for n, s in shapes.items()}
        state, D, bias = (
            normal(generator, *shape, dtype=torch.float32)
            for shape in ((self.batch, self.dim, self.state), (self.dim,), (self.dim,))
        )
        A = -torch.arange(1.0, self.state + 1, device=D.device).repeat(self.dim, 1)
        return made | {"state": state, "A": A, "D": D, "dt_bias": bias - 5}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        others = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]

        def step(state: Tensor) -> Tensor:
            return selective_state_update(state, *others, dt_softplus=True, route=route)

        return {"forward": Advance(step, inputs["state"])}

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        on_gpu = inputs["x"].device.type == "cuda"
        name = "mamba_ssm Triton" if on_gpu else "mamba_ssm reference"
        return {name: partial(self.upstream, inputs, triton=on_gpu)}

    def upstream(self, inputs: dict[str, Tensor], triton: bool) -> Calls:
        """mamba-ssm has groups of heads and not of channels: our groups are its heads."""
        module = mamba_ssm("triton.selective_state_update")
        update = module.selective_state_update if triton else module.selective_state_update_ref
        others = {
            name: x if name in ("B", "C") else self.by_head(name, x)
            for name, x in inputs.items()
            if name != "state"
        }

        def step(state: Tensor) -> Tensor:
            return update(self.by_head("state", state), **others, dt_softplus=True).flatten(1)

        return {"forward": Advance(step, inputs["state"])}

    def by_head(self, name: str, x: Tensor) -> Tensor:
        return x.unflatten(0 if name in OF_CHANNELS else 1, (self.groups, -1))

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """All samples, and all channels of the last group."""
        some, last = slice(self.dim - self.dim // self.groups, None), slice(self.groups - 1, None)
        of_channel: Index = (slice(0, self.samples), some)
        index: dict[str, Index] = dict.fromkeys(self.per_sample, of_channel)
        index |= dict.fromkeys(("B", "C"), (slice(0, self.samples), last))
        index |= dict.fromkeys(OF_CHANNELS, (some,))
        parts = {name: cast(x[index[name]]) for name, x in inputs.items()}
        out, state = selective_state_update_reference(**parts, dt_softplus=True)
        yield "out", of_channel, out
        yield "state", of_channel, state

    def floor(self, direction: str) -> Floor:
        """The state is read and written, A read once for all samples."""
        channels = self.samples * self.dim
        states, of_group = channels * self.state, self.samples * self.groups * self.state
        return Floor(
            bytes=8 * states
            + 4 * self.dim * self.state
            + (4 * channels + 2 * of_group) * self.itemsize,
            mufu=states,
            instructions=4 * states,
        )
