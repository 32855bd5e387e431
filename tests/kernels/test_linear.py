import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from tossup.kernels.linear import linear, linear_into, ops, weight_gradient_into

HALF = [torch.bfloat16, torch.float16]
DTYPES = ["exact", torch.float32, *HALF]
ROUTES = [None, (), (2,), (0, 3), (3, 1, 0, 2)]
every_route = pytest.mark.parametrize("chosen", ROUTES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
examples = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def operands(batch, seqlen, in_features, out_features, dtype, of_weight=None):
    """x, weight, bias and the output's gradient."""
    of_weight = of_weight or dtype
    return (
        random(batch, seqlen, in_features, dtype=dtype, seed=1),
        random(out_features, in_features, dtype=of_weight, seed=2),
        random(out_features, dtype=of_weight, seed=3),
        random(batch, seqlen, out_features, dtype=dtype, seed=4),
    )


def exactly(x, weight, bias, dout):
    """The output and all gradients, by einsum in float64, of weights in x's precision."""
    weight, bias = weight.to(x.dtype).double(), bias.to(x.dtype).double()
    x, dout = x.double(), dout.double()
    return (
        torch.einsum("btk,nk->btn", x, weight) + bias,
        torch.einsum("btn,nk->btk", dout, weight),
        torch.einsum("btn,btk->nk", dout, x),
        dout.sum((0, 1)),
    )


def plainly(x, weight, bias, dout):
    """The same by torch in x's precision."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    rows, drows = x.flatten(0, 1), dout.flatten(0, 1)
    return (
        torch.nn.functional.linear(x, weight, bias),
        dout @ weight,
        drows.t() @ rows,
        dout.sum((0, 1)),
    )


def compute(x, weight, bias, dout, **options):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = linear(*inputs, **options)
    return out, *torch.autograd.grad(out, inputs, dout)


def rows_of(chosen, batch):
    return list(range(batch) if chosen is None else chosen)


def routed(chosen, batch):
    return None if chosen is None else route_of(*chosen, batch=batch)


def poison(chosen, *tensors):
    """What belongs to samples that are left out is NaN."""
    for tensor in tensors:
        others = [b for b in range(len(tensor)) if b not in rows_of(chosen, len(tensor))]
        tensor[others] = float("nan")


@every_impl
@every_dtype
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 1, 33, 17), (2, 37, 45, 19), (1, 130, 70, 260), (2, 64, 64, 128)]
)
def test_agrees_with_float64(impl, dtype, sizes):
    inputs = operands(*sizes, EXACT[impl] if dtype == "exact" else dtype)
    got = compute(*inputs, impl=impl)
    assert all(g.dtype == t.dtype for g, t in zip(got, (inputs[0], *inputs[:3]), strict=True))
    assert_within_budget(got, exactly(*inputs), plainly(*inputs))


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_as_autocast_does(impl, dtype, of_weight):
    inputs = operands(2, 9, 21, 13, dtype, of_weight)
    got = compute(*inputs, impl=impl)
    assert [g.dtype for g in got] == [dtype, dtype, of_weight, of_weight]
    exact, plain = exactly(*inputs), list(plainly(*inputs))
    plain[2:] = [t.to(dtype).to(of_weight) for t in plain[2:]]
    assert_within_budget(got, exact, plain)
    if of_weight == torch.float32:  # in which gradients then come, never rounded to x's dtype
        torch.testing.assert_close(got[2:], [x.float() for x in exact[2:]], rtol=1e-5, atol=1e-5)


@every_backend
@every_route
@pytest.mark.parametrize("sizes", [(4, 19, 37, 21), (4, 1, 16, 32), (4, 70, 40, 18)])
def test_many_tiles_and_any_route(impl, chosen, sizes, small_tiles):
    x, weight, bias, dout = operands(*sizes, torch.float32)
    mine = rows_of(chosen, 4)
    exact = exactly(x[mine], weight, bias, dout[mine])
    plain = plainly(x[mine], weight, bias, dout[mine])
    poison(chosen, x, dout)
    got = compute(x, weight, bias, dout, route=routed(chosen, 4), impl=impl)
    assert_within_budget([got[0][mine], got[1][mine], *got[2:]], exact, plain)
    others = [b for b in range(4) if b not in mine]
    assert got[0][others].isnan().all() and got[1][others].isnan().all()
    if not mine:
        assert not got[2].any() and not got[3].any()


@every_impl
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_into_writes_rows_of_its_samples_alone(impl, chosen, dtype, of_out, accumulate):
    x, weight, bias, before = operands(4, 5, 12, 9, dtype)
    before = before.to(of_out)
    out, mine = before.clone(), rows_of(chosen, 4)
    exact = exactly(x, weight, bias, before)[0] + (before.double() if accumulate else 0)
    poison(chosen, x)
    linear_into(out, x, weight, bias, accumulate=accumulate, route=routed(chosen, 4), impl=impl)
    others = [b for b in range(4) if b not in mine]
    assert torch.equal(out[others], before[others])
    if mine:
        coarse = of_out if of_out == torch.bfloat16 else torch.float32
        bound = budget(exact, exact.to(coarse))
        if dtype == torch.bfloat16 and (impl, accumulate) == ("cpu", False):
            bound = budget(exact, exact.to(dtype))
        assert (out[mine].double() - exact[mine]).abs().max() <= bound


@pytest.mark.parametrize("impl", ["reference", "cpu"])  # the interpreter of Triton cuts bits off
def test_into_rounds_once(impl):
    """1 + 2⁻⁸ lies halfway between two numbers of bfloat16; only the last bit tells them apart."""
    x = torch.tensor([[[2.0**-8, 2.0**-17]]], dtype=torch.bfloat16)
    out = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    linear_into(out, x, torch.ones(1, 2), accumulate=True, impl=impl)
    assert out.item() == 1 + 2.0**-7


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_into_rounds_weights_to_the_dtype_of_x(impl):
    x, weight, bias, out = operands(2, 5, 12, 9, torch.bfloat16, torch.float32)
    exact, out = exactly(x, weight, bias, out)[0], out.float()
    linear_into(out, x, weight, bias, impl=impl)
    assert_within_budget(out, exact, exact.float())


@every_impl
@every_route
@pytest.mark.parametrize("written", [None, 0, 1, 7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
def test_weight_gradient_adds_to_what_was_written(
    impl, chosen, written, with_bias, segments, small_tiles, monkeypatch
):
    x, before, bias_before, dout = operands(4, 37, 30, 20, torch.float32)
    monkeypatch.setattr(small_tiles, "processors", lambda: 4 * segments)
    if not written:
        before[:], bias_before[:] = float("nan"), float("nan")
    grad, bias_grad = before.clone(), bias_before.clone()
    mine = rows_of(chosen, 4)
    exact = exactly(x[mine], before, bias_before, dout[mine])[2:]
    plain = plainly(x[mine], before, bias_before, dout[mine])[2:]
    poison(chosen, x, dout)
    weight_gradient_into(
        grad,
        dout,
        x,
        bias_grad=bias_grad if with_bias else None,
        written=None if written is None else torch.tensor(written, dtype=torch.int32),
        route=routed(chosen, 4),
        impl=impl,
    )
    if not mine:
        exact = plain = [before.double().nan_to_num(), bias_before.double().nan_to_num()]
        assert torch.equal(grad.view(torch.int32), before.view(torch.int32))
        assert torch.equal(bias_grad.view(torch.int32), bias_before.view(torch.int32))
        return
    got, befores = [grad, bias_grad], [before, bias_before]
    if not with_bias:
        assert torch.equal(bias_grad.view(torch.int32), bias_before.view(torch.int32))
        got, befores, exact, plain = got[:1], befores[:1], exact[:1], plain[:1]
    if written:
        exact = [e + b.double() for e, b in zip(exact, befores, strict=True)]
        plain = [p + b for p, b in zip(plain, befores, strict=True)]
    assert_within_budget(got, exact, plain)


@every_impl
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("of_grad", [torch.float32, torch.bfloat16])
def test_weight_gradient_of_half_precision_sums_in_float32(impl, dtype, of_grad):
    x, before, bias_before, dout = operands(2, 70, 9, 12, dtype, of_grad)
    grad, bias_grad = before.clone(), bias_before.clone()
    written = torch.tensor(1, dtype=torch.int32)
    weight_gradient_into(grad, dout, x, bias_grad=bias_grad, written=written, impl=impl)
    exact = [
        torch.einsum("btn,btk->nk", dout.double(), x.double()) + before.double(),
        dout.double().sum((0, 1)) + bias_before.double(),
    ]
    plain = [
        torch.einsum("btn,btk->nk", dout.float(), x.float()) + before.float(),
        dout.float().sum((0, 1)) + bias_before.float(),
    ]
    assert_within_budget((grad, bias_grad), exact, [p.to(of_grad) for p in plain])


@only_triton
@pytest.mark.parametrize("processors", [1, 50])
def test_weight_gradient_is_the_same_whenever_it_is_computed(impl, processors, small_tiles):
    small_tiles.processors = lambda: processors
    x, _, _, dout = operands(4, 37, 20, 20, torch.float32)
    grads = [torch.empty(20, 20) for _ in range(2)]
    for grad in grads:
        weight_gradient_into(grad, dout, x, route=route_of(3, 1, batch=4), impl=impl)
    assert torch.equal(*grads)


@every_impl
@pytest.mark.parametrize("chosen", [None, (2, 0)])
def test_takes_any_strides(impl, chosen, small_tiles):
    x, weight, bias, dout = operands(3, 19, 21, 18, torch.float32)
    route, mine = routed(chosen, 3), rows_of(chosen, 3)
    expected = compute(x, weight, bias, dout, route=route, impl="reference")
    views = [
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        weight.t().contiguous().t(),
        bias.repeat_interleave(3)[::3],
        dout.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    assert all(
        view.stride() != t.stride() for view, t in zip(views, (x, weight, bias, dout), strict=True)
    )
    got = compute(*views, route=route, impl=impl)
    for mine_of, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine_of[mine], theirs[mine])
    torch.testing.assert_close(got[2:], expected[2:], atol=2e-5, rtol=2e-5)
    assert got[0].is_contiguous()

    out = torch.zeros(3, 18, 38)[..., ::2].transpose(1, 2)
    grad, bias_grad = torch.zeros(18, 42)[:, ::2].t().contiguous().t(), torch.zeros(36)[::2]
    linear_into(out, views[0], views[1], views[2], route=route, impl=impl)
    weight_gradient_into(grad, views[3], views[0], bias_grad=bias_grad, route=route, impl=impl)
    torch.testing.assert_close(out[mine], expected[0][mine])
    torch.testing.assert_close([grad, bias_grad], list(expected[2:]), atol=2e-5, rtol=2e-5)


@every_backend
@pytest.mark.parametrize(
    "far, strides",
    [
        ("x", (2**30 + 8, 8, 1)),
        ("x", (8, 2**29 + 8, 1)),
        ("out", (2**30 + 8, 3, 1)),
        ("weight", (2**30 + 8, 1)),
        ("grad", (2**30 + 8, 1)),
    ],
)
def test_offsets_that_only_64_bits_hold_of_strides_that_32_do(impl, far, strides):
    x, weight, _, out = operands(3, 5, 8, 3, torch.bfloat16)
    near = {"x": x, "weight": weight, "out": out, "grad": weight.clone()}
    spread = torch.empty_strided(near[far].shape, strides, dtype=torch.bfloat16)  # hardly touched
    results = []
    for tensors in (near | {far: spread.copy_(near[far])}, near):
        linear_into(tensors["out"], tensors["x"], tensors["weight"], impl=impl)
        weight_gradient_into(tensors["grad"], tensors["out"], tensors["x"], impl=impl)
        results.append([tensors["out"], tensors["grad"]])
    torch.testing.assert_close(*results)


@every_backend
@pytest.mark.parametrize("chosen", [None, (1,)])
def test_the_data_gradient_is_the_product_with_the_transposed_weight(impl, chosen, small_tiles):
    x, weight, _, dout = operands(2, 19, 21, 18, torch.float32)
    dx, mine = x.clone(), rows_of(chosen, 2)
    linear_into(dx, dout, weight.t(), accumulate=True, route=routed(chosen, 2), impl=impl)
    exact = x.double() + torch.einsum("btn,nk->btk", dout.double(), weight.double())
    assert_within_budget(dx[mine], exact[mine], (x + dout @ weight)[mine])


@every_backend
@examples
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 40),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    chosen=st.none() | st.sets(st.integers(0, 2)),
)
def test_agrees_with_the_reference(
    impl, small_tiles, batch, seqlen, in_features, out_features, chosen
):
    inputs = operands(batch, seqlen, in_features, out_features, EXACT[impl])
    chosen = None if chosen is None else tuple(b for b in sorted(chosen) if b < batch)
    mine, tolerance = rows_of(chosen, batch), 1e-7 if EXACT[impl] == torch.float64 else 1e-4
    ours, theirs = (
        compute(*inputs, route=routed(chosen, batch), impl=i) for i in (impl, "reference")
    )
    ours, theirs = ([got[0][mine], got[1][mine], *got[2:]] for got in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_impl
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)])
def test_without_tokens_nothing_is_written(impl, sizes):
    x, dout = torch.ones(*sizes, 4), torch.ones(*sizes, 3)
    grad, bias_grad = torch.full((3, 4), 7.0), torch.full((3,), 7.0)
    weight_gradient_into(grad, dout, x, bias_grad=bias_grad, impl=impl)
    assert (grad == 7).all() and (bias_grad == 7).all()
    assert linear(x, grad, impl=impl).shape == (*sizes, 3)


@every_backend
def test_backward_follows_the_route_of_forward(impl):
    x, weight, bias, dout = operands(3, 5, 8, 6, torch.float32)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    route = route_of(1, batch=3)
    out = linear(*inputs, route=route, impl=impl)
    expected = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    route.count.zero_()
    route.samples.fill_(2)
    got = torch.autograd.grad(out, inputs, dout)
    assert torch.equal(got[0][1], expected[0][1]) and got[0][1].isfinite().all()
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    assert got[1].any()


@every_backend
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_gradients_that_nobody_wants_are_left_out(impl, frozen):
    x, weight, bias, dout = operands(2, 5, 8, 6, torch.float32)
    inputs = [t.requires_grad_(n not in frozen) for n, t in enumerate((x, weight, bias))]
    linear(*inputs, impl=impl).backward(dout)
    exact, plain = (f(x.detach(), weight.detach(), bias.detach(), dout) for f in (exactly, plainly))
    for n, tensor in enumerate(inputs):
        if n in frozen:
            assert tensor.grad is None
        else:
            assert_within_budget([tensor.grad], exact[n + 1 : n + 2], plain[n + 1 : n + 2])


@every_impl
def test_into_needs_no_gradients(impl):
    x, weight, bias, dout = operands(2, 5, 8, 6, torch.float32)
    parameters = [t.requires_grad_() for t in (x, weight, bias)]
    out, grad, bias_grad = torch.empty(2, 5, 6), torch.empty(6, 8), torch.empty(6)
    linear_into(out, *parameters, impl=impl)
    weight_gradient_into(grad, dout.requires_grad_(), x, bias_grad=bias_grad, impl=impl)
    assert not any(t.requires_grad for t in (out, grad, bias_grad))
    expected = compute(x, weight, bias, dout.detach(), impl="reference")
    torch.testing.assert_close(
        [out, grad, bias_grad], [t.detach() for t in (expected[0], *expected[2:])]
    )


@every_backend
@pytest.mark.parametrize("chosen", [None, (1,)], ids=["all", "routed"])
def test_registration(impl, chosen):
    x, weight, bias, dout = operands(2, 5, 8, 6, torch.float32)
    route = routed(chosen, 2)
    rest = (route and route.count, route and route.samples, impl)
    parameters = [t.clone().requires_grad_() for t in (x, weight, bias)]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    dynamic = [*tests, "test_aot_dispatch_dynamic"]
    # with a route, what nobody wrote differs from call to call
    check = torch.library.opcheck
    check(ops.linear_op, (*parameters, *rest), test_utils=tests if route else dynamic)
    check(ops.linear_into_op.overload, (dout, x, weight, bias, True, *rest), test_utils=dynamic)
    written = torch.tensor(1, dtype=torch.int32)
    for optional in ((bias, written), (None, None)):
        arguments = (weight, dout, x, *optional, *rest)
        check(ops.linear_weight_gradient_into_op.overload, arguments, test_utils=dynamic)
    check(ops.linear_backward_op, (dout, x, weight, bias, *rest), test_utils=dynamic)


@every_backend
@pytest.mark.parametrize("chosen", [None, (1,)], ids=["all", "routed"])
def test_compiles_whole(impl, chosen):
    x, weight, bias, dout = operands(2, 5, 8, 6, torch.float32)
    route = routed(chosen, 2)

    def step(x, weight, bias, out, grad):
        linear_into(out, x, weight, bias, accumulate=True, route=route, impl=impl)
        weight_gradient_into(grad, dout, x, route=route, impl=impl)
        return linear(x, weight, bias, route=route, impl=impl)

    results = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out, grad = dout.clone(), weight.clone()
        y = call(*inputs, out, grad)
        results.append([y, out, grad, *torch.autograd.grad(y, inputs, dout)])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_traces_on_the_meta_device(impl):
    with torch.device("meta"):
        x, weight, out = torch.ones(2, 5, 8), torch.ones(6, 8).requires_grad_(), torch.ones(2, 5, 6)
        y = linear(x, weight, impl=impl)
        y.sum().backward()
        linear_into(out, x, weight, impl=impl)
        weight_gradient_into(weight.grad, out, x, bias_grad=torch.ones(6), impl=impl)
    assert y.shape == out.shape and y.is_meta and weight.grad.shape == weight.shape


def test_a_second_derivative_of_the_weight_gradient_is_refused():
    x, weight, _, dout = operands(2, 5, 8, 6, torch.float32)
    weight.requires_grad_(), dout.requires_grad_()
    (dweight,) = torch.autograd.grad(linear(x, weight), weight, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dweight.sum().backward()


@only_triton
@pytest.mark.parametrize("name", ["x", "weight", "bias", "out", "grad", "bias_grad"])
def test_triton_refuses_float64_in_a_sentence(impl, name):
    tensors = {
        "x": torch.ones(1, 2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3),
        "out": torch.ones(1, 2, 3), "grad": torch.ones(3, 4), "bias_grad": torch.ones(3),
    }  # fmt: skip
    tensors[name] = tensors[name].double()
    x, weight, bias, out, grad, bias_grad = tensors.values()
    with pytest.raises(ValueError, match=rf"^{name} must be .* got float64: float64 runs with"):
        linear_into(out, x, weight, bias, impl=impl)
        weight_gradient_into(grad, out, x, bias_grad=bias_grad, impl=impl)


WRONG = {
    "x must be floating, .* got torch.float32": lambda x, w, b: linear(x[0], w, b),
    "x must be floating, .* got torch.int64": lambda x, w, b: linear(x.long(), w, b),
    r"x must be .* at least one feature, .* \(2, 5, 0\)": lambda x, w, b: linear(x[..., :0], w, b),
    r"weight must be .* = \(…, 8\), got .* \(6, 7\)": lambda x, w, b: linear(x, w[:, :7], b),
    "weight must be floating, .* got torch.int32": lambda x, w, b: linear(x, w.int(), b),
    r"bias must be of shape \(6,\), got \(5,\)": lambda x, w, b: linear(x, w, b[:5]),
    "bias must be floating, got torch.int32": lambda x, w, b: linear(x, w, b.int()),
    r"out must be of shape \(2, 5, 6\), got \(2, 5, 8\)": lambda x, w, b: linear_into(x, x, w, b),
    "dout must be floating, .* got torch.int64": (
        lambda x, w, b: weight_gradient_into(w, x[..., :6].long(), x)
    ),
    r"dout must be .* = \(2, 5, …\) in x's dtype torch.float32, got .* torch.bfloat16": (
        lambda x, w, b: weight_gradient_into(w, x[..., :6].bfloat16(), x)
    ),
    r"dout must be .* = \(2, 5, …\) .* got \(1, 5, 6\)": (
        lambda x, w, b: weight_gradient_into(w, x[:1, :, :6], x)
    ),
    r"grad must be of shape \(6, 8\), got \(8, 6\)": (
        lambda x, w, b: weight_gradient_into(w.t(), x[..., :6], x)
    ),
    r"bias_grad must be of shape \(6,\), got \(5,\)": (
        lambda x, w, b: weight_gradient_into(w, x[..., :6], x, bias_grad=b[:5])
    ),
    r"written must be int32 of shape \(\), got torch.int64": (
        lambda x, w, b: weight_gradient_into(w, x[..., :6], x, written=torch.tensor(1))
    ),
    r"written must be int32 of shape \(\), got .* \(1,\)": (
        lambda x, w, b: weight_gradient_into(w, x[..., :6], x, written=torch.ones(1).int())
    ),
    "impl must be auto, triton, cpu or reference, got 'gpu'": (
        lambda x, w, b: linear_into(x, x, torch.ones(8, 8), impl="gpu")
    ),
}


@pytest.mark.parametrize("message, call", WRONG.items(), ids=range(len(WRONG)))
def test_wrong_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.zeros(2, 5, 8), torch.zeros(6, 8), torch.zeros(6))
