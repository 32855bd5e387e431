"""Clipping and a step of AdamW over the parameters of a layer's mixers, against torch's over those
of the mixers alone that were used, which there the host knows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ...kernels.adamw import Bucket, adamw_, gradient_norm, scale_gradients_
from ...kernels.routing import Route
from ..peaks import Floor
from .workload import Advance, Calls, Index, Workload, normal, size

MAX_NORM = 1.0
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
COLUMNS = 4  # parameters, first and second moments, gradients


@dataclass(frozen=True, kw_only=True)
class AdamW(Workload):
    op = "adamw"
    directions = ("forward",)
    per_sample = frozenset(("state",))

    batch: int = size(2, "mixers, of which `active` were used")
    parameters: int = size(8, "parameters of a mixer")
    elements: int = size(1 << 21, "elements of a parameter")
    dtype: str = field(default="fp32", metadata={"about": "of parameters and moments: fp32"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "fp32":
            raise ValueError(f"dtype takes fp32, got {self.dtype!r}")

    @property
    def numbers(self) -> int:
        """Of a mixer's parameters, in all."""
        return self.parameters * self.elements

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One tensor with a row for each mixer, as it is overwritten: the columns, step counts."""
        counts = -(-self.parameters // 4) * 4  # as many as keep the next row's vectors aligned
        row = COLUMNS * self.numbers + counts
        state = normal(generator, self.batch, row, dtype=torch.float32).abs()
        state[:, -counts:] = 3
        return {"state": state}

    def views(self, state: Tensor) -> list[list[Tensor]]:
        """Parameters, both moments, gradients and step counts, of all mixers in turn."""
        tensors, counts = state.split((COLUMNS * self.numbers, -(-self.parameters // 4) * 4), 1)
        columns = tensors.unflatten(1, (COLUMNS, self.parameters, self.elements)).unbind(1)
        each = (*columns, counts[:, : self.parameters])
        return [[x for mixer in column for x in mixer] for column in each]

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        gates = [(0, mixer) for mixer in range(self.batch) for _ in range(self.parameters)]
        mixers = torch.arange(self.batch, device=inputs["state"].device)
        used = (mixers < self.samples)[None]

        def stepping(state: Tensor) -> Callable[[], Tensor]:
            params, exp_avgs, exp_avg_sqs, gradients, steps = self.views(state)
            bucket = Bucket(params, gates, exp_avgs, exp_avg_sqs, steps)

            def step() -> Tensor:
                norm = gradient_norm(bucket, gradients, used)
                scale_gradients_(bucket, gradients, factor_of(norm), used)
                adamw_(
                    bucket, gradients, used, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
                )
                return norm.view(1)

            return step

        return {"forward": Advance(of_one_state(stepping), inputs["state"])}

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        return {"torch": lambda: self.by_torch(inputs)}

    def by_torch(self, inputs: dict[str, Tensor]) -> Calls:
        def stepping(state: Tensor) -> Callable[[], Tensor]:
            params, exp_avgs, exp_avg_sqs, gradients, steps = self.views(state)

            def step() -> Tensor:
                norm = get_total_norm(gradients)
                torch._foreach_mul_(gradients, factor_of(norm))
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(
                    params, gradients, exp_avgs, exp_avg_sqs, [], steps, lr=LR, beta1=BETAS[0],
                    beta2=BETAS[1], weight_decay=WEIGHT_DECAY, eps=EPS, amsgrad=False,
                    maximize=False,
                )  # fmt: skip
                return norm.view(1)

            return step

        return {"forward": Advance(of_one_state(stepping), inputs["state"])}

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The norm, and the whole state of the mixers that were used."""
        state = cast(inputs["state"]).clone()
        params, exp_avgs, exp_avg_sqs, gradients, counts = self.views(state)
        steps = [count.float() for count in counts]
        bucket = Bucket(params, None, exp_avgs, exp_avg_sqs, steps)
        norm = gradient_norm(bucket, gradients, impl="reference")
        scale_gradients_(bucket, gradients, factor_of(norm), impl="reference")
        adamw_(
            bucket, gradients, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY,
            impl="reference",
        )  # fmt: skip
        for count, step in zip(counts, steps, strict=True):
            count.copy_(step)
        yield "out", (slice(None),), norm.view(1)
        yield "state", (slice(0, self.samples),), state

    def floor(self, direction: str) -> Floor:
        """The gradient is read for its norm, and again for the update, which scales it by itself;
        parameters and moments are read and written."""
        numbers = self.samples * self.numbers
        return Floor(bytes=32 * numbers, instructions=30 * numbers)


def factor_of(norm: Tensor) -> Tensor:
    """Below 1 in every call, though the one before has clipped: of 1, ours would do nothing."""
    return (MAX_NORM / (norm + 1e-6)).clamp(max=0.999)


def of_one_state(stepping: Callable[[Tensor], Callable[[], Tensor]]) -> Callable[[Tensor], Tensor]:
    """A step from the state that `stepping` made it for, which is the same tensor in each call."""
    made = cache(stepping)
    return lambda state: made(state)()
