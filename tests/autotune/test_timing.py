"""Statistics of runs, and what a stopwatch asks a GPU for, by a GPU that is a list."""

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from tossup.autotune.timing import (
    FEW_REPEATS,
    CpuStopwatch,
    GpuStopwatch,
    Run,
    Timing,
    rounds_within,
    take_turns,
)


@pytest.mark.parametrize("count", [3, 4, 8, 15])
def test_median_and_quartiles(count):
    seconds = np.random.default_rng(count).exponential(size=count)
    timing = Timing(seconds.tolist())
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75), method="weibull")
    assert timing.median == pytest.approx(median)
    assert timing.spread == pytest.approx((high - low) / 2 / median)
    p20, p80 = np.quantile(seconds, (0.2, 0.8))
    assert (timing.p20, timing.p80) == pytest.approx((p20, p80))


def test_fewer_runs_have_no_quartiles():
    with pytest.raises(ValueError, match="at least three runs, got 2"):
        Timing([1.0, 2.0])


class FakeCuda:
    """torch.cuda with a clock of its own: a call takes 10 µs, a graph as its calls, an event 0."""

    def __init__(self, captures: bool = True):
        self.now, self.log, self.captures, self.capturing = 0.0, [], captures, None

    def work(self, name: str = "call", seconds: float = 1e-5) -> None:
        if self.capturing is not None:
            if not self.captures:
                raise RuntimeError("no capture\nand more")
            self.capturing.append((name, seconds))
            return
        self.log.append(name)
        self.now += seconds

    def Stream(self):
        return "stream"

    @contextmanager
    def stream(self, stream):
        assert stream == "stream"
        yield

    def current_stream(self):
        return "default"

    def set_stream(self, stream):
        self.log.append(f"to {stream}")

    def synchronize(self):
        self.log.append("synchronize")

    def Event(self, enable_timing):
        return FakeEvent(self)

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph, pool, stream):
        assert pool == "pool"
        self.capturing = graph.calls
        try:
            yield
        finally:
            self.capturing = None


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.at = self.cuda.now
        self.cuda.log.append("event")

    def synchronize(self):
        self.cuda.log.append("wait")

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.calls = cuda, []

    def replay(self):
        for call in self.calls:
            self.cuda.work(*call)


def gpu(captures: bool = True) -> tuple[FakeCuda, GpuStopwatch]:
    cuda = FakeCuda(captures)
    return cuda, GpuStopwatch(lambda: cuda.work("flush", 1.0), cuda)


def test_a_cold_run_is_one_replay_behind_a_flush_which_is_not_counted():
    cuda, stopwatch = gpu()
    run = stopwatch.prepare(cuda.work)
    cuda.log.clear()
    assert run.seconds() == pytest.approx(1e-5) and run.method == "graph"
    assert cuda.log == ["flush", "event", "call", "event", "wait"]


def test_a_warm_run_replays_many_behind_as_many():
    cuda, stopwatch = gpu()
    run = stopwatch.prepare(cuda.work, warm=True)
    cuda.log.clear()
    assert run.seconds() == pytest.approx(1e-5)
    calls = ["call"] * 20  # 200 µs
    assert cuda.log == [*calls, "event", *calls, "event", "wait"]


def test_a_warm_run_is_as_long_as_it_should_be_whatever_calls_take_the_host():
    cuda, stopwatch = gpu()

    def call():
        if cuda.capturing is None:
            cuda.now += 5e-5  # the GPU waits for the host
        cuda.work()

    run = stopwatch.prepare(call, warm=True)
    cuda.log.clear()
    run.seconds()
    assert cuda.log.count("call") == 2 * 20


def test_calls_may_be_timed_without_a_graph():
    cuda, stopwatch = gpu()
    run = stopwatch.prepare(cuda.work, captured=False)
    cuda.log.clear()
    assert run.seconds() == pytest.approx(1e-5) and run.method == "calls"


def test_what_cannot_be_captured_is_queued_and_says_so():
    cuda, stopwatch = gpu(captures=False)
    run = stopwatch.prepare(cuda.work, warm=True)
    assert run.seconds() == pytest.approx(1e-5)
    assert run.method == "calls, not a graph: no capture"
    assert FEW_REPEATS > 1


def test_a_cpu_is_timed_by_its_clock_after_a_warm_call():
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 2.0

    run = CpuStopwatch(lambda: now[0]).prepare(call)
    assert calls == [0.0]
    assert run.seconds() == 2.0 and run.method == "clock"


def test_runs_take_turns_and_each_begins_a_round():
    order = []

    def run(name: str, seconds: float) -> Run:
        def once() -> float:
            order.append(name)
            return seconds

        return Run(once, "")

    timings = take_turns({"a": run("a", 1.0), "b": run("b", 2.0)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].median == 1.0 and timings["b"].median == 2.0
    order.clear()
    assert rounds_within(1e9, {"a": run("a", 1.0)}, 5, 50) == 50 and order == ["a"]
    assert rounds_within(0.0, {"a": run("a", 1.0)}, 5, 50) == 5


FAULTS = """
import resource, torch
from tossup.autotune.timing import CpuStopwatch
def faults(pieces, size):
    run = CpuStopwatch().prepare(lambda: [torch.ones(size) for _ in range(pieces)])
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run.seconds()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum(faults(pieces, size) for pieces in (40, 50, 60, 70) for size in (2**16, 2**17, 2**18)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_a_call_frees_does_not_fault_in_the_next():
    """10 to 70 MB in pieces: by itself glibc gives most back, unless something lies behind."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert int(done.stdout) < 1000  # of 90112 pages that are written
