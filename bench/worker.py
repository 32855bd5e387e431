"""One side of a comparison of two revisions: times ours as asked, in the checkout on its path.

bench/gate.py runs it twice, with PYTHONPATH at the base and at the head. Lines of JSON go in and
out: {"op", "values", "direction", "rounds"} prepares a case where it is another than before, and is
answered with {"seconds": […]}, or {"error": "…"} where this revision has no such case.
"""

import json
import sys
from typing import Any

import torch

import tossup
from tossup.autotune.timing import CpuStopwatch, GpuStopwatch, Run
from tossup.autotune.workloads import build


class Worker:
    def __init__(self, device: str):
        self.device = device
        self.stopwatch = GpuStopwatch() if device == "cuda" else CpuStopwatch()
        self.prepared: tuple[str, Run] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        rounds = request.pop("rounds")
        case = json.dumps(request, sort_keys=True)
        if self.prepared is None or self.prepared[0] != case:
            self.prepared = None  # frees the memory of the last case first
            try:
                self.prepared = case, self.prepare(**request)
            except ValueError as error:
                return {"error": str(error)}
        run = self.prepared[1]
        return {"seconds": [run.seconds() for _ in range(rounds)]}

    def prepare(self, op: str, values: dict[str, Any], direction: str) -> Run:
        prepared = build(op, values).prepare(self.device)
        with self.stopwatch.here():
            wrong = prepared.wrong(prepared.ours[direction]())
        if wrong:
            raise ValueError(f"not timed: {wrong}")
        return self.stopwatch.prepare(prepared.ours[direction])


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix in
    worker = Worker(sys.argv[1])
    print(json.dumps({"package": tossup.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
