"""Mixers against mamba-ssm's and transformers' own modules, and against their equations."""

import math
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, MistralConfig
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

from tests.oracles import Mamba as UpstreamMamba
from tests.oracles import selective_scan_ref
from tossup import Attention, Mamba
from tossup.supernet.mixers import GroupedMamba, packing


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def gradients(module, out, seed=0):
    torch.manual_seed(seed)
    (out * torch.randn_like(out)).sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [{}, {"expand": 1.6}, {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 3, "bias": True}],
)
def test_mamba_is_mamba_ssms(options):
    torch.manual_seed(0)
    theirs = UpstreamMamba(24, **options, use_fast_path=False)
    ours = Mamba(24, **options, use_fast_path=False, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())
    for name, parameter in theirs.named_parameters():  # what it tells optimizers and initialisers
        assert vars(ours.get_parameter(name)) == vars(parameter)
    for name in ("d_model", "d_state", "d_conv", "expand", "d_inner", "dt_rank", "use_fast_path"):
        assert getattr(ours, name) == getattr(theirs, name)
    x = torch.randn(3, 17, 24)
    out = ours(x)
    expected = theirs(x)
    close(out, expected)
    grads = gradients(ours, out)
    for name, grad in gradients(theirs, expected).items():
        close(grads[name], grad)


@pytest.mark.parametrize(
    "make", [partial(Attention, 16, 2), partial(Mamba, 16), partial(GroupedMamba, 16, 32)]
)
def test_parameters_are_made_where_and_as_asked(make):
    """Mamba's rates and skips stay in float32, as mamba-ssm's do."""
    wide = {"A_log", "D"}
    for name, parameter in make(device="meta", dtype=torch.bfloat16).named_parameters():
        assert parameter.is_meta
        assert parameter.dtype == (torch.float32 if name in wide else torch.bfloat16)
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    assert make(dtype=torch.bfloat16)(x).dtype == torch.bfloat16


def test_mamba_starts_as_mamba_ssms_does():
    torch.manual_seed(0)
    theirs, ours = UpstreamMamba(64, dt_init="constant"), Mamba(64, dt_init="constant")
    close(ours.A_log, theirs.A_log)
    close(ours.D, theirs.D)
    close(ours.dt_proj.weight, theirs.dt_proj.weight)
    for module in (theirs, ours):
        dt = F.softplus(module.dt_proj.bias.detach())
        assert 0.001 <= dt.min() and dt.max() <= 0.1
        assert dt.log().std() == pytest.approx(math.log(100) / 12**0.5, rel=0.2)
    with pytest.raises(ValueError, match="dt_init takes random or constant, got 'zero'"):
        Mamba(64, dt_init="zero")


