"""The registry: what its workloads compute, what they are compared with, and their floors."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tossup.autotune.peaks import PEAKS, Floor, Peak
from tossup.autotune.workloads import (
    OPS,
    MissingPeer,
    Prepared,
    Workload,
    attention,
    build,
    first_results,
    keys,
    selective_scan,
    shipped,
)
from tossup.kernels.flash_attention import flash_attention

ROOT = Path(__file__).parents[2]

SMALL = {
    "attention": {"seqlen": 37, "heads": 4, "kv_heads": 2, "head_dim": 16},
    "selective_scan": {"seqlen": 37, "dim": 24, "state": 4, "groups": 2},
    "causal_conv1d": {"seqlen": 37, "dim": 24},
    "linear": {"seqlen": 37, "in_features": 24, "out_features": 40},
    "rotary": {"seqlen": 37, "heads": 3, "head_dim": 10},
    "repeat_groups": {"seqlen": 37, "dim": 15, "group": 5, "repeats": 3},
    "selective_state_update": {"dim": 24, "state": 4, "groups": 2},
    "causal_conv1d_update": {"seqlen": 2, "dim": 24},
    "adamw": {"parameters": 3, "elements": 37},
}
every_op = pytest.mark.parametrize("op", OPS)


def small(op: str, **values) -> Workload:
    return build(op, SMALL[op] | {"batch": 3, "dtype": "fp32"} | values)


def peers_of(prepared: Prepared) -> dict:
    made = {}
    for name, make in prepared.peers.items():
        try:
            made[name] = make()
        except MissingPeer:
            continue
    return made


@pytest.mark.parametrize("active", [None, 2])
@every_op
def test_ours_and_a_peer_agree_with_the_reference_in_every_direction(op, active):
    workload = small(op, active=active)
    prepared = workload.prepare("cpu")
    peers = peers_of(prepared)
    assert peers
    for direction in workload.directions:
        for calls in (prepared.ours, *peers.values()):
            results = first_results(calls[direction])
            assert prepared.wrong(results) is None
            calls[direction]()
            again = first_results(calls[direction])  # nothing is left of the calls before
            for name, value in results.items():
                torch.testing.assert_close(
                    value[: workload.samples], again[name][: workload.samples]
                )


@every_op
def test_every_result_is_compared_and_a_wrong_one_is_named(op):
    workload = small(op)
    prepared = workload.prepare("cpu")
    results = {n: x for d in workload.directions for n, x in prepared.ours[d]().items()}
    assert {part.result for part in prepared.expected()} == results.keys()
    for name, value in results.items():
        off = value.detach().clone()
        off[(-1,) * off.ndim] += 0.1 * off.abs().max()
        assert prepared.wrong(results | {name: off}).startswith(f"{name} is off by ")
        off[(-1,) * off.ndim] = float("nan")
        assert prepared.wrong(results | {name: off}).startswith(f"{name} is off by inf")


def test_results_of_other_names_are_refused():
    """Or a workload of a user's would be timed, and never checked."""
    prepared = small("linear").prepare("cpu")
    for results in ({}, {"y": torch.ones(2)}):
        assert "the reference" in prepared.wrong(results)


