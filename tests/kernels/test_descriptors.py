"""Tiles that TMA descriptors load and store, in linear layers and in attention, against float64."""

import pytest
import torch

from tests.kernels.test_flash_attention import run, tensors
from tests.kernels.test_linear import (
    HALF,
    every_route,
    exactly,
    operands,
    plainly,
    poison,
    routed,
    rows_of,
)
from tests.support import assert_within_budget, only_triton, route_of
from tossup.kernels import descriptors
from tossup.kernels.flash_attention import bounds_of
from tossup.kernels.flash_attention import kernel as attention
from tossup.kernels.linear import linear, linear_into, weight_gradient_into


@pytest.fixture
def described(small_tiles, monkeypatch):
    """What descriptors were made of, launch by launch; wherever they can be, of small tiles."""
    found = []

    def describe(x, *block):
        found.append(x)
        return descriptors.describe(x, *block)

    def small(_kernel, _head_dim, _dtype, described, _busy):
        sides = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
        return sides | {"described": int(described)}

    tile = small_tiles.Tile(16, 32, 16, 4, 2, 1, described=1)
    monkeypatch.setattr(small_tiles, "DESCRIBED", (tile,) * 2)
    monkeypatch.setattr(attention, "heuristic", small)
    monkeypatch.setattr(descriptors, "BRIEF", 0)
    for module in (small_tiles, attention):
        monkeypatch.setattr(module, "describe", describe)
    return found


