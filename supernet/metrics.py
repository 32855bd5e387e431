"""Means that know how many samples they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Mean:
    """A sum and a count, both on the device, never read by the host here.

    Adding two weighs them by their counts; the value of no samples at all is 0, not NaN.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, values: Tensor, taken: Tensor | None = None) -> "Mean":
        """The mean of values (samples,) over those that `taken` (samples,) marks, or over all."""
        if taken is None:
            return cls(values.sum(), values.new_full((), len(values), dtype=torch.int64))
        return cls(torch.where(taken, values, 0).sum(), taken.sum())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


def accumulate(into: dict[str, Mean], key: str, mean: Mean) -> None:
    into[key] = into[key] + mean if key in into else mean
