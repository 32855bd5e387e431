"""One side of a comparison of two revisions: times ours as asked, in the checkout on its path.

bench/gate.py runs it twice, with PYTHONPATH at the base and at the head, and with the modules that
add workloads of a user's. Lines of JSON go in and out. The first names the {"package"}, and has an
"error" where a module cannot be imported. Then {"op", "values", "direction", "rounds"} prepares a
case where it is another than before, and is answered with {"seconds": […]}, or {"error": "…"} where
it fails, with "unknown" beside it where this revision has no such case.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

import tossup
from tossup.autotune.errors import said
from tossup.autotune.timing import CpuStopwatch, GpuStopwatch, Run
from tossup.autotune.workloads import Prepared, Workload, build, first_results


class Unknown(Exception):
    """A case that this revision does not have: its op, a key, a value or the direction."""


class Worker:
    def __init__(self, device: str):
        self.device = device
        self.stopwatch = GpuStopwatch() if device == "cuda" else CpuStopwatch()
        self.workload: tuple[Workload, Prepared] | None = None
        self.prepared: tuple[str, Run] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        rounds = request.pop("rounds")
        case = json.dumps(request, sort_keys=True)
        if self.prepared is None or self.prepared[0] != case:
            self.prepared = None  # frees the memory of the last case first
            try:
                self.prepared = case, self.prepare(**request)
            except Unknown as error:
                return {"error": said(error), "unknown": True}
            except Exception as error:  # of any library: the gate says which case it was
                return {"error": said(error)}
        run = self.prepared[1]
        return {"seconds": [run.seconds() for _ in range(rounds)]}

    def prepare(self, op: str, values: dict[str, Any], direction: str) -> Run:
        workload = find(op, values, direction)
        if self.workload is None or self.workload[0] != workload:
            self.workload = None  # frees the memory of the last one first
            self.workload = workload, workload.prepare(self.device)
        prepared = self.workload[1]
        with self.stopwatch.here():
            wrong = prepared.wrong(first_results(prepared.ours[direction]))
        if wrong:
            raise ValueError(f"not timed: {wrong}")
        return self.stopwatch.prepare(prepared.ours[direction])


def find(op: str, values: dict[str, Any], direction: str) -> Workload:
    """The workload of a case, or Unknown."""
    try:
        workload = build(op, values)
    except ValueError as error:
        raise Unknown(str(error)) from error
    if direction not in workload.directions:
        raise Unknown(f"{op} takes {', '.join(workload.directions)}, got {direction!r}")
    return workload


def import_all(modules: Sequence[str]) -> dict[str, str]:
    """By this file, as the package of a base may not know how."""
    for module in modules:
        try:
            import_module(module)
        except Exception as error:  # of any library: the gate tells
            return {"error": f"{module} cannot be imported: {said(error)}"}
    return {}


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, compilers too, must not mix in
    device, *modules = sys.argv[1:]
    worker = Worker(device)
    print(json.dumps({"package": tossup.__file__} | import_all(modules)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
