"""The decoder: dispatches agree, placements are models of their own, costs are exact."""

from itertools import permutations, product

import pytest
import torch

from tests.supernet.tiny import MIXERS, model_config, model_values
from tossup import Attention, MixerTable, Router, SupernetModel, draw
from tossup.supernet.checkpoint import model_tensors
from tossup.supernet.config import ModelConfig
from tossup.supernet.model import language_model_losses

TOKENS = torch.randint(32, (5, 9), generator=torch.Generator().manual_seed(0))


def supernet(dispatch="host", **mixer):
    torch.manual_seed(0)
    return SupernetModel(model_config(**mixer), dispatch)


def results(model, **kwargs):
    model.zero_grad()
    logits = model(TOKENS, **kwargs)
    torch.manual_seed(1)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("per_sample", [False, True])
def test_host_and_dense_dispatch_agree(per_sample):
    host, dense = supernet("host", per_sample=per_sample), supernet("dense", per_sample=per_sample)
    for step in range(4):
        table = host.draw(0, step, len(TOKENS))
        logits, grads = results(host, table=table)
        expected, expected_grads = results(dense, table=table)
        torch.testing.assert_close(logits, expected)
        for name, grad in expected_grads.items():
            ours = torch.zeros_like(grad) if grads[name] is None else grads[name]
            torch.testing.assert_close(ours, grad)
            gate = host.gate_of(name)
            if gate is not None:
                used = table.count[gate[0], host.mixer_names.index(gate[1])] > 0
                assert (grads[name] is not None) == used


def test_a_placement_is_the_ordinary_model_of_these_mixers():
    model = supernet().eval()
    tensors = model_tensors(model)
    for placement in product(("attention", "mamba"), repeat=3):
        values = {**model_values(), "placement": placement}
        alone = SupernetModel(ModelConfig.model_validate(values)).eval()
        for name, parameter in alone.named_parameters():
            layer = name.split(".")[1]
            inner = f".mixer.mixers.{placement[int(layer)]}." if layer.isdigit() else ""
            parameter.data.copy_(tensors[name.replace(".mixer.", inner)])
        expected = alone(TOKENS)
        torch.testing.assert_close(model(TOKENS, placement=placement), expected)
        rows = torch.tensor([[model.mixer_names.index(name)] for name in placement])
        torch.testing.assert_close(model(TOKENS, table=MixerTable.of(rows, 2, 5)), expected)
        with pytest.raises(ValueError, match="this model has the one placement"):
            alone(TOKENS, placement=[*placement[:2], "gdn"])


def test_evaluation_takes_the_main_mixer_in_every_layer():
    model = supernet(main_mixer_name="mamba").eval()
    assert torch.equal(model(TOKENS), model(TOKENS, placement=["mamba"] * 3))
    model.train()
    with pytest.raises(ValueError, match="training follows a mixer table"):
        model(TOKENS)
    with pytest.raises(ValueError, match="placement takes one mixer name for each of the 3 layers"):
        model(TOKENS, placement=["mamba"])


def test_a_model_is_made_of_its_configuration_alone():
    with pytest.raises(ValueError, match=r"^config takes a ModelConfig, got dict: tossup\.Mod"):
        SupernetModel({})


