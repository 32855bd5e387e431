"""Decoding with a cache against the full forward, generation against transformers, sampling."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracles import Mamba as UpstreamMamba
from tossup import Attention, Mamba, SupernetModel, save_checkpoint
from tossup.supernet.config import ModelConfig
from tossup.supernet.generation import Sampler, generate
from tossup.supernet.mixers import Cache

ATTENTION = {"type": "attention", "heads": 4}
MAMBA = {"type": "mamba", "d_inner": 24, "d_xb": 8, "state_size": 4, "dt_rank": 3}
MIXERS = {
    "attention": ATTENTION | {"kv_heads": 2, "head_dim": 6},
    "nope": ATTENTION | {"rope_theta": None},
    "window": ATTENTION | {"window_size": 3},
    "mamba": MAMBA,
    "late": MAMBA | {"repeat_kv_before_conv": False, "d_conv": 3},
    "mamba1": {"type": "mamba1", "d_state": 4},
}
PLACEMENTS = {name: (name,) * 2 for name in MIXERS} | {"hybrid": ("mamba", "window")}


def supernet(dtype=torch.float64) -> SupernetModel:
    """Its weights are large, so that a token's past matters."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "vocab_size": 29,
            "hidden_size": 16,
            "num_layers": 2,
            "intermediate_size": 24,
            "initializer_range": 0.4,
            "mixer": {"type": "stochastic", "mixers": MIXERS},
        }
    )
    return SupernetModel(config).to(dtype)


def prompts(*lengths):
    """Prompts, and the same as one batch: (ids, mask), noise in the padding on the left."""
    torch.manual_seed(1)
    alone = [torch.randint(29, (1, length)) for length in lengths]
    longest = max(lengths)
    ids, mask = torch.randint(29, (len(lengths), longest)), torch.zeros(len(lengths), longest)
    for row, prompt in enumerate(alone):
        ids[row, longest - prompt.shape[1] :] = prompt
        mask[row, longest - prompt.shape[1] :] = 1
    return alone, ids, mask.long()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def in_chunks(model, tokens, chunks, mask=None, **kwargs):
    cache = Cache(model.config.num_layers, tokens.shape[1], mask)
    parts = [model(part, cache=cache, **kwargs) for part in tokens.split(chunks, 1)]
    assert cache.length == tokens.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 1, 3], [2, 7]], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_cached_decoding_is_the_full_forward(placement, chunks):
    model, places = supernet(), PLACEMENTS[placement]
    tokens = torch.randint(29, (3, 9))
    close(
        in_chunks(model, tokens, chunks, placement=places),
        model(tokens, placement=places).detach(),
    )


