"""StochasticMixer around any modules: whom it follows, what each mixer sees, what it reports."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tossup import Mamba as TossupMamba
from tossup import MixerTable, Router, StochasticMixer, Strategy


class Scale(nn.Module):
    """Multiplies by its weight, and remembers what it was called with."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.seen = []

    def forward(self, hidden_states, attention_mask=None, flavour="plain"):
        self.seen.append((hidden_states.detach(), attention_mask, flavour))
        return hidden_states * self.weight


class Judge(Scale):
    """Adds a loss, and a metric, of each sample's mean."""

    def forward(self, hidden_states, losses, metrics):
        losses["level"] = hidden_states.mean((1, 2)) * self.weight
        metrics["samples"] = torch.ones(len(hidden_states))
        return hidden_states * self.weight


def three(**kwargs):
    return StochasticMixer({"a": Scale(2.0), "b": Scale(3.0), "c": Scale(5.0)}, **kwargs)


def table_of(*rows, batch):
    return MixerTable.of(torch.tensor(rows), mixers=3, batch=batch)


@pytest.mark.parametrize("dispatch", ["host", "dense"])
@pytest.mark.parametrize("row", [[0], [2], [0, 1, 2, 1, 0], [1, 1, 1, 1, 1], [2, 2, 0, 2, 2]])
def test_each_sample_takes_its_mixer(dispatch, row):
    layer = three(layer=1, dispatch=dispatch)
    x = torch.randn(5, 3, 4, requires_grad=True)
    table = table_of([0] * len(row), row, batch=5)
    out = layer(x, table=table)
    factors = torch.tensor([2.0, 3.0, 5.0])[torch.tensor(row)].expand(5)[:, None, None]
    torch.testing.assert_close(out, x * factors)
    dout = torch.randn_like(out)
    dx, *dweights = torch.autograd.grad(
        out, [x, *layer.parameters()], dout, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(dx, dout * factors)
    taken = torch.tensor(row).expand(5)
    for index, dweight in enumerate(dweights):
        torch.testing.assert_close(dweight, (dout * x)[taken == index].sum())


def test_host_dispatch_runs_only_what_was_chosen_on_its_own_samples():
    layer = three()
    x, mask = torch.randn(4, 3, 2), torch.arange(12).view(4, 3)
    layer(x, mask, table=table_of([2, 0, 2, 0], batch=4), flavour="salty", unknown=1)
    a, b, c = layer.mixers.values()
    assert not b.seen
    for mixer, rows in ((a, [1, 3]), (c, [0, 2])):
        ((hidden, seen_mask, flavour),) = mixer.seen
        assert torch.equal(hidden, x[rows]) and torch.equal(seen_mask, mask[rows])
        assert flavour == "salty"


def test_training_follows_the_router_evaluation_the_main_mixer_placement_overrides_both():
    router = Router(Strategy(mixers=3, kind="weighted", weights=(0, 0, 1)), layers=2, seed=3)
    layers = [three(layer=i, router=router, main_mixer_name="b") for i in range(2)]
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"call the router's draw\(batch\) before each step"):
        layers[0](x)
    router.draw(2)
    for layer in layers:
        torch.testing.assert_close(layer(x), 5 * x)
        torch.testing.assert_close(layer(x, placement="a"), 2 * x)
        assert layer.counts.tolist() == [0, 0, 2]
        layer.eval()
        torch.testing.assert_close(layer(x), 3 * x)
        torch.testing.assert_close(layer(x, placement="a"), 2 * x)
        assert layer.counts.tolist() == [0, 0, 2]


def test_router_repeats_its_tables_from_any_step():
    strategy = Strategy(mixers=3, per_sample=True)
    first, resumed = Router(strategy, 4, seed=7), Router(strategy, 4, seed=7, step=2)
    tables = [first.draw(5).table for _ in range(4)]
    assert torch.equal(resumed.draw(5).table, tables[2])
    assert torch.equal(resumed.draw(5).table, tables[3])
    assert not torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("dispatch", ["host", "dense"])
