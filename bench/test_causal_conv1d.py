"""causal_conv1d against torch's conv1d, which takes channels before time."""

import pytest
import torch
import torch.nn.functional as F

from tossup.kernels.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", [(2, 512, 128, 4), (1, 2048, 1024, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("peer", ["conv1d"])
def test_causal_conv1d(race, peer, dtype, shape, direction):
    batch, seqlen, dim, width = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(batch, seqlen, dim), torch.randn(dim, width), torch.randn(dim)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    dout = torch.randn(batch, seqlen, dim, dtype=dtype)

    def differentiate(out):
        return [out] if direction == "forward" else [out, *torch.autograd.grad(out, inputs, dout)]

    def ours():
        return differentiate(causal_conv1d(*inputs, activation="silu"))

    def theirs():  # from and to the layout that a projection gives and takes
        x, weight, bias = inputs
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        out = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=dim))
        return differentiate(out.transpose(1, 2))

    race(ours, theirs, tolerance=1e-4)
