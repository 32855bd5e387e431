"""The mixer table and its plan."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..transfer import send
from .route import Route


@dataclass(frozen=True, eq=False)
class MixerTable:
    """Which mixer each sample takes in each layer, and the same from each mixer's side.

    All tensors are int32 and on one device.
    table: [layers, batch], or [layers, 1] where whole batches are routed.
    count: [layers, mixers]: how many samples take the mixer.
    samples: [layers, mixers, batch]: their indices, in order, in the first `count` places; the rest
        is undefined.
    """

    table: Tensor
    count: Tensor
    samples: Tensor
    _sent: "dict[torch.device, MixerTable]" = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, table: Tensor, mixers: int, batch: int) -> "MixerTable":
        """Plan a table that was not drawn: a placement, or one candidate per sample.

        table: integers in [0, mixers), of shape (layers, batch) or (layers, 1). The values stay on
            the device, so they are not checked: a sample with another value takes no mixer.
        Raises ValueError where the shape does not fit the batch.
        """
        if table.ndim != 2 or table.shape[1] not in (1, batch):
            raise ValueError(
                f"table must be (layers, 1) or (layers, batch) with batch {batch},"
                f" got {tuple(table.shape)}"
            )
        everyone = torch.arange(mixers, device=table.device)[:, None]
        takes = (table[:, None] == everyone).expand(-1, -1, batch)  # [layers, mixers, batch]
        order = takes.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(table.int(), takes.sum(-1, dtype=torch.int32), order.int())

    def to(self, device: torch.device) -> "MixerTable":
        """The same on a device, sent there once: later changes of this table's memory are not."""
        if device == self.table.device:
            return self
        if device not in self._sent:
            parts = (send(part, device) for part in (self.table, self.count, self.samples))
            self._sent[device] = MixerTable(*parts)
        return self._sent[device]

    def route(self, layer: int, mixer: int) -> Route:
        """The samples that take `mixer` in the table's row `layer`, as views into the plan.

        The table of a pipeline stage counts its own layers, from 0. Raises ValueError where there
        is no such layer or mixer.
        """
        layers, mixers = self.count.shape
        if not (0 <= layer < layers and 0 <= mixer < mixers):
            raise ValueError(
                f"route takes a layer of {layers} and a mixer of {mixers}, counted from 0, got "
                f"layer {layer} and mixer {mixer}"
            )
        return Route(self.count[layer, mixer], self.samples[layer, mixer])
