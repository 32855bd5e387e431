"""Where the mixer tables of a training loop come from."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.routing import MixerTable, Strategy, draw


class Router:
    """Draws a mixer table per step for the StochasticMixers that share it.

    strategy: how tables are drawn. layers: how many layers share the router. seed: of the draws;
    one seed, one sequence of tables, on every rank. `step` counts the draws: set it to resume.
    `counts` (layers, mixers) int64 says how many samples were sent where, over all draws, and
    `used` the same since the last step of a GatedAdamW that has this router.
    device: where tables are drawn, for mixers under device dispatch. There `step` is an int64
        tensor of shape (), which a draw reads and advances without the host: fill it to resume.
        None draws on the host.

    A copy of a model follows the same router as the model does.
    """

    def __init__(
        self,
        strategy: Strategy,
        layers: int,
        *,
        seed: int = 0,
        step: int = 0,
        device: torch.device | str | None = None,
    ):
        self.strategy, self.layers, self.seed = strategy, layers, seed
        self.device = torch.device("cpu" if device is None else device)
        self.step: int | Tensor = step
        if device is not None:
            self.step = torch.tensor(step, dtype=torch.int64, device=device)
        self.table: MixerTable | None = None
        self.counts = torch.zeros(layers, strategy.mixers, dtype=torch.int64, device=self.device)
        self.used, self.drawn = torch.zeros_like(self.counts), 0

    def begin_step(self) -> None:
        """Forget what was used until now."""
        self.used.zero_()
        self.drawn = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Router":
        return self

    def draw(self, batch: int) -> MixerTable:
        """Draw the next step's table, for `batch` samples; the mixers follow it until the next."""
        self.table = draw(
            self.strategy, self.seed, self.step, self.layers, batch, device=self.device
        )
        self.counts += self.table.count
        self.used += self.table.count
        self.drawn += 1
        self.step += 1
        return self.table
