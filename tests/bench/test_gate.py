"""The gates, on injected times: what did not change passes, what was slowed down trips them."""

import json
from itertools import count

import numpy as np
import pytest
import torch

from bench import gate, host, startup
from bench.records import new_record, newest, write_record
from tossup.autotune import races
from tossup.autotune.workloads import build
from tossup.autotune.workloads import linear as linears

WORKLOAD = build("linear", {"seqlen": 8, "in_features": 16, "out_features": 16, "dtype": "fp32"})
CASES = [f"{WORKLOAD.name}, {direction}" for direction in WORKLOAD.directions]
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


def revisions(base, head, least: float = 1.10) -> list[str]:
    return gate.check_revisions(base, head, [WORKLOAD], least, rounds=5)


def test_a_head_as_fast_as_its_base_passes():
    assert revisions(side({}), side({})) == []
    assert revisions(side({"dgrad": 2.0}), side({})) == []  # faster


def test_a_kernel_slowed_down_at_the_head_trips_the_gate_after_a_second_look():
    asked: list[str] = []
    (sentence,) = revisions(side({}), side({"dgrad": 1.2}, asked))
    assert sentence.startswith(f"{CASES[1]}: 1.") and "× the time" in sentence
    assert asked.count("dgrad") == 2 * asked.count("forward")


def test_what_is_slower_only_once_passes():
    turns = count()

    def ask(request):
        once = request["direction"] == "wgrad" and next(turns) <= gate.PAIRS
        return {"seconds": noise(request["rounds"], 1.5 if once else 1.0)}

    assert revisions(side({}), ask) == []


def test_a_case_that_the_base_does_not_know_passes_and_one_wrong_at_the_head_does_not(capsys):
    refuse = lambda request: {"error": "not timed: out is off by 1"}  # noqa: E731
    assert revisions(refuse, side({})) == []
    assert "base: not timed: out is off by 1" in capsys.readouterr().out
    assert revisions(side({}), refuse) == [
        f"{case}: head: not timed: out is off by 1" for case in CASES
    ]


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
    assert gate.check_ratios(record(), [WORKLOAD], 0.0) == []
    monkeypatch.setattr(gate, "race", recorded(slow=1.5))
    assert [
        s.partition(", by torch: 1.")[0] for s in gate.check_ratios(record(), [WORKLOAD], 0.0)
    ] == CASES


def test_what_can_no_longer_be_measured_is_told(monkeypatch, capsys):
    gone = {**record(), "start": {"import tossup": [0.2] * 5, "first call of old": [0.2] * 5}}
    for race in gone["races"]:
        race["entrants"]["gone"] = {"seconds": noise(20)}
    monkeypatch.setattr(gate, "race", recorded())
    assert gate.check_ratios(gone, [WORKLOAD], 0.0) == []
    told = capsys.readouterr().out
    assert all(f"{case}, by gone: not measured here: not compared" in told for case in CASES)
    monkeypatch.setattr(startup, "measure", lambda: {"import tossup": noise(5, 0.2)})
    assert gate.check_start(gone) == []
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
    assert gate.check_ratios(before, [WORKLOAD], 0.01) == []
    monkeypatch.setattr(linears, "linear", ticking(linear, 2))
    (sentence,) = gate.check_ratios(before, [WORKLOAD], 0.01)
    assert sentence.startswith(f"{CASES[0]}, by torch: ")


def test_a_slower_way_to_the_gpu_trips_the_gate(monkeypatch):
    before = {"host": {"linear, forward": noise(5, 12.0), "linear, wgrad": noise(5, 15.0)}}
    for factor, worse in ((1.0, 0), (0.5, 0), (1.6, 1)):
        found = {"linear, forward": noise(5, 12.0 * factor), "linear, wgrad": noise(5, 15.0)}
        monkeypatch.setattr(host, "measure", lambda found=found: found)
        assert len(gate.check_host(before)) == worse


def test_a_slower_start_trips_the_gate_unless_it_is_negligible(monkeypatch):
    for shares, worse in (((0.2, 0.01), 0), ((0.2, 0.04), 0), ((0.4, 0.01), 1), ((0.2, 0.2), 1)):
        found = {"import tossup": noise(5, shares[0]), "first call": noise(5, shares[1])}
        monkeypatch.setattr(startup, "measure", lambda found=found: found)
        assert len(gate.check_start(record())) == worse


def test_resources_trip_the_gate(monkeypatch, tmp_path, capsys):
    kernel = {"registers": 9, "spills": 0, "shared": 0, "fits": True, "scalar_dots": 0}
    kernel |= {"unordered_writes": 0, "loads_before_exit": 1, "loops": []}
    monkeypatch.setattr(gate, "RESOURCES", tmp_path)
    monkeypatch.setattr(gate, "inspect", lambda archs: {"a": kernel | {"registers": 10}})
    committed = tmp_path / f"{gate.triton.__version__}.json"
    (missing,) = gate.check_resources()
    assert missing.startswith(f"{committed.name} is not there: ")
    committed.write_text(json.dumps({"a": kernel}))
    assert gate.check_resources() == ["a: registers 9 → 10"]
    committed.write_text(json.dumps({"a": kernel | {"registers": 11}}))
    assert gate.check_resources() == []
    assert "better, and to be committed: a: registers 11 → 10" in capsys.readouterr().out


@pytest.mark.parametrize(("worse", "code"), [([], 0), (["a: slower"], 1)])
def test_the_exit_code_says_whether_anything_is_worse(monkeypatch, worse, code, capsys):
    monkeypatch.setattr(gate, "compare_with_records", lambda seconds: worse)
    assert gate.main([]) == code
    assert f"gate: {len(worse)} worse" in capsys.readouterr().out


def test_a_worker_times_the_package_of_its_checkout():
    with gate.worker(gate.ROOT, "cpu") as ask:
        request = {"op": "linear", "values": {"seqlen": 8}, "direction": "forward", "rounds": 3}
        seconds = ask(request)["seconds"]
        assert len(seconds) == 3 and min(seconds) > 0
        assert "takes the keys" in ask(request | {"values": {"no": 1}})["error"]


def test_the_last_record_of_a_commit_names_the_base(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    bases = []
    monkeypatch.setattr(gate, "compare_revisions", lambda base, *others: bases.append(base) or [])
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


def test_a_worker_with_another_package_is_refused(tmp_path):
    (tmp_path / "tossup").symlink_to(gate.ROOT / "tossup")
    with pytest.raises(SystemExit, match="not the package of"):
        with gate.worker(tmp_path, "cpu"):
            pass


def test_records_are_written_whole_and_the_newest_is_found(tmp_path):
    first = new_record(torch.device("cpu"), [{"seconds": [0.123456]}])
    path = write_record(
        first | {"device": "Some GPU", "time": "2026-01-02T03:04:05+00:00"}, tmp_path
    )
    assert path == tmp_path / "some_gpu/20260102T030405.json"
    write_record(first | {"device": "Some GPU", "time": "2026-01-03T03:04:05+00:00"}, tmp_path)
    assert newest(path.parent)["time"].startswith("2026-01-03")
    assert newest(path.parent)["races"] == [{"seconds": [0.1235]}]
    assert [p.suffix for p in path.parent.iterdir()] == [".json"] * 2
    with pytest.raises(FileNotFoundError, match="holds no record"):
        newest(tmp_path)
