"""The gates, on injected times: what did not change passes, what was slowed down trips them."""

import json
import re
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import gate, host, startup
from bench.records import new_record, newest, write_record
from bench.tally import Tally
from tests.bench.copies import copy_folders
from tossup.autotune import races
from tossup.autotune.errors import WrongResult
from tossup.autotune.workloads import build
from tossup.autotune.workloads import linear as linears

WORKLOAD = build("linear", {"seqlen": 8, "in_features": 16, "out_features": 16, "dtype": "fp32"})
CASES = [f"{WORKLOAD.name}, {direction}" for direction in WORKLOAD.directions]
REQUEST = {"op": "linear", "values": {"seqlen": 8}, "direction": "forward", "rounds": 3}
SEEDS = count()


def noise(rounds: int, factor: float = 1.0) -> list[float]:
    return (factor * np.random.default_rng(next(SEEDS)).normal(1, 0.02, rounds)).tolist()


def side(slow: dict[str, float], asked: list | None = None):
    """A worker whose times have noise, and a factor for some directions."""

    def ask(request):
        if asked is not None:
            asked.append(request["direction"])
        return {"seconds": noise(request["rounds"], slow.get(request["direction"], 1.0))}

    return ask


def revisions(base, head, directions=WORKLOAD.directions) -> Tally:
    cases = [(WORKLOAD, direction) for direction in directions]
    return gate.check_revisions(base, head, cases, least=1.10, rounds=5)


def test_a_head_as_fast_as_its_base_passes():
    for slow in ({}, {"dgrad": 2.0}):  # at the base: the head is faster
        tally = revisions(side(slow), side({}))
        assert tally.passes and tally.summary() == "0 worse, 3 of 3 compared"


def test_a_kernel_slowed_down_at_the_head_trips_the_gate_after_a_second_look():
    asked: list[str] = []
    tally = revisions(side({}), side({"dgrad": 1.2}, asked))
    (sentence,) = tally.worse
    assert not tally.passes and tally.summary() == f"1 worse, 3 of 3 compared\n  {sentence}"
    assert sentence.startswith(f"{CASES[1]}: 1.") and "× the time" in sentence
    assert asked.count("dgrad") == 2 * asked.count("forward")


def test_what_is_slower_only_once_passes():
    turns = count()

    def ask(request):
        once = request["direction"] == "wgrad" and next(turns) <= gate.PAIRS
        return {"seconds": noise(request["rounds"], 1.5 if once else 1.0)}

    assert revisions(side({}), ask).passes


def refusing(direction: str | None = None, **answer):
    """A worker that has no times for a direction, or for none."""
    return lambda request: (
        answer if direction in (None, request["direction"]) else side({})(request)
    )


@pytest.mark.parametrize("at", ["base", "head"])
def test_a_case_that_fails_on_either_side_trips_the_gate(at, capsys):
    fails = refusing("dgrad", error="not timed: out is off by 1")
    tally = revisions(*(fails if side_ == at else side({}) for side_ in ("base", "head")))
    sentence = f"{CASES[1]}: {at}: not timed: out is off by 1"
    assert not tally.passes and sentence in capsys.readouterr().out
    counts = "0 worse, 2 of 3 compared, 1 failed at the base"
    counts = counts if at == "base" else "1 worse, 2 of 3 compared"
    assert tally.summary() == f"{counts}\n  {sentence}"


def test_a_case_that_is_new_at_the_head_passes_unless_there_is_no_other(capsys):
    new = {"error": "linear takes the keys batch, got 'gain'", "unknown": True}
    tally = revisions(refusing("dgrad", **new), side({}))
    assert tally.passes and tally.summary() == "0 worse, 2 of 3 compared"
    told = f"{CASES[1]}: new at the head: {new['error']}: not compared"
    assert told in capsys.readouterr().out
    tally = revisions(refusing(**new), side({}))
    assert not tally.passes
    assert tally.summary() == "0 worse, 0 of 3 compared\n  nothing was compared"
    assert revisions(
        refusing(**new), refusing(error="off")
    ).worse  # fails at the head, which has it


def recorded(slow: float = 1.0):
    """In place of a race: times of ours and of a peer, both with noise and on some machine."""

    def race(workload, device, directions, seconds):
        machine = next(SEEDS) % 7 + 1
        entrants = {
            "ours": {"seconds": noise(20, slow * machine)},
            "torch": {"seconds": noise(20, machine)},
            "other": {"untimed": "not there"},
        }
        return [{"workload": workload.name, "direction": directions[0], "entrants": entrants}]

    return race


