"""selective_scan against mamba-ssm's own reference, its one scan that runs without CUDA."""

import pytest
import torch

from tests.oracles import selective_scan_ref
from tossup.kernels.selective_scan import selective_scan


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", [(2, 512, 128, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("peer", ["mamba_ssm"])
def test_selective_scan(race, peer, dtype, shape, direction):
    batch, seqlen, dim, states = shape
    torch.manual_seed(0)
    u, delta, z = (torch.randn(batch, seqlen, dim, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(batch, seqlen, 1, states, dtype=dtype) for _ in range(2))
    A, D, bias = -torch.rand(dim, states), torch.randn(dim), torch.randn(dim)
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
    dout = torch.randn(batch, seqlen, dim, dtype=dtype)
    # each in its own layout: the peer takes (batch, dim, seqlen), laid out so in memory
    moved = [x.detach() for x in inputs]
    for i in (0, 1, 6):
        moved[i] = moved[i].transpose(1, 2).contiguous()
    for i in (3, 4):
        moved[i] = moved[i].permute(0, 2, 3, 1).contiguous()
    moved = [x.requires_grad_() for x in moved]
    moved_dout = dout.transpose(1, 2).contiguous()

    def ours():
        out = selective_scan(*inputs, delta_softplus=True)
        if direction == "forward":
            return [out]
        return [out, *torch.autograd.grad(out, inputs, dout)]

    def theirs():
        out = selective_scan_ref(*moved, delta_softplus=True)
        if direction == "forward":
            return [out.transpose(1, 2)]
        grads = list(torch.autograd.grad(out, moved, moved_dout))
        for i in (0, 1, 6):
            grads[i] = grads[i].transpose(1, 2)
        for i in (3, 4):
            grads[i] = grads[i].permute(0, 3, 1, 2)
        return [out.transpose(1, 2), *grads]

    race(ours, theirs, tolerance=1e-4)
