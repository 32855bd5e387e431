"""Causal convolution: values, gradients, states, resets and routes, against independent oracles."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import EXACT, assert_within_budget, every_backend, every_impl, route_of, seeded
from tossup.kernels.causal_conv1d import causal_conv1d

NAMES = ("x", "weight", "bias", "initial_state")


def make(
    batch=2, seqlen=11, dim=7, width=4, dtype=torch.float32, without=(), seed=0
) -> dict[str, Tensor]:
    """Random inputs, all but `without`. x is a view."""
    random = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    tensors = {
        "x": normal(batch, seqlen, 2 * dim)[..., dim:],
        "weight": normal(dim, width),
        "bias": normal(dim),
        "initial_state": normal(batch, width - 1, dim),
    }
    return {name: tensor for name, tensor in tensors.items() if name not in without}


def differentiate(out: Tensor, final_state: Tensor, leaves: dict[str, Tensor], rows=slice(None)):
    """The gradients of a fixed function of the output and the final state."""
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    dfinal = torch.linspace(-2, 3, final_state.numel(), dtype=torch.float64).cos()
    loss = (out * dout.to(out.dtype))[rows].sum()
    loss = loss + (final_state * dfinal.to(out.dtype).view_as(final_state))[rows].sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def run(tensors: dict[str, Tensor], impl="cpu", rows=slice(None), **options) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, final_state = causal_conv1d(**leaves, impl=impl, return_final_state=True, **options)
    gradients = differentiate(out, final_state, leaves, rows)
    return {"out": out.detach(), "final_state": final_state.detach(), **gradients}


def by_torch(tensors: dict[str, Tensor], activation=None) -> dict[str, Tensor]:
    """The same from torch's own convolution, which knows no resets."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    inputs = torch.cat([leaves["initial_state"], leaves["x"]], 1)
    weight = leaves["weight"]
    out = F.conv1d(
        inputs.transpose(1, 2), weight.unsqueeze(1), leaves["bias"], groups=len(weight)
    ).transpose(1, 2)
    out = out if activation is None else F.silu(out)
    final_state = inputs[:, -(weight.shape[1] - 1) :]
    return {
        "out": out.detach(),
        "final_state": final_state.detach(),
        **differentiate(out, final_state, leaves),
    }


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """As close as the dtype of ours allows. Sums over tokens are the largest numbers."""
    for name, expected in exact.items():
        tolerance = 1e-11 if ours[name].dtype == torch.float64 else 3e-5
        torch.testing.assert_close(
            ours[name].double(), expected.double(), rtol=tolerance, atol=tolerance
        )


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@every_impl
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("seqlen", [1, 2, 33])
def test_agrees_with_torch(impl, activation, width, seqlen):
    tensors = make(seqlen=seqlen, width=width, dtype=EXACT[impl])
    assert_close(run(tensors, impl, activation=activation), by_torch(doubled(tensors), activation))


@every_backend
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    without=st.sets(st.sampled_from(["bias", "initial_state"])),
    activation=st.sampled_from([None, "silu"]),
    packed=st.booleans(),
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 30),
    dim=st.integers(1, 70),
    width=st.integers(2, 4),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_options(
    impl, without, activation, packed, batch, seqlen, dim, width, channels_last, seed
):
    tensors = make(batch, seqlen, dim, width, EXACT[impl], without, seed)
    if not channels_last:
        tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    options = {"activation": activation}
    if packed:
        starts = torch.rand(batch, seqlen, generator=seeded(seed)) < 0.3
        options["seq_idx"] = starts.cumsum(1).int() % 3  # a number may come back
    assert_close(run(tensors, impl, **options), run(doubled(tensors), "reference", **options))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, seqlen, dim, width", [(2, 33, 20, 4), (1, 3, 65, 2)])
