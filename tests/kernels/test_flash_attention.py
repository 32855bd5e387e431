import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import (
    eager_attention_forward as gemma2_attention,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

from tests.support import (
    EXACT,
    assert_within_budget,
    every_backend,
    every_impl,
    only_triton,
    route_of,
)
from tossup.kernels import descriptors
from tossup.kernels.flash_attention import bounds_of, flash_attention, kernel
from tossup.kernels.flash_attention.ops import flash_attention_op

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, 0), (-1, 3), (3, 1), (0, -1), (100, 100)]
WINDOWS += [(2**31 - 1, 2**31 - 1)]
SLOPES = torch.tensor([0.25, 0.0625, 0.5, 0.125])
SEED = torch.tensor(3 * 2**40 + 11)
PLAIN = dict(window_size=(-1, -1))


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, dtype=torch.float64, seed=0):
    """q, k and v that want gradients, and gradients of out and lse."""
    torch.manual_seed(seed)
    q, dout = torch.randn(2, batch, seqlen_q, heads, head_dim, dtype=dtype).unbind()
    k, v = torch.randn(2, batch, seqlen_k, kv_heads, head_dim, dtype=dtype).unbind()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        [x.clone().requires_grad_() for x in (q, k, v)],
        dout,
        torch.randn_like(q[..., 0], dtype=wide),
    )


def run(inputs, dout, dlse, **options):
    """out, lse, dq, dk, dv; the gradient of lse in q's layout, None to leave lse out."""
    options = {n: o.to(dout.device) if isinstance(o, Tensor) else o for n, o in options.items()}
    out, lse = flash_attention(*inputs, return_lse=True, **options)
    if dlse is None:
        return out, lse, *torch.autograd.grad(out, inputs, dout)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse.transpose(-1, -2)))


def brute_force(q, k, v, left, right, scale):
    """One query, one key at a time, in Python's own floats. Returns float64."""
    (batch, seqlen_q, heads, _), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
    out, lse = (
        torch.zeros_like(q).double(),
        torch.full((batch, heads, seqlen_q), -math.inf).double(),
    )
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                position = seqlen_k - (seqlen_q - i)  # the last query stands at the last key
                terms = {}
                for j in range(seqlen_k):
                    if left != -1 and position - j > left:
                        continue
                    if right != -1 and j - position > right:
                        continue
                    key = k[b, j, h * kv_heads // heads].tolist()
                    score = sum(x * y for x, y in zip(q[b, i, h].tolist(), key, strict=True))
                    terms[j] = math.exp(scale * score)
                if terms:
                    total = sum(terms.values())
                    lse[b, h, i] = math.log(total)
                    for j, term in terms.items():
                        out[b, i, h] += term / total * v[b, j, h * kv_heads // heads]
    return out, lse


@every_impl
@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(4, 4), (2, 5), (6, 3), (1, 4), (5, 1)])
def test_agrees_with_brute_force(impl, window_size, seqlen_q, seqlen_k):
    inputs, *_ = tensors(1, seqlen_q, seqlen_k, 4, 2, 3, EXACT[impl])
    q, k, v = (x.detach() for x in inputs)
    options = dict(window_size=window_size, softmax_scale=0.7, return_lse=True, impl=impl)
    expected = brute_force(q, k, v, *window_size, 0.7)
    assert_close(flash_attention(q, k, v, **options), expected)
    causal = brute_force(q, k, v, window_size[0], 0, 0.7)
    assert_close(flash_attention(q, k, v, causal=True, **options), causal)