def record() -> dict:
    shipped = [recorded()(WORKLOAD, None, [d], 0)[0] for d in WORKLOAD.directions]
    return {"races": shipped, "start": {"import tossup": [0.2] * 5, "first call": [0.01] * 5}}


def test_ratios_to_peers_trip_the_gate_whatever_the_machine(monkeypatch):
    monkeypatch.setattr(gate, "race", recorded())
    assert gate.check_ratios(record(), [WORKLOAD], 0.0).passes
    monkeypatch.setattr(gate, "race", recorded(slow=1.5))
    worse = gate.check_ratios(record(), [WORKLOAD], 0.0).worse
    assert [sentence.partition(", by torch: 1.")[0] for sentence in worse] == CASES


def test_a_wrong_result_and_a_peer_that_is_gone_at_a_second_look_end_no_gate(monkeypatch):
    def race(workload, device, directions, seconds):
        if directions == ["dgrad"]:
            raise WrongResult("dx is off by 1")
        (found,) = slow(workload, device, directions, seconds)
        if next(looks) % 2:
            del found["entrants"]["torch"]
        return [found]

    looks, slow = count(), recorded(slow=1.5)
    monkeypatch.setattr(gate, "race", race)
    tally = gate.check_ratios(record(), [WORKLOAD], 0.0)
    assert (tally.compared, tally.cases) == (2, 3)
    assert f"{CASES[1]}: head: dx is off by 1" in tally.worse and len(tally.worse) == 3


def test_what_can_no_longer_be_measured_is_told(monkeypatch, capsys):
    gone = {**record(), "start": {"import tossup": [0.2] * 5, "first call of old": [0.2] * 5}}
    for race in gone["races"]:
        race["entrants"]["gone"] = {"seconds": noise(20)}
    monkeypatch.setattr(gate, "race", recorded())
    tally = gate.check_ratios(gone, [WORKLOAD], 0.0)
    assert tally.passes and (tally.compared, tally.cases) == (3, 6)
    told = capsys.readouterr().out
    assert all(f"{case}, by gone: not measured here: not compared" in told for case in CASES)
    monkeypatch.setattr(startup, "measure", lambda: {"import tossup": noise(5, 0.2)})
    assert gate.check_start(gone).passes
    assert "start: first call of old: not measured here" in capsys.readouterr().out


def test_an_op_slowed_down_on_the_cpu_trips_the_gate(monkeypatch):
    """The race itself, by a clock that an op which repeats its work moves on twice as far."""
    now, linear = [0.0], linears.linear

    class Ticking(races.CpuStopwatch):
        def __init__(self):
            super().__init__(lambda: now[0])

    def ticking(function, ticks):
        def call(*args, **kwargs):
            now[0] += ticks * noise(1)[0]
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(races, "CpuStopwatch", Ticking)
    monkeypatch.setattr(linears.F, "linear", ticking(linears.F.linear, 1))
    monkeypatch.setattr(linears, "linear", ticking(linear, 1))
    cpu = torch.device("cpu")
    before = {"races": races.race(WORKLOAD, cpu, ["forward"], 0.01)}
    assert gate.check_ratios(before, [WORKLOAD], 0.01).passes
    monkeypatch.setattr(linears, "linear", ticking(linear, 2))
    (sentence,) = gate.check_ratios(before, [WORKLOAD], 0.01).worse
    assert sentence.startswith(f"{CASES[0]}, by torch: ")


def test_a_slower_way_to_the_gpu_trips_the_gate(monkeypatch):
    before = {"host": {"linear, forward": noise(5, 12.0), "linear, wgrad": noise(5, 15.0)}}
    for factor, worse in ((1.0, 0), (0.5, 0), (1.6, 1)):
        found = {"linear, forward": noise(5, 12.0 * factor), "linear, wgrad": noise(5, 15.0)}
        monkeypatch.setattr(host, "measure", lambda found=found: found)
        assert len(gate.check_host(before).worse) == worse


def test_a_slower_start_trips_the_gate_unless_it_is_negligible(monkeypatch):
    for shares, worse in (((0.2, 0.01), 0), ((0.2, 0.04), 0), ((0.4, 0.01), 1), ((0.2, 0.2), 1)):
        found = {"import tossup": noise(5, shares[0]), "first call": noise(5, shares[1])}
        monkeypatch.setattr(startup, "measure", lambda found=found: found)
        assert len(gate.check_start(record()).worse) == worse