@pytest.mark.parametrize("chunks", [[8, 1, 1], [1] * 10, [3, 5, 2], [4, 6]], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_row_padded_on_the_left_is_that_row_alone(placement, chunks):
    """Whatever part of the padding a chunk ends in, and whatever stands there."""
    model, places = supernet(), PLACEMENTS[placement]
    alone, ids, mask = prompts(10, 7, 6, 2)
    out = in_chunks(model, ids, chunks, mask, placement=places)
    for row, prompt in zip(out, alone, strict=True):
        close(row[-prompt.shape[1] :], model(prompt, placement=places)[0].detach())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward(placement):
    model, places = supernet(), PLACEMENTS[placement]
    alone, ids, mask = prompts(6, 1, 4)
    out = model.generate(ids, mask, max_new_tokens=7, placement=places)
    assert torch.equal(out[:, :6], ids)
    for row, prompt in zip(out, alone, strict=True):
        for _ in range(7):
            chosen = model(prompt, placement=places)[:, -1].argmax(-1)
            prompt = torch.cat((prompt, chosen[:, None]), 1)
        assert torch.equal(row[-prompt.shape[1] :], prompt[0])
    assert len({tuple(row) for row in out[:, 6:].tolist()}) == 3  # the rows differ, and so do
    assert len(out[:, 6:].unique()) >= 5  # the tokens


def test_generation_takes_the_main_mixers_whatever_the_mode():
    model, ids = supernet(), prompts(5)[1]
    expected = model.generate(ids, max_new_tokens=5, placement=("attention",) * 2)
    for mode in (True, False):
        out = model.train(mode).generate(ids, max_new_tokens=5)
        assert torch.equal(out, expected) and model.training is mode
    other = model.generate(ids, max_new_tokens=5, placement=("mamba",) * 2)
    assert not torch.equal(other, expected)


def test_a_model_of_one_placement_generates():
    values = supernet().config.model_dump() | {"placement": ("mamba", "window")}
    model = SupernetModel(ModelConfig.model_validate(values)).double()
    tokens = torch.randint(29, (2, 6))
    close(in_chunks(model, tokens, [3, 1, 1, 1]), model(tokens).detach())
    out = model.generate(tokens, max_new_tokens=3)
    assert torch.equal(out[:, -1], model(out[:, :-1])[:, -1].argmax(-1))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [3, 11, 17, 20], "pad_token_id": 1},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_k": 9, "top_p": 0.8},
        {"do_sample": True, "eos_token_id": 5, "top_k": 0},
    ],
    ids=str,
)
def test_generation_is_that_of_transformers(window, options, tmp_path):
    """Token for token, through an exported checkpoint, sampled ones with the same seed."""
    torch.manual_seed(0)
    values = supernet().config.model_dump() | {
        "mixer": MIXERS["attention"] | {"window_size": window}
    }
    model = SupernetModel(ModelConfig.model_validate(values))
    save_checkpoint(model, tmp_path / "out", "mistral")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, ids, mask = prompts(7, 3, 5, 1)
    torch.manual_seed(5)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=12, **options), expected)


@pytest.mark.parametrize("interface", ["cache", "inference_params", "step"])
def test_mamba_steps_as_mamba_ssms_does(interface, monkeypatch):
    """As its equations in torch: the kernel that it would take needs a GPU."""
    monkeypatch.setattr(sys.modules[UpstreamMamba.__module__], "selective_state_update", None)
    torch.manual_seed(0)
    theirs = UpstreamMamba(24, d_state=5, use_fast_path=False, layer_idx=1).double()
    ours = Mamba(24, d_state=5, layer_idx=1).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    fresh = {"max_seqlen": 9, "seqlen_offset": 0}  # the fields of mamba-ssm's InferenceParams
    params = [SimpleNamespace(**fresh, key_value_memory_dict={}) for _ in range(2)]
    cache, states = Cache(1, 9), ours.allocate_inference_cache(2, 9)
    assert [s.shape for s in states] == [s.shape for s in theirs.allocate_inference_cache(2, 9)]
    with torch.no_grad():
        for tokens in x.split([1] * 9 if interface == "step" else [5, 1, 1, 1, 1], 1):
            expected = theirs(tokens, inference_params=params[0])
            if interface == "cache":
                cache.extend(tokens.shape[1], x.device)
                out = ours(tokens, past_key_values=cache.layers[0], use_cache=True)
            elif interface == "step":
                out, *states = ours.step(tokens, *states)
            else:
                out = ours(tokens, inference_params=params[1])
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)
            for p in params:
                p.seqlen_offset += tokens.shape[1]
        for p in params:
            p.seqlen_offset = 0  # another prompt, of one token
        expected = theirs(x[:, :1], inference_params=params[0])
        out = ours(x[:, :1], inference_params=params[1])
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)
        with pytest.raises(ValueError, match="step takes one token at a time, got 9"):
            ours.step(x, *states)
        with pytest.raises(ValueError, match="goes with a mixer made with layer_idx="):
            Mamba(24)(x.float(), inference_params=params[1])