def assert_close(ours, expected):
    """To the precision of ours, which may be less than that of the expected."""
    for got, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, oracle.to(got.dtype), rtol=2e-5, atol=2e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((1, 1, 1, 1, 1, 1), PLAIN),
        ((2, 7, 7, 4, 4, 40), dict(causal=True)),
        ((1, 130, 130, 4, 2, 64), dict(causal=True)),
        ((1, 130, 130, 2, 1, 17), dict(causal=True, window_size=(9, -1))),
        ((1, 33, 130, 6, 2, 40), dict(causal=True)),
        ((1, 130, 33, 6, 3, 40), dict(causal=True, softmax_scale=0.1)),
        ((2, 130, 7, 2, 2, 64), dict(window_size=(3, 5))),
        ((2, 7, 130, 2, 1, 128), PLAIN),
        ((1, 70, 130, 2, 1, 32), dict(softmax_scale=-0.4)),
        ((1, 70, 70, 2, 1, 32), dict(causal=True, softmax_scale=-0.4)),
        ((1, 40, 70, 2, 1, 80), dict(causal=True, softcap=5.0)),
        ((1, 40, 40, 2, 2, 160), dict(alibi_slopes=SLOPES[:2])),
        ((1, 33, 70, 2, 1, 256), dict(causal=True)),
        ((2, 33, 70, 4, 2, 24), dict(causal=True, dropout_p=0.3, dropout_seed=SEED)),
        ((2, 70, 33, 4, 2, 24), dict(softcap=2.0, alibi_slopes=SLOPES, window_size=(20, 9))),
    ],
)
def test_agrees_with_float64(impl, dtype, with_lse, sizes, options):
    inputs, dout, dlse = tensors(*sizes, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    wide = (dlse, dlse.double()) if with_lse else (None, None)
    ours = run(inputs, dout, wide[0], impl=impl, **options)
    same = run(inputs, dout, wide[0], impl="reference", **options)
    exact = run(exact_inputs, dout.double(), wide[1], impl="reference", **options)
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_within_budget(ours, exact, same)


@every_impl
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (5, 33), (1, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_torch(impl, seqlen_q, seqlen_k, causal):
    inputs, dout, _ = tensors(2, seqlen_q, seqlen_k, 4, 2, 17, EXACT[impl])
    ours = run(inputs, dout, None, causal=causal, impl=impl)
    mask = causal_lower_right(seqlen_q, seqlen_k)._materialize() if causal else None
    with sdpa_kernel(SDPBackend.MATH):
        heads_first = (x.transpose(1, 2) for x in inputs)
        theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    theirs = theirs.transpose(1, 2)
    grads = torch.autograd.grad(theirs, inputs, dout)
    assert_close((ours[0], *ours[2:]), (theirs, *grads))


@every_backend
@pytest.mark.parametrize("window", [1, 4, 50])
def test_agrees_with_transformers_sliding_window(impl, window):
    """Their window counts the query's own key, ours the keys to its left."""
    inputs, *_ = tensors(2, 21, 21, 4, 2, 16, torch.float32)
    sees = sliding_window_causal_mask_function(window)
    position = torch.arange(21)
    mask = torch.zeros(21, 21)
    mask.masked_fill_(~sees(0, 0, position[:, None], position[None]), float("-inf"))
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    heads_first = (x.transpose(1, 2) for x in inputs)
    theirs, _ = eager_attention_forward(module, *heads_first, mask, scaling=0.25)
    ours = flash_attention(*inputs, causal=True, window_size=(window - 1, 0), impl=impl)
    torch.testing.assert_close(ours, theirs)


@every_impl
def test_agrees_with_transformers_softcap(impl):
    inputs, dout, _ = tensors(2, 21, 21, 4, 2, 16, EXACT[impl])
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.head_dim = 2, 16
    heads_first = (x.transpose(1, 2) for x in inputs)
    theirs, _ = gemma2_attention(module, *heads_first, None, softcap=0.6)
    expected = theirs, *torch.autograd.grad(theirs, inputs, dout)
    out, _, *gradients = run(inputs, dout, None, softcap=0.6, impl=impl)
    assert_close((out, *gradients), expected)


@every_impl
def test_agrees_with_transformers_alibi(impl):
    """Theirs adds slope · j instead of slope · (j - i), which the softmax does not tell apart."""
    heads, seqlen = 6, 21  # no power of two: slopes from two sequences
    inputs, dout, _ = tensors(2, seqlen, seqlen, heads, 3, 16, EXACT[impl])
    bias = build_alibi_tensor(torch.ones(2, seqlen), heads, EXACT[impl])
    bias = bias.view(2, heads, 1, seqlen)
    slopes = bias[:, :, 0, 1].float()
    mask = torch.ones(seqlen, seqlen).tril().log() + bias
    with sdpa_kernel(SDPBackend.MATH):
        heads_first = (x.transpose(1, 2) for x in inputs)
        theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    theirs = theirs.transpose(1, 2)
    expected = theirs, *torch.autograd.grad(theirs, inputs, dout)
    for each in (slopes, slopes[0]):
        out, _, *gradients = run(inputs, dout, None, causal=True, alibi_slopes=each, impl=impl)
        assert_close((out, *gradients), expected)


@every_impl
def test_alibi_measures_the_distance_to_either_side_from_the_bottom_right(impl):
    v = torch.eye(5, dtype=EXACT[impl])[None, :, None]
    q, k = torch.zeros_like(v[:, :2]), torch.zeros_like(v)
    out = flash_attention(q, k, v, alibi_slopes=torch.tensor([0.5]), impl=impl)
    distance = torch.tensor([[3.0, 2, 1, 0, 1], [4, 3, 2, 1, 0]])
    assert_close([out[0, :, 0]], [(-0.5 * distance).softmax(-1)])


def kept(impl, p, seed, seqlen_q=40, seqlen_k=64, batch=2, heads=2, **options):
    """The weights that dropout leaves, times their number: (batch, seqlen_q, heads, seqlen_k)."""
    q = torch.zeros(batch, seqlen_q, heads, seqlen_k, dtype=EXACT[impl])
    k = torch.zeros(batch, seqlen_k, heads, seqlen_k, dtype=EXACT[impl])
    v = torch.eye(seqlen_k, dtype=EXACT[impl])[None, :, None].expand(batch, -1, heads, -1)
    seed = None if seed is None else torch.tensor(seed)
    out = flash_attention(q, k, v, dropout_p=p, dropout_seed=seed, impl=impl, **options)
    return seqlen_k * out


@every_impl
def test_dropout_keeps_as_many_as_asked_and_scales_them(impl):
    weights = kept(impl, 0.2, 5)
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1.25))
    deviation = (0.2 * 0.8 / weights.numel()) ** 0.5
    assert abs((weights == 0).double().mean() - 0.2) < 4 * deviation


