import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.support import EXACT, assert_within_budget, every_backend, every_impl, route_of
from tossup.kernels.rotary import rotary, rotary_angles
from tossup.kernels.rotary.ops import rotary_op


def inputs_of(batch, seqlen, heads, head_dim, rotary_dim, dtype=torch.float32, per_sample=False):
    """x that wants gradients, cos and sin of positions with gaps, and the output's gradient."""
    torch.manual_seed(0)
    x, dout = torch.randn(2, batch, seqlen, heads, head_dim, dtype=dtype).unbind()
    positions = torch.randint(0, 5000, (batch, seqlen) if per_sample else (seqlen,))
    return x.clone().requires_grad_(), *rotary_angles(positions, rotary_dim), dout


def complex_rotation(x, cos, sin, interleaved):
    """Each pair as a complex number times exp(i · angle), in float64."""
    half = cos.shape[-1]
    turning, rest = x.double()[..., : 2 * half], x.double()[..., 2 * half :]
    first, second = slice(0, half), slice(half, None)
    if interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    numbers = torch.complex(turning[..., first], turning[..., second])
    numbers = numbers * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    out = torch.empty_like(turning)
    out[..., first], out[..., second] = numbers.real, numbers.imag
    return torch.cat((out, rest), -1)


@every_impl
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["exact", torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 2, 2),
        (2, 7, 3, 17, 10),
        (3, 130, 2, 40, 40),
        (2, 5, 2, 64, 16),
        (1, 3, 1, 2050, 2),  # a tile that fits the pairs by far does not fit the rest
    ],
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_agrees_with_complex_multiplication(impl, interleaved, dtype, sizes, per_sample):
    dtype = EXACT[impl] if dtype == "exact" else dtype
    x, cos, sin, dout = inputs_of(*sizes, dtype, per_sample)
    out = rotary(x, cos, sin, interleaved=interleaved, impl=impl)
    (dx,) = torch.autograd.grad(out, x, dout)
    exact = complex_rotation(x.detach(), cos, sin, interleaved)
    exact_dx = complex_rotation(dout, cos, -sin, interleaved)
    assert_within_budget((out, dx), (exact, exact_dx), (exact.to(dtype), exact_dx.to(dtype)))


def test_far_angles_are_as_exact_as_near_ones():
    positions = torch.tensor([0, 1, 4095, 131071, 2**20 + 1])
    cos, sin = rotary_angles(positions, 8, theta=500.0)
    for position, cosines, sines in zip(positions.tolist(), cos, sin, strict=True):
        for i, (of_cos, of_sin) in enumerate(zip(cosines.tolist(), sines.tolist(), strict=True)):
            angle = position * 500.0 ** (-2 * i / 8)
            assert of_cos == pytest.approx(math.cos(angle), abs=1e-7)
            assert of_sin == pytest.approx(math.sin(angle), abs=1e-7)


@every_impl
def test_agrees_with_transformers(impl):
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=None)
    torch.manual_seed(0)
    # As far as its float32 holds angles to what is compared
    x, positions = torch.randn(3, 9, 2, 32), torch.randint(0, 64, (3, 9))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    ours_cos, ours_sin = rotary_angles(positions, 32)
    torch.testing.assert_close(torch.cat((ours_cos, ours_cos), -1), cos)
    torch.testing.assert_close(torch.cat((ours_sin, ours_sin), -1), sin)
    torch.testing.assert_close(rotary(x, ours_cos, ours_sin, impl=impl), theirs)


@every_backend
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 9),
    half=st.integers(1, 6),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    per_sample=st.booleans(),
)
def test_agrees_with_the_reference(impl, batch, seqlen, half, rest, interleaved, per_sample):
    x, cos, sin, dout = inputs_of(
        batch, seqlen, 2, 2 * half + rest, 2 * half, EXACT[impl], per_sample
    )
    results = []
    for each in (impl, "reference"):
        out = rotary(x, cos, sin, interleaved=interleaved, impl=each)
        results.append((out, *torch.autograd.grad(out, x, dout)))
    torch.testing.assert_close(*results)