def test_agrees_with_float64(impl, dtype, batch, seqlen, dim, width):
    tensors = make(batch, seqlen, dim, width, dtype)
    seq_idx = (torch.arange(seqlen) // 5).int().expand(batch, -1)
    options = {"activation": "silu", "seq_idx": seq_idx}
    exact = run(doubled(tensors), "reference", **options)
    plain, ours = run(tensors, "reference", **options), run(tensors, impl, **options)
    assert list(ours) == list(plain) == list(exact)
    assert all(tensor.dtype == dtype for tensor in ours.values())
    assert_within_budget(ours.values(), exact.values(), plain.values())


@every_impl
def test_three_tokens_by_hand(impl):
    x, weight = torch.tensor([[[1.0], [10.0], [100.0]]]), torch.tensor([[2.0, 3.0]])
    before = torch.tensor([[[7.0]]])
    out, state = causal_conv1d(
        x, weight, torch.tensor([0.5]), initial_state=before, return_final_state=True, impl=impl
    )
    assert out.flatten().tolist() == [2 * 7 + 3 + 0.5, 2 + 30 + 0.5, 20 + 300 + 0.5]
    assert state.item() == 100


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_by_finite_differences(packed):
    tensors = make(2, 6, 3, 3, torch.float64)
    seq_idx = (torch.arange(6) // torch.tensor([[2], [5]])) if packed else None

    def convolve(*leaves):
        named = dict(zip(NAMES, leaves, strict=True))
        return causal_conv1d(
            **named, activation="silu", seq_idx=seq_idx, return_final_state=True, impl="cpu"
        )

    assert torch.autograd.gradcheck(
        convolve, [tensors[name].contiguous().requires_grad_() for name in NAMES]
    )


@every_backend
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_pieces_with_state_make_the_whole(impl, cut):
    tensors = make(dtype=EXACT[impl])
    whole = run(tensors, impl, activation="silu")
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outs, state = [], leaves["initial_state"]
    for piece in (leaves["x"][:, :cut], leaves["x"][:, cut:]):
        out, state = causal_conv1d(
            piece, leaves["weight"], leaves["bias"],
            activation="silu", initial_state=state, return_final_state=True, impl=impl,
        )  # fmt: skip
        outs.append(out)
    pieces = {"out": torch.cat(outs, 1), "final_state": state}
    assert_close({**pieces, **differentiate(*pieces.values(), leaves)}, whole)


@every_impl
@pytest.mark.parametrize("lengths", [[5, 1, 3, 7], [9, 1], [2, 12, 2]])
def test_packed_sequences_are_separate_runs(impl, lengths):
    tensors = make(1, sum(lengths))
    numbers = torch.arange(len(lengths)) % 2
    seq_idx = torch.repeat_interleave(numbers, torch.tensor(lengths))[None].int()
    packed = run(tensors, impl, seq_idx=seq_idx)
    outs, state = [], tensors["initial_state"]
    for piece in tensors["x"].split(lengths, 1):
        out, final_state = causal_conv1d(
            piece, tensors["weight"], tensors["bias"],
            initial_state=state, return_final_state=True, impl="reference",
        )  # fmt: skip
        outs.append(out)
        state = None
    torch.testing.assert_close(packed["out"], torch.cat(outs, 1))
    torch.testing.assert_close(packed["final_state"], final_state)


@every_backend
def test_nothing_crosses_a_reset(impl):
    tensors = make(1, 8)
    tensors["x"][:, :4] = tensors["initial_state"][:] = float("nan")
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    seq_idx = (torch.arange(8) >= 4).int()[None]
    out = causal_conv1d(**leaves, seq_idx=seq_idx, impl=impl)
    assert out[:, 4:].isfinite().all() and out[:, :4].isnan().all()
    dx, dstate = torch.autograd.grad(out[:, 4:].sum(), (leaves["x"], leaves["initial_state"]))
    assert (dx[:, :4] == 0).all() and (dx[:, 4:] != 0).all() and (dstate == 0).all()


@every_impl
@pytest.mark.parametrize("chosen", [(), (2,), (3, 0), (0, 1, 2, 3)])
def test_route_touches_only_its_samples(impl, chosen):
    tensors = make(4)
    seq_idx = (torch.arange(11) // torch.tensor([[2], [3], [4], [5]])).int()
    mine, others = list(chosen), [b for b in range(4) if b not in chosen]
    options = {"activation": "silu", "seq_idx": seq_idx}
    routed = run(tensors, impl, mine, route=route_of(*chosen, batch=4), **options)
    alone = run(tensors, "reference", mine, **options)
    for name in ("out", "final_state", "dx", "dinitial_state"):
        torch.testing.assert_close(routed[name][mine], alone[name][mine])
        if impl != "reference" or not name.startswith("d"):
            assert routed[name][others].isnan().all()
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(routed[name], alone[name], rtol=1e-5, atol=1e-5)


@every_backend
def test_backward_follows_the_route_of_its_forward(impl):
    leaves = {name: tensor.requires_grad_() for name, tensor in make(3).items()}
    route = route_of(1, batch=3)
    out = causal_conv1d(**leaves, route=route, impl=impl)
    route.count.zero_()
    (dx,) = torch.autograd.grad(out[1].sum(), leaves["x"])
    assert not dx[1].isnan().any() and dx[[0, 2]].isnan().all()


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_registration(impl, routed, monkeypatch):
    from tossup.kernels.causal_conv1d.ops import causal_conv1d_op

    monkeypatch.undo()  # opcheck compares what nobody wrote
    tensors = make()
    leaves = [tensors[name].contiguous().requires_grad_() for name in NAMES]
    seq_idx = (torch.arange(11) // 4).int().expand(2, -1).contiguous()
    route = route_of(0, 1, batch=2)
    count, samples = (route.count, route.samples) if routed else (None, None)
    torch.library.opcheck(causal_conv1d_op, (*leaves, seq_idx, count, samples, "silu", impl))


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_compiles_as_one_graph(impl, routed):
    tensors = make()
    route = route_of(1, 0, batch=2) if routed else None
    leaves = [tensors[name].requires_grad_() for name in NAMES]

    def convolve(*leaves):
        named = dict(zip(NAMES, leaves, strict=True))
        return causal_conv1d(**named, activation="silu", route=route, impl=impl)

    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    expected, out = convolve(*leaves), compiled(*leaves)
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
        ({"x": torch.zeros(3, 4)}, r"x must be \(batch, seqlen, dim\).* got \(3, 4\)"),
        ({"x": torch.zeros(2, 0, 7)}, "at least one token"),
        ({"weight": torch.zeros(7, 5)}, r"weight must be .* = \(7, 2 to 4\), got \(7, 5\)"),
        ({"weight": torch.zeros(6, 4)}, r"weight must be .* = \(7, 2 to 4\), got \(6, 4\)"),
        ({"weight": torch.zeros(7, 4).cfloat()}, "weight must be floating, got torch.complex64"),
        ({"bias": torch.zeros(1)}, r"bias must be of shape \(7,\), got \(1,\)"),
        ({"initial_state": torch.zeros(2, 7, 3)}, r"initial_state must be of shape \(2, 3, 7\)"),
        ({"seq_idx": torch.zeros(2, 11)}, "seq_idx must hold integers, got torch.float32"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(make() | change))