def test_a_constructor_refuses_widths_that_cannot_work():
    """Where else the first forward would say so, in words about tensors, or nobody at all."""
    whole = "takes a whole number"
    for make, sentence in (
        (lambda: Attention(30, 4), r"^heads must divide hidden_size \(30\) .*, got 4$"),
        (lambda: Attention(32, 64), r"^heads must divide hidden_size \(32\) .*, got 64$"),
        (lambda: Attention(32, 0), f"^heads {whole}, 1 or more, got 0$"),
        (lambda: Attention(0, 4), f"^hidden_size {whole}, 1 or more, got 0$"),
        (lambda: Attention(32, 4.0), f"^heads {whole}, 1 or more, got 4.0$"),
        (lambda: Attention(32, 4, kv_heads=3), r"^kv_heads must divide heads \(4\), got 3$"),
        (lambda: Attention(32, 4, kv_heads=0), f"^kv_heads {whole}, 1 or more, got 0$"),
        (lambda: Attention(32, 4, head_dim=0), f"^head_dim {whole}, 1 or more, got 0$"),
        (lambda: Attention(32, 4, head_dim=5), "^head_dim must be even .*, got 5;"),
        (lambda: Attention(36, 4), "^head_dim must be even .*, got 9;"),
        (lambda: Attention(32, 4, window_size=0), f"^window_size {whole}, 1 or more, got 0$"),
        (lambda: Attention(32, 4, window_size=(3, 0)), rf"^window_size {whole}, .*, got \(3, 0\)$"),
        (lambda: Attention(32, 4, rope_theta=0), "^rope_theta takes a positive number, .*, got 0$"),
        (lambda: Mamba(32, d_conv=7), f"^d_conv {whole}, 2 to 4, got 7$"),
        (lambda: Mamba(32, d_conv=1), f"^d_conv {whole}, 2 to 4, got 1$"),
        (lambda: Mamba(32, d_state=0), f"^d_state {whole}, 1 or more, got 0$"),
        (lambda: Mamba(-32), f"^d_model {whole}, 1 or more, got -32$"),
        (lambda: Mamba(32, expand=0), "^expand takes a number that leaves a channel .*, got 0$"),
        (
            lambda: Mamba(32, expand="2"),
            "^expand takes a number that leaves a channel .*, got '2'$",
        ),
        (lambda: Mamba(32, dt_rank=0), f"^dt_rank {whole}, 1 or more, got 0$"),
        (lambda: Mamba(32, dt_rank="full"), "^dt_rank takes auto or a whole number, got 'full'$"),
        (
            lambda: Mamba(32, dt_min=0),
            r"^dt_min takes a positive number, dt_max \(0.1\) .*, got 0$",
        ),
        (
            lambda: Mamba(32, dt_min=1),
            r"^dt_min takes a positive number, dt_max \(0.1\) .*, got 1$",
        ),
        (lambda: GroupedMamba(32, 32, d_conv=5), f"^d_conv {whole}, 2 to 4, got 5$"),
        (lambda: GroupedMamba(32, 32, 0), f"^d_xb {whole}, 1 or more, got 0$"),
        (
            lambda: GroupedMamba(32, 32, 12, 8),
            r"^d_xb must be a multiple of state_size \(8\), got 12",
        ),
        (
            lambda: GroupedMamba(32, 40, 16, 8),
            r"^d_inner must be a multiple of d_xb \(16\), got 40",
        ),
        (lambda: GroupedMamba(32, 32, state_size=0), f"^state_size {whole}, 1 or more, got 0$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
    assert Attention(32, 4, head_dim=5, rope_theta=None)(torch.zeros(1, 2, 32)).shape == (1, 2, 32)
    assert Attention(32, 4, head_dim=2, window_size=1).head_dim == 2
    assert Mamba(30, expand=1.5, dt_min=0.1, dt_max=0.1).d_inner == 45


@pytest.mark.parametrize("kind", ["attention", "mamba", "mamba1"])
def test_parameters_can_be_drawn_anew(kind):
    """As where a module was made on the meta device: by it alone, or by each module in its turn."""
    with torch.device("meta"):
        made = [MIXERS[kind]() for _ in range(2)]
    for mixer, modules in zip(made, (lambda m: [m], lambda m: m.modules()), strict=True):
        mixer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.fill_(math.nan)
        for module in modules(mixer):
            torch.manual_seed(1)
            module.reset_parameters()
        assert not any(p.isnan().any() for p in mixer.parameters())
        if kind != "attention":
            expected = torch.arange(1.0, 5).log().expand_as(mixer.A_log)
            assert torch.equal(mixer.A_log, expected) and mixer.D.eq(1).all()
            dt = F.softplus(mixer.dt_proj.bias)
            assert 0.001 <= dt.min() and dt.max() <= 0.1 and dt.std() > 0


@pytest.mark.parametrize("before", [True, False])
def test_grouped_mamba_follows_its_equations(before):
    """Every step written out: split, repeat as key and value heads do, convolve, scan, gate."""
    torch.manual_seed(0)
    d_inner, d_xb, state, seqlen = 24, 8, 4, 11
    mixer = GroupedMamba(16, d_inner, d_xb, state, dt_rank=3, repeat_kv_before_conv=before)
    hidden = torch.randn(2, seqlen, 16)
    z, x, B, C = mixer.in_proj(hidden).transpose(1, 2).split((d_inner, d_xb, d_xb, d_inner), 1)

    def repeat(heads):  # (batch, d_xb, seqlen) to (batch, d_inner, seqlen)
        groups = heads.reshape(2, d_xb // state, 1, state, seqlen)
        return groups.expand(-1, -1, d_inner // d_xb, -1, -1).reshape(2, d_inner, seqlen)

    def convolve(channels):
        padded = F.pad(channels, (3, 0))
        return F.silu(F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=x_channels))

    x_channels = d_inner if before else d_xb
    x = convolve(repeat(x)) if before else repeat(convolve(x))
    dt = mixer.dt_proj(mixer.dt_in_proj(hidden)).transpose(1, 2)
    y = selective_scan_ref(
        x,
        dt,
        -mixer.A_log.exp(),
        repeat(B).reshape(2, d_inner // state, state, seqlen),
        C.reshape(2, d_inner // state, state, seqlen),
        mixer.D,
        z=z,
        delta_bias=mixer.dt_proj.bias,
        delta_softplus=True,
    )
    close(mixer(hidden), mixer.out_proj(y.transpose(1, 2)))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_mistrals(window):
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        attn_implementation="eager",
        rope_theta=500.0,
    )
    theirs = MistralAttention(config, layer_idx=0)
    ours = Attention(32, heads=4, kv_heads=2, head_dim=8, window_size=window, rope_theta=500.0)
    ours.load_state_dict(theirs.state_dict())
    x, places = torch.randn(2, 13, 32), torch.arange(13)
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < (window or 13))
    mask = torch.zeros(1, 1, 13, 13).masked_fill(~seen, -math.inf)
    angles = MistralRotaryEmbedding(config)(x, places[None])
    expected = theirs(x, angles, mask)[0]
    out = ours(x)
    close(out, expected)
    grads = gradients(ours, out)
    for name, grad in gradients(theirs, expected).items():
        close(grads[name], grad)


MIXERS = {
    "attention": lambda: Attention(16, heads=2, kv_heads=1),
    "window": lambda: Attention(16, heads=2, window_size=3),
    "mamba": lambda: GroupedMamba(16, 16, 8, 4),
    "mamba1": lambda: Mamba(16, d_state=4),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_packed_and_padded_sequences_are_those_sequences_alone(kind):
    torch.manual_seed(0)
    mixer = MIXERS[kind]()
    sequences = [torch.randn(1, length, 16) for length in (5, 1, 7)]
    alone = [mixer(sequence) for sequence in sequences]
    bounds = torch.tensor([0, 5, 6, 13]).int()
    numbers = torch.tensor([0, 1, 2]).repeat_interleave(bounds.diff())
    places = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    flattened = {"cu_seq_lens_q": bounds, "seq_idx": numbers[None], "position_ids": places}
    causal = ((numbers[:, None] == numbers) & torch.ones(13, 13).tril().bool())[None, None]
    told = [{name: value} for name, value in flattened.items()]
    told += [{"cu_seqlens": bounds}, flattened, {"attention_mask": causal}]
    told += [{"attention_mask": causal, **flattened}]  # as transformers' collator and sdpa
    for packed in told:
        close(mixer(torch.cat(sequences, 1), **packed), torch.cat(alone, 1))
    for side in ("left", "right"):
        pad = [(7 - s.shape[1], 0) if side == "left" else (0, 7 - s.shape[1]) for s in sequences]
        both = list(zip(sequences, pad, strict=True))
        padded = torch.cat([F.pad(s, (0, 0, *p), value=9.0) for s, p in both])
        mask = torch.cat([F.pad(torch.ones_like(s[..., 0]), p) for s, p in both])
        causal = (mask[:, None, None] * torch.ones(7, 7).tril()).bool()
        additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
        for form in (mask, causal, additive):  # the last two as transformers makes them
            out = mixer(padded, attention_mask=form)
            for row, keep, expected in zip(out, mask.bool(), alone, strict=True):
                close(row[keep], expected[0])


@pytest.mark.parametrize("kind", MIXERS)
def test_what_a_mixer_cannot_do_it_says(kind):
    mixer, x = MIXERS[kind](), torch.randn(2, 4, 16)
    for cache in (None, DynamicCache()):
        got = "use_cache=True" if cache is None else type(cache).__name__
        with pytest.raises(NotImplementedError, match=f"no cache but tossup's own, .* got {got}; "):
            mixer(x, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"padding mask of shape \(2, 4\), got \(2, 5\)"):
        mixer(x, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"must be \(2, 1, 4, 4\), got \(2, 1, 1, 4\)"):
        mixer(x, attention_mask=torch.ones(2, 1, 1, 4))
    both_ways = torch.ones(2, 1, 4, 4)
    both_ways[1, 0, 1:3, 1:3] = 0
    for mask in (torch.ones(2, 1, 4, 4), both_ways, torch.ones(2, 1, 4, 4).tril(1)):
        with pytest.raises(ValueError, match="must be causal, with padding and packed"):
            mixer(x, attention_mask=mask.bool())
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 4, 4, "cpu")
    with pytest.raises(ValueError, match="must be a tensor, got BlockMask: attn_implementation"):
        mixer(x, attention_mask=block_mask)
    for dtype in (torch.long, torch.uint8):
        with pytest.raises(ValueError, match="must be boolean, or 0 where a key is seen"):
            mixer(x, attention_mask=torch.ones(2, 1, 4, 4, dtype=dtype).tril())
    with pytest.raises(ValueError, match="must be causal, with padding and packed"):
        mixer(x, attention_mask=torch.ones(2, 1, 4, 4).tril())  # zeros and ones
    with pytest.raises(ValueError, match="batch of one row, got 2 rows"):
        mixer(x, cu_seqlens=torch.tensor([0, 4]).int())
    with pytest.raises(ValueError, match=r"seq_idx must be of shape \(2, 4\), got \(1, 4\)"):
        mixer(x, seq_idx=torch.zeros(1, 4))
    for name, value in (("cu_seqlens", [0, 4]), ("cu_seq_lens_q", [0, 4]), ("seq_idx", [[0] * 4])):
        with pytest.raises(ValueError, match="exclude each other"):
            mixer(x[:1], attention_mask=torch.ones(1, 4), **{name: torch.tensor(value).int()})


@pytest.mark.parametrize("kind", MIXERS)
def test_what_a_mask_says_is_read_once_for_all_layers(kind, monkeypatch):
    torch.manual_seed(0)
    mixer, x = MIXERS[kind](), torch.randn(2, 6, 16)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    seen = (padding[:, None, None] * torch.ones(6, 6).tril()).bool()
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    for some, told in (
        (x, {"attention_mask": padding}),
        (x, {"attention_mask": seen}),
        (x[:1], packed),
    ):
        with monkeypatch.context() as patch:
            calls = Mock()
            for name in ("packing_of_padding", "packing_of_attention", "packing_of_positions"):
                read = Mock(wraps=getattr(packing, name))
                calls.attach_mock(read, name)
                patch.setattr(packing, name, read)
            expected = mixer(some, **told)
            assert torch.equal(mixer(some, **told), expected)
            assert len(calls.mock_calls) == 1
    padding[0] = 1  # a mask that changes is read again
    close(mixer(x, attention_mask=padding), mixer(x))
    with torch.inference_mode():
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
        for _ in range(2):
            mixer(x, attention_mask=mask)
            mask[0] = 1
        assert torch.equal(mixer(x, attention_mask=mask), mixer(x))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    with torch.inference_mode():
        mixer(x, attention_mask=mask)
    mixer(x, attention_mask=mask).sum().backward()
    compiled = torch.compile(mixer, backend="aot_eager")
    assert torch.equal(compiled(x, attention_mask=mask), mixer(x, attention_mask=mask))
    mask.fill_(1)
    close(compiled(x, attention_mask=mask), mixer(x))
    seen_alone = len(packing.KNOWN)
    del mask, padding, seen, packed, told
    assert len(packing.KNOWN) < seen_alone


@pytest.mark.parametrize(
    "told",
    [
        {"seq_idx": torch.tensor([[0, 0, 1]], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32)},
        {"position_ids": torch.tensor([[0, 1, 0]])},
        {"attention_mask": torch.tensor([[0, 1, 1]], dtype=torch.int32)},
    ],
    ids=lambda told: next(iter(told)),
)
def test_what_is_remembered_goes_with_what_told_it(told):
    known, told = len(packing.KNOWN), {name: tensor.clone() for name, tensor in told.items()}
    Attention(16, 2)(torch.randn(1, 3, 16), **told)
    assert len(packing.KNOWN) == known + 1
    del told
    assert len(packing.KNOWN) == known


def test_masks_of_another_librarys_memory_are_read_each_time():
    """Which may change without torch counting it."""
    memory = np.ones((2, 6), dtype=np.int64)
    mixer, x, mask = Attention(16, 2), torch.randn(2, 6, 16), torch.from_numpy(memory)
    mixer(x, attention_mask=mask)
    memory[0, :2] = 0
    close(mixer(x, attention_mask=mask), mixer(x, attention_mask=mask.clone()))


def test_masks_that_a_dataloaders_worker_shares_are_remembered():
    mask = torch.ones(2, 6, dtype=torch.int64).share_memory_()
    known = len(packing.KNOWN)
    Attention(16, 2)(torch.randn(2, 6, 16), attention_mask=mask)
    assert len(packing.KNOWN) == known + 1


@pytest.mark.parametrize("kind", MIXERS)
def test_torch_func_takes_masks_as_arguments(kind):
    mixer, x = MIXERS[kind](), torch.randn(2, 6, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

    def loss(parameters, x, mask):
        out = torch.func.functional_call(mixer, parameters, (x,), {"attention_mask": mask})
        return (out * mask[..., None]).sum()

    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    found = torch.func.grad(loss)(parameters, x, mask)
    (mixer(x, attention_mask=mask) * mask[..., None]).sum().backward()
    close(
        [found[name] for name, _ in mixer.named_parameters()], [p.grad for p in mixer.parameters()]
    )


@pytest.mark.parametrize("kind", MIXERS)
def test_packed_sequences_compile_whole(kind):
    mixer, x = MIXERS[kind](), torch.randn(1, 6, 16)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for told in (
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2]])},
        {"cu_seqlens": torch.tensor([0, 2, 5, 6], dtype=torch.int32)},
    ):
        close(compiled(x, **told), mixer(x, **told))


