"""Selective scan: values, gradients, states, resets and routes, against independent oracles."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import selective_scan_ref
from tests.support import (
    EXACT,
    assert_within_budget,
    budget,
    every_backend,
    every_impl,
    only_triton,
    route_of,
    seeded,
)
from tossup.kernels.selective_scan import kernel, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
BATCHED = ("u", "delta", "B", "C", "z", "initial_state")
STATES = ("A", "D", "delta_bias", "initial_state")  # kept in float32 beside half-precision inputs


def make(
    batch=2, seqlen=37, dim=24, states=5, groups=(1, 1), dtype=torch.float32, without=(), seed=0
) -> dict[str, Tensor]:
    """Random inputs, all of those that take a gradient but `without`. u, delta and z are views.

    groups: those of B and of C, 0 for a constant one.
    """
    random = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    tensors = {
        "u": normal(batch, seqlen, 2 * dim)[..., :dim],
        "delta": normal(batch, seqlen, dim + 3)[..., 3:],
        "A": -normal(dim, states).exp(),
        "B": normal(batch, seqlen, groups[0], states) if groups[0] else normal(dim, states),
        "C": normal(batch, seqlen, groups[1], states) if groups[1] else normal(dim, states),
        "D": normal(dim),
        "z": normal(seqlen, batch, dim).transpose(0, 1),
        "delta_bias": normal(dim),
        "initial_state": normal(batch, dim, states),
    }
    kept = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(kept if name in STATES else dtype)
        for name, tensor in tensors.items()
        if name not in without
    }


def run(tensors: dict[str, Tensor], impl="cpu", **options) -> dict[str, Tensor]:
    """The output, the final state, and the gradients of a fixed function of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, final_state = selective_scan(**leaves, impl=impl, return_final_state=True, **options)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    dfinal = torch.linspace(-2, 3, final_state.numel(), dtype=torch.float64).cos()
    route = options.get("route")
    mine = slice(None) if route is None else route.samples[: route.count].long()
    loss = (out * dout.to(out.dtype))[mine].sum()
    loss = loss + (final_state * dfinal.to(final_state.dtype).view_as(final_state))[mine].sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final_state.detach(), **gradients}


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def assert_all_within_budget(ours, exact, plain):
    ours, exact, plain = dict(ours), dict(exact), dict(plain)
    if "ddelta_bias" in exact:  # a sum whose terms may cancel: it inherits their errors
        got, oracle, same = (tensors.pop("ddelta_bias") for tensors in (ours, exact, plain))
        allowed = budget(oracle, same) + budget(exact["ddelta"], plain["ddelta"])
        assert got.dtype == same.dtype
        assert (got.double() - oracle).abs().max() <= allowed
    assert list(ours) == list(exact) == list(plain)
    assert_within_budget(ours.values(), exact.values(), plain.values())


@pytest.fixture
def split(monkeypatch):
    """Segments of one chunk, as if the GPU were never full."""
    monkeypatch.setattr(kernel, "segment_of", lambda seqlen, warps: kernel.CHUNK)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, seqlen, dim, states, groups",
    [
        (1, 1, 1, 1, (1, 1)),
        (2, 16, 16, 16, (1, 1)),
        (2, 33, 50, 3, (1, 2)),  # blocks of 16 and 9 channels
        (1, 50, 12, 4, (3, 2)),  # groups of 4 and of 6 channels: runs of 2
        (2, 7, 6, 2, (6, 1)),  # a group for every channel
        (1, 40, 70, 4, (0, 1)),
        (2, 9, 12, 5, (4, 0)),
        (1, 35, 40, 3, (0, 0)),
        (2, 5, 4, 256, (1, 2)),
        (2, 36, 64, 4, (2, 1)),  # no lane without a channel, no turn without a token
    ],
)
def test_agrees_with_float64(impl, dtype, batch, seqlen, dim, states, groups):
    tensors = make(batch, seqlen, dim, states, groups, dtype)
    exact = run(doubled(tensors), "reference", delta_softplus=True)
    plain = run(tensors, "reference", delta_softplus=True)
    assert_all_within_budget(run(tensors, impl, delta_softplus=True), exact, plain)


