"""Searches the launch configurations of a workload: `tossup tune`.

For each kernel that a workload launches, the candidates that survive pruning are run, compared with
the float64 reference, and timed, turn by turn with the heuristic. The fastest is timed once more,
against the heuristic alone, as the fastest of many owes some of its lead to chance. If it wins by
more than the noise of both, it goes into the GPU's file, and otherwise that the heuristic stays.

The samples of a workload are selected: a kernel that is gated off would time nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import TritonError

from ..kernels import configs
from ..kernels.configs import Config, Entry, Key
from ..kernels.configs.file import read, written
from .candidates import candidates
from .errors import WrongResult, said
from .offline import offline
from .on_meta import calls_on_meta, launching
from .pruning import Survey
from .timing import Timing
from .workloads import Calls, Prepared, Results, Workload, first_results

TOGETHER = 8  # candidates that are timed turn by turn

Call = Callable[[], Any]
Measure = Callable[[Sequence[Call]], Sequence[Timing]]  # of each call, runs taken turn by turn
Prune = Callable[[Workload, str, str, Sequence[Config]], Iterator[Survey]]


@dataclass(frozen=True)
class Task:
    """One kernel of a workload. direction: the call that launches it."""

    direction: str
    key: Key
    heuristic: Config

    @property
    def name(self) -> str:
        return f"{self.key.kernel} ({self.direction})"


@dataclass(frozen=True)
class Machine:
    """What the tuner needs of the world around it.

    gpu: the name that the driver gives it. prune: surveys of candidates, in their order. measure:
    times calls. write: puts text into a file, whole or not at all. say: shows progress.
    """

    gpu: str
    prune: Prune
    measure: Measure
    write: Callable[[Path, str], None]
    say: Callable[[str], None] = print


def tasks_of(workload: Workload, calls: Calls) -> list[Task]:
    """A task for each key that a workload's launches ask for, in the order of its directions."""
    found: dict[Any, Task] = {}
    for direction in workload.directions:
        if "+" in direction:  # what its parts have launched
            continue
        with configs.asked() as asked:
            calls[direction]()
        for key, heuristic in asked:
            found.setdefault(key.same, Task(direction, key, heuristic))
    return list(found.values())


def tune(
    workload: Workload, prepared: Prepared, path: Path, machine: Machine, again: bool = False
) -> None:
    """Find the fastest configuration of each kernel of a workload, and write it to a GPU's file.

    path: the file; its other entries stay. again: whether to measure what the file holds already,
    measured with the same versions of torch and Triton. Each kernel is written as soon as it is
    found, so that a tuner that was killed goes on where it was.
    Raises ValueError for a workload that is gated off and where the file is malformed, and
    WrongResult where the heuristic's own result is wrong.
    """
    if workload.samples == 0:
        raise ValueError("active takes at least one sample: what is gated off takes no time")
    for task in tasks_of(workload, prepared.ours):
        entries = {e.key.same: e for e in read(path)} if path.exists() else {}
        known = entries.get(task.key.same)
        if known and not again and (known.torch, known.triton) == versions():
            machine.say(f"{task.name}: measured on {known.date}")
            continue
        entry = contest(workload, prepared, task, machine)
        entries = {e.key.same: e for e in read(path)} if path.exists() else {}  # as it is by now
        entries[task.key.same] = entry
        machine.write(path, written(machine.gpu, entries.values()))
        configs.forget()


