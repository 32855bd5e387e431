import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import EXACT, assert_within_budget, every_backend, every_impl, route_of, seeded
from tossup.kernels.repeat_groups import ops, repeat_groups
from tossup.kernels.repeat_groups.ops import repeat_groups_into_op, sum_groups_into_op

every_route = pytest.mark.parametrize("chosen", [(), (2,), (0, 3), (3, 1, 0, 2)])


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def origins(dim, group, repeats):
    """The channel of x that each channel of the result is a copy of, one by one."""
    return torch.tensor(
        [
            first + offset
            for first in range(0, dim, group)
            for _ in range(repeats)
            for offset in range(group)
        ]
    )


def sums(dout, dim, group, repeats):
    """The gradient of x in float64: each copy's is added to its origin's."""
    zeros = dout.new_zeros((*dout.shape[:2], dim), dtype=torch.float64)
    return zeros.index_add(2, origins(dim, group, repeats), dout.double())


def compute(x, group, repeats, dout, **options):
    x = x.detach().requires_grad_()
    out = repeat_groups(x, group, repeats, **options)
    return out, *torch.autograd.grad(out, x, dout)


def into_ops(impl, route=None):
    """repeat(out, x, group) and its gradient, both into given memory."""
    rest = (route and route.count, route and route.samples, impl)
    return (
        lambda out, x, group: repeat_groups_into_op(out, x, group, *rest),
        lambda out, x, group: sum_groups_into_op(out, x, group, *rest),
    )


@every_impl
@pytest.mark.parametrize("dtype", ["exact", torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, seqlen, dim, group, repeats",
    [
        (1, 1, 1, 1, 1),
        (2, 7, 15, 5, 3),
        (3, 130, 48, 16, 4),
        (1, 19, 600, 300, 2),  # a group reaches over three tiles of channels
        (2, 3, 261, 9, 5),
        (1, 5, 4, 2, 11),
    ],
)
def test_copies_and_their_sums(impl, dtype, batch, seqlen, dim, group, repeats):
    dtype = EXACT[impl] if dtype == "exact" else dtype
    x = random(batch, seqlen, dim, dtype=dtype)
    dout = random(batch, seqlen, dim * repeats, dtype=dtype, seed=1)
    out, dx = compute(x, group, repeats, dout, impl=impl)
    assert out.dtype == dx.dtype == dtype
    assert torch.equal(out, x[..., origins(dim, group, repeats)])
    exact = sums(dout, dim, group, repeats)
    assert_within_budget(dx, exact, exact.to(dtype))


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(impl, dtype):
    """Next to 1 each of the other copies would be lost."""
    dout = torch.full((1, 1, 2 * 257), torch.finfo(dtype).eps / 4, dtype=dtype)
    dout[..., :2] = 1
    _, dx = compute(torch.zeros(1, 1, 2, dtype=dtype), 2, 257, dout, impl=impl)
    assert (dx == 1 + 64 * torch.finfo(dtype).eps).all()


@every_backend
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 3),
    seqlen=st.integers(0, 9),
    groups=st.integers(1, 5),
    group=st.integers(1, 9),
    repeats=st.integers(1, 6),
    chosen=st.none() | st.sets(st.integers(0, 2)),
)
def test_agrees_with_the_reference(impl, batch, seqlen, groups, group, repeats, chosen):
    x = random(batch, seqlen, groups * group, dtype=EXACT[impl])
    dout = random(batch, seqlen, groups * group * repeats, dtype=EXACT[impl], seed=1)
    mine = [b for b in range(batch) if chosen is None or b in chosen]
    route = None if chosen is None else route_of(*mine, batch=batch)
    ours, theirs = (
        [result[mine] for result in compute(x, group, repeats, dout, route=route, impl=each)]
        for each in (impl, "reference")
    )
    torch.testing.assert_close(ours, theirs)


@every_impl
@every_route
def test_route_touches_only_its_samples(impl, chosen):
    x, dout = random(4, 5, 6, dtype=torch.float32), random(4, 5, 18, dtype=torch.float32, seed=1)
    alone = compute(x, 2, 3, dout, impl="reference")
    others = [b for b in range(4) if b not in chosen]
    x[others], dout[others] = float("nan"), float("nan")
    routed = compute(x, 2, 3, dout, route=route_of(*chosen, batch=4), impl=impl)
    for got, expected in zip(routed, alone, strict=True):
        torch.testing.assert_close(got[list(chosen)], expected[list(chosen)])
    for unwritten in routed if impl != "reference" else routed[:1]:
        assert unwritten[others].isnan().all()


