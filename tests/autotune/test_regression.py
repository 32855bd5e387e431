"""Verdicts on planted noise and planted changes."""

import numpy as np
import pytest

from tossup.autotune.regression import compare_pairs, compare_samples


def noisy(seed: int, count: int, factor: float = 1.0, noise: float = 0.03) -> list[float]:
    spread = np.random.default_rng(seed).normal(0, noise, count)
    return (factor * np.exp(spread)).tolist()


def test_of_cases_that_did_not_change_few_are_slower():
    """About one in a hundred of twelve pairs without any margin; none with one."""
    pairs = [(noisy(seed, 12), noisy(1000 + seed, 12)) for seed in range(400)]
    for compare in (compare_pairs, compare_samples):
        assert sum(compare(before, now, 1.0).slower for before, now in pairs) <= 8
        assert not any(compare(before, now, 1.10).slower for before, now in pairs)


@pytest.mark.parametrize("compare", [compare_pairs, compare_samples])
def test_a_change_beyond_margin_and_noise_is_found(compare):
    before, now = noisy(0, 15), noisy(1, 15, factor=1.3)
    found = compare(before, now, 1.10)
    assert found.slower and found.low < found.change < found.high
    assert found.change == pytest.approx(np.median(now) / np.median(before), rel=0.03)
    assert str(found) == f"{found.change:.3f} × the time ({found.low:.3f} to {found.high:.3f})"
    assert not compare(before, now, 1.35).slower
    assert not compare(now, before, 1.0).slower  # faster is not slower
    assert not compare(before, noisy(1, 15, factor=1.3, noise=0.5), 1.10).slower


def test_what_slows_both_of_a_pair_cancels_out():
    drift = np.linspace(1, 3, 15)
    before, now = drift * noisy(0, 15), drift * noisy(1, 15, factor=1.15)
    assert compare_pairs(before, now, 1.05).slower
    assert not compare_samples(before, now, 1.05).slower


def test_too_few_say_nothing():
    for compare in (compare_pairs, compare_samples):
        with pytest.raises(ValueError, match="five"):
            compare([1.0] * 4, [1.0] * 4, 1.1)
