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

A gate that compared nothing fails, and so does one whose base fails a case, unless it does not know
the case yet.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import triton

from bench import host, startup
from bench.checkouts import ROOT, Answer, Ask, end_on_sigterm, worker, worktree
from bench.options import add_workloads, count, seconds
from bench.records import RESULTS, newest, newest_first
from bench.tally import Tally
from tossup.autotune.errors import WrongResult, said
from tossup.autotune.inspection import inspect
from tossup.autotune.machine import name_of
from tossup.autotune.races import OURS, race
from tossup.autotune.regression import Verdict, compare_pairs, compare_samples
from tossup.autotune.resources import changes
from tossup.autotune.workloads import Workload, shipped
from tossup.kernels.configs import slug
from tossup.supernet.benchmark import add_ops, parse
from tossup.supernet.devices import device_of
from tossup.supernet.errors import ConfigError

RESOURCES = ROOT / "tests/autotune/resources"

Case = tuple[Workload, str]  # in one direction

PAIRS = 12  # turns of base and head
LEAST = {"cuda": 1.03, "cpu": 1.10}  # the least factor that matters between two revisions
LEAST_RATIO = 1.30  # the same against a record, which was taken at another time
LEAST_START = 1.50
NEGLIGIBLE = 0.05  # of `import torch`: what begins faster than that may change


def check_resources(archs: Sequence[int] = (90, 80)) -> Tally:
    """What is worse than committed for this version of Triton, or that nothing was committed; what
    is better is only printed."""
    tally = Tally("resources")
    committed = RESOURCES / f"{triton.__version__}.json"
    if not committed.exists():
        print(f"resources: none were committed for Triton {triton.__version__}")
        tally.worse.append(
            f"{committed.name} is not there: python -m tests.autotune.test_inspection writes it"
        )
        return tally
    before, now = json.loads(committed.read_text()), inspect(archs)
    tally.cases, tally.compared = len(before.keys() | now.keys()), len(before.keys() & now.keys())
    for is_worse, sentence in changes(before, now):
        print(f"resources: {'worse' if is_worse else 'better, and to be committed'}: {sentence}")
        tally.worse += [sentence] if is_worse else []
    return tally


def check_ratios(record: dict[str, Any], workloads: Sequence[Workload], seconds: float) -> Tally:
    """What takes longer by a peer's time than in the record."""
    tally = Tally("ratios")
    before = {
        (r["workload"], r["direction"]): ratios_of(r) for r in record["races"] if "failed" not in r
    }
    for workload in workloads:
        for direction in workload.directions:
            if (workload.name, direction) not in before:
                tally.skip(f"{workload.name}, {direction}", "not in the record")
                continue
            known = before[workload.name, direction]

            def measure(workload: Workload = workload, direction: str = direction) -> Any:
                return ratios_of(*race(workload, torch.device("cpu"), [direction], seconds))

            what = f"{workload.name}, {direction}, by "
            try:
                for peer, old, new in in_both(tally, what, known, measure()):
                    found = compare_samples(old, new, LEAST_RATIO)
                    if found.slower:
                        again = measure()
                        found = compare_samples(old, again.get(peer, new), LEAST_RATIO)
                    tally.judge(what + peer, found)
            except WrongResult as error:
                tally.fail(f"{workload.name}, {direction}", said(error), "head")
    return tally


def ratios_of(race: dict[str, Any]) -> dict[str, list[float]]:
    """Ours by each peer, round by round, as both ran in each."""
    timed = {name: e["seconds"] for name, e in race["entrants"].items() if "untimed" not in e}
    ours = timed.pop(OURS)
    return {
        name: [mine / theirs for mine, theirs in zip(ours, seconds, strict=True)]
        for name, seconds in timed.items()
    }