def test_packed_sequences_are_those_sequences_alone():
    model = supernet().eval()
    placement = ("mamba", "attention", "mamba")
    packed = model(
        TOKENS[:1], placement=placement, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)
    )
    alone = [model(part, placement=placement) for part in (TOKENS[:1, :4], TOKENS[:1, 4:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize(
    "mixer",
    [
        {},
        {"sampling_strategy": "weighted", "sampling_weights": {"attention": 3, "mamba": 1}},
        {"sampling_strategy": "full_layout"},
        {"sampling_strategy": "sandwich", "cheapest_mixer_name": "mamba"},
        {
            "predefined_layouts": [["mamba", "mamba", "attention"], ["attention"] * 3],
            "predefined_layout_probabilities": [0.5, 0.125],
        },
    ],
)
def test_expected_flops_are_the_mean_over_all_tables(mixer):
    """Enumerates every table with its probability, worked out here from the strategy's words."""
    model = supernet(**mixer)
    placements = list(product(("attention", "mamba"), repeat=3))
    kind = mixer.get("sampling_strategy", "uniform")
    weights = mixer.get("sampling_weights", {"attention": 1, "mamba": 1})
    total = sum(weights.values())
    layouts = mixer.get("predefined_layouts", [])
    shares = mixer.get("predefined_layout_probabilities", [])
    expected = 0.0
    for placement in placements:
        if kind == "full_layout":  # four allocations of 3 layers; each arrangement alike
            count = placement.count("mamba")
            probability = 1 / 4 / sum(p.count("mamba") == count for p in placements)
        elif kind == "sandwich":  # a third each: all main, all cheapest (mamba), any
            probability = (len(set(placement)) == 1) / 3 + 1 / 8 / 3
        else:
            probability = 1.0
            for name in placement:
                probability *= weights[name] / total
        probability *= 1 - sum(shares)
        for layout, share in zip(layouts, shares, strict=True):
            probability += share * (tuple(layout) == placement)
        expected += probability * model.flops_per_token(7, placement)
    assert model.flops_per_token(7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tie", [False, True])
def test_shared_flops_are_the_matrices_that_every_token_meets(tie):
    model = SupernetModel(ModelConfig.model_validate({**model_values(), "tie_embeddings": tie}))
    mixers = sum(block.mixer.mixers["attention"].flops_per_token(7) for block in model.layers)
    matrices = 3 * 3 * 16 * 24 + 32 * 16
    assert model.flops_per_token(7, ["attention"] * 3) == mixers + 2 * matrices


def test_the_order_of_layers_changes_no_flops():
    """Though it changes a sum of numbers that no float holds, as windows of 7 have them."""
    values = model_values(layers=6)
    values["mixer"]["mixers"] = {**MIXERS, "window": MIXERS["attention"] | {"window_size": 7}}
    model = SupernetModel(ModelConfig.model_validate(values))
    placements = permutations(("attention", "attention", "mamba", "window", "window", "mamba"))
    assert len({model.flops_per_token(999, placement) for placement in placements}) == 1


def test_one_name_is_the_mixer_of_every_layer():
    model = supernet().eval()
    everywhere = model(TOKENS, placement=("mamba",) * 3)
    assert torch.equal(model(TOKENS, placement="mamba"), everywhere)
    new = model.generate(TOKENS, max_new_tokens=2, placement="mamba")
    assert torch.equal(new, model.generate(TOKENS, max_new_tokens=2, placement=("mamba",) * 3))


def test_training_without_a_table_is_refused():
    with pytest.raises(ValueError, match=r"pass table=, as draw\(seed, step, batch\) gives"):
        supernet().train()(TOKENS)


def test_routers_of_the_layers_tell_their_mixers():
    model = supernet().train()
    router = Router(model.strategy(), layers=3, seed=0)
    for block in model.layers:
        block.mixer.router = router
    table = router.draw(batch=len(TOKENS))
    assert torch.equal(model(TOKENS), model(TOKENS, table=table))


def test_logits_of_the_last_tokens_alone():
    model = supernet().eval()
    whole = model(TOKENS)
    for kept in (1, 3, 9):
        torch.testing.assert_close(model(TOKENS, logits_to_keep=kept), whole[:, -kept:])


def test_sandwich_takes_all_main_then_all_cheapest():
    model = supernet(sampling_strategy="sandwich", cheapest_mixer_name="mamba")
    assert (model.draw(0, 0, 2).table == 0).all() and (model.draw(0, 1, 2).table == 1).all()


def test_losses_are_summed_over_labelled_tokens():
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([[1, -100, 3], [-100, -100, -100]])
    losses, counts = language_model_losses(logits, labels)
    logs = logits.log_softmax(-1)
    torch.testing.assert_close(losses[0], -logs[0, 0, 1] - logs[0, 2, 3])
    assert losses[1] == 0
    assert counts.tolist() == [2, 0]


def test_padded_rows_are_those_sequences_alone():
    model = supernet().eval()
    mask = torch.ones(5, 9)
    mask[1, :4] = mask[2, 6:] = 0
    for placement in (("mamba", "attention", "mamba"), ("attention", "mamba", "attention")):
        padded = model(TOKENS, placement=placement, attention_mask=mask)
        for row, keep in enumerate(mask.bool()):
            alone = model(TOKENS[row : row + 1, keep], placement=placement)[0]
            torch.testing.assert_close(padded[row, keep], alone)


def test_tables_come_from_the_shifted_seed():
    model = supernet(per_sample=True, seed_shift=1000)
    assert torch.equal(model.draw(7, 3, 6).table, draw(model.strategy(), 1007, 3, 3, 6).table)


def test_a_model_without_choices_draws_no_table():
    values = model_values() | {"mixer": {"type": "attention", "heads": 2}}
    model = SupernetModel(ModelConfig.model_validate(values))
    with pytest.raises(ValueError, match="only a model with stochastic mixers draws tables"):
        model.draw(0, 0, 2)


def test_preprocessing_is_done_once_for_all_layers(monkeypatch):
    calls = []
    original = Attention.preprocess

    def counted(self, *args):
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(Attention, "preprocess", counted)
    supernet().eval()(TOKENS, placement=["attention"] * 3)
    assert len(calls) == 1


def test_mixers_report_losses_and_metrics_through_the_model():
    class Judge(torch.nn.Module):
        def forward(self, hidden_states, losses, metrics):
            losses["level"] = torch.full((len(hidden_states),), 2.0)
            metrics["ran"] = torch.ones(len(hidden_states))
            return hidden_states

    model = supernet(per_sample=True)
    for block in model.layers:
        block.mixer.mixers["mamba"] = Judge()
    losses, metrics = {}, {}
    table = model.draw(0, 1, 5)
    model(TOKENS, table=table, losses=losses, metrics=metrics)
    assert losses["mamba/level"].value == 2
    assert metrics["mamba/ran"].count == table.count[:, 1].sum()


def test_initial_weights():
    """Matrices have the configured spread, outputs less by depth; Mamba's own tensors stay."""
    config = {**model_values(), "hidden_size": 64, "initializer_range": 0.05}
    torch.manual_seed(0)
    model = SupernetModel(ModelConfig.model_validate(config))
    mamba = model.layers[1].mixer.mixers["mamba"]
    attention = model.layers[1].mixer.mixers["attention"]
    for plain in (model.embed_tokens, model.layers[0].mlp.up_proj, attention.q_proj, mamba.in_proj):
        assert plain.weight.std().item() == pytest.approx(0.05, rel=0.1)
    for output in (model.layers[0].mlp.down_proj, attention.o_proj, mamba.out_proj):
        assert output.weight.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.1)
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 5).expand(16, 4))
    assert mamba.dt_proj.weight.abs().max() <= 2**-0.5
    assert mamba.dt_proj.weight.std().item() == pytest.approx(6**-0.5, rel=0.3)
    dt = torch.nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.001 <= dt.min() and dt.max() <= 0.1
