"""Races of ours against peers under pytest-benchmark: `python -m pytest bench`.

Ours is reported by pytest-benchmark, so its storage and comparison serve (`--benchmark-save`,
`--benchmark-compare-fail`); the seconds are those that the race measured, on a GPU by events. A
table with the peers comes at the end. bench/record.py writes records.
"""

import pytest
import torch

from tossup.autotune.races import OURS, race, table
from tossup.autotune.workloads import shipped

RACES = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--race-device", default="cpu", help="cpu (default) or cuda")
    parser.addoption("--race-seconds", type=float, default=2.0, help="of one race; 2 by default")


def pytest_configure(config):
    config.stash[RACES] = []
    torch.set_num_threads(1)  # what else runs on the machine is then felt least


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        device = metafunc.config.getoption("--race-device")
        cases = [(w, direction) for w in shipped(device) for direction in w.directions]
        ids = [f"{workload.name}, {direction}" for workload, direction in cases]
        metafunc.parametrize(("workload", "direction"), cases, ids=ids)


class Clock:
    """Stands still, but for what it is told: pytest-benchmark then reports what a race measured."""

    __name__ = "race"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


CLOCK = Clock()


@pytest.fixture
def run_race(benchmark, request):
    config = request.config

    def run(workload, direction):
        device = torch.device(config.getoption("--race-device"))
        (result,) = race(workload, device, [direction], config.getoption("--race-seconds"))
        config.stash[RACES].append(result)
        seconds = iter(result["entrants"][OURS]["seconds"])
        benchmark.extra_info["race"] = result
        benchmark.pedantic(
            CLOCK.advance,
            setup=lambda: ((next(seconds),), {}),
            rounds=len(result["entrants"][OURS]["seconds"]),
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[RACES]:
        terminalreporter.section("ours against peers: medians (20 % to 80 %)")
        terminalreporter.write_line(table(config.stash[RACES]))
