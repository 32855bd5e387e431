"""One step of the scan: against mamba-ssm's own, in float64, and against the whole scan."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import selective_state_update_ref
from tests.support import (
    EXACT,
    assert_within_budget,
    every_backend,
    every_impl,
    only_triton,
    route_of,
    seeded,
)
from tossup.kernels.selective_scan import selective_scan
from tossup.kernels.selective_state_update import selective_state_update

WEIGHTS = ("state", "A", "D", "dt_bias")  # kept in float32 beside half-precision tokens


def make(
    batch=2, dim=12, states=5, groups=(1, 1), dtype=torch.float32, without=(), seed=0
) -> dict[str, Tensor]:
    """Random inputs, all but `without`. state, x and z are views."""
    random = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    tensors = {
        "state": normal(batch, states, dim).transpose(1, 2),
        "x": normal(batch, 2 * dim)[:, ::2],
        "dt": normal(batch, dim),
        "A": -normal(dim, states).exp(),
        "B": normal(batch, groups[0], states),
        "C": normal(batch, groups[1], states),
        "D": normal(dim),
        "z": normal(dim, batch).T,
        "dt_bias": normal(dim),
    }
    kept = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(kept if name in WEIGHTS else dtype)
        for name, tensor in tensors.items()
        if name not in without
    }


def run(tensors: dict[str, Tensor], impl: str, **options) -> tuple[Tensor, Tensor]:
    """The output, and the state that was overwritten."""
    state = tensors["state"].clone()
    return selective_state_update(**(tensors | {"state": state}), impl=impl, **options), state


def by_mamba_ssm(tensors: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """In float64. Theirs has one group for several heads, not for several channels of one."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    dim = wide["x"].shape[1]
    state = wide.pop("state").clone()
    heads = {name: wide[name].repeat_interleave(dim // wide[name].shape[1], 1) for name in "BC"}
    columns = {n: t.unsqueeze(-1) for n, t in wide.items() if n in ("x", "dt", "D", "z", "dt_bias")}
    rows = state.unsqueeze(2)
    out = selective_state_update_ref(rows, **heads, **columns, A=wide["A"].unsqueeze(1), **options)
    return out.squeeze(-1), rows.squeeze(2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, dim, states, groups",
    [
        (1, 1, 1, (1, 1)),
        (3, 200, 16, (1, 1)),
        (2, 12, 5, (3, 2)),
        (2, 6, 7, (6, 6)),
        (1, 17, 130, (1, 17)),
    ],
)
def test_agrees_with_mamba_ssm_in_float64(impl, dtype, batch, dim, states, groups):
    tensors = make(batch, dim, states, groups, dtype)
    exact = by_mamba_ssm(tensors, dt_softplus=True)
    plain = run(tensors, "reference", dt_softplus=True)
    assert_within_budget(run(tensors, impl, dt_softplus=True), exact, plain)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_float64_stays_float64(impl):
    tensors = make(2, 12, 5, (3, 2), torch.float64)
    ours = run(tensors, impl, dt_softplus=True)
    torch.testing.assert_close(
        ours, by_mamba_ssm(tensors, dt_softplus=True), rtol=1e-12, atol=1e-12
    )


@every_impl
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    without=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
    softplus=st.booleans(),
    batch=st.integers(0, 3),
    groups=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 6])),
    width=st.integers(1, 30),
    states=st.integers(1, 40),
)
def test_any_options(impl, without, softplus, batch, groups, width, states):
    tensors = make(batch, 6 * width, states, groups, EXACT[impl], without)
    ours = run(tensors, impl, dt_softplus=softplus)
    exact = by_mamba_ssm(tensors, dt_softplus=softplus)
    tolerance = 1e-11 if EXACT[impl] == torch.float64 else 1e-4
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@every_impl
def test_steps_make_the_whole_scan(impl):
    seqlen, tensors = 7, make(2, 12, 5, (3, 2), EXACT[impl])
    of_tokens = ("x", "dt", "B", "C", "z")
    steps = [make(2, 12, 5, (3, 2), EXACT[impl], seed=t) for t in range(seqlen)]
    tokens = {name: torch.stack([step[name] for step in steps], 1) for name in of_tokens}
    renamed = {"x": "u", "dt": "delta", "dt_bias": "delta_bias", "state": "initial_state"}
    whole, final_state = selective_scan(
        **{renamed.get(name, name): tensor for name, tensor in (tensors | tokens).items()},
        delta_softplus=True, return_final_state=True, impl="reference",
    )  # fmt: skip
    state = tensors["state"].clone()
    for t in range(seqlen):
        now = {name: tokens[name][:, t] for name in of_tokens}
        out = selective_state_update(
            **(tensors | now | {"state": state}), dt_softplus=True, impl=impl
        )
        torch.testing.assert_close(out, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5, check_dtype=False)


