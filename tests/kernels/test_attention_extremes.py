"""Attention where numbers or strides leave what is usual."""

import torch

from tests.kernels.test_flash_attention import run, tensors
from tests.support import EXACT, every_backend, only_triton
from tossup.kernels.flash_attention import flash_attention, kernel


@every_backend
def test_without_scale_every_query_takes_the_mean_of_what_it_sees(impl):
    (q, k, v), *_ = tensors(1, 40, 40, 2, 2, 16, EXACT[impl])
    out = flash_attention(q, k, v, causal=True, softmax_scale=0.0, impl=impl)
    expected = v.cumsum(1) / torch.arange(1, 41, dtype=v.dtype)[:, None, None]
    torch.testing.assert_close(out, expected)


@every_backend
def test_a_gradient_of_lse_need_not_fit_into_16_bits(impl):
    """As that of a loss that is scaled."""
    (q, k, v), dout, dlse = tensors(1, 64, 64, 2, 1, 16, torch.float16)
    ours = run((q, k, v), dout, dlse * 1e5, impl=impl, softmax_scale=0.1)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = run(wide, dout.double(), dlse.double() * 1e5, impl="reference", softmax_scale=0.1)
    assert exact[2].abs().max() < 60000
    for got, expected in zip(ours[2:], exact[2:], strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max()
        )


@only_triton
def test_samples_may_lie_further_apart_than_32_bits_count(impl, tmp_path):
    """Strides of rows of 8 numbers are given in eights, of which 32 bits hold more."""
    apart = 2**32 + 8
    size = apart + 64
    if torch.cuda.is_available():
        far = torch.empty(size, dtype=torch.float16)
    else:  # a file, of which two samples are ever touched
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    q = far.as_strided((2, 2, 1, 8), (apart, 8, 8, 1))
    q.copy_(torch.arange(32.0).view(q.shape).sin())
    assert kernel.addresses(q.stride())[1] == 8
    out = flash_attention(q, q.contiguous(), q.contiguous(), impl=impl)
    expected = flash_attention(*[q.contiguous()] * 3, impl=impl)
    assert torch.equal(out, expected)