@every_backend
def test_dropout_drops_the_same_in_all_implementations(impl):
    dropped = [kept(each, 0.4, 2**62 + 7) == 0 for each in (impl, "reference")]
    assert torch.equal(*dropped)


@every_backend
def test_dropout_differs_by_sample_head_query_and_seed(impl):
    weights = kept(impl, 0.5, 1) == 0
    assert len(weights.transpose(1, 2).flatten(0, 2).unique(dim=0)) == 2 * 2 * 40
    for seed in (2, 1 + 2**32):
        assert not torch.equal(weights, kept(impl, 0.5, seed) == 0)


@every_backend
def test_dropout_of_packed_sequences_is_that_of_samples(impl):
    apart = kept(impl, 0.5, 1)
    bounds = torch.tensor([0, 40, 80], dtype=torch.int32)
    keys = torch.tensor([0, 64, 128], dtype=torch.int32)
    q = torch.zeros(80, 2, 64, dtype=EXACT[impl])
    k = torch.zeros(128, 2, 64, dtype=EXACT[impl])
    v = torch.eye(64, dtype=EXACT[impl])[None, :, None].expand(2, -1, 2, -1).flatten(0, 1)
    packed = flash_attention(
        q, k, v, dropout_p=0.5, dropout_seed=torch.tensor(1), impl=impl,
        cu_seqlens_q=bounds, cu_seqlens_k=keys,
    )  # fmt: skip
    torch.testing.assert_close(64 * packed.unflatten(0, (2, 40)), apart)


