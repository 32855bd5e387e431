"""The tuner, whole, with a clock and an op that tests plan: no GPU, and nothing is compiled."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import TritonError

from tossup.autotune import tune as tuning
from tossup.autotune.candidates import SPACES, candidates
from tossup.autotune.errors import WrongResult
from tossup.autotune.pruning import Survey
from tossup.autotune.timing import Timing
from tossup.autotune.tune import Machine, tune
from tossup.autotune.workloads.workload import Advance
from tossup.kernels import configs
from tossup.kernels.adamw.bucket import CHUNK
from tossup.kernels.configs import Key
from tossup.kernels.configs.file import read

HEURISTIC = {"BLOCK_T": 32, "BLOCK_DIM": 64, "num_warps": 4}
FAST = {"BLOCK_T": 8, "BLOCK_DIM": 128, "num_warps": 2}
FACTS = {"dtype": "torch.float32"}
PART = torch.tensor([1.0, 2.0])


@dataclass
class Op:
    """Stands for a workload and its calls: two kernels, whose configurations a test can plan.

    seconds: of a kernel and its configuration. wrong, unwritten: configurations that give a wrong
    result, or write none.
    """

    name: str = "causal_conv1d dim=4"
    samples: int = 1
    directions: tuple[str, ...] = ("forward", "backward", "forward+backward")
    seconds: dict = field(default_factory=dict)
    noise: float = 0.0
    wrong: list = field(default_factory=list)
    unwritten: list = field(default_factory=list)
    calls: int = 0
    asked: list = field(default_factory=list)

    @property
    def ours(self):
        def call(*kernels):
            self.calls += 1
            self.asked = [
                (k, configs.choose(f"causal_conv1d.{k}", FACTS, {"tokens": (64, 4096)}, HEURISTIC))
                for k in kernels
            ]
            out = torch.empty(2)
            taken = [config for _, config in self.asked]
            if not any(config in self.unwritten for config in taken):
                out.copy_(PART + any(config in self.wrong for config in taken))
            return {"out": out}

        return {
            "forward": lambda: call("forward"),
            "backward": lambda: call("forward", "backward"),
            "forward+backward": lambda: call("forward", "backward"),
        }

    def fault(self, results):
        error = (results["out"] - PART).abs().nan_to_num(nan=9.0).max().item()
        return f"out is off by {error}" if error > 0 else None

    def prepared(self):
        return SimpleNamespace(ours=self.ours, wrong=self.fault)

    def measure(self, calls):
        timings = []
        for call in calls:
            call()
            total = sum(self.seconds.get((k, *c.values()), 1.0) for k, c in self.asked)
            spread = 2 * self.noise * total
            timings.append(Timing([total - spread, total, total, total + spread]))
        return timings


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("TOSSUP_CONFIGS", str(tmp_path))
    configs.forget()
    with configs.of_gpu("some_gpu"):
        yield tmp_path / "some_gpu.json"
    configs.forget()


def run(op: Op, path, again=False, pruned=(), write=None):
    said: list[str] = []
    surveyed = []

    def prune(workload, direction, kernel, found):
        surveyed.append((direction, kernel))
        return iter([Survey(c, "spills" if c in pruned else None) for c in found])

    write = write or (lambda path, text: path.write_text(text))
    machine = Machine("Some GPU", prune, op.measure, write, said.append)
    tune(op, op.prepared(), path, machine, again)
    return surveyed, "\n".join(said)


def planned(kernel: str, config: dict, seconds: float) -> dict:
    return {(kernel, *config.values()): seconds}


def test_the_planted_fastest_is_found_and_launches_take_it(path):
    op = Op(seconds=planned("forward", FAST, 0.25) | planned("backward", HEURISTIC, 0.5))
    surveyed, said = run(op, path)
    assert surveyed == [
        ("forward", "causal_conv1d.forward"),
        ("backward", "causal_conv1d.backward"),
    ]
    forward, backward = read(path)
    assert forward.config == FAST and backward.config is None
    assert (forward.milliseconds, forward.heuristic) == (250.0, 1000.0)
    assert forward.workload == op.name and forward.triton
    # With the forward kernel's FAST by now: 0.25 + 0.5
    assert (backward.milliseconds, backward.heuristic) == (750.0, 750.0)
    op.ours["backward"]()
    assert op.asked == [("forward", FAST), ("backward", HEURISTIC)]
    assert "4.00 × the heuristic's speed: BLOCK_T=8 BLOCK_DIM=128 num_warps=2" in said
    assert "heuristic stays" in said


class Overwriting(Op):
    """An op whose every call adds 1 to a state."""

    @property
    def ours(self):
        ask = super().ours["forward"]

        def step(state):
            ask()
            return state.add_(1).clone()

        return {"forward": Advance(step, PART - 1)}


def test_a_state_is_put_back_before_results_are_compared(path):
    op = Overwriting(directions=("forward",), seconds=planned("forward", FAST, 0.25))
    _, said = run(op, path)
    assert next(read(path)).config == FAST and "0 refused" in said


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_the_fastest_is_refused_where_its_result_is_wrong(path, fault):
    second = {"BLOCK_T": 16, "BLOCK_DIM": 128, "num_warps": 4}
    op = Op(seconds=planned("forward", FAST, 0.25) | planned("forward", second, 0.5))
    getattr(op, fault).append(FAST)
    _, said = run(op, path)
    assert next(read(path)).config == second
    assert "refused BLOCK_T=8 BLOCK_DIM=128 num_warps=2: out is off by" in said
    assert "1 refused" in said


def test_what_is_pruned_is_not_run_and_is_counted(path):
    op = Op(seconds=planned("forward", FAST, 0.25))
    _, said = run(op, path, pruned=[FAST])
    assert next(read(path)).config is None
    count = len(candidates(Key("causal_conv1d.forward", tuple(FACTS.items()), ()), HEURISTIC))
    assert f"{count} candidates, 1 pruned (1 spills)" in said and f"  {count - 1} measured" in said


def test_within_the_noise_the_heuristic_stays(path):
    seconds = planned("forward", FAST, 0.9)
    for noise, expected in ((0.02, FAST), (0.2, None)):
        run(Op(seconds=seconds, noise=noise), path, again=True)
        assert next(read(path)).config == expected


def test_the_fastest_of_many_must_win_again_alone(path):
    op = Op()
    measure = op.measure

    def lucky(calls):  # once, and not against the heuristic alone
        op.seconds = planned("forward", FAST, 0.5) if len(calls) > 2 else {}
        return measure(calls)

    op.measure = lucky
    run(op, path)
    assert next(read(path)).config is None


def test_an_interrupted_tuner_goes_on_where_it_was(path):
    op = Op(seconds=planned("forward", FAST, 0.25))

    def write_once(path, text):
        if path.exists():
            raise KeyboardInterrupt
        path.write_text(text)

    with pytest.raises(KeyboardInterrupt):
        run(op, path, write=write_once)
    assert [e.key.kernel for e in read(path)] == ["causal_conv1d.forward"]
    surveyed, said = run(op, path)
    assert surveyed == [("backward", "causal_conv1d.backward")]
    assert "causal_conv1d.forward (forward): measured on" in said
    assert [e.config for e in read(path)] == [FAST, None]
    assert run(op, path)[0] == [] and len(run(op, path, again=True)[0]) == 2


def test_what_another_tuner_wrote_meanwhile_stays(path):
    run(Op(), path)
    theirs = path.read_text().replace('"tokens": 64', '"tokens": 128')
    path.unlink()
    configs.forget()

    class Slow(Op):
        def measure(self, calls):
            if not path.exists():
                path.write_text(theirs)
            return super().measure(calls)

    run(Slow(), path)
    assert sorted(dict(e.key.sizes)["tokens"] for e in read(path)) == [64, 64, 128, 128]


def test_other_versions_are_measured_anew_and_other_entries_stay(path, monkeypatch):
    run(Op(), path)
    before = list(read(path))
    text = path.read_text().replace('"tokens": 64', '"tokens": 128')
    path.write_text(text)
    configs.forget()
    run(Op(), path)
    assert [dict(e.key.sizes)["tokens"] for e in read(path)] == [128, 128, 64, 64]
    assert list(read(path))[2:] == before
    monkeypatch.setattr(tuning, "versions", lambda: ("9", "9"))
    assert len(run(Op(), path)[0]) == 2
    assert [e.triton == "9" for e in read(path)] == [False, False, True, True]


def test_what_is_gated_off_and_a_wrong_heuristic_are_refused(path):
    with pytest.raises(ValueError, match="active takes at least one sample"):
        run(Op(samples=0), path)
    with pytest.raises(
        WrongResult, match=r"causal_conv1d\.forward \(forward\): untuned, out is off"
    ):
        run(Op(wrong=[HEURISTIC]), path)
    assert not path.exists()


@pytest.mark.parametrize(
    "error, ends",
    [(RuntimeError, False), (TritonError, False), (torch.OutOfMemoryError, True)],
)
def test_a_candidate_that_does_not_run_is_refused_and_a_full_memory_ends_the_tuner(error, ends):
    def call():
        raise error("of the driver")

    if ends:
        with pytest.raises(error):
            tuning.fault(call, None)
    else:
        assert tuning.fault(call, None) == "it does not run: of the driver"


def test_memory_is_poisoned_while_results_are_made():
    mode = torch.get_deterministic_debug_mode()
    with tuning.poisoned_memory():
        for fresh in (torch.empty(9), torch.ones(9).new_empty(9), torch.empty_like(torch.ones(9))):
            assert fresh.isnan().all()
    assert torch.get_deterministic_debug_mode() == mode


FACTS_OF = {
    "flash_attention": {"head_dim": 128},
    "selective_scan": {"states": 16},
    "causal_conv1d": {},
    "linear": {},
    "rotary": {"width": 64},
    "repeat_groups": {},
    "selective_state_update": {"states": 16},
    "causal_conv1d_update": {},
    "adamw": {},
}


@pytest.mark.parametrize("kernel", SPACES)
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize("described", [False, True])
def test_candidates_are_legal_few_and_without_the_heuristic(kernel, dtype, described):
    facts = FACTS_OF[kernel.partition(".")[0]]
    facts = facts | {"dtype": dtype, "left": dtype, "described": described}
    key = Key(kernel, tuple(facts.items()), ())
    every = candidates(key, {})
    assert 8 < len(every) < 256
    for config in every:
        others = {"stages", "num_stages", "programs", "described", "BLOCK"}
        sides = [n for name, n in config.items() if name not in others]
        assert config.get("described", 0) <= described
        assert all(n & (n - 1) == 0 and n <= 256 for n in sides)
        assert 32 % config.get("TOKENS", 1) == 0 and CHUNK % config.get("BLOCK", 1) == 0
    assert candidates(key, every[3]) == every[:3] + every[4:]


def test_a_kernel_without_a_space_is_named():
    with pytest.raises(ValueError, match=r"kernels that are tuned are flash_.*, got routing.draw"):
        candidates(Key("routing.draw", (), ()), {})