def test_losses_are_means_over_the_samples_that_took_the_mixer(dispatch):
    layers = [
        StochasticMixer(
            {"plain": Scale(2.0), "judge": Judge(3.0), "other": Judge(4.0)},
            layer=i,
            dispatch=dispatch,
        )
        for i in range(2)
    ]
    x = torch.randn(4, 3, 2)
    table = MixerTable.of(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]), 3, 4)
    losses, metrics = {}, {}
    for layer in layers:
        layer(x, table=table, losses=losses, metrics=metrics)
    means = x.mean((1, 2))
    expected = 3 * (means[[0, 2, 3]].sum() + means[1]) / 4
    torch.testing.assert_close(losses["judge/level"].value, expected)
    torch.testing.assert_close(metrics["judge/samples"].value, torch.tensor(1.0))
    assert metrics["judge/samples"].count == 4
    if dispatch == "dense":  # it ran, and nobody took it
        assert losses["other/level"].value == 0
        assert not losses["other/level"].total.isnan()
    else:
        assert "other/level" not in losses


def test_preprocessing_reaches_its_own_mixer_only():
    layer = three()
    x = torch.randn(2, 3, 4)
    layer(x, placement="a", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    layer(x, placement="b", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    layer(x, placement="c", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    assert [mixer.seen[0][2] for mixer in layer.mixers.values()] == ["sweet", "sour", "plain"]


def test_outputs_come_as_the_caller_expects_them():
    x, cache = torch.randn(2, 3, 4), object()
    assert isinstance(three(num_outputs=1)(x, placement="a"), torch.Tensor)
    assert three(num_outputs=2)(x, placement="a", past_key_values=cache)[1:] == (None,)
    assert three(num_outputs=3)(x, placement="a", past_key_values=cache)[1:] == (None, cache)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: StochasticMixer({}), "mixers takes at least one mixer, got none"),
        (lambda: three(main_mixer_name="d"), r"main_mixer_name takes .*\['a', 'b', 'c'\], got 'd'"),
        (lambda: three(dispatch="guess"), "dispatch takes host or dense, got 'guess'"),
        (
            lambda: three(router=Router(Strategy(mixers=2), 1)),
            "router draws among 2 mixers, got 3 of them",
        ),
        (lambda: StochasticMixer({"a.b": Scale(1.0)}), "got 'a.b'"),
        (lambda: three()(torch.zeros(1, 1, 1), placement="d"), "placement takes .* got 'd'"),
        (
            lambda: three()(torch.zeros(3, 1, 1), table=table_of([0, 1], batch=2)),
            "table is for 2 samples, got a batch of 3",
        ),
        (
            lambda: three()(
                torch.zeros(2, 1, 1), past_key_values=1, table=table_of([0, 1], batch=2)
            ),
            "a cache cannot be shared among mixers",
        ),
    ],
)
def test_misuse_gets_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("per_sample", [False, True])
def test_drop_in_for_the_attention_of_transformers(per_sample):
    """Llama with {its own attention, Mamba}: main mixer in evaluation is Llama, bit for bit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(50, (4, 9))
    expected = model(tokens).logits

    router = Router(Strategy(mixers=2, per_sample=per_sample), layers=3, seed=1)
    for i, block in enumerate(model.model.layers):
        block.self_attn = StochasticMixer(
            {"attention": block.self_attn, "mamba": TossupMamba(32)},
            layer=i,
            router=router,
            num_outputs=2,
        )
    assert torch.equal(model.eval()(tokens).logits, expected)

    model.train()
    for _ in range(3):
        table = router.draw(batch=4).table.expand(-1, 4)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for i, block in enumerate(model.model.layers):
            for index, mixer in enumerate(block.self_attn.mixers.values()):
                used = any(p.grad is not None and p.grad.any() for p in mixer.parameters())
                assert used == bool((table[i] == index).any())
