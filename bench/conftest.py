"""A race: ours against a peer, checked first, then timed in turns on the same inputs.

Ours is timed by pytest-benchmark, so its storage and comparison options serve (`--benchmark-save`,
`--benchmark-compare-fail`). The peer runs before each of our rounds, so that whatever slows the
machine down slows both. A table of ratios comes at the end; `--record` also writes it, with
versions, to bench/results/cpu/.
"""

import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tossup.autotune.timing import Timing

RACES = pytest.StashKey[list[dict]]()
FEWEST, MOST, BUDGET = 3, 15, 10.0  # rounds of a race, and the seconds it should take
PACKAGES = ("torch", "numba", "numpy", "mamba-ssm", "transformers")


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the ratios to bench/results/cpu")


def pytest_configure(config):
    config.stash[RACES] = []


@pytest.fixture
def race(benchmark, request) -> Callable:
    """race(ours, peer, tolerance): both return tensors, which must agree before anything is timed.

    tolerance: the largest difference allowed, in units of each tensor's largest value.
    """

    def run(
        ours: Callable[[], list[Tensor]], peer: Callable[[], list[Tensor]], tolerance: float
    ) -> None:
        for i, (mine, theirs) in enumerate(zip(ours(), peer(), strict=True)):
            difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            assert difference <= tolerance, f"result {i} differs by {difference:.1e}: not timed"

        peer_seconds: list[float] = []

        def peer_first():
            start = time.perf_counter()
            peer()
            peer_seconds.append(time.perf_counter() - start)

        peer_first()  # the second call of each is warm, and tells how many rounds there is time for
        rounds = max(FEWEST, min(MOST, int(BUDGET / peer_seconds.pop())))
        benchmark.pedantic(ours, setup=peer_first, rounds=rounds)
        mine, theirs = Timing(benchmark.stats.stats.data), Timing(peer_seconds)
        result = {
            "rounds": rounds,
            "name": request.node.name,
            "ours_ms": mine.median * 1e3,
            "ours_spread": mine.spread,
            "peer_ms": theirs.median * 1e3,
            "peer_spread": theirs.spread,
        }
        result["ratio"] = result["peer_ms"] / result["ours_ms"]
        benchmark.extra_info.update(result)
        request.config.stash[RACES].append(result)

    return run


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RACES]
    if not results:
        return
    terminalreporter.section("ours against peers: medians, and half the interquartile range")
    for r in results:
        terminalreporter.write_line(
            f"{r['name']:<72} {r['ours_ms']:8.2f} ms ±{r['ours_spread']:4.0%}   "
            f"{r['peer_ms']:8.2f} ms ±{r['peer_spread']:4.0%}   {r['ratio']:6.1f}×"
        )


def pytest_sessionfinish(session):
    config = session.config
    if not config.getoption("--record") or not config.stash[RACES]:
        return
    now = datetime.now(UTC)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "races": config.stash[RACES],
    }
    path = Path(__file__).parent / "results" / "cpu" / f"{now:%Y%m%dT%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
