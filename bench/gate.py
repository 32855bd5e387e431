"""Gates: exit code 1 where a kernel takes more, or something got slower beyond measured noise.

    python -m bench.gate                          without a GPU: resources, ratios, host, start
    python -m bench.gate --base REV [--device …]  two revisions side by side, case by case

Without --base: what the offline compiler reports of every shipped launch against the committed
resources; times of ours by those of peers on the CPU, what calls take the host on their way to a
GPU, and the cost of starting, against the newest committed record of the same CPU. Ratios, not
times, so that a busy machine weighs on both.

With --base: a worktree of REV and the working tree take turns, in a process each that stays, so
that both meet the same clocks and temperatures. autotune/regression.py says what counts as slower;
what seems slower is measured once more before it fails. `--base last` is what the newest committed
record of the same device was taken of.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from bench import host, startup
from bench.records import RESULTS, newest, newest_first
from tossup.autotune.inspection import inspect
from tossup.autotune.machine import name_of
from tossup.autotune.races import OURS, race
from tossup.autotune.regression import Verdict, compare_pairs, compare_samples
from tossup.autotune.resources import changes
from tossup.autotune.workloads import Workload, shipped
from tossup.kernels.configs import slug
from tossup.supernet.benchmark import parse
from tossup.supernet.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = ROOT / "tests/autotune/resources"

PAIRS = 12  # turns of base and head
LEAST = {"cuda": 1.03, "cpu": 1.10}  # the least factor that matters between two revisions
LEAST_RATIO = 1.30  # the same against a record, which was taken at another time
LEAST_START = 1.50
NEGLIGIBLE = 0.05  # of `import torch`: what begins faster than that may change

Answer = dict[str, Any]
Ask = Callable[[Answer], Answer]


def check_resources(archs: Sequence[int] = (90, 80)) -> list[str]:
    """What is worse than committed for this version of Triton, or that nothing was committed; what
    is better is only printed."""
    committed = RESOURCES / f"{triton.__version__}.json"
    if not committed.exists():
        print(f"resources: none were committed for Triton {triton.__version__}")
        return [
            f"{committed.name} is not there: python -m tests.autotune.test_inspection writes it"
        ]
    worse = []
    for is_worse, sentence in changes(json.loads(committed.read_text()), inspect(archs)):
        print(f"resources: {'worse' if is_worse else 'better, and to be committed'}: {sentence}")
        worse += [sentence] if is_worse else []
    return worse


def check_ratios(
    record: dict[str, Any], workloads: Sequence[Workload], seconds: float
) -> list[str]:
    """What takes longer by a peer's time than in the record."""
    worse = []
    before = {
        (r["workload"], r["direction"]): ratios_of(r) for r in record["races"] if "failed" not in r
    }
    for workload in workloads:
        for direction in workload.directions:
            if (workload.name, direction) not in before:
                print(f"ratios: {workload.name}, {direction}: not in the record: not compared")
                continue
            known = before[workload.name, direction]

            def measure(workload: Workload = workload, direction: str = direction) -> Any:
                return ratios_of(*race(workload, torch.device("cpu"), [direction], seconds))

            what = f"{workload.name}, {direction}, by "
            for peer, old, new in compared("ratios", what, known, measure()):
                found = compare_samples(old, new, LEAST_RATIO)
                if found.slower:
                    found = compare_samples(old, measure()[peer], LEAST_RATIO)
                worse += report("ratios", what + peer, found)
    return worse


def ratios_of(race: dict[str, Any]) -> dict[str, list[float]]:
    """Ours by each peer, round by round, as both ran in each."""
    timed = {name: e["seconds"] for name, e in race["entrants"].items() if "untimed" not in e}
    ours = timed.pop(OURS)
    return {
        name: [mine / theirs for mine, theirs in zip(ours, seconds, strict=True)]
        for name, seconds in timed.items()
    }