@every_backend
def test_a_half_precision_state_stays_in_its_dtype(impl):
    tensors = make(dtype=torch.bfloat16)
    tensors["state"] = tensors["state"].bfloat16()
    ours, plain = (run(tensors, each, dt_softplus=True) for each in (impl, "reference"))
    assert ours[1].dtype == torch.bfloat16
    assert_within_budget(ours, by_mamba_ssm(tensors, dt_softplus=True), plain)


@every_impl
@pytest.mark.parametrize("chosen", [(), (2,), (3, 0), (0, 1, 2, 3)])
def test_route_touches_only_its_samples(impl, chosen):
    tensors = make(4)
    mine, others = list(chosen), [b for b in range(4) if b not in chosen]
    every_out, every_state = run(tensors, "reference")
    out, state = run(tensors, impl, route=route_of(*chosen, batch=4))
    torch.testing.assert_close(out[mine], every_out[mine], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[mine], every_state[mine], rtol=1e-5, atol=1e-5)
    assert out[others].isnan().all()
    assert torch.equal(state[others], tensors["state"][others])


@every_impl
def test_records_no_gradients(impl):
    tensors = make()
    tensors["A"].requires_grad_()
    out, state = run(tensors, impl)
    assert not out.requires_grad and not state.requires_grad


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_registration(impl, routed, monkeypatch):
    from tossup.kernels.selective_state_update.ops import selective_state_update_op

    monkeypatch.undo()  # opcheck compares what nobody wrote
    route = route_of(0, 1, batch=2) if routed else None
    places = (route.count, route.samples) if route else (None, None)
    arguments = (*(t.contiguous() for t in make().values()), True, *places, impl)
    torch.library.opcheck(
        selective_state_update_op.overload, arguments, test_utils=("test_schema", "test_faketensor")
    )


@every_backend
def test_compiles_as_one_graph(impl):
    tensors = make()

    def step(state, x):
        out = selective_state_update(**(tensors | {"state": state, "x": x}), impl=impl)
        return out + state.sum()  # the state after

    expected, state = step(tensors["state"].clone(), tensors["x"]), tensors["state"].clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state, tensors["x"]), expected)
    torch.testing.assert_close(state, run(tensors, impl)[1])


@only_triton
def test_triton_refuses_float64_in_a_sentence(impl):
    with pytest.raises(ValueError, match="float64 runs with impl='cpu' or 'reference'"):
        run(make(dtype=torch.float64), impl)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": torch.zeros(2, 12)}, r"state must be \(batch, dim, state\), got \(2, 12\)"),
        ({"x": torch.zeros(3, 12)}, r"x must be of shape \(2, 12\), got \(3, 12\)"),
        ({"A": torch.zeros(12, 4)}, r"A must be of shape \(12, 5\), got \(12, 4\)"),
        ({"A": torch.zeros(12, 5).cfloat()}, "A must be floating, got torch.complex64"),
        ({"B": torch.zeros(2, 5, 5)}, r"B must be .* dividing dim = 12, got \(2, 5, 5\)"),
        ({"C": torch.zeros(2, 5)}, r"C must be \(batch, groups, state\) .* got \(2, 5\)"),
        ({"D": torch.zeros(1)}, r"D must be of shape \(12,\), got \(1,\)"),
        ({"z": torch.zeros(2, 12).long()}, "z must be floating, got torch.int64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_state_update(**(make() | change))
