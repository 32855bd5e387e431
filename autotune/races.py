"""A race: ours and its peers on one workload, checked first, then timed in turns."""

from collections.abc import Sequence
from typing import Any

import torch

from .errors import WrongResult, said
from .machine import name_of
from .peaks import PEAKS
from .timing import (
    WARM_BELOW,
    Call,
    CpuStopwatch,
    GpuStopwatch,
    Run,
    Stopwatch,
    Timing,
    rounds_within,
    take_turns,
)
from .workloads import Calls, MissingPeer, Prepared, Workload, first_results

OURS = "ours"
FEWEST, MOST = 5, 50  # rounds


def race(
    workload: Workload, device: torch.device, directions: Sequence[str] = (), seconds: float = 10.0
) -> list[dict[str, Any]]:
    """The records of some directions, or of all; see Race."""
    started = Race(workload, device, seconds)
    return [started.run(direction) for direction in directions or workload.directions]


class Race:
    """Ours and every peer on one workload, prepared once for all of its directions.

    seconds: that one direction should take, without what prepares it. stopwatch: by the clock on a
    CPU; by events, with a cold L2 cache, on a GPU.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        seconds: float,
        stopwatch: Stopwatch | None = None,
    ):
        self.workload, self.device, self.seconds = workload, device, seconds
        on_gpu = device.type == "cuda"
        self.stopwatch = stopwatch or (GpuStopwatch() if on_gpu else CpuStopwatch())
        self.prepared = workload.prepare(device)
        self.peers, self.missing = gather(self.prepared)

    def run(self, direction: str) -> dict[str, Any]:
        """Check and time one direction. The record holds, in SI units:

            workload, direction, floor, binds  seconds of the floor and what binds it; null where
                                               the device's peaks are not known
            entrants   for ours and each peer: median, p20, p80, seconds of every round, tflops,
                       gbps, share (of the floor), ratio (its median by ours), timer, l2; `warm`,
                       the median with a warm L2 cache, where less than 100 µs; or `untimed`, the
                       reason
        Raises WrongResult where ours is wrong.
        """
        with self.stopwatch.here():
            entrants, excluded = check(self.prepared, self.peers, direction)
        calls = {name: calls[direction] for name, calls in entrants.items()}
        runs = {name: self.stopwatch.prepare(call) for name, call in calls.items()}
        timings = take_turns(runs, rounds_within(self.seconds, runs, FEWEST, MOST))
        record = record_of(self.workload, direction, self.device, runs, timings)
        if isinstance(self.stopwatch, GpuStopwatch):
            add_warm(record, calls, self.stopwatch)
        for name, reason in (self.missing | excluded).items():
            record["entrants"][name] = {"untimed": reason}
        return record


def gather(prepared: Prepared) -> tuple[dict[str, Calls], dict[str, str]]:
    """The peers that are there, and why the others are not."""
    there, missing = {}, {}
    for name, make in prepared.peers.items():
        try:
            there[name] = make()
        except MissingPeer as reason:
            missing[name] = str(reason)
    return there, missing


def check(
    prepared: Prepared, peers: dict[str, Calls], direction: str
) -> tuple[dict[str, Calls], dict[str, str]]:
    """Who may be timed, ours first, and why the others may not: a peer that refuses this shape,
    or computes something else."""
    wrong = prepared.wrong(first_results(prepared.ours[direction]))
    if wrong:
        raise WrongResult(wrong)
    entrants, excluded = {OURS: prepared.ours}, {}
    for name, calls in peers.items():
        try:
            wrong = prepared.wrong(first_results(calls[direction]))
        except Exception as error:  # of any library: what it refuses is its reason
            wrong = f"raises {said(error)}"
        if wrong:
            excluded[name] = wrong
        else:
            entrants[name] = calls
    return entrants, excluded


def record_of(
    workload: Workload,
    direction: str,
    device: torch.device,
    runs: dict[str, Run],
    timings: dict[str, Timing],
) -> dict[str, Any]:
    parts, peak = workload.parts(direction), PEAKS.get(name_of(device))
    floor = sum(peak.seconds(part) for part in parts) if peak else None
    moved, flops = sum(part.bytes for part in parts), workload.flops(direction)
    entrants = {}
    for name, timing in timings.items():
        entrants[name] = {
            "median": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "seconds": list(timing.seconds),
            "tflops": flops / timing.median / 1e12,
            "gbps": moved / timing.median / 1e9,
            "share": floor / timing.median if floor else None,
            "ratio": timing.median / timings[OURS].median,
            "timer": runs[name].method,
            "l2": "cold" if device.type == "cuda" else None,
        }
    return {
        "workload": workload.name,
        "direction": direction,
        "floor": floor,
        "binds": [peak.binds(part) for part in parts] if peak else None,
        "entrants": entrants,
    }


def add_warm(record: dict[str, Any], calls: dict[str, Call], stopwatch: GpuStopwatch) -> None:
    """Times with a warm L2 cache, where they are short enough for that to tell."""
    short = [name for name, e in record["entrants"].items() if e["median"] < WARM_BELOW]
    if not short:
        return
    runs = {name: stopwatch.prepare(calls[name], warm=True) for name in short}
    for name, timing in take_turns(runs, FEWEST).items():
        record["entrants"][name]["warm"] = timing.median


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records for people: a heading for each race, and a line for each entrant.

    One that holds `failed` in place of entrants has that reason."""
    lines = []
    for record in records:
        lines.append(f"{record['workload']}, {record['direction']}")
        if "failed" in record:
            lines.append(f"    not timed: {record['failed']}")
            continue
        if record["floor"]:
            binds = " + ".join(kind.replace("_", " ") for kind in record["binds"])
            lines.append(f"    {'floor':<28}{milliseconds(record['floor'])}  ({binds})")
        for name, entrant in record["entrants"].items():
            if "untimed" in entrant:
                lines.append(f"    {name:<28}not timed: {entrant['untimed']}")
                continue
            spread = f"{milliseconds(entrant['p20'])} to {milliseconds(entrant['p80'])}"
            words = [f"{milliseconds(entrant['median'])}  ({spread})"]
            if name != OURS:
                words.append(f"{entrant['ratio']:.2f} × our time")
            if entrant["tflops"]:
                words.append(f"{entrant['tflops']:.3g} TFLOP/s")
            words.append(f"{entrant['gbps']:.3g} GB/s")
            if entrant["share"]:
                words.append(f"{entrant['share']:.0%} of the floor")
            if "warm" in entrant:
                words.append(f"warm {milliseconds(entrant['warm'])}")
            lines.append(f"    {name:<28}{', '.join(words)}")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