def test_resources_trip_the_gate(monkeypatch, tmp_path, capsys):
    kernel = {"registers": 9, "spills": 0, "shared": 0, "fits": True, "scalar_dots": 0}
    kernel |= {"unordered_writes": 0, "loads_before_exit": 1, "loops": []}
    monkeypatch.setattr(gate, "RESOURCES", tmp_path)
    monkeypatch.setattr(gate, "inspect", lambda archs: {"a": kernel | {"registers": 10}})
    committed = tmp_path / f"{gate.triton.__version__}.json"
    (missing,) = gate.check_resources().worse
    assert missing.startswith(f"{committed.name} is not there: ")
    committed.write_text(json.dumps({"a": kernel}))
    assert gate.check_resources().worse == ["a: registers 9 → 10"]
    committed.write_text(json.dumps({"a": kernel | {"registers": 11}}))
    assert gate.check_resources().passes
    assert "better, and to be committed: a: registers 11 → 10" in capsys.readouterr().out


@pytest.mark.parametrize(("tally", "code"), [
    (Tally("any", 2, 1), 0),
    (Tally("any", 2, 2, ["a: slower"]), 1),
    (Tally("any", 2, 1, [], ["a: base: broken"]), 1),
    (Tally("any", 2, 0), 1),
])  # fmt: skip
def test_the_exit_code_says_whether_anything_is_worse_or_nothing_compared(
    monkeypatch, tally, code, capsys
):
    monkeypatch.setattr(gate, "compare_with_records", lambda seconds: tally)
    assert gate.main([]) == code
    assert f"gate: {len(tally.worse)} worse, {tally.compared} of 2" in capsys.readouterr().out


def test_a_worker_times_the_package_of_its_checkout():
    with gate.worker(gate.ROOT, "cpu") as ask:
        seconds = ask(REQUEST)["seconds"]
        assert len(seconds) == 3 and min(seconds) > 0
        for wrong, sentence in (
            ({"op": "liner"}, "OP takes attention, "),
            ({"values": {"no": 1}}, "takes the keys"),
            ({"direction": "sideways"}, "takes forward, dgrad, wgrad, got 'sideways'"),
        ):
            answer = ask(REQUEST | wrong)
            assert sentence in answer["error"] and answer["unknown"]


def test_what_breaks_a_case_at_the_base_is_no_new_case(tmp_path):
    """The package of a folder, in which the backend of an op has an error."""
    copy_folders(tmp_path)
    with open(tmp_path / "kernels/linear/cpu.py", "a") as file:
        file.write('raise RuntimeError("broken base")\n')
    with gate.worktree(str(tmp_path)) as base, gate.worker(base, "cpu") as ask:
        assert ask(REQUEST) == {"error": "broken base"}


def test_a_base_is_asked_for_no_option_that_it_may_not_know():
    asked = []
    fails = lambda request: asked.append(request) or {"error": "any"}  # noqa: E731
    revisions(fails, fails, ["forward"])
    assert asked[0]["values"] == {
        "batch": 1, "seqlen": 8, "in_features": 16, "out_features": 16, "dtype": "fp32",
    }  # fmt: skip


def compared_cases(monkeypatch, *words: str) -> list[str]:
    """What a command line has compared."""
    cases = []

    def compare(base, device, found, *others):
        cases.extend(f"{workload.name}, {direction}" for workload, direction in found)
        return Tally("any", 1, 1)

    monkeypatch.setattr(gate, "compare_revisions", compare)
    assert gate.main(["--base", "HEAD", "--device", "cpu", *words]) == 0
    return cases


def test_a_case_is_compared_in_the_direction_that_it_names_or_in_all(monkeypatch):
    case = WORKLOAD.name
    assert compared_cases(monkeypatch, "--case", case) == CASES
    assert compared_cases(monkeypatch, "--case", f"{case} direction=dgrad") == [CASES[1]]
    both = ("--case", f"{case} direction=wgrad", "--case", f"{case} direction=forward")
    assert compared_cases(monkeypatch, *both) == [CASES[2], CASES[0]]
    assert len(compared_cases(monkeypatch)) > len(CASES)  # all that are shipped


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--case linear", "--case takes --base REV as well"),
        ("--device cpu", "--device takes --base REV as well"),
        ("--workloads json", "--workloads takes --base REV as well"),
        ("--base HEAD --workloads absent", "--workloads takes a module that can be .* 'absent'"),
        ("--rounds 0", "argument --rounds: takes a whole number from 1 on, got '0'"),
        ("--rounds 1.5", "argument --rounds: takes a whole number from 1 on, got '1.5'"),
        ("--seconds -1", "argument --seconds: takes a number of seconds above 0, got '-1'"),
        ("--seconds nan", "argument --seconds: takes a number of seconds above 0, got 'nan'"),
        ("--seconds two", "argument --seconds: takes a number of seconds above 0, got 'two'"),
        pytest.param(
            "--base HEAD --device cuda", "--device takes a device of this machine, .* got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is one here"),
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(gate, "compare_with_records", lambda seconds: Tally("any", 1, 1))
    with pytest.raises(SystemExit) as end:
        gate.main(words.split())
    assert end.value.code == 2
    assert re.search(f"bench.gate: error: {sentence}", capsys.readouterr().err)


