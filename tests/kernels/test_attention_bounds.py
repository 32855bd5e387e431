"""Several sequences in a row of tokens, for attention: against each of them by itself."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.test_flash_attention import SEED, SLOPES, assert_close, run, tensors
from tests.support import EXACT, assert_within_budget, every_backend, every_impl, route_of
from tossup.kernels.flash_attention import bounds_of, flash_attention

# (where the sequences of each row begin, seqlen): one token, none of a tile's size, whole tiles
ROWS = {
    "short": (((0, 1, 2, 6), (0,)), 7),
    "long": (((0, 33, 34, 100), (0, 64, 128), (0, 130)), 150),
    "one": (((0,),), 40),
}


def numbers_of(begins, seqlen):
    """seq_idx of rows."""
    places = torch.arange(seqlen)
    return torch.stack([sum((places >= begin).int() for begin in row) for row in begins])


def apart(inputs, dout, dlse, begins, **options):
    """out, lse, dq, dk, dv of each sequence by itself."""
    columns = []
    for row, starts in enumerate(begins):
        stops = [*starts[1:], inputs[0].shape[1]]
        parts = []
        for place in map(slice, starts, stops):
            one = [x.detach()[row : row + 1, place].requires_grad_() for x in inputs]
            of_lse = None if dlse is None else dlse[row : row + 1, place]
            parts.append(run(one, dout[row : row + 1, place], of_lse, **options))
        out, lse, *grads = zip(*parts, strict=True)
        columns.append((torch.cat(out, 1), torch.cat(lse, 2), *(torch.cat(g, 1) for g in grads)))
    return [torch.cat(column) for column in zip(*columns, strict=True)]


@pytest.mark.parametrize("padding", [None, 0])
def test_bounds_are_where_numbers_change(padding):
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [2, 2, 2, 2, 2, 2, 2], [1, 2, 3, 0, 0, 0, 9]])
    begins, ends = bounds_of(seq_idx, padding)
    for row, numbers in enumerate(seq_idx.tolist()):
        alone = [number == padding for number in numbers]
        cuts = [
            at for at in range(1, 7) if numbers[at] != numbers[at - 1] or alone[at] or alone[at - 1]
        ]
        for begin, end in pairwise([0, *cuts, 7]):
            assert set(begins[row, begin:end].tolist()) == {begin}
            assert set(ends[row, begin:end].tolist()) == {end}
    assert (begins.dtype, begins.shape) == (torch.int32, (3, 7))


@pytest.mark.parametrize("wrong", [torch.zeros(5).long(), torch.zeros(2, 5)])
def test_numbers_of_sequences_are_integers_of_rows(wrong):
    with pytest.raises(ValueError, match="seq_idx must"):
        bounds_of(wrong)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options",
    [dict(causal=True), dict(), dict(causal=True, window_size=(40, 0)), dict(window_size=(3, 50))],
    ids=["causal", "all", "window", "two-sided"],
)
def test_agrees_with_each_sequence_by_itself(impl, dtype, rows, options):
    begins, seqlen = ROWS[rows]
    inputs, dout, dlse = tensors(len(begins), seqlen, seqlen, 4, 2, 40, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = (dlse, dlse.double()) if dtype == torch.float32 else (None, None)
    bounds = bounds_of(numbers_of(begins, seqlen))
    ours = run(inputs, dout, wide[0], bounds=bounds, impl=impl, **options)
    same = apart(inputs, dout, wide[0], begins, impl="reference", **options)
    oracle = apart(exact, dout.double(), wide[1], begins, impl="reference", **options)
    assert_within_budget(ours, oracle, same)


@every_impl
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_agrees_with_torch_under_a_mask(impl, rows, causal):
    begins, seqlen = ROWS[rows]
    inputs, dout, _ = tensors(len(begins), seqlen, seqlen, 4, 2, 17, EXACT[impl])
    numbers = numbers_of(begins, seqlen)
    out, _, *grads = run(inputs, dout, None, causal=causal, bounds=bounds_of(numbers), impl=impl)
    mask = (numbers[:, :, None] == numbers[:, None])[:, None]
    mask = mask.tril() if causal else mask
    with sdpa_kernel(SDPBackend.MATH):
        heads_first = (x.transpose(1, 2) for x in inputs)
        theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    theirs = theirs.transpose(1, 2)
    assert_close((out, *grads), (theirs, *torch.autograd.grad(theirs, inputs, dout)))


@every_impl
@pytest.mark.parametrize(
    "options",
    [dict(softcap=2.0), dict(alibi_slopes=SLOPES), dict(dropout_p=0.4, dropout_seed=SEED)],
    ids=["softcap", "ALiBi", "dropout"],
)
def test_goes_with_every_other_option(impl, options):
    """Weights are dropped by a token's place in its row, so a mask stands for the sequences."""
    begins, seqlen = ROWS["long"]
    inputs, dout, dlse = tensors(3, seqlen, seqlen, 4, 2, 24, torch.float32)
    numbers = numbers_of(begins, seqlen)
    bounds = bounds_of(numbers)
    options = dict(causal=True, bounds=bounds, **options)
    ours = run(inputs, dout, dlse, impl=impl, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    oracle = run(exact, dout.double(), dlse.double(), impl="reference", **options)
    assert_within_budget(ours, oracle, ours if impl == "reference" else run(
        inputs, dout, dlse, impl="reference", **options
    ))  # fmt: skip
    # What another sequence holds makes no difference
    changed = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in changed:
            x[0, :33] = 7
    again = run(changed, dout, dlse, impl=impl, **options)
    for got, before in zip(again, ours, strict=True):
        got, before = (x.transpose(1, 2) if x.ndim == 3 else x for x in (got, before))
        assert torch.equal(got[0, 33:], before[0, 33:])


@every_backend
def test_rows_of_one_token_give_its_value(impl):
    """One query a row, which decoding has an order of its own for."""
    (q, k, v), *_ = tensors(5, 1, 1, 4, 2, 16, torch.float32)
    out = flash_attention(q, k, v, bounds=bounds_of(torch.arange(5)[:, None]), impl=impl)
    assert torch.equal(out, v.repeat_interleave(2, 2))


@every_backend
def test_goes_with_a_route(impl):
    begins, seqlen = ROWS["long"]
    inputs, dout, dlse = tensors(3, seqlen, seqlen, 2, 1, 16, torch.float32)
    bounds = bounds_of(numbers_of(begins, seqlen))
    all_rows = run(inputs, dout, dlse, bounds=bounds, causal=True, impl=impl)
    routed = run(
        inputs, dout, dlse, bounds=bounds, causal=True, route=route_of(2, batch=3), impl=impl
    )
    for got, expected in zip(routed, all_rows, strict=True):
        torch.testing.assert_close(got[2], expected[2])
        assert got[:2].isnan().all()


@every_backend
def test_takes_bounds_of_any_strides(impl):
    begins, seqlen = ROWS["long"]
    inputs, dout, _ = tensors(3, seqlen, seqlen, 2, 1, 16, torch.float32)
    bounds = bounds_of(numbers_of(begins, seqlen))
    far = torch.stack((bounds, bounds), -1)[..., 0]
    assert not far.is_contiguous()
    for got, expected in zip(
        run(inputs, dout, None, bounds=far, impl=impl),
        run(inputs, dout, None, bounds=bounds, impl=impl),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        ([(1, 2, 4, 8)] * 3, dict(bounds=torch.zeros(2, 1, 2)), r"int32 \(2, 1, 2\), got .*float"),
        (
            [(1, 2, 4, 8)] * 3,
            dict(bounds=torch.zeros(2, 2, 2, dtype=torch.int32)),
            r"int32 \(2, 1, 2\), got torch.int32 \(2, 2, 2\)",
        ),
        (
            [(1, 2, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)],
            dict(bounds=torch.zeros(2, 1, 2, dtype=torch.int32)),
            "as many keys as queries, got 3 keys of 2 queries",
        ),
        (
            [(2, 4, 8)] * 3,
            dict(
                bounds=torch.zeros(2, 1, 2, dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
            ),
            "exclude each other",
        ),
    ],
)
def test_refuses(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*(torch.zeros(shape) for shape in shapes), **options)
