"""Whether something got slower, beyond the noise that was measured with it.

Times are compared as logarithms, so that a doubling weighs as much as a halving. What is tested is
a median of differences, by the bootstrap (Efron 1979): resample what was measured, with
replacement, many times over; the median of the resamples spreads as that of new measurements would.
A case is slower where even the low end of that spread is above the least effect that matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# Of the interval, which with twelve pairs lies above 1 for one in a hundred unchanged cases
LEVEL = 0.99


@dataclass(frozen=True)
class Verdict:
    """How much longer now than before, as a factor, and the interval that holds it.

    least: the factor above which a change matters.
    """

    change: float
    low: float
    high: float
    least: float

    @property
    def slower(self) -> bool:
        return self.low > self.least

    def __str__(self) -> str:
        return f"{self.change:.3f} × the time ({self.low:.3f} to {self.high:.3f})"


def compare_pairs(before: Sequence[float], now: Sequence[float], least: float) -> Verdict:
    """Each of `now` was measured beside its `before`, so that what slowed both cancels out.

    At least five pairs; ValueError otherwise.
    """
    if len(before) != len(now) or len(now) < 5:
        raise ValueError(f"before and now take five pairs or more, got {len(before)}, {len(now)}")
    differences = np.log(now) - np.log(before)
    return verdict(float(np.median(differences)), medians(differences), least)


def compare_samples(before: Sequence[float], now: Sequence[float], least: float) -> Verdict:
    """Two samples of one ratio, measured at different times. At least five each."""
    if min(len(before), len(now)) < 5:
        raise ValueError(f"before and now take five or more each, got {len(before)}, {len(now)}")
    old, new = np.log(before), np.log(now)
    change = float(np.median(new) - np.median(old))
    return verdict(change, medians(new) - medians(old, seed=1), least)


def verdict(change: float, spread: np.ndarray, least: float) -> Verdict:
    low, high = np.quantile(spread, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Verdict(math.exp(change), math.exp(low), math.exp(high), least)


def medians(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Of resamples; always the same ones, so that a verdict can be repeated."""
    places = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.median(values[places], axis=1)
