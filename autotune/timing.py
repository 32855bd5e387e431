"""What repeated runs took."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds that each of several runs of one thing took; at least three runs."""

    seconds: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.seconds) < 3:
            raise ValueError(f"seconds takes at least three runs, got {len(self.seconds)}")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median