def in_both(
    tally: Tally, what: str, before: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """What was measured both times; of what is no longer, as where a peer is missing, it tells."""
    for name in before:
        if name in now:
            yield name, before[name], now[name]
        else:
            tally.skip(what + name, "not measured here")


def check_host(record: dict[str, Any]) -> Tally:
    """What takes the host longer on its way to a GPU, in idle launches, than in the record."""
    tally = Tally("host")
    if "host" not in record:
        tally.skip("the record has none", "`make record` makes one")
        return tally
    for what, old, new in in_both(tally, "", record["host"], host.measure()):
        found = compare_samples(old, new, LEAST_RATIO)
        if found.slower:
            found = compare_samples(old, host.measure()[what], LEAST_RATIO)
        tally.judge(what, found)
    return tally


def check_start(record: dict[str, Any]) -> Tally:
    """What takes longer, by `import torch`, than in the record."""
    tally = Tally("start")

    def compare(old: list[float], new: list[float]) -> Verdict:
        old, new = ([max(share, NEGLIGIBLE) for share in shares] for shares in (old, new))
        return compare_samples(old, new, LEAST_START)

    for what, old, new in in_both(tally, "", record["start"], startup.measure()):
        found = compare(old, new)
        if found.slower:
            found = compare(old, startup.measure()[what])
        tally.judge(what, found)
    return tally


def check_revisions(
    base: Ask, head: Ask, cases: Sequence[Case], least: float, rounds: int
) -> Tally:
    """What takes longer at the head than at the base, or fails on one side. A case that the base
    does not know yet, as its op or a key is new, passes."""
    tally = Tally("revisions")
    for workload, direction in cases:
        request = {"op": workload.op, "values": workload.named, "direction": direction}
        what = f"{workload.name}, {direction}"
        try:
            found = compare_in_turns(base, head, request, least, rounds)
            if found.slower:
                found = compare_in_turns(base, head, request, least, 2 * rounds)
        except NotCompared as reason:
            if reason.side is None:
                tally.skip(what, f"new at the head: {reason}")
            else:
                tally.fail(what, str(reason), reason.side)
            continue
        tally.judge(what, found)
    return tally


class NotCompared(Exception):
    """side: base or head, whichever fails; None where the base does not know the case yet."""

    def __init__(self, side: str | None, reason: str):
        super().__init__(reason)
        self.side = side


def compare_in_turns(base: Ask, head: Ask, request: Answer, least: float, rounds: int) -> Verdict:
    """A pair is the fastest of a few rounds on each side, as noise only ever adds; who goes first
    alternates."""
    sides = {"base": base, "head": head}
    best: dict[str, list[float]] = {"base": [], "head": []}
    for turn in range(PAIRS + 1):
        order = sorted(sides, reverse=turn % 2 == 1)
        answers = {side: sides[side](request | {"rounds": rounds}) for side in order}
        check_answers(answers)
        for side, answer in answers.items():
            if turn > 0:  # the first turn warms up
                best[side].append(min(answer["seconds"]))
    return compare_pairs(best["base"], best["head"], least)


def check_answers(answers: dict[str, Answer]) -> None:
    """Raises NotCompared where a side has no times; the head's reason counts more."""
    base, head = answers["base"], answers["head"]
    if "error" in head:
        raise NotCompared("head", head["error"])
    if "error" in base:
        raise NotCompared(None if base.get("unknown") else "base", base["error"])


def recorded_revision(device: str) -> str:
    """The commit that this machine's device was last recorded at."""
    folder = RESULTS / slug(name_of(torch.device(device)))
    for record in newest_first(folder):
        commit = record.get("commit")
        if commit and not commit.endswith("-dirty"):
            return commit
    raise SystemExit(f"gate: --base last takes a record of a commit, and {folder} holds none")


def compare_revisions(
    revision: str, device: str, cases: Sequence[Case], rounds: int, modules: Sequence[str] = ()
) -> Tally:
    """modules: that add workloads of a user's, for both workers to import."""
    with ExitStack() as stack:
        base = stack.enter_context(worktree(revision))
        sides = [stack.enter_context(worker(path, device, modules)) for path in (base, ROOT)]
        return check_revisions(*sides, cases, LEAST[device], rounds)


def compare_with_records(seconds: float) -> Tally:
    tally = check_resources()
    folder = RESULTS / slug(name_of(torch.device("cpu")))
    if not folder.exists():
        print(f"the rest: {folder.name} has no record: not compared; `make record` makes one")
        return tally
    record = newest(folder)
    tally += check_ratios(record, shipped("cpu"), seconds)
    return tally + check_host(record) + check_start(record)


def cases_of(words: Sequence[str]) -> list[Case]:
    """OP key=value …, as `tossup bench` takes it: in the direction that it names, or in all.

    Raises ConfigError where a word is wrong."""
    workload, directions = parse(words)
    return [(workload, direction) for direction in directions or workload.directions]


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """Options, and the cases of --case; what is wrong ends the process with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--base", metavar="REV", help="a revision, a folder, or last")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of --base; cuda if it is there")
    parser.add_argument(
        "--case", action="append", default=[], metavar="'OP key=value …'",
        help="with --base: a shape of yours, as tossup bench takes it; not those shipped",
    )  # fmt: skip
    add_workloads(parser)
    parser.add_argument("--rounds", type=count, default=5, help="of each turn; 5 by default")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of a race; 2 by default")
    options = parser.parse_args(arguments)
    for name in ("case", "device", "workloads"):
        if getattr(options, name) and not options.base:
            parser.error(f"--{name} takes --base REV as well: records hold shipped shapes of a CPU")
    try:
        add_ops(options.workloads)
        if options.device:
            device_of(options.device, "--device")
        return options, [case for words in options.case for case in cases_of(words.split())]
    except ConfigError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options, cases = parse_arguments(arguments)
    torch.set_num_threads(1)
    if options.base:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        base = recorded_revision(device) if options.base == "last" else options.base
        cases = cases or [(w, direction) for w in shipped(device) for direction in w.directions]
        tally = compare_revisions(base, device, cases, options.rounds, options.workloads)
    else:
        tally = compare_with_records(options.seconds)
    print(f"gate: {tally.summary()}")
    return 0 if tally.passes else 1


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
