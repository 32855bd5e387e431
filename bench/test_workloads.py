"""Every shipped workload against its peers; a case whose result is wrong fails, and has no time."""

import pytest

from bench.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_race(run_race, workload, direction):
    run_race(workload, direction)
