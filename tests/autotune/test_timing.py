import numpy as np
import pytest

from tossup.autotune.timing import Timing


@pytest.mark.parametrize("count", [3, 4, 8, 15])
def test_median_and_quartiles(count):
    seconds = np.random.default_rng(count).exponential(size=count)
    timing = Timing.of(seconds.tolist())
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75), method="weibull")
    assert timing.median == pytest.approx(median)
    assert timing.spread == pytest.approx((high - low) / 2 / median)
