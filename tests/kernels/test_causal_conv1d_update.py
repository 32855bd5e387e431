"""Steps of the causal convolution: against the whole convolution and a window kept by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import (
    EXACT,
    assert_within_budget,
    every_backend,
    every_impl,
    only_triton,
    route_of,
    seeded,
)
from tossup.kernels.causal_conv1d import causal_conv1d
from tossup.kernels.causal_conv1d_update import causal_conv1d_update


def make(
    batch=3, seqlen=2, dim=7, width=4, state_len=3, entries=None, dtype=torch.float32, seed=0
) -> dict[str, Tensor]:
    """Random inputs. x and conv_state are views."""
    random = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, seqlen, 2 * dim)[..., ::2],
        "conv_state": normal(entries or batch, dim, state_len).transpose(1, 2),
        "weight": normal(width, dim).T,
        "bias": normal(dim),
    }


def run(tensors: dict[str, Tensor], impl: str, **options) -> tuple[Tensor, Tensor]:
    """The output, and the state that was overwritten."""
    conv_state = tensors["conv_state"].clone()
    return (
        causal_conv1d_update(**(tensors | {"conv_state": conv_state}), impl=impl, **options),
        conv_state,
    )


def by_hand(tensors, activation=None, cache_seqlens=None) -> tuple[Tensor, Tensor]:
    """In float64: a list of inputs for each sample, and what the state holds of them."""
    x, states, weight, bias = (t.double() for t in tensors.values())
    (batch, seqlen, _), state_len, width = x.shape, states.shape[1], weight.shape[1]
    out, after = torch.empty_like(x), states.clone()
    for n in range(batch):
        start = state_len if cache_seqlens is None else int(cache_seqlens[n])
        kept = range(state_len) if cache_seqlens is None else range(start - state_len, start)
        inputs = [states[n, place % state_len] for place in kept] + list(x[n])
        for t in range(seqlen):
            window = torch.stack(inputs[state_len + t + 1 - width : state_len + t + 1])
            y = (window * weight.T).sum(0) + bias
            out[n, t] = F.silu(y) if activation else y
        for age in range(state_len):
            place = state_len - 1 - age if cache_seqlens is None else start + seqlen - 1 - age
            after[n, place % state_len] = inputs[-1 - age]
    return out, after


def assert_close(ours, exact):
    for got, expected in zip(ours, exact, strict=True):
        tolerance = 1e-12 if got.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@every_impl
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 6),
    dim=st.integers(1, 40),
    width=st.integers(2, 4),
    more=st.integers(0, 5),
    ring=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
def test_agrees_with_a_window_kept_by_hand(impl, batch, seqlen, dim, width, more, ring, activation):
    state_len = max(width - 1, seqlen if ring else 0) + more
    tensors = make(batch, seqlen, dim, width, state_len, dtype=EXACT[impl])
    places = torch.tensor([0, 5, 1001][:batch], dtype=torch.int32) if ring else None
    options = {"activation": activation, "cache_seqlens": places}
    assert_close(run(tensors, impl, **options), by_hand(tensors, **options))


@every_impl
@pytest.mark.parametrize("width", [2, 3, 4])
def test_steps_make_the_whole_convolution(impl, width):
    tensors = make(2, 9, width=width, state_len=width - 1, dtype=EXACT[impl])
    weights = {name: tensors[name] for name in ("weight", "bias")}
    whole, final_state = causal_conv1d(
        tensors["x"], **weights, activation="silu", initial_state=tensors["conv_state"],
        return_final_state=True, impl="reference",
    )  # fmt: skip
    state = tensors["conv_state"].clone()
    for t in range(9):
        out = causal_conv1d_update(
            tensors["x"][:, t], state, **weights, activation="silu", impl=impl
        )
        assert out.shape == (2, 7)
        torch.testing.assert_close(out, whole[:, t], rtol=1e-5, atol=1e-5)
    assert torch.equal(state, final_state)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ring", [False, True])
def test_agrees_with_float64_in_half_precision(impl, dtype, ring):
    tensors = make(dtype=dtype)
    places = torch.tensor([0, 1, 2], dtype=torch.int32) if ring else None
    options = {"activation": "silu", "cache_seqlens": places}
    ours, plain = (run(tensors, each, **options) for each in (impl, "reference"))
    assert all(got.dtype == dtype for got in ours)
    assert_within_budget(ours, by_hand(tensors, **options), plain)


@every_impl
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("chosen", [None, (), (2, 0)])
def test_indices_name_the_entries_and_negative_ones_are_padding(impl, ring, chosen):
    tensors = make(3, entries=6, dtype=EXACT[impl])
    options = {"cache_seqlens": torch.tensor([7, 1, 2], dtype=torch.int32)} if ring else {}
    entries = torch.tensor([4, -1, 1], dtype=torch.int32)
    gathered = tensors | {"conv_state": tensors["conv_state"][[4, 0, 1]]}
    expected, after = by_hand(gathered, **options)
    route = None if chosen is None else route_of(*chosen, batch=3)
    out, state = run(tensors, impl, conv_state_indices=entries, route=route, **options)
    touched = []
    for sample, entry in ((0, 4), (2, 1)):
        if chosen is None or sample in chosen:
            touched.append(entry)
            assert_close((out[sample], state[entry]), (expected[sample], after[sample]))
    untouched = [entry for entry in range(6) if entry not in touched]
    assert torch.equal(state[untouched], tensors["conv_state"][untouched])
    if chosen is None:
        assert (out[1] == 0).all()


@every_impl
@pytest.mark.parametrize("chosen", [(), (2,), (1, 0)])
def test_route_touches_only_its_samples(impl, chosen):
    tensors = make(dtype=EXACT[impl])
    mine, others = list(chosen), [b for b in range(3) if b not in chosen]
    out, state = run(tensors, impl, route=route_of(*chosen, batch=3))
    expected, after = by_hand(tensors)
    assert_close((out[mine], state[mine]), (expected[mine], after[mine]))
    assert out[others].isnan().all()
    assert torch.equal(state[others], tensors["conv_state"][others])


@every_backend
@pytest.mark.parametrize("ring", [False, True])
def test_registration(impl, ring, monkeypatch):
    from tossup.kernels.causal_conv1d_update.ops import causal_conv1d_update_op

    monkeypatch.undo()  # opcheck compares what nobody wrote
    places = torch.arange(3, dtype=torch.int32) if ring else None
    inputs = [tensor.contiguous() for tensor in make().values()]
    arguments = (*inputs, "silu", places, places, None, None, impl)
    torch.library.opcheck(
        causal_conv1d_update_op.overload, arguments, test_utils=("test_schema", "test_faketensor")
    )


@every_backend
def test_compiles_as_one_graph(impl):
    tensors = make()

    def step(x, conv_state):
        out = causal_conv1d_update(x, conv_state, tensors["weight"], impl=impl)
        return out + conv_state.sum()  # the state after

    state, again = tensors["conv_state"].clone(), tensors["conv_state"].clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors["x"], state), step(tensors["x"], again))
    assert torch.equal(state, again)


@only_triton
def test_triton_refuses_float64_in_a_sentence(impl):
    with pytest.raises(ValueError, match="float64 runs with impl='cpu' or 'reference'"):
        run(make(dtype=torch.float64), impl)


INDICES = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x must be \(batch, dim\) or \(batch, seqlen, dim\), got \(3,\)"),
        ({"weight": torch.zeros(7, 5)}, r"weight must be .* \(7, 2 to 4\), got \(7, 5\)"),
        ({"conv_state": torch.zeros(3, 2, 7)}, r"at least 3, 7\), got \(3, 2, 7\)"),
        ({"conv_state": torch.zeros(4, 3, 7)}, "must have x's 3 entries .* got 4"),
        ({"bias": torch.zeros(1)}, r"bias must be of shape \(7,\), got \(1,\)"),
        ({"bias": torch.zeros(7).long()}, "bias must be floating, got torch.int64"),
        ({"cache_seqlens": INDICES.long()}, r"cache_seqlens must be int32 .*got torch.int64"),
        ({"conv_state_indices": INDICES[:2]}, r"conv_state_indices must be int32 .*\(3,\)"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        (
            {"x": torch.zeros(3, 5, 7), "cache_seqlens": INDICES},
            r"conv_state must be .* at least 5, 7\), got \(3, 3, 7\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**(make() | change))