def test_scores_depend_on_the_distance_alone():
    """Equation 16 of the paper: what rotary is for."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = [rotary_angles(torch.tensor([position]), 16, theta=100.0) for position in (3, 10, 20, 27)]
    near = (rotary(q, *at[0]) * rotary(k, *at[1])).sum()
    far = (rotary(q, *at[2]) * rotary(k, *at[3])).sum()
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert (near - (rotary(q, *at[0]) * rotary(k, *at[2])).sum()).abs() > 1e-2


@every_backend
def test_takes_any_strides(impl):
    x, cos, sin, _ = inputs_of(2, 5, 3, 8, 6)
    strided = x.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
    out = rotary(strided, cos, sin, impl=impl)
    expected = rotary(x, cos, sin, impl=impl)
    torch.testing.assert_close(out, expected)
    for got, plain in zip(
        torch.autograd.grad(out.sum(), strided), torch.autograd.grad(expected.sum(), x), strict=True
    ):
        torch.testing.assert_close(got, plain)


@every_impl
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("chosen", [(), (2,), (0, 3), (0, 1, 2, 3)])
def test_route_touches_only_its_samples(impl, per_sample, chosen):
    x, cos, sin, dout = inputs_of(4, 5, 2, 9, 6, per_sample=per_sample)
    out = rotary(x, cos, sin, impl="reference")
    alone = out, *torch.autograd.grad(out, x, dout)
    others = [b for b in range(4) if b not in chosen]
    with torch.no_grad():
        x[others], dout[others] = float("nan"), float("nan")
    out = rotary(x, cos, sin, route=route_of(*chosen, batch=4), impl=impl)
    routed = out, *torch.autograd.grad(out, x, dout)
    for got, expected in zip(routed, alone, strict=True):
        torch.testing.assert_close(got[list(chosen)], expected[list(chosen)])
    for unwritten in routed if impl != "reference" else routed[:1]:
        assert unwritten[others].isnan().all()


@every_backend
def test_backward_follows_the_route_of_forward(impl):
    x, cos, sin, dout = inputs_of(3, 5, 2, 8, 8)
    route = route_of(1, batch=3)
    out = rotary(x, cos, sin, route=route, impl=impl)
    (expected,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    route.count.zero_()
    route.samples.fill_(2)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert not dx[1].isnan().any() and torch.equal(dx[1], expected[1])


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_registration(impl, routed):
    route = route_of(1, batch=2) if routed else None
    x, cos, sin, _ = inputs_of(2, 5, 2, 9, 6)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if route is None:  # with a route, what nobody wrote differs from call to call
        tests.append("test_aot_dispatch_dynamic")
    arguments = (x, cos, sin, False, route and route.count, route and route.samples, impl)
    torch.library.opcheck(rotary_op, arguments, test_utils=tests)


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_compiles_whole(impl, routed):
    route = route_of(1, batch=2) if routed else None
    x, _, _, dout = inputs_of(2, 5, 2, 8, 6)
    positions = torch.arange(5)

    def turn(x):
        return rotary(x, *rotary_angles(positions, 6), route=route, impl=impl)

    got = torch.compile(turn, fullgraph=True, backend="aot_eager")(x)
    expected = turn(x)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, dout), torch.autograd.grad(expected, x, dout), equal_nan=True
    )


@pytest.mark.parametrize(
    "x, cos, sin, message",
    [
        (
            (2, 3, 8),
            (3, 4),
            (3, 4),
            r"x must be floating, \(batch, .* got .* \(2, 3, 8\)",
        ),
        ((2, 3, 1, 8), (4, 4), (4, 4), r"got \(4, 4\) and \(4, 4\) for x \(2, 3, 1, 8\)"),
        ((2, 3, 1, 8), (3, 4), (3, 3), "cos and sin must both be"),
        ((2, 3, 1, 8), (3, 5), (3, 5), "head_dim / 2 = 4 angles, got 5"),
    ],
)
def test_shapes_that_disagree_are_refused(x, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))


def test_angles_of_another_kind_are_refused():
    x, angles = torch.zeros(2, 3, 1, 8), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="cos must be float32 without gradients, got torch"):
        rotary(x, angles.half(), angles)
    with pytest.raises(ValueError, match=r"sin must be float32 .* and requires_grad=True"):
        rotary(x, angles, angles.clone().requires_grad_())


def test_an_odd_rotary_dim_is_refused():
    with pytest.raises(ValueError, match="rotary_dim must be even and at least 2, got 7"):
        rotary_angles(torch.arange(3), 7)
