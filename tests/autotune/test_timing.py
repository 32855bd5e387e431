import numpy as np
import pytest

from tossup.autotune.timing import Timing


@pytest.mark.parametrize("count", [3, 4, 8, 15])
def test_median_and_quartiles(count):
    seconds = np.random.default_rng(count).exponential(size=count)
    timing = Timing(seconds.tolist())
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75), method="weibull")
    assert timing.median == pytest.approx(median)
    assert timing.spread == pytest.approx((high - low) / 2 / median)


def test_fewer_runs_have_no_quartiles():
    with pytest.raises(ValueError, match="at least three runs, got 2"):
        Timing([1.0, 2.0])