def test_attention_gives_zeros_in_padding():
    """So that what a layer behind it reads there is finite, whatever the memory held."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = Cache(1, 6, mask)
    cache.layers[0].states = {name: torch.full((2, 6, 2, 4), math.nan) for name in "kv"}
    with torch.no_grad():
        cache.extend(4, mask.device)
        out = Attention(8, heads=2)(torch.randn(2, 4, 8), past_key_values=cache.layers[0])
    assert not out[mask == 0].any() and out[mask == 1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["attention", "mamba", "mamba1"])
def test_other_dtypes_decode_as_they_run_forward(placement, dtype):
    model, places = supernet(dtype), PLACEMENTS[placement]
    tokens = torch.randint(29, (2, 8))
    exact = supernet()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    expected, full = exact(tokens, placement=places), model(tokens, placement=places)
    error = (in_chunks(model, tokens, [4, 1, 1, 2], placement=places) - expected).abs().max()
    assert error <= 2 * (full - expected).abs().max() + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_step_waits_for_the_device(placement):
    """On a device from which nothing can be read."""
    model, places = supernet().to("meta"), PLACEMENTS[placement]
    _, ids, mask = prompts(6, 2)
    cache = Cache(2, 8, mask)
    cache.padding = cache.padding.to("meta")
    sampler = Sampler(temperature=0.7, top_k=5, top_p=0.9, generator=None)
    tokens = ids.to("meta")
    with torch.no_grad():
        for _ in range(3):
            logits = model(tokens, cache=cache, placement=places)[:, -1]
            tokens = sampler(logits)[:, None]
    assert tokens.shape == (2, 1) and tokens.is_meta


def scripted(*rows):
    """A `step` whose logits spell out these rows, and which counts its calls."""
    script = torch.tensor(rows)

    def step(tokens):
        step.calls += 1
        return torch.nn.functional.one_hot(script[:, step.calls - 1], 30).double()

    step.calls = 0
    return step


@pytest.mark.parametrize("look_every, calls", [(1, 3), (2, 4), (16, 6)])
def test_rows_end_at_their_stop_and_are_padded(look_every, calls):
    """Also where the host looks too late to stop there."""
    step = scripted([4, 7, 4, 9, 9, 9], [4, 4, 8, 9, 9, 9], [7, 5, 8, 9, 9, 9])
    prompt = torch.tensor([[7], [8], [0]])
    out = generate(step, lambda logits: logits.argmax(-1), prompt, 6, (7, 8), 2, look_every)
    assert out.tolist() == [[7, 4, 7, 2], [8, 4, 4, 8], [0, 7, 2, 2]]
    assert step.calls == calls


def test_without_a_stop_nothing_ends():
    step = scripted([4, 7, 4, 0], [0, 0, 1, 2])
    out = generate(step, lambda logits: logits.argmax(-1), torch.tensor([[7], [8]]), 4, (), 0, 1)
    assert out.tolist() == [[7, 4, 7, 4, 0], [8, 0, 0, 1, 2]]


def test_padding_defaults_to_the_first_eos():
    model, ids = supernet(), prompts(4, 4, 4)[1]
    free = model.generate(ids, max_new_tokens=8)
    eos = free[0, 5].item()  # the first row's second token
    out = model.generate(ids, max_new_tokens=8, eos_token_id=[eos, 28])
    assert (out[0, 5:] == eos).all()
    assert (free[:, 4:] != eos).all(1).any() and out.shape == free.shape


LOGITS = torch.tensor([[0.1, 0.4, 0.25, 0.2, 0.05], [0.02, 0.03, 0.9, 0.01, 0.04]]).log()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[0.1, 0.4, 0.25, 0.2, 0.05], [0.02, 0.03, 0.9, 0.01, 0.04]]),
        ({"top_k": 3}, [[0, 0.4, 0.25, 0.2, 0], [0, 0.03, 0.9, 0, 0.04]]),
        ({"top_k": 0}, [[0.1, 0.4, 0.25, 0.2, 0.05], [0.02, 0.03, 0.9, 0.01, 0.04]]),
        ({"top_k": 50}, [[0.1, 0.4, 0.25, 0.2, 0.05], [0.02, 0.03, 0.9, 0.01, 0.04]]),
        ({"top_p": 0.6}, [[0, 0.4, 0.25, 0, 0], [0, 0, 0.9, 0, 0]]),
        ({"top_p": 0.92}, [[0.1, 0.4, 0.25, 0.2, 0], [0, 0, 0.9, 0, 0.04]]),
        ({"top_p": 1e-9}, [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]),
        # 0.4 and 0.25 are 0.65 of all, and 0.76 of what top_k leaves
        ({"top_p": 0.75, "top_k": 3}, [[0, 0.4, 0.25, 0, 0], [0, 0, 0.9, 0, 0]]),
        ({"temperature": 0.5}, [[0.01, 0.16, 0.0625, 0.04, 0.0025], [4, 9, 8100, 1, 16]]),
        # the squares of 0.4 and 0.25 are 0.81 of all
        ({"temperature": 0.5, "top_p": 0.8}, [[0, 0.16, 0.0625, 0, 0], [0, 0, 1, 0, 0]]),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_the_probabilities_that_are_left(options, expected):
    """The probabilities worked out by hand, and 20000 draws of each row: chi-square over tokens."""
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "generator": generator} | options
    sampler = Sampler(**settings)
    expected = torch.tensor(expected) / torch.tensor(expected).sum(-1, keepdim=True)
    torch.testing.assert_close(sampler.probabilities(LOGITS), expected)
    draws = 20000
    tokens = sampler(LOGITS.repeat(draws, 1)).view(draws, 2)
    for column, shares in zip(tokens.T, expected, strict=True):
        seen = torch.bincount(column, minlength=5)
        assert not seen[shares == 0].any()
        wanted = draws * shares[shares > 0]
        chi_square = ((seen[shares > 0] - wanted) ** 2 / wanted).sum()
        assert chi_square < 23.5  # four degrees of freedom: once in ten thousand


def test_sampling_repeats_with_its_generator():
    model, ids = supernet(), prompts(5, 5)[1]

    def sample(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "generator": generator} | options
        return model.generate(ids, max_new_tokens=9, **options)

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own is left alone
    greedy = sample(1, do_sample=False, temperature=0.0)
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(2, top_p=1e-6), greedy)
    assert not torch.equal(sample(1, temperature=9.0, top_k=None), greedy)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"input_ids": torch.zeros(3).long()}, r"input_ids must be integers .* got \(3,\)"),
        ({"input_ids": torch.zeros(2, 0).long()}, "with at least one token"),
        ({"input_ids": torch.zeros(2, 3)}, "got .* of torch.float32"),
        ({"attention_mask": torch.ones(2, 4)}, r"like input_ids, \(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "padded on the left"),
        ({"max_new_tokens": 0}, "max_new_tokens takes at least 1, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature takes a positive number, got 0.0"),
        ({"do_sample": True, "temperature": math.nan}, "temperature takes .* got nan"),
        ({"do_sample": True, "top_k": -1}, "top_k takes .* got -1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p takes a probability above 0, got 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p takes a probability above 0, got 1.5"),
        ({"placement": ["mamba"]}, "placement takes one mixer name for each of the 2 layers"),
    ],
    ids=str,
)
def test_misuse_gets_one_sentence(options, sentence):
    call = {"input_ids": torch.zeros(2, 3).long(), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=sentence) as error:
        supernet().generate(**call)
    assert "\n" not in str(error.value)


def test_a_cache_says_what_it_cannot_do():
    model, tokens = supernet().eval(), torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=r"without gradients: .* under torch.no_grad\(\)"):
        model(tokens, cache=Cache(2, 8))
    with torch.no_grad():
        cache = Cache(2, 4)
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="room for 4 tokens, got 6"):
            model(tokens, cache=cache)
        cache = Cache(2, 8)
        model(tokens, cache=cache, placement=("mamba", "window"))
        with pytest.raises(ValueError, match="belongs to one mixer, got another mixer's"):
            model(tokens, cache=cache, placement=("mamba", "mamba"))
        with pytest.raises(ValueError, match="belongs to one mixer, got another mixer's"):
            dense = SupernetModel(model.config, "dense").double()
            dense(tokens, cache=Cache(2, 8), table=dense.draw(0, 0, 2))
        for given in ({"attention_mask": tokens}, {"cu_seqlens": tokens[0].int()}):
            with pytest.raises(ValueError, match="a cache knows its padding"):
                model(tokens, cache=Cache(2, 8), **given)
        with pytest.raises(ValueError, match=r"takes extend\(seqlen, device\) before a mixer"):
            Attention(8, heads=2)(torch.zeros(1, 1, 8), past_key_values=Cache(1, 2).layers[0])
