"""`tossup tune`: the launch configurations of an op on a shape of the user's, or of all shipped."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from ..autotune.errors import WrongResult
from ..autotune.offline import SHARED_MEMORY, fusing
from ..autotune.pruning import Survey, survey_all
from ..autotune.timing import GpuStopwatch, Stopwatch, Timing, rounds_within, take_turns
from ..autotune.tune import Machine, Prune, list_survivors, tune
from ..autotune.workloads import Workload, shipped
from ..kernels.configs import path_of, slug
from ..kernels.configs.file import read
from .benchmark import parse
from .errors import ConfigError
from .files import write_atomically

SECONDS = 1.0  # of a round of candidates that are timed together
ROUNDS = 7, 200  # fewest and most


def run_tuning(
    words: Sequence[str], archs: Sequence[str], again: bool, output: Path | None
) -> None:
    """Measure on the GPU that is there; or list for `archs`, without measuring anything.

    words: OP key=value …; none stands for every workload that is shipped.
    Raises ConfigError where a word or a file is wrong, and where there is neither GPU nor arch.
    """
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET must be unset: the interpreter has no configurations")
    workloads = workloads_of(words)
    if archs:
        for arch in map(number_of, archs):
            with pruning(arch) as prune:
                for workload in workloads:
                    tqdm.write(f"{workload.name}, sm_{arch}")
                    list_survivors(workload, arch, prune, tqdm.write)
        tqdm.write("nothing was measured: a listing compiles, and runs nothing")
        return
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is here to measure on; --arch sm_90 lists what would be measured")
    measure_all(workloads, again, output)


def measure_all(workloads: Sequence[Workload], again: bool, output: Path | None) -> None:
    gpu = torch.cuda.get_device_name()
    arch = number_of("sm_{}{}".format(*torch.cuda.get_device_capability()))
    path = output or path_of(slug(gpu))
    refuse_malformed(path)
    stopwatch = GpuStopwatch()
    with pruning(arch) as prune, stopwatch.here():
        machine = Machine(gpu, prune, partial(measure, stopwatch), write_atomically, tqdm.write)
        wrong = []
        for workload in workloads:
            tqdm.write(workload.name)
            try:
                tune(workload, workload.prepare("cuda"), path, machine, again)
            except WrongResult as error:  # of one workload, which the others need not wait for
                tqdm.write(str(error))
                wrong.append(error)
    tqdm.write(str(path))
    if wrong:
        raise wrong[0]


def refuse_malformed(path: Path) -> None:
    """Before anything is measured."""
    try:
        if path.exists():
            list(read(path))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def workloads_of(words: Sequence[str]) -> list[Workload]:
    if not words:
        return [workload for workload in shipped("cuda") if workload.active is None]
    workload, directions = parse(words)
    if directions:
        raise ConfigError("direction is no key of tune, which takes all directions of an op")
    if workload.samples == 0:
        raise ConfigError("active takes at least one sample: what is gated off takes no time")
    return [workload]


def number_of(arch: str) -> int:
    """sm_90 as 90."""
    numbers = {f"sm_{number}": number for number in SHARED_MEMORY}
    if arch not in numbers:
        raise ConfigError(f"tune knows the architectures {', '.join(numbers)}, got {arch}")
    return numbers[arch]


@contextmanager
def pruning(arch: int) -> Iterator[Prune]:
    """Surveys by a process for each core, with a bar that shows how many are left. What they
    compile is found again by what is launched in this context."""
    with fusing(), ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:

        def prune(workload: Workload, direction: str, kernel: str, found: Sequence) -> Iterator:
            surveys: Iterator[Survey] = survey_all(pool, arch, workload, direction, kernel, found)
            bar = tqdm(surveys, kernel, len(found), unit="candidate", leave=False, disable=None)
            return iter(bar)

        yield prune


def measure(stopwatch: Stopwatch, calls: Sequence[Callable[[], object]]) -> list[Timing]:
    """All in graphs, or none: a graph costs the host less, which is no merit of a kernel."""
    runs = {str(place): stopwatch.prepare(call) for place, call in enumerate(calls)}
    if len({run.method == "graph" for run in runs.values()}) > 1:
        runs.clear()  # graphs keep memory, of which there may be too little
        runs = {
            str(place): stopwatch.prepare(call, captured=False) for place, call in enumerate(calls)
        }
    rounds = rounds_within(SECONDS, runs, *ROUNDS)
    return [*take_turns(runs, rounds).values()]