@every_impl
def test_dropout_draws_its_seed_from_torch(impl):
    torch.manual_seed(0)
    first, second = kept(impl, 0.5, None), kept(impl, 0.5, None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, kept(impl, 0.5, None))


@every_backend
def test_dropout_of_backward_is_that_of_forward(impl):
    """Though the seed's tensor has moved on, as a training step's does."""
    inputs, dout, _ = tensors(2, 9, 9, 2, 2, 8, EXACT[impl])
    options = dict(dropout_p=0.5, causal=True)
    expected = run(inputs, dout, None, dropout_seed=torch.tensor(4), impl="reference", **options)
    seed = torch.tensor(4)
    out = flash_attention(*inputs, dropout_seed=seed, impl=impl, **options)
    seed += 1
    assert_close((out, *torch.autograd.grad(out, inputs, dout)), (expected[0], *expected[2:]))


@every_impl
def test_dropout_leaves_the_log_sum_exp_alone(impl):
    inputs, *_ = tensors(1, 9, 9, 2, 2, 8, EXACT[impl])
    options = dict(return_lse=True, impl=impl)
    _, lse = flash_attention(*inputs, dropout_p=0.5, **options)
    torch.testing.assert_close(lse, flash_attention(*inputs, **options)[1])


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(3, 3), (2, 4), (4, 2)])
def test_gradients_agree_with_finite_differences(seqlen_q, seqlen_k):
    inputs, *_ = tensors(2, seqlen_q, seqlen_k, 2, 1, 3)

    def attend(*inputs):
        out, lse = flash_attention(*inputs, causal=True, return_lse=True, impl="cpu")
        return out, lse[:, :, max(0, seqlen_q - seqlen_k) :]  # -inf has no finite difference

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@every_backend
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seqlen_q=st.integers(0, 40),
    seqlen_k=st.integers(0, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    left=st.integers(-1, 12),
    right=st.integers(-1, 12),
    causal=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    slope=st.sampled_from([None, None, 0.25]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    with_lse=st.booleans(),
)
def test_agrees_with_the_reference(
    impl, seqlen_q, seqlen_k, kv_heads, group, head_dim, left, right, causal, softcap, slope,
    dropout_p, with_lse,
):  # fmt: skip
    heads = kv_heads * group
    inputs, dout, dlse = tensors(2, seqlen_q, seqlen_k, heads, kv_heads, head_dim, EXACT[impl])
    options = dict(
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        alibi_slopes=None if slope is None else slope * torch.arange(2.0 * heads).view(2, heads),
        dropout_p=dropout_p,
        dropout_seed=SEED,
    )
    dlse = dlse if with_lse else None
    ours = run(inputs, dout, dlse, impl=impl, **options)
    expected = run(inputs, dout, dlse, impl="reference", **options)
    tolerance = 1e-7 if impl == "cpu" else 5e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize("strided", [0, 1, 2, 3])
def test_takes_any_strides(impl, strided):
    """Each tensor in turn, dout included, with strides of its own in every dimension."""
    inputs, dout, dlse = tensors(2, 9, 9, 4, 2, 8, EXACT[impl])
    expected = run(inputs, dout, dlse, impl=impl, causal=True)
    given_strides = [*inputs, dout]
    source = given_strides[strided].detach()
    stretched = torch.full([2 * n for n in reversed(source.shape)], float("nan"), dtype=EXACT[impl])
    view = stretched[::2, ::2, ::2, ::2].permute(3, 2, 1, 0).copy_(source)
    given_strides[strided] = view.requires_grad_(strided < 3)
    *inputs, dout = given_strides
    torch.testing.assert_close(run(inputs, dout, dlse, impl=impl, causal=True), expected)


@every_backend
def test_takes_an_expanded_gradient(impl):
    inputs, *_ = tensors(1, 5, 5, 2, 2, 4, EXACT[impl])
    ours = torch.autograd.grad(flash_attention(*inputs, impl=impl).sum(), inputs)
    theirs = torch.autograd.grad(flash_attention(*inputs, impl="reference").sum(), inputs)
    assert_close(ours, theirs)


@every_impl
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("chosen", [(), (2,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(9, 9), (9, 4)])
def test_route_touches_only_its_samples(impl, with_lse, chosen, seqlen_q, seqlen_k):
    inputs, dout, dlse = tensors(4, seqlen_q, seqlen_k, 4, 2, 8, EXACT[impl])
    dlse = dlse if with_lse else None
    alone = run(inputs, dout, dlse, causal=True, impl="reference")
    others = [b for b in range(4) if b not in chosen]
    with torch.no_grad():
        for poisoned in (*inputs, dout, *([dlse] if with_lse else [])):
            poisoned[others] = float("nan")
    route = route_of(*chosen, batch=4)
    routed = run(inputs, dout, dlse, causal=True, impl=impl, route=route)
    for got, expected in zip(routed, alone, strict=True):
        assert_close([got[list(chosen)]], [expected[list(chosen)]])
    for unwritten in routed if impl != "reference" else routed[:2]:
        assert unwritten[others].isnan().all()


@every_backend
def test_backward_follows_the_route_of_forward(impl):
    inputs, dout, _ = tensors(3, 5, 5, 2, 2, 4, EXACT[impl])
    route = route_of(1, batch=3)
    out = flash_attention(*inputs, route=route, impl=impl)
    expected = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    route.count.zero_()
    route.samples.fill_(2)
    for got, first in zip(torch.autograd.grad(out, inputs, dout), expected, strict=True):
        assert not got[1].isnan().any() and torch.equal(got[1], first[1])


CU_Q, CU_K = [0, 3, 3, 10, 11], [0, 5, 9, 12, 12]  # without queries; fewer keys; without keys


@every_impl
@pytest.mark.parametrize("longest", [None, 7])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("chosen", [None, (), (2,), (0, 1, 3)])
def test_packed_sequences_do_not_see_each_other(impl, longest, with_lse, chosen):
    inputs, dout, dlse = tensors(
        1, 13, 14, 4, 2, 8, EXACT[impl]
    )  # two tokens of padding behind the last
    q, k, v = inputs
    packed = [x.detach()[0].clone().requires_grad_() for x in inputs]
    packed_dlse = dlse[0] if with_lse else None
    results = run(
        packed,
        dout[0],
        packed_dlse,
        causal=True,
        cu_seqlens_q=torch.tensor(CU_Q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(CU_K, dtype=torch.int32),
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        route=None if chosen is None else route_of(*chosen, batch=4),
        impl=impl,
    )
    out, lse, dq, dk, dv = results
    assert lse.shape == (4, 13)
    written_q, written_k = torch.zeros(13, dtype=torch.bool), torch.zeros(14, dtype=torch.bool)
    for n in range(4) if chosen is None else chosen:
        of_q, of_k = slice(*CU_Q[n : n + 2]), slice(*CU_K[n : n + 2])
        written_q[of_q], written_k[of_k] = True, True
        alone = [q[:, of_q], k[:, of_k], v[:, of_k]]
        alone_dlse = dlse[:, of_q] if with_lse else None
        expected = run(alone, dout[:, of_q], alone_dlse, causal=True, impl="reference")
        got = out[of_q], lse[:, of_q], dq[of_q], dk[of_k], dv[of_k]
        assert_close([x[None] for x in got], expected)
    assert out[~written_q].isnan().all() and lse[:, ~written_q].isnan().all()
    if impl != "reference":
        assert dq[~written_q].isnan().all()
        assert dk[~written_k].isnan().all() and dv[~written_k].isnan().all()


@only_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("busy", [False, True])
def test_tiles_of_every_architecture_agree_with_float64(impl, arch, dtype, busy, monkeypatch):
    monkeypatch.setattr(descriptors, "BRIEF", 0)
    monkeypatch.setattr(kernel, "arch", lambda: arch)
    inputs, dout, dlse = tensors(1, 150, 200, 2, 1, 72, dtype)
    options = dict(causal=True, window_size=(130, 0), softcap=3.0 if busy else 0.0)
    ours = run(inputs, dout, dlse, impl=impl, **options)
    same = run(inputs, dout, dlse, impl="reference", **options)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(wide, dout.double(), dlse.double(), impl="reference", **options)
    assert_within_budget(ours, exact, same)


@pytest.mark.parametrize(
    "strides, unit",
    [
        ([(960, 240, 40, 1)], 8),
        ([(960, 240, 40, 1), (960, 240, 20, 1)], 4),
        ([(960, 240, 40, 3), (0, 0, 6, 1)], 2),
        ([(960, 480, 48, 1)], 1),  # 16 divides them, which Triton finds out
        ([(120, 24, 1)], 8),
        ([(119, 7, 7, 1)], 1),
        ([(0, 0, 0, 0)], 1),
    ],
)
def test_strides_are_given_in_the_largest_unit_below_16_that_divides_all(strides, unit):
    assert kernel.addresses(*strides)[1] == unit


@every_backend
def test_packed_keys_lie_as_the_queries_by_default(impl):
    inputs, *_ = tensors(2, 6, 6, 2, 2, 4, EXACT[impl])
    packed = [x.detach().flatten(0, 1) for x in inputs]
    bounds = torch.tensor([0, 6, 12], dtype=torch.int32)
    out = flash_attention(*packed, cu_seqlens_q=bounds, impl=impl)
    torch.testing.assert_close(out, flash_attention(*inputs, impl=impl).flatten(0, 1))


def cases():
    """Arguments for one dense, one routed and one packed call."""
    route = route_of(1, batch=2)
    packed = torch.tensor([0, 4, 7], dtype=torch.int32)
    dense, *_ = tensors(2, 5, 3, 4, 2, 8, torch.float32)
    flat = [x.detach()[0].requires_grad_() for x in tensors(1, 7, 7, 4, 2, 8, torch.float32)[0]]
    return {
        "dense": (dense, dict(causal=True)),
        "routed": (dense, dict(causal=True, route=route)),
        "packed": (flat, dict(cu_seqlens_q=packed, window_size=(2, 1))),
        "softcap, ALiBi and dropout": (
            dense,
            dict(
                softcap=2.0,
                alibi_slopes=SLOPES.to(dense[0].device),
                dropout_p=0.5,
                dropout_seed=SEED.to(dense[0].device),
            ),
        ),
        "several sequences in a row": (
            [x.detach()[:, :3].requires_grad_() for x in dense],
            dict(causal=True, bounds=bounds_of(torch.tensor([[0, 0, 1], [0, 1, 1]]))),
        ),
        "packed and routed": (flat, dict(cu_seqlens_q=packed, route=route)),
    }


@every_backend
@pytest.mark.parametrize("case", cases())
def test_registration(impl, case):
    inputs, options = cases()[case]
    route, bounds = options.get("route"), options.get("cu_seqlens_q")
    rows = options.get("bounds")
    places = (bounds, bounds, route and route.count, route and route.samples)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if route is None:  # with a route, what nobody wrote differs from call to call
        tests.append("test_aot_dispatch_dynamic")
    scoring = (options.get(n) for n in ("softcap", "alibi_slopes", "dropout_p", "dropout_seed"))
    softcap, slopes, p, seed = scoring
    arguments = (
        *inputs, 2, 0, 0.5, softcap or 0.0, slopes, p or 0.0, seed, *places[:2], None, None, rows,
        *places[2:], impl,
    )  # fmt: skip
    torch.library.opcheck(flash_attention_op, arguments, test_utils=tests)


@every_backend
@pytest.mark.parametrize("case", cases())
def test_compiles_whole(impl, case):
    inputs, options = cases()[case]

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, return_lse=True, impl=impl, **options)
        return out.nan_to_num().square().sum() + lse.nan_to_num(neginf=0.0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for ours, eager in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager, equal_nan=True)


BOUNDS = torch.tensor([0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        ([(2, 4, 8)] * 3, {}, r"q must be \(batch, seqlen, heads, head_dim\), got \(2, 4, 8\)"),
        ([(1, 2, 4, 8)] * 3, dict(cu_seqlens_q=BOUNDS), r"q must be \(total, heads, head_dim\)"),
        ([(1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 9)], {}, "k and v must have the same shape"),
        ([(1, 2, 4, 8), (1, 2, 4, 9), (1, 2, 4, 9)], {}, "q's batch and head_dim"),
        ([(1, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)], {}, "q's batch and head_dim"),
        ([(1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8)], {}, "divides q's 4, got 3"),
        ([(1, 2, 4, 0)] * 3, {}, r"head_dim of at least 1, got \(1, 2, 4, 0\)"),
        ([(1, 2, 4, 8)] * 3, dict(window_size=(-2, 0)), r"window_size must .* got \(-2, 0\)"),
        ([(1, 2, 4, 8)] * 3, dict(window_size=3), r"window_size must .* got 3"),
        ([(1, 2, 4, 8)] * 3, dict(softcap=-1.0), "softcap must be 0 or a positive .* got -1.0"),
        (
            [(3, 2, 4, 8)] * 3,
            dict(alibi_slopes=torch.ones(2, 4)),
            r"alibi_slopes must be floating, \(4,\) or \(3, 4\), got .* \(2, 4\)",
        ),
        ([(1, 2, 4, 8)] * 3, dict(alibi_slopes=torch.arange(4)), "floating, .* got torch.int64"),
        ([(1, 2, 4, 8)] * 3, dict(dropout_p=1.0), "at least 0 and below 1, got 1.0"),
        (
            [(1, 2, 4, 8)] * 3,
            dict(dropout_p=0.5, dropout_seed=torch.zeros(1)),
            r"dropout_seed must be int64 of shape \(\), got torch.float32 of shape \(1,\)",
        ),
        ([(1, 2, 4, 8)] * 3, dict(cu_seqlens_k=BOUNDS), "must come with cu_seqlens_q"),
        ([(1, 2, 4, 8)] * 3, dict(max_seqlen_k=2), "must come with cu_seqlens_q"),
        ([(2, 4, 8)] * 3, dict(cu_seqlens_q=BOUNDS.long()), r"int32 \(sequences \+ 1,\)"),
        (
            [(2, 4, 8)] * 3,
            dict(cu_seqlens_q=BOUNDS, cu_seqlens_k=torch.tensor([0, 1, 2], dtype=torch.int32)),
            "as many sequences, got 1 and 2",
        ),
        ([(1, 4, 8)] * 3, dict(cu_seqlens_q=BOUNDS), r"grow from 0 to q's 1 tokens, got \[0, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*(torch.zeros(shape) for shape in shapes), impl="cpu", **options)


def test_mixed_dtypes_are_refused():
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"share one dtype .* got torch\.float16 for k"):
        flash_attention(x, x.half(), x)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bounds", [[2, 8], [0, 9], [0, 5, 3, 8]])
def test_packed_sequences_begin_at_the_first_token_and_never_overlap(bounds, impl):
    q = torch.randn(8, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens_q must grow from 0 to q's 8 tokens"):
        flash_attention(q, q, q, cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32), impl=impl)
