"""Attention of few queries to many keys, which programs share out; against float64."""

import pytest
import torch

from tests.kernels.test_flash_attention import SEED, SLOPES, run, tensors
from tests.support import assert_within_budget, only_triton, poison_memory, route_of
from tossup.kernels import configs
from tossup.kernels.flash_attention import flash_attention, kernel


@pytest.fixture
def parts(monkeypatch):
    """Keys are shared out from 8 on, in tiles of 16; lists among how many programs."""
    found: list[int] = []
    parts_of = kernel.parts_of

    def spy(programs, keys):
        found.append(parts_of(programs, keys))
        return found[-1]

    monkeypatch.setattr(kernel, "SHORTEST", 8)
    monkeypatch.setattr(kernel, "processors", lambda: 132)
    monkeypatch.setattr(kernel, "parts_of", spy)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "described": 0}
    with configs.forced("flash_attention.decode", tiles):
        yield found


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes, options, expected",
    [
        ((2, 1, 130, 6, 2, 40), dict(causal=True), 16),
        ((2, 1, 130, 6, 2, 64), dict(causal=True, window_size=(50, 0)), 6),
        ((2, 1, 37, 4, 4, 16), dict(window_size=(-1, -1)), 4),
        ((1, 5, 130, 6, 2, 40), dict(causal=True), 16),
        ((1, 16, 70, 2, 1, 17), dict(causal=True, window_size=(30, -1)), 5),
        ((1, 7, 130, 2, 1, 40), dict(window_size=(20, 3)), 3),
        ((1, 13, 9, 2, 1, 32), dict(causal=True), 1),
        ((1, 16, 17, 2, 1, 32), dict(causal=True), 2),
        ((1, 1, 130, 4, 2, 40), dict(causal=True, softcap=3.0), 16),
        ((1, 1, 130, 4, 2, 40), dict(causal=True, alibi_slopes=SLOPES), 16),
        ((2, 3, 130, 4, 2, 40), dict(dropout_p=0.3, dropout_seed=SEED), 16),
        ((1, 1, 2000, 4, 2, 16), dict(causal=True, softmax_scale=-0.4), 64),
    ],
)
def test_agrees_with_float64(impl, dtype, sizes, options, expected, parts):
    inputs, dout, dlse = tensors(*sizes, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours = run(inputs, dout, dlse, impl=impl, **options)
    assert parts == [expected]
    same = run(inputs, dout, dlse, impl="reference", **options)
    exact = run(exact_inputs, dout.double(), dlse.double(), impl="reference", **options)
    assert_within_budget(ours, exact, same)


@only_triton
@pytest.mark.parametrize("chosen", [None, (), (2,), (0, 1, 3)])
def test_packed_sequences_and_routes(impl, chosen, parts, monkeypatch):
    """Sequences shorter than a part and longer than several, one without a query, one with queries
    that see no key; nobody reads what nobody wrote, and other sequences' rows stay unwritten."""
    poison_memory(monkeypatch)
    queries, keys = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1, 5, 7], [0, 3, 9, 11, 97])
    )
    (q, k, v), *_ = tensors(1, 7, 97, 4, 2, 24, torch.float32)
    options = dict(cu_seqlens_q=queries, cu_seqlens_k=keys, max_seqlen_q=5, causal=True)
    route = None if chosen is None else route_of(*chosen, batch=4)
    inputs = [x.detach()[0] for x in (q, k, v)]
    with torch.no_grad():
        out, lse = flash_attention(*inputs, return_lse=True, route=route, impl=impl, **options)
        exact, exact_lse = flash_attention(
            *(x.double() for x in inputs), return_lse=True, impl="reference", **options
        )
    assert parts == [12]
    written = torch.zeros(7, dtype=torch.bool)
    for sample in range(4) if chosen is None else chosen:
        written[queries[sample] : queries[sample + 1]] = True
    torch.testing.assert_close(out[written].double(), exact[written], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, written], exact_lse[:, written].float())
    assert out[~written].isnan().all() and lse[:, ~written].isnan().all()


@only_triton
@pytest.mark.parametrize("chosen", [(), (1,)])
def test_a_route_of_single_queries_touches_only_its_samples(impl, chosen, parts, monkeypatch):
    poison_memory(monkeypatch)
    inputs = [x.detach() for x in tensors(3, 1, 50, 4, 2, 24, torch.float32)[0]]
    out, lse = flash_attention(
        *inputs, causal=True, return_lse=True, route=route_of(*chosen, batch=3), impl=impl
    )
    expected = flash_attention(*inputs, causal=True, impl="reference")
    others = [sample for sample in range(3) if sample not in chosen]
    torch.testing.assert_close(out[list(chosen)], expected[list(chosen)])
    assert out[others].isnan().all() and lse[others].isnan().all()


@only_triton
@pytest.mark.parametrize("heads, kv_heads, expected", [(34, 2, 3), (32, 2, 16), (17, 1, 7)])
def test_a_group_that_fills_no_tile_shares_none(impl, heads, kv_heads, expected, parts):
    """More heads than a tile has rows go on one by one, and their keys are shared out as well."""
    inputs = [x.detach() for x in tensors(2, 1, 130, heads, kv_heads, 16, torch.float32)[0]]
    out = flash_attention(*inputs, causal=True, impl=impl)
    assert parts == [expected]
    torch.testing.assert_close(out, flash_attention(*inputs, causal=True, impl="reference"))


def test_keys_are_shared_out_only_where_programs_are_few(monkeypatch):
    """Of 132 multiprocessors, with two programs for each."""
    monkeypatch.setattr(kernel, "processors", lambda: 132)
    assert kernel.parts_of(programs=8, keys=32768) == 33
    assert kernel.parts_of(programs=8, keys=1024) == 4
    assert kernel.parts_of(programs=1, keys=2**20) == 64
    assert kernel.parts_of(programs=200, keys=2**20) == 1
    assert kernel.parts_of(programs=0, keys=0) == 1