@every_backend
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_writes_rows_of_its_samples_alone(impl, chosen, dtype):
    """Into the middle of slots, whose other bytes stay as they are."""
    x, dout = random(4, 5, 6, dtype=dtype), random(4, 5, 18, dtype=dtype, seed=1)
    exact = x[..., origins(6, 2, 3)], sums(dout, 6, 2, 3).to(dtype)
    others = [b for b in range(4) if b not in chosen]
    x[others], dout[others] = float("nan"), float("nan")
    slots = torch.full((4, 7, 20), 7.0, dtype=dtype)
    repeat, add_up = into_ops(impl, route_of(*chosen, batch=4))
    for op, tensor, expected in ((repeat, x, exact[0]), (add_up, dout, exact[1])):
        got, untouched = slots.clone(), torch.ones(slots.shape, dtype=torch.bool)
        inside = slice(None), slice(1, 6), slice(1, 1 + expected.shape[2])
        op(got[inside], tensor, 2)
        torch.testing.assert_close(got[inside][list(chosen)], expected[list(chosen)])
        for b in chosen:
            untouched[b, inside[1], inside[2]] = False
        assert (got[untouched] == 7).all()


@every_backend
def test_takes_any_strides(impl):
    x, dout = random(2, 5, 6, dtype=torch.float32), random(2, 5, 18, dtype=torch.float32, seed=1)
    expected = compute(x, 2, 3, dout, impl="reference")
    views = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, dout)]
    out, dx = compute(views[0], 2, 3, views[1], impl=impl)
    assert out.is_contiguous()
    torch.testing.assert_close((out, dx), expected)
    repeat, add_up = into_ops(impl)
    memory = torch.zeros(2, 18, 10)[..., ::2].transpose(1, 2), torch.zeros(5, 2, 12)[..., ::2]
    out, dx = memory[0], memory[1].transpose(0, 1)
    repeat(out, views[0], 2)
    add_up(dx, views[1], 2)
    torch.testing.assert_close((out, dx), expected)


@every_backend
@pytest.mark.parametrize("strides", [(2**30 + 8, 18, 1), (18, 2**29 + 8, 1)])
def test_offsets_that_only_64_bits_hold_of_strides_that_32_do(impl, strides):
    x, near = random(3, 5, 6, dtype=torch.bfloat16), torch.zeros(3, 5, 18, dtype=torch.bfloat16)
    far = torch.empty_strided(near.shape, strides, dtype=near.dtype)  # hardly touched
    repeat, add_up = into_ops(impl)
    for out in (near, far):
        repeat(out, x, 2)
    assert torch.equal(far, near)
    dx = x.clone(), x.clone()
    add_up(dx[0], near, 2)
    add_up(dx[1], far, 2)
    assert torch.equal(*dx)


@every_backend
def test_backward_follows_the_route_of_forward(impl):
    x, dout = random(3, 5, 4, dtype=torch.float32), random(3, 5, 8, dtype=torch.float32, seed=1)
    route = route_of(1, batch=3)
    out = repeat_groups(x.requires_grad_(), 2, 2, route=route, impl=impl)
    (expected,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    route.count.zero_()
    route.samples.fill_(2)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert not dx[1].isnan().any() and torch.equal(dx[1], expected[1])


def test_derivatives_of_any_order():
    x = random(2, 3, 6).requires_grad_()

    def cubes(x):
        return repeat_groups(x, 2, 3, impl="cpu") ** 3

    assert torch.autograd.gradcheck(cubes, x) and torch.autograd.gradgradcheck(cubes, x)


@every_backend
@pytest.mark.parametrize("routed", [False, True])
def test_registration(impl, routed):
    route = route_of(1, batch=2) if routed else None
    x, out = random(2, 5, 6, dtype=torch.float32), random(2, 5, 18, dtype=torch.float32)
    rest = (route and route.count, route and route.samples, impl)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    dynamic = [*tests, "test_aot_dispatch_dynamic"]
    # with a route, what nobody wrote differs from call to call
    check = torch.library.opcheck
    for op, tensor in ((ops.repeat_groups_op, x.clone()), (ops.sum_groups_op, out.clone())):
        arguments = (tensor.requires_grad_(), 2, 3, *rest)
        check(op, arguments, test_utils=tests if route else dynamic)
    check(ops.repeat_groups_into_op.overload, (out, x, 2, *rest), test_utils=dynamic)
    check(ops.sum_groups_into_op.overload, (x, out, 2, *rest), test_utils=dynamic)


@every_backend
def test_compiles_whole_with_a_route(impl):
    x, dout = random(2, 5, 6, dtype=torch.float32), random(2, 5, 18, dtype=torch.float32)
    route = route_of(1, batch=2)

    def step(x):
        return repeat_groups(x, 2, 3, route=route, impl=impl)

    results = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, dout)])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize(
    "x, group, repeats, message",
    [
        (torch.zeros(2, 6), 2, 3, r"x must be floating, \(batch, seqlen, dim\) .* \(2, 6\)"),
        (torch.zeros(1, 2, 0), 2, 3, r"at least one channel, got torch.float32 \(1, 2, 0\)"),
        (torch.zeros(1, 2, 6).int(), 2, 3, "x must be floating, .* got torch.int32"),
        (torch.zeros(1, 2, 6), 4, 3, "group must divide the 6 channels of x, got 4"),
        (torch.zeros(1, 2, 6), 0, 3, "group must divide the 6 channels of x, got 0"),
        (torch.zeros(1, 2, 6), 2, 0, "repeats must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(x, group, repeats, message):
    with pytest.raises(ValueError, match=message):
        repeat_groups(x, group, repeats)