def compared(
    gate: str, what: str, before: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """What was measured both times; of what is no longer, as where a peer is missing, it tells."""
    for name in before:
        if name in now:
            yield name, before[name], now[name]
        else:
            print(f"{gate}: {what}{name}: not measured here: not compared")


def check_host(record: dict[str, Any]) -> list[str]:
    """What takes the host longer on its way to a GPU, in idle launches, than in the record."""
    if "host" not in record:
        print("host: the record has none: not compared; `make record` makes one")
        return []
    worse = []
    for what, old, new in compared("host", "", record["host"], host.measure()):
        found = compare_samples(old, new, LEAST_RATIO)
        if found.slower:
            found = compare_samples(old, host.measure()[what], LEAST_RATIO)
        worse += report("host", what, found)
    return worse


def check_start(record: dict[str, Any]) -> list[str]:
    """What takes longer, by `import torch`, than in the record."""
    worse = []

    def compare(old: list[float], new: list[float]) -> Verdict:
        old, new = ([max(share, NEGLIGIBLE) for share in shares] for shares in (old, new))
        return compare_samples(old, new, LEAST_START)

    for what, old, new in compared("start", "", record["start"], startup.measure()):
        found = compare(old, new)
        if found.slower:
            found = compare(old, startup.measure()[what])
        worse += report("start", what, found)
    return worse


def check_revisions(
    base: Ask, head: Ask, workloads: Sequence[Workload], least: float, rounds: int
) -> list[str]:
    """What takes longer at the head than at the base."""
    worse = []
    for workload in workloads:
        for direction in workload.directions:
            values = asdict(workload)
            request = {"op": workload.op, "values": values, "direction": direction}
            what = f"{workload.name}, {direction}"
            try:
                found = compare_in_turns(base, head, request, least, rounds)
                if found.slower:
                    found = compare_in_turns(base, head, request, least, 2 * rounds)
            except NotTimed as reason:
                print(f"revisions: {what}: {reason}")
                worse += [f"{what}: {reason}"] if reason.side == "head" else []
                continue
            worse += report("revisions", what, found)
    return worse


class NotTimed(Exception):
    """side: base or head, whichever does not know the case or gets it wrong."""

    def __init__(self, side: str, reason: str):
        super().__init__(f"{side}: {reason}")
        self.side = side


def compare_in_turns(base: Ask, head: Ask, request: Answer, least: float, rounds: int) -> Verdict:
    """A pair is the fastest of a few rounds on each side, as noise only ever adds; who goes first
    alternates."""
    sides = {"base": base, "head": head}
    best: dict[str, list[float]] = {"base": [], "head": []}
    for turn in range(PAIRS + 1):
        for side in sorted(sides, reverse=turn % 2 == 1):
            answer = sides[side](request | {"rounds": rounds})
            if "error" in answer:
                raise NotTimed(side, answer["error"])
            if turn > 0:  # the first turn warms up
                best[side].append(min(answer["seconds"]))
    return compare_pairs(best["base"], best["head"], least)


def report(gate: str, what: str, found: Verdict) -> list[str]:
    sentence = f"{what}: {found}"
    print(f"{gate}: {'SLOWER: ' if found.slower else ''}{sentence}", flush=True)
    return [sentence] if found.slower else []


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a revision, beside this one, gone afterwards; or the folder that it names."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base")
        git = ["git", "-C", str(ROOT), "worktree"]
        if subprocess.run([*git, "add", "--quiet", "--detach", path, revision]).returncode:
            raise SystemExit(f"gate: --base takes a revision of git or a folder, got {revision!r}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", path], check=True)


@contextmanager
def worker(checkout: Path, device: str) -> Iterator[Ask]:
    """A process of bench/worker.py, of this revision, on the package of a checkout."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "bench/worker.py", device],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        cwd=checkout, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def answer() -> Answer:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"gate: the worker at {checkout} ended; its last lines are above")
        return json.loads(line)

    def ask(request: Answer) -> Answer:
        print(json.dumps(request), file=process.stdin, flush=True)
        return answer()

    try:
        package = Path(answer()["package"]).resolve()
        if not package.is_relative_to(checkout.resolve()):
            raise SystemExit(f"gate: the worker imported {package}, not the package of {checkout}")
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def recorded_revision(device: str) -> str:
    """The commit that this machine's device was last recorded at."""
    folder = RESULTS / slug(name_of(torch.device(device)))
    for record in newest_first(folder):
        commit = record.get("commit")
        if commit and not commit.endswith("-dirty"):
            return commit
    raise SystemExit(f"gate: --base last takes a record of a commit, and {folder} holds none")


def compare_revisions(
    revision: str, device: str, workloads: Sequence[Workload], rounds: int
) -> list[str]:
    with ExitStack() as stack:
        base = stack.enter_context(worktree(revision))
        sides = [stack.enter_context(worker(checkout, device)) for checkout in (base, ROOT)]
        return check_revisions(*sides, workloads, LEAST[device], rounds)


def compare_with_records(seconds: float) -> list[str]:
    worse = check_resources()
    folder = RESULTS / slug(name_of(torch.device("cpu")))
    if not folder.exists():
        print(f"the rest: {folder.name} has no record: not compared; `make record` makes one")
        return worse
    record = newest(folder)
    worse += check_ratios(record, shipped("cpu"), seconds)
    return worse + check_host(record) + check_start(record)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--base", metavar="REV", help="a revision, a folder, or last")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of --base; cuda if it is there")
    parser.add_argument(
        "--case", action="append", default=[], metavar="'OP key=value …'",
        help="with --base: a shape of yours, as tossup bench takes it; not those shipped",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="of each turn; 5 by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a race; 2 by default")
    options = parser.parse_args(arguments)
    try:
        cases = [parse(words.split())[0] for words in options.case]
    except ConfigError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    if options.base:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        base = recorded_revision(device) if options.base == "last" else options.base
        worse = compare_revisions(base, device, cases or shipped(device), options.rounds)
    else:
        worse = compare_with_records(options.seconds)
    print(f"gate: {len(worse)} worse" + "".join(f"\n  {sentence}" for sentence in worse))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
