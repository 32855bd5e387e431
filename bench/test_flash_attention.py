"""flash_attention against torch's scaled_dot_product_attention, in torch's own layout."""

import pytest
import torch
import torch.nn.functional as F

from tossup.kernels.flash_attention import flash_attention


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", [(2, 512, 8, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("peer", ["sdpa"])
def test_flash_attention(race, peer, dtype, shape, direction):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, dtype=dtype)

    def differentiate(out):
        return [out] if direction == "forward" else [out, *torch.autograd.grad(out, inputs, dout)]

    def ours():
        return differentiate(flash_attention(*inputs, causal=True))

    def theirs():
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return differentiate(out.transpose(1, 2))

    race(ours, theirs, tolerance=1e-4)