@only_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seqlen, dim, groups", [(36, 128, 1), (37, 128, 2), (34, 192, 1)])
def test_two_channels_to_a_lane(impl, dtype, seqlen, dim, groups, monkeypatch):
    monkeypatch.setattr(kernel, "processors", lambda: 0)  # any number of channels fills them
    tensors = make(1, seqlen, dim, 5, (groups, groups), dtype)
    options = {"delta_softplus": True, "seq_idx": (torch.arange(seqlen)[None] > 18).int()}
    pieces = kernel.cut(*(tensors[name] for name in "uABCz"), None, backward=False)
    assert pieces.constants["BLOCK_DIM"] == 64 and pieces.even == (seqlen % 2 == 0)
    exact = run(doubled(tensors), "reference", **options)
    plain = run(tensors, "reference", **options)
    assert_all_within_budget(run(tensors, impl, **options), exact, plain)


@only_triton
@pytest.mark.parametrize(
    "seqlen, groups, packed, chosen",
    [
        (33, (1, 1), False, None),
        (70, (3, 2), True, None),
        (65, (0, 1), True, (1,)),
        (64, (1, 0), False, (1, 0)),
        (33, (0, 0), False, ()),
    ],
)
def test_the_length_split_over_programs_changes_nothing(
    impl, seqlen, groups, packed, chosen, split
):
    tensors = make(2, seqlen, 12, 3, groups)
    options = {"delta_softplus": True}
    if packed:  # sequences that end at, before and behind the ends of segments
        options["seq_idx"] = (torch.arange(seqlen) // torch.tensor([[32], [45]])).int()
    if chosen is not None:
        options["route"] = route_of(*chosen, batch=2)
    whole = run(tensors, "reference", **options)
    ours = run(tensors, impl, **options)
    mine = slice(None) if chosen is None else list(chosen)
    for name, expected in whole.items():
        got, of_samples = ours[name], name[1:] in BATCHED and expected.shape != (12, 3)
        if of_samples or name in ("out", "final_state"):
            got, expected = got[mine], expected[mine]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@only_triton
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_of_zero_stays_zero_through_a_segment_that_would_grow_anything(
    impl, reverse, monkeypatch
):
    monkeypatch.setattr(kernel, "segment_of", lambda seqlen, warps: kernel.CHUNK)
    seqlen, states = 3 * kernel.CHUNK, 3
    u, B, C = (
        torch.randn(1, seqlen, *s, generator=seeded(0)) for s in ((2,), (1, states), (1, states))
    )
    silent = slice(2 * kernel.CHUNK, None) if reverse else slice(2 * kernel.CHUNK)
    delta = torch.full((1, seqlen, 2), 0.1)
    delta[:, silent] = -4.0
    u[:, silent] = 0
    A = -torch.ones(2, states)
    results = []
    for chosen in (impl, "reference"):
        leaf = u.clone().requires_grad_()
        out = selective_scan(leaf, delta, A, B, C, impl=chosen)
        heard = out[:, : 2 * kernel.CHUNK].sum() if reverse else out
        results.append(torch.autograd.grad(heard, leaf)[0] if reverse else heard.detach())
    assert results[1].isfinite().all() and results[1].count_nonzero()
    torch.testing.assert_close(*results)


def test_segments_are_whole_chunks_that_cover_the_length_and_are_worth_it():
    for seqlen in (1, 31, 32, 33, 4096, 32768 + 1):
        chunks = -(-seqlen // kernel.CHUNK) * kernel.CHUNK
        assert kernel.segment_of(seqlen, warps=10**6) == chunks
        segment = kernel.segment_of(seqlen, warps=1)
        assert segment % kernel.CHUNK == 0 and segment == min(kernel.SHORTEST, chunks)
    # Half of the 8 warps that each multiprocessor of sm_90 wants: two segments
    assert kernel.segment_of(4096, warps=132 * 4) == 2048


def test_float64_stays_float64():
    tensors = make(1, 50, 12, 4, (3, 2), torch.float64)
    ours, exact = (run(tensors, impl, delta_softplus=True) for impl in ("cpu", "reference"))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-11, atol=1e-12)


@every_backend
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    without=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
    softplus=st.booleans(),
    packed=st.booleans(),
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 40),
    groups=st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 2, 6])),
    heads=st.integers(1, 3),
    states=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_options(impl, without, softplus, packed, batch, seqlen, groups, heads, states, seed):
    tensors = make(batch, seqlen, 6 * heads, states, groups, EXACT[impl], without, seed)
    if not softplus:
        tensors["delta"] = tensors["delta"].abs()
        tensors |= {"delta_bias": tensors["delta_bias"].abs()} if "delta_bias" in tensors else {}
    options = {"delta_softplus": softplus}
    if packed:
        starts = torch.rand(batch, seqlen, generator=seeded(seed)) < 0.2
        options["seq_idx"] = starts.cumsum(1).int() % 3  # a number may come back
    ours, exact = run(tensors, impl, **options), run(doubled(tensors), "reference", **options)
    for name in exact:
        tolerance = 1e-9 if impl == "cpu" else 2e-5
        largest = max(exact[name].abs().max().item(), 1.0)
        torch.testing.assert_close(
            ours[name].double(), exact[name], rtol=0, atol=tolerance * largest
        )