def test_the_last_record_of_a_commit_names_the_base(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    bases = []

    def compare(base, *others):
        bases.append(base)
        return Tally("any", 1, 1)

    monkeypatch.setattr(gate, "compare_revisions", compare)
    commits = ("abc-dirty", None, "0123456789ab", "fedcba987654", "def-dirty")
    for day, commit in enumerate(commits, 1):
        time = f"2026-01-0{day}T00:00:00+00:00"
        write_record(
            new_record(torch.device("cpu"), []) | {"commit": commit, "time": time}, tmp_path
        )
        if day < 3:
            with pytest.raises(SystemExit, match=r"takes a record of a commit, and .* holds none"):
                gate.main(["--base", "last", "--device", "cpu"])
        else:
            assert gate.main(["--base", "last", "--device", "cpu"]) == 0
    assert bases == ["0123456789ab", "fedcba987654", "fedcba987654"]


def test_a_folder_without_the_package_is_refused(tmp_path):
    """Though one lies below it, as in a virtual environment."""
    below = tmp_path / "venv/tossup"
    below.mkdir(parents=True)
    (below / "__init__.py").touch()
    for base in (str(tmp_path), "no-such-revision"):
        with pytest.raises(SystemExit, match=f"takes a revision of git, or a folder .* '{base}'"):
            with gate.worktree(base):
                pass
    (tmp_path / "tossup").symlink_to(gate.ROOT / "tossup")
    with pytest.raises(SystemExit, match="not the package of"):
        with gate.worker(tmp_path, "cpu"):
            pass


WAIT = """
import sys, time
from pathlib import Path
from bench import checkouts
checkouts.ROOT = Path(sys.argv[1])
checkouts.end_on_sigterm()
with checkouts.worktree("HEAD") as path:
    print(path, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="worktrees are git's")
def test_a_gate_that_is_ended_takes_its_worktree_away(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=m"]):
        subprocess.run([*git, *words], check=True)
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, tmp_path], cwd=gate.ROOT, text=True, stdout=subprocess.PIPE
    )
    path = process.stdout.readline().strip()
    assert Path(path).is_dir()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    listed = subprocess.run([*git, "worktree", "list"], text=True, capture_output=True).stdout
    assert not Path(path).parent.exists() and len(listed.splitlines()) == 1


def test_records_are_written_whole_and_the_newest_is_found(tmp_path):
    race = {"workload": "linear", "direction": "dgrad", "seconds": [0.123456]}
    first = new_record(torch.device("cpu"), [race])
    path = write_record(
        first | {"device": "Some GPU", "time": "2026-01-02T03:04:05+00:00"}, tmp_path
    )
    assert path == tmp_path / "some_gpu/20260102T030405.json"
    write_record(first | {"device": "Some GPU", "time": "2026-01-03T03:04:05+00:00"}, tmp_path)
    assert newest(path.parent)["time"].startswith("2026-01-03")
    assert newest(path.parent)["races"] == [race | {"seconds": [0.1235]}]
    assert [p.suffix for p in path.parent.iterdir()] == [".json"] * 2
    with pytest.raises(FileNotFoundError, match="holds no record"):
        newest(tmp_path)


def test_records_of_one_commit_complete_each_other(tmp_path):
    """As device.sh writes one for attention, and one for what else was raced."""

    def race(workload, **more):
        return {"workload": workload, "direction": "forward", "of": more.pop("of"), **more}

    about = {"device": "Some GPU", "packages": {"torch": "2"}}
    for day, commit, of_part in (
        (1, "b", [race("scan", of=1)]),
        (2, "a", [race("attention", of=2), race("linear", of=2)]),
        (3, "b", [race("attention", of=3), race("linear", of=3), race("rotary", of=3)]),
        (4, "b", [race("attention", of=4), race("linear", of=4, failed="it is off by 1")]),
    ):
        time = f"2026-01-0{day}T03:04:05+00:00"
        write_record(about | {"time": time, "commit": commit, "races": of_part}, tmp_path)
    found = newest(tmp_path / "some_gpu")
    assert found["time"].startswith("2026-01-04")
    assert {race["workload"]: race["of"] for race in found["races"]} == {
        "attention": 4, "linear": 3, "rotary": 3, "scan": 1
    }  # fmt: skip
