"""How long calls take: on a CPU by the clock, on a GPU by events, in turns where they are compared.

A GPU works through a queue. What is timed there is captured in a CUDA graph, so that the host costs
nothing between kernels, and queued after other work, so that the GPU never waits for the host
between the two events. A cold run comes after a read of twice the L2 cache, which leaves nothing
else in it, and nothing to be written back; a warm one after the same calls.
"""

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .errors import said

Call = Callable[[], Any]

WARM_BELOW = 1e-4  # seconds, below which a call is also timed warm
WARM_SECONDS = 2e-4  # that the calls of one warm run take together, at least
MOST_REPEATS = 200
FEW_REPEATS = 20


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
    def p20(self) -> float:
        return statistics.quantiles(self.seconds, n=5, method="inclusive")[0]

    @property
    def p80(self) -> float:
        return statistics.quantiles(self.seconds, n=5, method="inclusive")[-1]

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Run:
    """seconds: runs a call once, or more often, and says how long once takes. method: how timed."""

    seconds: Callable[[], float]
    method: str


class Stopwatch(Protocol):
    def here(self) -> AbstractContextManager:
        """Where calls run that are timed later, for whatever they keep from one to the next."""

    def prepare(self, call: Call, *, captured: bool = True) -> Run:
        """Warm a call up. captured: whether to time it in a graph, where it can be."""


# Of glibc's malloc.h, and the largest threshold that it takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MOST_THRESHOLD = -1, -3, 2**25


def keep_freed_memory() -> None:
    """Let glibc give no memory back to the system, for the rest of the process.

    Else it depends on what else lies in the heap whether a call's results are new pages, which
    fault when they are written: that can take several times as long as a short call.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, MOST_THRESHOLD)


class CpuStopwatch:
    """By the clock, after one call that warms up."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        keep_freed_memory()
        self.clock = clock

    def here(self) -> AbstractContextManager:
        return nullcontext()

    def prepare(self, call: Call, *, captured: bool = True) -> Run:
        call()

        def seconds() -> float:
            start = self.clock()
            call()
            return self.clock() - start

        return Run(seconds, "clock")


class GpuStopwatch:
    """By events around the replay of a graph; where a call cannot be captured, around calls.

    All is on one stream: autograd runs a backward pass where the forward pass ran, and a stream
    that is captured must not meet another.
    flush: reads twice the L2 cache. cuda: stands for torch.cuda.
    """

    def __init__(self, flush: Call | None = None, cuda: Any = torch.cuda):
        self.cuda, self.stream = cuda, cuda.Stream()
        self.flush = flush or flush_of(2 * cuda.get_device_properties().L2_cache_size)

    @contextmanager
    def here(self) -> Iterator[None]:
        self.cuda.synchronize()
        with self.cuda.stream(self.stream):
            yield
        self.cuda.synchronize()

    def prepare(self, call: Call, *, captured: bool = True, warm: bool = False) -> Run:
        """warm: as many calls as take WARM_SECONDS, after as many; else one, after a flush."""
        with self.here():
            for _ in range(3):  # compiles what is compiled at the first call
                call()
        repeats = 1
        if warm:
            few = self.repeated(call, FEW_REPEATS, captured, warm).seconds()
            repeats = max(1, min(MOST_REPEATS, math.ceil(WARM_SECONDS / few)))
        return self.repeated(call, repeats, captured, warm)

    def repeated(self, call: Call, repeats: int, captured: bool, warm: bool) -> Run:
        def calls() -> None:
            for _ in range(repeats):
                call()

        if not captured:
            return self.run(calls, repeats, warm, "calls")
        pool, before = self.cuda.graph_pool_handle(), self.cuda.current_stream()
        try:
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph, pool=pool, stream=self.stream):
                calls()
        except RuntimeError as error:
            self.cuda.set_stream(before)  # a capture that ends in an error leaves another
            self.cuda.synchronize()
            if self.cuda is torch.cuda:
                leave_pool(pool)
            return self.run(calls, repeats, warm, f"calls, not a graph: {said(error)}")
        return self.run(graph.replay, repeats, warm, "graph")

    def run(self, work: Call, repeats: int, warm: bool, method: str) -> Run:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            with self.cuda.stream(self.stream):
                (work if warm else self.flush)()
                start.record()
                work()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

        return Run(seconds, method)


def flush_of(size: int) -> Call:
    """size: bytes."""
    return torch.zeros(size // 4, dtype=torch.float32, device="cuda").sum


def leave_pool(pool: Any) -> None:
    """Of a capture that failed: before 2.12 torch may go on allocating there, and refuse every
    later capture (pytorch/pytorch#180395)."""
    if torch.__version__ < "2.12":
        with suppress(RuntimeError):  # where the capture itself came to its end, nothing is left
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def take_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
    """Every run once in each round, so that what slows the machine down slows all of them; each
    round begins with another, so that none always runs after the same one."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(runs[name].seconds())
    return {name: Timing(values) for name, values in seconds.items()}


def rounds_within(seconds: float, runs: Mapping[str, Run], fewest: int, most: int) -> int:
    """How many rounds of all runs this much time allows, by one that is not counted."""
    start = time.perf_counter()
    for run in runs.values():
        run.seconds()
    return max(fewest, min(most, int(seconds / (time.perf_counter() - start))))