@pytest.mark.parametrize(
    ("op", "one", "other"),
    [
        ("attention", {}, {"sequences": 4, "seqlen": 36}),
        ("attention", {"causal": False}, {"sequences": 4, "seqlen": 36, "causal": False}),
        ("repeat_groups", {"group": 16, "dim": 64}, {"group": 1, "dim": 64}),
    ],
)
def test_other_work_asks_for_configurations_of_its_own(op, one, other):
    program = f"""
from tossup.autotune.offline import offline
from tossup.autotune.on_meta import calls_on_meta, launching
from tossup.autotune.tune import tasks_of
from tossup.autotune.workloads import build
found = []
for values in {one, other}:
    workload = build({op!r}, dict(batch=2, seqlen=36) | values)
    with offline(90), launching():
        found.append({{task.key.facts for task in tasks_of(workload, calls_on_meta(workload))}})
assert found[0] and not found[0] & found[1]
"""
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=without, cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("op", "values"),
    [
        ("attention", {"window": 9}),
        ("attention", {"causal": False}),
        ("attention", {"queries": 1}),
        ("attention", {"queries": 20}),
        ("attention", {"queries": 20, "causal": False}),
        ("attention", {"queries": 20, "window": 9}),
        ("attention", {"sequences": 4, "seqlen": 36}),
        ("attention", {"sequences": 4, "seqlen": 36, "causal": False, "active": 2}),
        ("attention", {"sequences": 4, "seqlen": 36, "window": 3}),
        ("attention", {"dtype": "bf16"}),
        ("rotary", {"interleaved": True}),
        ("rotary", {"dtype": "bf16"}),
        ("repeat_groups", {"dtype": "bf16"}),
        ("causal_conv1d_update", {"dtype": "bf16", "seqlen": 5, "width": 3}),
    ],
)
def test_ours_and_a_peer_agree_in_variants(op, values):
    workload = small(op, **values)
    prepared = workload.prepare("cpu")
    for calls in (prepared.ours, *peers_of(prepared).values()):
        assert prepared.wrong(first_results(calls[workload.directions[-1]])) is None


def test_both_oracles_of_the_scan_agree():
    """That of a GPU, the CPU backend, and that of a CPU, the reference a few tokens at a time."""
    made = small("selective_scan").inputs(torch.Generator().manual_seed(0))
    inputs = {name: x.double() for name, x in made.items()}
    dout = inputs.pop("dout")
    ours = selective_scan.scan_on_cpu(inputs, dout)
    theirs = selective_scan.scan_in_steps({name: x.clone() for name, x in inputs.items()}, dout)
    assert ours.keys() == theirs.keys() and len(ours) == 9
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window": 9},
        {"queries": 9},
        {"causal": False},
        {"sequences": 3, "seqlen": 36},
        {"sequences": 3, "seqlen": 36, "causal": False},
        {"sequences": 2, "seqlen": 36, "window": 4},
    ],
)
def test_flex_attention_gets_the_mask_that_ours_has(values, monkeypatch):
    """The peer of a GPU, without the compilation that makes it fast, and without gradients, which
    it refuses on a CPU."""

    def as_it_is(function):
        return lambda *inputs, **options: function(*(x.detach() for x in inputs), **options)

    monkeypatch.setattr(attention, "compiled", as_it_is)
    workload = small("attention", **values)
    inputs = workload.inputs(torch.Generator().manual_seed(0))
    assert workload.prepare("cpu").wrong(workload.flex(inputs)["forward"]()) is None


def test_a_call_that_overwrites_a_state_goes_on_from_it():
    """What is timed is a step after a step; only the first is from the state that was made."""
    prepared = small("selective_state_update").prepare("cpu")
    call = prepared.ours["forward"]
    first, second = (call()["out"] for _ in range(2))
    assert prepared.wrong({"out": second}) and not prepared.wrong({"out": first})


def test_blocks_of_the_references_agree_with_the_whole(monkeypatch):
    """Queries and tokens come in blocks, which these shapes would not fill."""
    monkeypatch.setattr(attention, "BLOCK", 10)
    monkeypatch.setattr(selective_scan, "STEPS", 10)
    for op, values in (
        ("attention", {}),
        ("attention", {"causal": False}),
        ("attention", {"queries": 23}),
        ("attention", {"sequences": 2, "seqlen": 36}),
        ("attention", {"sequences": 2, "seqlen": 36, "causal": False}),
        ("selective_scan", {}),
    ):
        prepared = small(op, **values).prepare("cpu")
        assert prepared.wrong(prepared.ours["forward+backward"]()) is None


