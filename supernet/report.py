"""What a run reports between two log lines, summed on the device."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.routing import MixerTable
from .checkpoint import copy_tensors
from .metrics import Mean
from .ranks import Ranks


class Report:
    """Sums between two log lines, kept on the device and read when a line is written.

    A checkpoint takes them along (`tensors`, `load`), so that a run which was killed between two
    lines writes the second one as if it had not been.
    """

    def __init__(self, layers: int, mixers: tuple[str, ...], device: torch.device):
        self.mixers, self.device = mixers, device
        # [layers, mixers]: summed loss and number of labelled tokens and samples that took a mixer
        self.by_mixer = torch.zeros(3, layers, len(mixers), device=device)
        self.means: dict[str, Mean] = {}
        self.rate, self.norm = 0.0, torch.zeros((), device=device)

    def clear(self) -> None:
        """Begin anew, in the same memory: a captured step goes on adding there."""
        self.by_mixer.zero_()
        for mean in self.means.values():
            mean.total.zero_()
            mean.count.zero_()
        self.norm.zero_()

    def add(
        self, losses: Tensor, counts: Tensor, table: MixerTable | None, extra: dict[str, Mean]
    ) -> None:
        """losses, counts: (batch,), summed over each sample's tokens."""
        for key, mean in {"loss": Mean(losses.sum(), counts.sum()), **extra}.items():
            sums = self._mean(key)
            sums.total += mean.total.detach()
            sums.count += mean.count
        if table is not None:
            row = table.to(self.device).table.expand(-1, len(losses))
            # [layers, mixers, batch]
            taken = row[:, None] == torch.arange(len(self.mixers), device=self.device)[:, None]
            samples = torch.stack((losses, counts.float(), torch.ones_like(losses)))
            self.by_mixer += torch.einsum("lmb,kb->klm", taken.float(), samples)

    def add_norm(self, norm: Tensor) -> None:
        """The gradient's, in the last step."""
        self.norm.copy_(norm)

    def _mean(self, key: str) -> Mean:
        if key not in self.means:
            self.means[key] = Mean(*torch.zeros(2, device=self.device))
        return self.means[key]

    def scalars(self) -> dict[str, float]:
        """The loss, the last gradient's norm and the mixers' own; waits for the device."""
        means = {
            key: mean.value.item()
            for key, mean in sorted(self.means.items())
            if key == "loss" or mean.count.item()  # a mixer's own, where it ran at all
        }
        return {**means, "grad_norm": self.norm.item()}

    def read(self) -> dict[str, Any]:
        """The log line's values, after which the sums begin anew."""
        record: dict[str, Any] = {**self.scalars(), "learning_rate": self.rate}
        losses, tokens, samples = self.by_mixer.cpu()
        if samples.any():
            record["samples"], record["loss_by_mixer"] = {}, {}
            for m, name in enumerate(self.mixers):
                record["samples"][name] = samples[:, m].int().tolist()
                record["loss_by_mixer"][name] = [
                    (loss / count).item() if count else None
                    for loss, count in zip(losses[:, m], tokens[:, m], strict=True)
                ]
        self.clear()
        return record

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; rate and norm are the last step's alone, and the next replaces them."""
        totals = {f"{key}.total": mean.total for key, mean in self.means.items()}
        counts = {f"{key}.count": mean.count for key, mean in self.means.items()}
        return {"by_mixer": self.by_mixer, **totals, **counts}

    def collect(self, ranks: Ranks) -> None:
        """Bring all ranks' sums together on the first one; on the others they begin anew."""
        if ranks.count == 1:
            return
        parts = ranks.gather({name: tensor.cpu() for name, tensor in self.tensors().items()})
        self._make({name for part in parts for name in part})
        for name, tensor in self.tensors().items():
            tensor.zero_()
            for part in parts if ranks.first else ():
                if name in part:
                    tensor += part[name].to(tensor.device)

    def _make(self, names: Iterable[str]) -> None:
        """The sums that have these names, where they are not there yet."""
        for name in sorted(names):
            if name.endswith(".total"):
                self._mean(name.removesuffix(".total"))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned. Raises ConfigError where they are not whole."""
        self._make(tensors)
        copy_tensors(self.tensors(), tensors)
