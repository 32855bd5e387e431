"""`tossup tune`: what it refuses, and the timing that it gives the tuner."""

import os
import weakref

import pytest
import torch
import triton

from tossup.autotune.offline import FUSION
from tossup.autotune.timing import CpuStopwatch, Run
from tossup.supernet import tuning
from tossup.supernet.cli import main
from tossup.supernet.errors import ConfigError
from tossup.supernet.tuning import measure, pruning, workloads_of


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


@pytest.mark.parametrize(
    "words, message",
    [
        (["selective_scan", "--arch", "sm_75"], "architectures sm_80, .*, sm_120, got sm_75"),
        (["selective_scam"], "OP takes attention, .*, got 'selective_scam'"),
        (["attention", "heads=3", "kv_heads=2"], "kv_heads takes a divisor of heads = 3, got 2"),
        (["attention", "direction=forward"], "direction is no key of tune"),
    ],
)
def test_wrong_words_get_one_sentence(compiler, capsys, words, message):
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_what_surveys_compile_is_kept_as_launches_look_for_it(monkeypatch, capsys):
    monkeypatch.delenv(FUSION, raising=False)
    monkeypatch.setattr(tuning, "survey_all", lambda *work: iter("ab"))
    with pruning(90) as prune:
        assert os.environ[FUSION] == "1"
        assert list(prune(None, "forward", "linear", "ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""  # no bar where nobody watches


def test_without_a_gpu_nothing_is_claimed(compiler, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "linear"]) == 2
    assert "no GPU is here to measure on; --arch sm_90 lists" in capsys.readouterr().err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main(["tune", "linear", "--arch", "sm_90"]) == 2
    assert "TRITON_INTERPRET must be unset" in capsys.readouterr().err


def test_without_an_op_all_that_is_shipped_is_tuned_but_what_is_routed():
    assert {w.op for w in workloads_of([])} >= {"attention", "selective_scan", "linear"}
    assert all(w.active is None for w in workloads_of([]))
    with pytest.raises(ConfigError, match="direction"):
        workloads_of(["linear", "direction=wgrad"])


def test_calls_are_timed_in_turns(monkeypatch):
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(tuning, "ROUNDS", (5, 5))
    slow, fast = measure(CpuStopwatch(lambda: now[0]), [call("slow", 0.5), call("fast", 0.25)])
    assert (slow.median, fast.median) == (0.5, 0.25)
    assert len(slow.seconds) == len(fast.seconds) == 5
    assert order[-4:] in (["slow", "fast", "fast", "slow"], ["fast", "slow", "slow", "fast"])


def test_calls_are_timed_alike_where_one_cannot_be_captured(monkeypatch):
    class Short:
        """Has memory for one graph."""

        graphs = 0

        def prepare(self, call, *, captured=True):
            if not captured:
                assert self.kept() is None  # the graph's memory is free by now
                return Run(lambda: call(False), "calls")
            self.graphs += 1
            if self.graphs > 1:
                return Run(lambda: call(True), "calls")
            run = Run(lambda: call(True), "graph")
            self.kept = weakref.ref(run)
            return run

    monkeypatch.setattr(tuning, "ROUNDS", (3, 3))
    calls = [lambda captured: 1.0 if captured else 3.0, lambda captured: 1.0 if captured else 2.0]
    slow, fast = measure(Short(), calls)
    assert (slow.median, fast.median) == (3.0, 2.0)


@pytest.mark.parametrize(
    "words",
    [
        ["linear", "in_features=64", "--arch", "sm_80"],
        ["--arch", "sm_80", "linear", "in_features=64"],
        ["linear", "--arch", "sm_80", "in_features=64"],
    ],
)
def test_words_stand_before_and_behind_options(words, monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "run_tuning", lambda *options: seen.append(options))
    assert main(["tune", *words]) == 0
    assert seen == [(["linear", "in_features=64"], ["sm_80"], False, None)]


def test_options_that_nobody_knows_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "linear", "--arc", "sm_80", "--other"])
    assert "unrecognized arguments: --other" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "--json", "rotary"])
    assert "unrecognized arguments: rotary" in capsys.readouterr().err