@every_op
def test_without_a_sample_ours_runs_and_no_peer_has_anything_to_do(op):
    workload = small(op, active=0)
    prepared = workload.prepare("cpu")
    assert not prepared.peers and not prepared.expected()
    for direction in workload.directions:
        assert prepared.ours[direction]()
        assert all(part == Floor() for part in workload.parts(direction))


def test_a_peer_that_cannot_run_says_why():
    for values, why in (
        ({"window": 5}, "no sliding window"),
        ({"sequences": 3, "seqlen": 36}, "takes one sequence"),
    ):
        peers = small("attention", **values).prepare("cpu").peers
        with pytest.raises(MissingPeer, match=why):
            peers["SDPA"]()


def test_varlen_gets_the_sequences_that_ours_has(monkeypatch):
    """The peer of a GPU, of which a loop over its sequences takes the place."""

    def in_turns(q, k, v, of_q, of_k, longest_q, longest_k, *, window_size):
        assert torch.equal(of_q, of_k) and (longest_q, longest_k) == (9, 9)
        parts = [slice(*ends) for ends in itertools.pairwise(of_q.tolist())]
        outs = [
            flash_attention(*(x[None, at] for x in (q, k, v)), window_size=window_size)[0]
            for at in parts
        ]
        return torch.cat(outs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", in_turns)
    for values in ({}, {"causal": False}, {"window": 4}):
        workload = small("attention", sequences=4, seqlen=36, kv_heads=4, **values)
        calls = workload.varlen(workload.inputs(torch.Generator().manual_seed(0)))
        assert workload.prepare("cpu").wrong(calls["forward+backward"]()) is None
    for values, why in (({}, "packed sequences"), ({"sequences": 37}, "as many heads")):
        with pytest.raises(MissingPeer, match=why):
            small("attention", **values).varlen({})


def test_floors_are_those_of_the_kernels_docstrings():
    """In ms on an H200, or bytes: the head of each op's kernel.py."""
    h200 = PEAKS["NVIDIA H200"]
    scan = build("selective_scan", {"batch": 8, "seqlen": 4096, "dim": 4096, "state": 16})
    for direction, milliseconds in (("forward", 0.51), ("backward", 1.0)):
        floor = scan.floor(direction)
        assert h200.seconds(floor) == pytest.approx(milliseconds / 1e3, rel=0.03)
        assert h200.binds(floor) == "mufu"
    linear = build("linear", {"batch": 4, "seqlen": 4096})
    assert h200.seconds(linear.floor("forward")) == pytest.approx(0.13e-3, rel=0.03)
    assert h200.binds(linear.floor("wgrad")) == "matrix_flops"
    tokens = {"batch": 2, "seqlen": 4096}
    for op, per_channel, channels in (("rotary", 4, 32 * 128), ("repeat_groups", 10, 1024)):
        for direction in ("forward", "backward"):
            floor = build(op, tokens).floor(direction)
            assert floor.bytes == pytest.approx(per_channel * channels * 8192, rel=0.02)
            assert h200.binds(floor) == "bytes"


def test_pairs_are_those_that_the_mask_leaves():
    query, key = torch.arange(37)[:, None], torch.arange(37)
    for values, mask in (
        ({}, key <= query),
        ({"window": 9}, (key <= query) & (key >= query - 9)),
        ({"window": 99}, key <= query),
        ({"queries": 9}, (key <= query) & (query >= 28)),
        ({"queries": 9, "window": 31}, (key <= query) & (query >= 28) & (key >= query - 31)),
        ({"queries": 9, "causal": False}, torch.ones(9, 37)),
        ({"causal": False}, torch.ones(37, 37)),
    ):
        workload = small("attention", **values)
        assert workload.pairs == mask.sum() * 4 * 3
        if "queries" not in values:
            together = query[:36] // 12 == key[:36] // 12
            parted = small("attention", sequences=3, seqlen=36, **values)
            assert parted.pairs == (mask[:36, :36].bool() & together).sum() * 4 * 3
        assert workload.flops("forward+backward") == 7 * 2 * 16 * workload.pairs


def test_keys_that_no_query_sees_move_no_bytes():
    """3 samples, 4 heads of queries and 2 of keys, of 16 channels in float32, and log-sum-exps."""
    for values, seen in (({}, 37), ({"window": 3}, 4), ({"window": 99}, 37)):
        floor = small("attention", queries=1, **values).floor("forward")
        assert floor.bytes == 3 * (2 * 4 * 16 * 4 + 2 * seen * 2 * 16 * 4 + 4 * 4)


def test_float32_products_have_no_matrix_unit():
    peak = Peak(1e12, processors=100, clock=1e9, matrix_flops=4096, float32_flops=256)
    half, full = (small("linear", dtype=dtype).floor("forward") for dtype in ("bf16", "fp32"))
    assert half.matrix_flops == full.float32_flops > 0 == half.float32_flops == full.matrix_flops
    assert peak.parts(full)["float32_flops"] == pytest.approx(full.float32_flops / 25.6e12)
    assert peak.seconds(Floor(bytes=3e12, mufu=1)) == 3 and peak.binds(Floor(bytes=1)) == "bytes"


def test_a_name_is_what_one_types_and_names_are_distinct():
    for device in ("cpu", "cuda"):
        names = [workload.name for workload in shipped(device)]
        assert len(names) == len(set(names))
    assert small("linear", active=2).name == (
        "linear batch=3 seqlen=37 in_features=24 out_features=40 dtype=fp32 active=2"
    )
    assert build("flash_attention", {"seqlen": 8}) == build("attention", {"seqlen": 8})
    assert list(keys("linear")) == [
        "batch", "seqlen", "in_features", "out_features", "dtype", "active",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "values", "message"),
    [
        ("scan", {}, "OP takes attention, selective_scan, causal_conv1d, .*, got 'scan'"),
        ("linear", {"dim": 4}, "linear takes the keys batch, seqlen, .*, got 'dim'"),
        ("linear", {"seqlen": 0}, "seqlen takes a whole number from 1 on, got 0"),
        ("linear", {"seqlen": 1.5}, "seqlen takes a whole number from 1 on, got 1.5"),
        ("linear", {"dtype": "fp8"}, "dtype takes bf16, fp16, fp32, got 'fp8'"),
        ("linear", {"active": 2}, "active takes at most the batch of 1, got 2"),
        ("linear", {"active": -1}, "active takes a whole number from 0 on, got -1"),
        ("attention", {"causal": 1}, "causal takes true or false, got 1"),
        ("attention", {"kv_heads": 3}, "kv_heads takes a divisor of heads = 32, got 3"),
        ("attention", {"causal": False, "window": 2}, "window takes causal=true"),
        ("attention", {"seqlen": 4, "queries": 5}, "queries takes at most seqlen = 4, got 5"),
        ("attention", {"sequences": 3}, "sequences takes a divisor of seqlen = 4096, got 3"),
        ("attention", {"sequences": 2, "queries": 1}, "queries takes sequences=1"),
        ("selective_scan", {"groups": 3}, "groups takes a divisor of dim = 4096, got 3"),
        ("causal_conv1d", {"width": 5}, "width takes 2 to 4, got 5"),
        ("rotary", {"head_dim": 7}, "head_dim takes an even number, got 7"),
        ("repeat_groups", {"group": 3}, "group takes a divisor of dim = 1024, got 3"),
        ("selective_state_update", {"groups": 3}, "groups takes a divisor of dim = 4096, got 3"),
        ("selective_state_update", {"seqlen": 2}, "takes the keys batch, dim, .*, got 'seqlen'"),
        ("causal_conv1d_update", {"width": 1}, "width takes a whole number from 2 on, got 1"),
    ],
)
def test_wrong_keys_and_values_get_a_sentence(op, values, message):
    with pytest.raises(ValueError, match=message):
        build(op, values)