@every_impl
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_agrees_with_mamba_ssm(impl, groups):
    tensors = make(2, 45, 8, 8, (groups, groups), without=("initial_state",))
    ours = run(tensors, impl, delta_softplus=True)

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    theirs = {name: leaves[name].transpose(1, 2) for name in ("u", "delta", "z")}
    if groups:
        theirs |= {name: leaves[name].permute(0, 2, 3, 1) for name in ("B", "C")}
    out, state = selective_scan_ref(
        **(leaves | theirs), delta_softplus=True, return_last_state=True
    )
    out = out.transpose(1, 2)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    dstate = torch.linspace(-2, 3, state.numel(), dtype=torch.float64).cos().view_as(state)
    loss = (out * dout.float()).sum() + (state * dstate.float()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    torch.testing.assert_close(ours["out"], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["final_state"], state, rtol=1e-5, atol=1e-5)
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(ours[f"d{name}"], gradient, rtol=1e-4, atol=1e-4)


@every_impl
def test_two_tokens_by_hand(impl):
    u, delta = torch.tensor([[[3.0], [5.0]]]), torch.tensor([[[0.5], [2.0]]])
    A = torch.tensor([[-1.0]])
    B, C = torch.tensor([[[[2.0]], [[7.0]]]]), torch.tensor([[[[11.0]], [[13.0]]]])
    out, state = selective_scan(u, delta, A, B, C, return_final_state=True, impl=impl)
    first = 0.5 * 3 * 2
    second = first * torch.exp(torch.tensor(-2.0)) + 2 * 5 * 7
    torch.testing.assert_close(
        out, torch.stack([torch.tensor(first * 11), second * 13])[None, :, None]
    )
    torch.testing.assert_close(state, second.view(1, 1, 1))


@pytest.mark.parametrize("options", [{}, {"delta_softplus": True}])
def test_gradients_by_finite_differences(options):
    tensors = make(2, 19, 4, 2, (2, 1), dtype=torch.float64)
    if not options:
        tensors["delta"], tensors["delta_bias"] = (
            tensors["delta"].abs(),
            tensors["delta_bias"].abs(),
        )
    seq_idx = (torch.arange(19) // 7).expand(2, -1)

    def scan(*leaves):
        named = dict(zip(NAMES, leaves, strict=True))
        return selective_scan(
            **named, seq_idx=seq_idx, return_final_state=True, impl="cpu", **options
        )

    leaves = [tensors[name].contiguous().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@every_backend
@pytest.mark.parametrize("cut", [1, 16, 20])
def test_pieces_with_state_make_the_whole(impl, cut):
    tensors = make(2, 37)
    whole = run(tensors, impl, delta_softplus=True)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def piece(tokens, state):
        parts = {n: leaves[n][:, tokens] for n in ("u", "delta", "B", "C", "z")}
        return selective_scan(
            **(leaves | parts | {"initial_state": state}),
            delta_softplus=True, return_final_state=True, impl=impl,
        )  # fmt: skip

    head, state = piece(slice(None, cut), leaves["initial_state"])
    tail, state = piece(slice(cut, None), state)
    out = torch.cat([head, tail], 1)
    torch.testing.assert_close(out, whole["out"])
    torch.testing.assert_close(state, whole["final_state"])
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    dfinal = torch.linspace(-2, 3, state.numel(), dtype=torch.float64).cos().view_as(state)
    loss = (out * dout.float()).sum() + (state * dfinal.float()).sum()
    for name, gradient in zip(NAMES, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(gradient, whole[f"d{name}"], rtol=1e-4, atol=1e-5)


@every_impl
def test_packed_sequences_are_separate_runs(impl):
    lengths = [5, 1, 16, 11]
    tensors = make(1, sum(lengths))
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 1]), torch.tensor(lengths))[None]
    packed = run(tensors, impl, delta_softplus=True, seq_idx=seq_idx.int())

    pieces = {n: tensors[n].split(lengths, 1) for n in ("u", "delta", "B", "C", "z")}
    outs = []
    for i in range(len(lengths)):
        state = tensors["initial_state"] if i == 0 else None
        parts = {name: split[i] for name, split in pieces.items()}
        out, final_state = selective_scan(
            **(tensors | parts | {"initial_state": state}),
            delta_softplus=True, return_final_state=True, impl="reference",
        )  # fmt: skip
        outs.append(out)
    torch.testing.assert_close(packed["out"], torch.cat(outs, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed["final_state"], final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # the interpreter's, of infinities
@pytest.mark.parametrize("starts, value", [(16, float("inf")), (20, float("nan")), (269, 3e38)])
@every_impl
def test_what_overflowed_in_a_sequence_stays_there(impl, starts, value):
    seqlen = starts + 20
    tensors = make(1, seqlen, without=("initial_state",))
    options = {"delta_softplus": True, "seq_idx": (torch.arange(seqlen) >= starts).int()[None]}
    expected = run(tensors, impl, **options)
    tensors["u"][:, :starts] = value
    found = run(tensors, impl, **options)
    for name in ("out", "du", "ddelta", "dB", "dC", "dz"):
        torch.testing.assert_close(found[name][:, starts:], expected[name][:, starts:])


@every_backend
def test_no_gradient_crosses_a_reset(impl):
    tensors = {name: tensor.requires_grad_() for name, tensor in make(1, 20).items()}
    seq_idx = (torch.arange(20) >= 9).int()[None]
    out, _ = selective_scan(
        **tensors, delta_softplus=True, seq_idx=seq_idx, return_final_state=True, impl=impl
    )
    du, dstate = torch.autograd.grad(out[:, 9:].sum(), (tensors["u"], tensors["initial_state"]))
    assert (du[:, :9] == 0).all() and (du[:, 9:] != 0).any()
    assert (dstate == 0).all()


@every_impl
@pytest.mark.parametrize("chosen", [(), (2,), (3, 0), (0, 1, 2, 3)])
def test_route_touches_only_its_samples(impl, chosen):
    tensors = make(4, 21)
    seq_idx = (torch.arange(21) // torch.tensor([[4], [5], [6], [7]])).int()
    route = route_of(*chosen, batch=4)
    options = {"delta_softplus": True, "seq_idx": seq_idx}
    routed = run(tensors, impl, route=route, **options)
    every = run(tensors, "reference", **options)

    mine, others = list(chosen), [b for b in range(4) if b not in chosen]
    for name in ("out", "final_state"):
        assert routed[name][others].isnan().all()
        torch.testing.assert_close(routed[name][mine], every[name][mine], rtol=1e-5, atol=1e-5)
    for name in BATCHED:
        gradient = routed[f"d{name}"]
        expected = every[f"d{name}"]
        torch.testing.assert_close(gradient[mine], expected[mine], rtol=1e-4, atol=1e-4)
        if impl != "reference":
            assert gradient[others].isnan().all()
    for name in ("A", "D", "delta_bias"):  # what the route's samples alone add
        alone = sum(share(tensors, name, b, every, options) for b in mine)
        expected = alone if mine else torch.zeros_like(tensors[name])
        torch.testing.assert_close(routed[f"d{name}"], expected, rtol=1e-4, atol=1e-4)


def share(tensors, name, sample, every, options):
    """The part of a weight's gradient that one sample makes: the route's own, by the reference."""
    return run(tensors, "reference", **(options | {"route": route_of(sample, batch=4)}))[f"d{name}"]


@every_backend
def test_backward_follows_the_route_of_its_forward(impl):
    tensors = {name: tensor.requires_grad_() for name, tensor in make(3, 9).items()}
    route = route_of(1, batch=3)
    out = selective_scan(**tensors, route=route, impl=impl)
    route.count.zero_()
    (du,) = torch.autograd.grad(out[1].sum(), tensors["u"])
    assert not du[1].isnan().any() and du[[0, 2]].isnan().all()


@every_backend
def test_extreme_steps(impl):
    """A state that decays to nothing, steps beyond the softplus's threshold, and vanishing ones."""
    tensors = make(1, 40, 8, 4)
    tensors["delta"] = torch.linspace(-120, 60, 40)[None, :, None].expand(1, 40, 8).contiguous()
    tensors["A"] = -torch.logspace(-3, 3, 32).view(8, 4)
    exact = run(doubled(tensors), "reference", delta_softplus=True)
    plain = run(tensors, "reference", delta_softplus=True)
    ours = run(tensors, impl, delta_softplus=True)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert_all_within_budget(ours, exact, plain)


@every_backend
def test_not_a_number_spreads_from_its_channel_and_no_further(impl):
    tensors = make(1, 30, 20)
    tensors["u"][0, 12, 3] = float("nan")
    out = selective_scan(**tensors, delta_softplus=True, impl=impl)
    assert out[0, 12:, 3].isnan().all()
    out[0, 12:, 3] = 0
    assert out.isfinite().all()


def test_sweeps_are_the_same_whatever_the_number_of_threads():
    """Torch divides nothing of this size among its own."""
    tensors = make(2, 50, 70, 16, (2, 1))
    threads = torch.get_num_threads()
    first = run(tensors, delta_softplus=True)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = run(tensors, delta_softplus=True)
    finally:
        torch.set_num_threads(threads)
    for name in ("out", "final_state", "du", "ddelta", "dA", "dB", "dC", "dinitial_state"):
        assert torch.equal(first[name], second[name]), name
    third = run(tensors, delta_softplus=True)
    assert all(torch.equal(first[name], third[name]) for name in first)


def gradient_of_u(seed: int) -> list[float]:
    return run(make(2, 9, 33, seed=seed), delta_softplus=True)["du"].flatten().tolist()


def test_concurrent_threads_and_forked_processes(monkeypatch):
    """A fork has none of its parent's threads. torch stays on one, or it would hang there; beside a
    GPU autograd has threads of its own, and refuses."""
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = [gradient_of_u(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(gradient_of_u, range(8))) == expected
    if torch.cuda.is_available():
        return
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map_async(gradient_of_u, range(8)).get(timeout=60) == expected


def test_runs_where_nothing_can_be_cached(monkeypatch):
    from numba.core.caching import CacheImpl

    from tossup.kernels.selective_scan import cpu

    tensors = make(1, 9)
    expected = selective_scan(**tensors, impl="cpu")
    monkeypatch.setattr(cpu.forward_sweep, "kernels", {})
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.warns(UserWarning, match=r"selective_scan is compiled anew.*NUMBA_CACHE_DIR"):
        assert torch.equal(selective_scan(**tensors, impl="cpu"), expected)


FIRST_KEPT = """
import sys, torch, tossup
from tossup.kernels.selective_scan.ops import CHUNKS, selective_scan_op
CHUNKS["cpu"] = chunk = int(sys.argv[1])
ones = torch.ones(1, 40, 2)
u, A, B = ones, -torch.ones(2, 1), torch.ones(1, 40, 1, 1)
_, _, kept = selective_scan_op(u, ones, A, B, B, *(None,) * 7, False, "cpu")
_, state = tossup.selective_scan(
    *(x[:, :chunk] for x in (u, ones)), A, *(x[:, :chunk] for x in (B, B)),
    return_final_state=True, impl="reference",
)
torch.testing.assert_close(kept[:, 1].mT, state)
"""


def test_what_is_cached_is_compiled_with_this_chunk(tmp_path):
    """numba looks at the file of the sweeps alone, where CHUNKS does not stand."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for chunk in ("16", "8"):
        script = [sys.executable, "-W", "error", "-c", FIRST_KEPT, chunk]
        subprocess.run(script, env=environment, check=True)


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_registration(impl, routed, monkeypatch):
    from tossup.kernels.selective_scan.ops import selective_scan_op

    monkeypatch.undo()  # opcheck compares what nobody wrote
    tensors = make(2, 9, 6, 3)
    leaves = [tensors[name].contiguous().requires_grad_() for name in NAMES]
    seq_idx = (torch.arange(9) // 4).int().expand(2, -1).contiguous()
    route = route_of(0, 1, batch=2)
    count, samples = (route.count, route.samples) if routed else (None, None)
    torch.library.opcheck(selective_scan_op, (*leaves, seq_idx, count, samples, True, impl))


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_compiles_as_one_graph(impl, routed):
    tensors = make(2, 9, 6, 3)
    options = {"delta_softplus": True, "route": route_of(1, 0, batch=2) if routed else None}
    leaves = [tensors[name].requires_grad_() for name in NAMES]

    def scan(*leaves):
        return selective_scan(**dict(zip(NAMES, leaves, strict=True)), impl=impl, **options)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    expected, out = scan(*leaves), compiled(*leaves)
    assert torch.equal(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": torch.zeros(3, 4)}, r"u must be \(batch, seqlen, dim\).* got \(3, 4\)"),
        ({"u": torch.zeros(2, 0, 6)}, "at least one token"),
        ({"u": torch.zeros(2, 9, 0)}, "one channel, got .2, 9, 0. of torch.float32"),
        ({"B": torch.zeros(2, 9, 1, 3).cfloat()}, "B must be floating, got torch.complex64"),
        ({"delta": torch.zeros(2, 9, 6).long()}, "delta must be floating, got torch.int64"),
        ({"A": torch.zeros(5, 3)}, r"A must be \(dim, state\) = \(6, state\), real, got \(5, 3\)"),
        (
            {"A": torch.zeros(6, 3, dtype=torch.complex64)},
            "A must be .* real, got .* of torch.complex64",
        ),
        (
            {"B": torch.zeros(2, 9, 4, 3)},
            r"B must be .* groups dividing dim = 6, or \(dim, state\), got \(2, 9, 4, 3\)",
        ),
        ({"C": torch.zeros(2, 9, 3)}, r"C must be .* got \(2, 9, 3\)"),
        ({"delta": torch.zeros(2, 8, 6)}, r"delta must be of shape \(2, 9, 6\), got \(2, 8, 6\)"),
        ({"D": torch.zeros(1)}, r"D must be of shape \(6,\), got \(1,\)"),
        ({"initial_state": torch.zeros(2, 3, 6)}, r"initial_state must be of shape \(2, 6, 3\)"),
        ({"seq_idx": torch.zeros(2, 9)}, "seq_idx must hold integers, got torch.float32"),
        ({"seq_idx": torch.zeros(9, dtype=torch.int32)}, r"seq_idx must be of shape \(2, 9\)"),
        ({"impl": "cuda"}, "impl must be auto, triton, cpu or reference, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make(2, 9, 6, 3) | change))


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # the interpreter's, of infinities
@every_backend
@pytest.mark.parametrize("dim", [40, 24])
@pytest.mark.parametrize("what", ["z", "B", "C"])
def test_an_infinity_stays_in_its_group(impl, dim, what):
    """Tiles cover more channels than there are; what they load there belongs to others. Of 40
    channels two tiles have one each, and the tile of 24 has both."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 1, 5, dim).unbind()
    B, C = torch.randn(2, 1, 5, 2, 4).unbind()
    {"z": z, "B": B[:, :, 0], "C": C[:, :, 0]}[what][0, 2, 0] = float("inf")
    B.requires_grad_()
    C.requires_grad_()
    A = -torch.arange(1.0, 5).repeat(dim, 1)
    out = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, impl=impl)
    for gradient in torch.autograd.grad(out.sum(), (B, C)):
        assert gradient[:, :, 1].isfinite().all()
