"""Scores against a plain loop, and their standard errors against repeated draws."""

import numpy as np
import pytest
import torch

from tests.supernet.tiny import model_config
from tossup import SupernetModel
from tossup.supernet.evaluate import evaluate_model, evaluate_placements, score_of
from tossup.supernet.search import all_placements


def batches():
    """Batches of different sizes, and samples with different numbers of labels, some with none."""
    torch.manual_seed(1)
    made = []
    for batch in (4, 3):
        labels = torch.randint(32, (batch, 9))
        labels[torch.rand(batch, 9) < 0.6] = -100
        labels[0] = -100
        made.append((torch.randint(32, (batch, 9)), labels))
    return made


@pytest.mark.parametrize("training", [True, False])
def test_placements_together_score_as_a_plain_loop_over_each(training):
    torch.manual_seed(0)
    model = SupernetModel(model_config()).train(training)
    placements = all_placements(3, model.mixer_names)
    scores = evaluate_placements(model, batches(), placements)
    for placement, score in zip(placements, scores, strict=True):
        logits = torch.cat([model(x, placement=placement).flatten(0, 1) for x, _ in batches()])
        labels = torch.cat([labels.flatten() for _, labels in batches()])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels)[labels != -100].double().mean()
        assert score.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert score.metrics["accuracy"] == pytest.approx(right.item())
        assert evaluate_model(model, batches(), placement).metrics == pytest.approx(score.metrics)
    assert model.training == training


def test_packed_sequences_score_as_each_by_itself():
    torch.manual_seed(0)
    model = SupernetModel(model_config()).eval()
    tokens, labels = torch.randint(32, (3, 9)), torch.randint(32, (3, 9))
    bounds, parts = (4, 1, 4), []
    seq_idx = torch.arange(3).repeat_interleave(torch.tensor(bounds)).expand(3, -1)
    for pieces in zip(tokens.split(bounds, 1), labels.split(bounds, 1), strict=True):
        parts.append(pieces)
    for placement in (("mamba",) * 3, ("attention", "mamba", "attention")):
        packed = evaluate_model(model, [(tokens, labels, seq_idx)], placement)
        alone = evaluate_model(model, parts, placement)
        assert packed.metrics == pytest.approx(alone.metrics, rel=1e-5)
        (together,) = evaluate_placements(model, [(tokens, labels, seq_idx)], [placement])
        assert together.metrics == pytest.approx(alone.metrics, rel=1e-5)


def test_a_supernet_in_training_is_evaluated_by_its_main_mixers():
    model = SupernetModel(model_config(main_mixer_name="mamba")).train()
    assert evaluate_model(model, batches()) == evaluate_model(model, batches(), ("mamba",) * 3)


def test_the_mode_comes_back_after_an_error():
    model = SupernetModel(model_config()).train()
    with pytest.raises(IndexError):
        evaluate_model(model, [(torch.full((1, 3), 99), torch.zeros(1, 3).long())])
    assert model.training


def test_standard_errors_are_the_spread_of_repeated_evaluations():
    random = np.random.default_rng(0)

    def draw():
        """Thirty samples: their level varies, and so does how many tokens they have."""
        counts = random.integers(1, 9, size=30)
        losses = counts * random.normal(2.0, 0.5, size=30)
        right = random.binomial(counts, 0.7)
        return torch.tensor(np.stack((losses, right, counts), 1), dtype=torch.float64)

    scores = [score_of(draw()) for _ in range(3000)]
    for name in ("loss", "accuracy"):
        spread = np.std([score.metrics[name] for score in scores])
        stated = np.mean([score.standard_errors[name] for score in scores])
        assert stated == pytest.approx(spread, rel=0.06)