def windowed(seqlen: int, left: int) -> Tensor:
    return torch.ones(1, 1, seqlen, seqlen, dtype=torch.bool).tril().triu(-left)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_masks_window_is_attentions_own(kind):
    """Layers with windows hand them to their mixers: a scan has none, attention checks it."""
    torch.manual_seed(0)
    mixer, x = MIXERS[kind](), torch.randn(2, 6, 16)
    if kind == "attention":
        for left in (1, 2, 4):
            with pytest.raises(ValueError, match="no window narrower than the mixer's window_size"):
                mixer(x, attention_mask=windowed(6, left))
    followed = {"attention": (5,), "window": (5, 3, 2)}
    for left in followed.get(kind, (5, 3, 2, 1)):
        close(mixer(x, attention_mask=windowed(6, left)), mixer(x))
    if kind == "window":
        with pytest.raises(ValueError, match="no window narrower than the mixer's window_size"):
            mixer(x, attention_mask=windowed(6, 1))


@pytest.mark.parametrize("kind", MIXERS)
def test_padding_within_a_sequence(kind):
    mixer, x = MIXERS[kind](), torch.randn(1, 6, 16)
    with pytest.raises(ValueError, match="must pad the sides alone"):
        mixer(x, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))


def test_padding_that_sees_everything_is_padding_still():
    """As some versions of transformers let it, for torch's memory-efficient attention."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 16), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    seen = (mask[:, None, None] * torch.ones(6, 6).tril()).bool()
    seen[0, 0, :2] = True
    for make in MIXERS.values():
        mixer = make()
        found, expected = mixer(x, attention_mask=seen), mixer(x, attention_mask=mask)
        close(found[mask.bool()], expected[mask.bool()])


def test_flops_count_what_runs():
    """Against a count by hand: every product of a matrix with a token, every score, every state."""
    attention = Attention(16, heads=4, kv_heads=2, head_dim=8, window_size=3)
    projections = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16
    keys = sum(min(place + 1, 3) for place in range(10)) / 10
    assert attention.flops_per_token(10) == pytest.approx(
        2 * projections + 2 * 2 * 4 * 8 * keys, rel=1e-12
    )
    assert attention.flops_per_token(2) == pytest.approx(2 * projections + 4 * 4 * 8 * 1.5)
    mamba = GroupedMamba(16, d_inner=24, d_xb=8, state_size=4, dt_rank=3)
    weights = 16 * (2 * 24 + 2 * 8) + 16 * 3 + 3 * 24 + 24 * 4 + 24 * 16
    assert mamba.flops_per_token(10) == 2 * weights + 24 * 4 * 9 + 24 * 3