def contest(workload: Workload, prepared: Prepared, task: Task, machine: Machine) -> Entry:
    """Measure a kernel's candidates. Every one of them runs what the others run, but for it."""
    kernel = task.key.kernel
    surveys = survivors(workload, task, machine.prune, machine.say)
    call = prepared.ours[task.direction]
    first = partial(first_results, call)
    as_is = partial(call_with, kernel, task.heuristic, call)
    sentence = fault(partial(call_with, kernel, task.heuristic, first), prepared)
    if sentence is not None:
        raise WrongResult(f"{workload.name}, {task.name}: untuned, {sentence}")
    right, wrong = [], 0
    for survey in surveys:
        sentence = fault(partial(call_with, kernel, survey.config, first), prepared)
        if sentence is None:
            right.append((survey.config, partial(call_with, kernel, survey.config, call)))
        else:
            wrong += 1
            machine.say(f"  refused {in_words(survey.config)}: {sentence}")
    best, ours, theirs = fastest(as_is, right, machine.measure)
    gain = theirs.median / ours.median
    machine.say(
        f"  {len(right)} measured, {wrong} refused; "
        + (f"{gain:.2f} × the heuristic's speed: {in_words(best)}" if best else "heuristic stays")
    )
    of_torch, of_triton = versions()
    return Entry(
        key=task.key,
        config=best,
        workload=workload.name,
        milliseconds=significant(1e3 * ours.median),
        heuristic=significant(1e3 * theirs.median),
        noise=significant(theirs.spread),
        torch=of_torch,
        triton=of_triton,
        date=date.today().isoformat(),
    )


def survivors(
    workload: Workload, task: Task, prune: Prune, say: Callable[[str], None]
) -> list[Survey]:
    """The candidates that survive pruning; says how many there were, and why others did not."""
    found = candidates(task.key, task.heuristic)
    surveys = list(prune(workload, task.direction, task.key.kernel, found))
    pruned = Counter(survey.pruned for survey in surveys if survey.pruned)
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(pruned.items()))
    say(
        f"{task.name}: {len(found)} candidates, {pruned.total()} pruned"
        + (f" ({reasons})" if reasons else "")
    )
    return [survey for survey in surveys if not survey.pruned]


def fastest(
    heuristic: Call, others: Sequence[tuple[Config, Call]], measure: Measure
) -> tuple[Config | None, Timing, Timing]:
    """The fastest of all, None being the heuristic, its timing, and that of the heuristic.

    Some at a time, each time beside the heuristic, as a captured call keeps its results.
    """
    rated: list[tuple[float, Config, Call]] = []
    for group in batched(others, TOGETHER):
        theirs, *timings = measure([heuristic, *(call for _, call in group)])
        for timing, (config, call) in zip(timings, group, strict=True):
            rated.append((timing.median / theirs.median, config, call))
    if not rated:
        (alone,) = measure([heuristic])
        return None, alone, alone
    _, config, call = min(rated, key=lambda rating: rating[0])
    theirs, ours = measure([heuristic, call])
    if ours.median * (1 + ours.spread) < theirs.median * (1 - theirs.spread):
        return config, ours, theirs
    return None, theirs, theirs


def batched(others: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(others), size):
        yield others[start : start + size]


def list_survivors(
    workload: Workload, arch: int, prune: Prune, say: Callable[[str], None] = print
) -> None:
    """What would be measured on a GPU of compute capability `arch`, found out without one."""
    calls = calls_on_meta(workload)
    with offline(arch), configs.of_gpu(None), launching():
        tasks = tasks_of(workload, calls)
    for task in tasks:
        for survey in survivors(workload, task, prune, say):
            say(
                f"  {in_words(survey.config)}: {survey.registers} registers, "
                f"{survey.shared} bytes of shared memory, {survey.resident} programs at once"
            )


def call_with(kernel: str, config: Config, call: Call) -> Any:
    with configs.forced(kernel, config):
        return call()


def fault(call: Callable[[], Results], prepared: Prepared) -> str | None:
    """What is wrong with a call's results, as a sentence; None if nothing is.

    Memory is filled with NaN before, lest the last call's results be found where this one wrote
    none.
    """
    try:
        with poisoned_memory():
            results = call()
    except torch.OutOfMemoryError:  # no candidate's fault
        raise
    except (TritonError, RuntimeError) as error:  # code that ptxas or the driver refuses
        return f"it does not run: {said(error)}"
    sentence = prepared.wrong(results)
    for result in results.values():
        result.detach().fill_(float("nan"))
    return sentence


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch fills what it allocates with NaN, as its deterministic mode does."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def versions() -> tuple[str, str]:
    return torch.__version__, triton.__version__


def in_words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def significant(number: float) -> float:
    """To four digits: a file is read by people too."""
    return float(f"{number:.4g}")
