"""Races every shipped workload and writes one record: `python -m bench.record [--device cuda]`.

Each op has a process of its own, so that one that fails, or outlasts its time, takes no other
along: what it raced before is kept. A case whose result is wrong has a reason in place of times,
and the exit code is 1. `--workloads` adds a user's, in the shapes that their module adds to ON_CPU
or ON_GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import host, startup
from bench.options import add_workloads, seconds
from bench.records import RESULTS, new_record, write_record
from tossup.autotune.errors import said
from tossup.autotune.races import Race, table
from tossup.autotune.workloads import OPS, op_named, shipped
from tossup.supernet.benchmark import add_ops
from tossup.supernet.devices import device_of

INTERRUPTED = "interrupted, and what comes after it was not raced"


def race_op(op: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    for workload in shipped(device.type):
        if workload.op != op:
            continue
        race = None
        for direction in workload.directions:
            try:
                race = race or Race(workload, device, seconds)
                yield race.run(direction)
            except Exception as error:  # of any library: the record tells, and the others go on
                yield {"workload": workload.name, "direction": direction, "failed": said(error)}


def in_process(op: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a process that races one op has done by the time it ends, or is ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "races.jsonl")
        command = [
            sys.executable, "-m", "bench.record", "--device", options.device, "--seconds",
            str(options.seconds), "--op", op, "--append", str(path),
            *(f"--workloads={module}" for module in options.workloads),
        ]  # fmt: skip
        failed = None
        try:
            done = subprocess.run(command, timeout=options.limit)
            if done.returncode:
                failed = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"what was left after {options.limit:g} s was not raced"
        except KeyboardInterrupt:
            failed = INTERRUPTED
        races = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
    if failed:
        races.append({"workload": op, "direction": "all", "failed": failed})
    return races


def parse_arguments() -> argparse.Namespace:
    """Options; what is wrong ends the process with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of one race; 2 by default")
    parser.add_argument("--limit", type=seconds, default=1200.0, help="seconds for each op")
    parser.add_argument("--op", nargs="+", default=[], help="all by default")
    add_workloads(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, help="bench/results by default")
    parser.add_argument("--append", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        add_ops(options.workloads)
        device_of(options.device, "--device")
        options.op = [op_named(name) for name in options.op or OPS]
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if options.append:
        with options.append.open("a") as file:
            for result in race_op(options.op[0], device, options.seconds):
                print(json.dumps(result), file=file, flush=True)
                print(table([result]), flush=True)
        os._exit(0)  # all is written: what threads of libraries do at the end is no race's failure
    races: list[dict[str, Any]] = []
    record = new_record(device, races)
    if device.type == "cpu":
        record |= {"host": host.measure(), "start": startup.measure()}
    for op in options.op:
        races += in_process(op, options)
        path = write_record(record, options.output)  # after each op, lest the next lose them all
        if races and races[-1].get("failed") == INTERRUPTED:
            break
    print(path)
    failed = [r for r in races if "failed" in r]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
