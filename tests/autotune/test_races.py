"""Races: who may be timed, what a record holds, and what people get to read."""

import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from tossup.autotune import machine, races
from tossup.autotune.errors import WrongResult
from tossup.autotune.machine import describe
from tossup.autotune.peaks import Peak
from tossup.autotune.races import Race, race, table
from tossup.autotune.timing import CpuStopwatch, Run
from tossup.autotune.workloads import MissingPeer, Workload, build
from tossup.autotune.workloads import linear as linears

CPU = torch.device("cpu")


class Steady(CpuStopwatch):
    """Ours takes 1 s, the next 3 s, and so on; what is called is called once."""

    def __init__(self):
        super().__init__()
        self.prepared = 0

    def prepare(self, call):
        call()
        self.prepared += 1
        return Run(partial(float, 2 * self.prepared - 1), "steady")


def small() -> Workload:
    return build("linear", {"seqlen": 8, "in_features": 16, "out_features": 16, "dtype": "fp32"})


def shifted(inputs, by):
    calls = linears.torch_products(inputs)
    return calls | {"forward": lambda: {"out": calls["forward"]()["out"] + by}}


def refuse(inputs):
    raise MissingPeer("not built: no compiler")


def fail(inputs):
    def raising():
        raise RuntimeError("no kernel\nfor this shape")

    return linears.torch_products(inputs) | {"forward": raising}


@pytest.fixture
def peers(monkeypatch):
    def set_peers(**makers):
        monkeypatch.setattr(
            linears.Linear,
            "peers",
            lambda self, inputs: {name: partial(make, inputs) for name, make in makers.items()},
        )

    return set_peers


def test_a_record_holds_what_was_timed_and_why_others_were_not(peers, monkeypatch):
    peers(right=linears.torch_products, wrong=partial(shifted, by=1.0), absent=refuse, raising=fail)
    peak = Peak(1e3, processors=1, clock=1.0, matrix_flops=1, float32_flops=1)
    monkeypatch.setitem(races.PEAKS, races.name_of(CPU), peak)
    record = Race(small(), CPU, 0.0, Steady()).run("forward")
    assert record["workload"] == small().name and record["direction"] == "forward"
    assert record["floor"] == 2 * 8 * 16 * 16 and record["binds"] == ["float32_flops"]
    entrants = record["entrants"]
    assert list(entrants) == ["ours", "right", "absent", "wrong", "raising"]
    ours, right = entrants["ours"], entrants["right"]
    assert ours["median"] == ours["p20"] == ours["p80"] == 1.0 == ours["ratio"]
    assert ours["seconds"] == [1.0] * races.FEWEST
    assert right["median"] == 3.0 == right["ratio"] and right["timer"] == "steady"
    assert ours["tflops"] == pytest.approx(4096e-12)
    assert ours["gbps"] == pytest.approx((8 * 16 * 2 + 16 * 16) * 4 / 1e9)
    assert ours["share"] == 4096.0 and right["share"] == pytest.approx(4096 / 3)
    assert entrants["absent"] == {"untimed": "not built: no compiler"}
    assert entrants["raising"] == {"untimed": "raises no kernel"}
    assert entrants["wrong"]["untimed"].startswith("out is off by 1.0e+00, allowed are")
    text = table([record])
    assert "right                       3000 ms  (3000 ms to 3000 ms), 3.00 × our time" in text
    assert "absent                      not timed: not built: no compiler" in text


def test_no_speed_of_a_wrong_result(monkeypatch):
    monkeypatch.setattr(linears, "linear", lambda x, w, route: torch.zeros(1, 8, 16))
    stopwatch = Steady()
    with pytest.raises(WrongResult, match="out is off by"):
        Race(small(), CPU, 0.0, stopwatch).run("forward")
    assert stopwatch.prepared == 0


def test_every_direction_is_raced_by_the_clock_and_unknown_peaks_have_no_floor():
    records = race(small(), CPU, seconds=0.0)
    assert [record["direction"] for record in records] == ["forward", "dgrad", "wgrad"]
    for record in records:
        assert record["floor"] is None and record["entrants"]["ours"]["share"] is None
        assert record["entrants"]["torch"]["timer"] == "clock"


def test_a_machine_describes_itself():
    about = describe(CPU)
    assert about["packages"]["torch"] == torch.__version__ and about["device"]
    assert about["threads"] == torch.get_num_threads()


def test_the_commit_is_of_the_checkout_that_the_package_belongs_to(tmp_path, monkeypatch):
    """Not of one that it only lies in, as a copy or an installed wheel may."""
    copy = tmp_path / "machine.py"
    copy.write_bytes(Path(machine.__file__).read_bytes())
    monkeypatch.setattr(machine, "__file__", str(copy))
    monkeypatch.delenv("TOSSUP_COMMIT", raising=False)

    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        done = ["git", "-C", tmp_path, *identity, *words]
        return subprocess.run(done, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    assert machine.commit() is None and "commit" not in describe(CPU)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "of others")
    assert machine.commit() is None
    monkeypatch.setenv("TOSSUP_COMMIT", "told")
    assert machine.commit() == describe(CPU)["commit"] == "told"
    git("add", "machine.py")
    git("commit", "--quiet", "--message", "ours")
    assert machine.commit() == git("rev-parse", "--short=12", "HEAD")
    with copy.open("a") as file:
        file.write("# changed")
    assert machine.commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"