# Views of (batch, seqlen, …) that TMA takes
TAKEN = {
    "contiguous": torch.clone,
    "part of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "seqlen first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
# And that it does not, each for one reason
REFUSED = {
    "begins between vectors": lambda x: torch.cat([x[..., :1], x, x[..., 1:]], 2)[
        ..., 1 : x.shape[2] + 1
    ],
    "rows begin between vectors": lambda x: torch.cat([x, x[..., :3]], 2)[..., : x.shape[2]],
    "every other number": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "features first": lambda x: x.mT.contiguous().mT,
}


@only_triton
@every_route
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", TAKEN)
@pytest.mark.parametrize("sizes", [(4, 19, 40, 24), (4, 1, 8, 16), (4, 33, 16, 48)])
def test_tiles_of_linear_layers(impl, chosen, dtype, layout, sizes, described):
    x, weight, _, dout = operands(*sizes, dtype)
    mine = rows_of(chosen, 4)
    exact = exactly(x[mine], weight, torch.zeros(sizes[3], dtype=dtype), dout[mine])
    plain = plainly(x[mine], weight, torch.zeros(sizes[3], dtype=dtype), dout[mine])
    poison(chosen, x, dout)
    x, dout, dx = (TAKEN[layout](t) for t in (x, dout, x.clone()))
    before, route = dx.clone(), routed(chosen, 4)

    out = linear(x, weight, route=route, impl=impl)
    assert len(described) == 3
    linear_into(dx, dout, weight.t(), accumulate=True, route=route, impl=impl)
    assert len(described) == 6
    grad = weight.new_full(weight.shape, 3)
    weight_gradient_into(grad, dout, x, route=route, impl=impl)
    assert len(described) == 8

    got = [out[mine], dx[mine]]
    exact = [exact[0], exact[1] + before[mine].double(), exact[2]]
    plain = [plain[0], plain[1] + before[mine], plain[2]]
    assert_within_budget(got, exact[:2], plain[:2])
    others = [b for b in range(4) if b not in mine]
    assert torch.equal(dx[others].view(torch.int16), before[others].view(torch.int16))
    if mine:
        assert_within_budget(grad, exact[2], plain[2])
    else:
        assert (grad == 3).all()


@only_triton
@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("of", ["x", "dout", "out"])
def test_operands_that_tma_does_not_take(impl, layout, of, described):
    inputs = operands(2, 19, 16, 24, torch.bfloat16)
    x, weight, bias, dout = inputs
    view = REFUSED[layout]
    exact, plain = exactly(*inputs), plainly(*inputs)
    x, dout = view(x) if of == "x" else x, view(dout) if of == "dout" else dout
    out = torch.zeros(2, 19, 24, dtype=torch.bfloat16)
    out = view(out) if of == "out" else out
    linear_into(out, x, weight, bias, impl=impl)
    grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
    weight_gradient_into(grad, dout, x, bias_grad=bias_grad, impl=impl)
    assert_within_budget([out, grad, bias_grad], [exact[0], *exact[2:]], [plain[0], *plain[2:]])
    assert len(described) == {"x": 0, "dout": 3, "out": 4}[of]


@only_triton
@pytest.mark.parametrize("of_weight", [torch.float16, torch.float32])
def test_no_descriptors_of_weights_that_are_converted(impl, of_weight, described):
    inputs = operands(2, 19, 16, 24, torch.bfloat16, of_weight)
    x, weight, bias, _ = inputs
    out = linear(x, weight, bias, impl=impl)
    assert_within_budget(out, exactly(*inputs)[0], plainly(*inputs)[0])
    assert not described


@only_triton
def test_a_stride_that_no_number_needs_may_be_any(impl, described):
    x, weight, bias, _ = inputs = operands(1, 1, 16, 24, torch.bfloat16)
    x = x.as_strided(x.shape, (3, 5, 1))
    out = linear(x, weight, bias, route=route_of(0, batch=1), impl=impl)
    assert_within_budget(out, exactly(*inputs)[0], plainly(*inputs)[0])
    assert len(described) == 3


IN_ROWS = bounds_of(torch.tensor([0] * 33 + [1] + [2] * 36).expand(3, -1))


@only_triton
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chosen", [None, (2, 0)])
@pytest.mark.parametrize("layout", TAKEN)
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((3, 37, 53, 4, 2, 40), dict(causal=True)),
        ((3, 70, 70, 2, 1, 64), dict(causal=True, window_size=(19, 0))),
        ((3, 33, 33, 3, 3, 8), dict(window_size=(5, 7), softcap=3.0)),
        ((3, 65, 32, 2, 2, 16), dict()),
        ((3, 70, 70, 2, 1, 24), dict(causal=True, bounds=IN_ROWS)),
    ],
)
def test_tiles_of_attention(impl, dtype, chosen, layout, sizes, options, described):
    inputs, dout, dlse = tensors(*sizes, dtype)
    mine = list(range(3) if chosen is None else chosen)
    exact_inputs = [x.detach()[mine].double().requires_grad_() for x in inputs]
    same_inputs = [x.detach()[mine].requires_grad_() for x in inputs]
    others = [b for b in range(3) if b not in mine]
    inputs = [x.detach().clone() for x in inputs]
    for x in (*inputs, dout, dlse):
        x[others] = float("nan")
    inputs = [TAKEN[layout](x).requires_grad_() for x in inputs]
    route = None if chosen is None else route_of(*chosen, batch=3)

    ours = [
        x[mine] for x in run(inputs, TAKEN[layout](dout), dlse, impl=impl, route=route, **options)
    ]
    assert len(described) == 6
    if "bounds" in options:
        options = options | {"bounds": options["bounds"][:, mine]}
    exact = run(exact_inputs, dout[mine].double(), dlse[mine].double(), impl="reference", **options)
    same = run(same_inputs, dout[mine], dlse[mine], impl="reference", **options)
    assert_within_budget(ours, exact, same)


@only_triton
@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 16), (torch.bfloat16, 20)])
def test_heads_that_tma_does_not_take(impl, dtype, head_dim, described):
    inputs, dout, dlse = tensors(1, 37, 37, 2, 1, head_dim, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours = run(inputs, dout, dlse, impl=impl, causal=True)
    exact = run(exact_inputs, dout.double(), dlse.double(), impl="reference", causal=True)
    assert_within_budget(ours, exact, run(inputs, dout, dlse, impl="reference", causal=True))
    assert not described


@only_triton
def test_packed_tiles_end_with_their_sequence(impl, described):
    """A descriptor would read into the next one, whose NaN times a weight of zero is NaN."""
    inputs, dout, dlse = tensors(1, 40, 40, 2, 1, 16, torch.bfloat16)
    inputs = [x.detach()[0].clone() for x in inputs]
    for x in inputs:
        x[19:] = float("nan")
    bounds = torch.tensor([0, 19, 40], dtype=torch.int32)
    inputs = [x.requires_grad_() for x in inputs]
    ours = run(inputs, dout[0], dlse[0], impl=impl, cu_seqlens_q=bounds)
    assert not described
    assert not any(x[:19].isnan().any() for x in (ours[0], *ours[2:]))
