"""torch.func's transforms of the ops, forward mode, and gradients of gradients."""

import pytest
import torch
from torch.autograd import forward_ad

from tests.kernels.test_all_ops import DIM, OPS, every_op
from tests.support import every_backend, seeded


def random(*shape):
    return torch.randn(*shape, generator=seeded(0))


def loss_of(op, impl):
    return lambda x: sum(result.square().sum() for result in op(x, impl=impl))


@every_op
@every_backend
def test_functional_gradients_are_autograd_s(op, impl):
    x, loss = random(2, 5, DIM), loss_of(op, impl)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_each_sample(name):
    """As for clipping them apart: one call, in torch's loop over samples, or torch's refusal."""
    x, loss = random(3, 1, 5, DIM), loss_of(OPS[name], "cpu")
    of_each = torch.func.vmap(torch.func.grad(loss))
    if name in ("selective_scan", "causal_conv1d"):
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            of_each(x)
        return
    expected = torch.stack([torch.func.grad(loss)(row) for row in x])
    torch.testing.assert_close(of_each(x), expected)


@every_op
def test_forward_mode_is_refused_and_not_zero(op):
    x = random(2, 5, DIM)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(loss_of(op, "cpu"), (x,), (x,))
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x)
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                op(dual)
    with forward_ad.dual_level():
        op(x)


TWICE = ("rotary", "repeat_groups")


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_gradients(name):
    x = random(2, 5, DIM).requires_grad_()
    out, *_ = OPS[name](x)
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    if name in TWICE:
        assert torch.autograd.grad(dx.sum(), x)[0].any()
    else:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (out.sum() + dx.sum()).backward()
