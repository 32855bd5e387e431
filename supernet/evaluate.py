"""Evaluation: how well placements predict frozen, held-out batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.routing import MixerTable
from .data import Batch
from .model import SupernetModel, language_model_losses
from .search.scoring import Score
from .search.space import Placement

Batches = Sequence[Batch]


@torch.no_grad()
def evaluate_placements(
    model: SupernetModel, batches: Batches, placements: Sequence[Placement]
) -> list[Score]:
    """Score placements on the same batches, all of them in one forward per batch.

    The batch is repeated once per placement, and a per-sample mixer table sends each copy its own
    way. Metrics: `loss`, the mean cross entropy (nats) per labelled token, and `accuracy`, the
    share of labelled tokens predicted right; their standard errors are over samples.
    """
    device, count = model.lm_head.weight.device, len(placements)
    indices = torch.tensor([[model.mixer_names.index(name) for name in p] for p in placements])
    indices = indices.to(device if model.dispatch == "device" else "cpu")  # where it is followed
    tallies = []
    with evaluating(model):
        for batch in batches:
            tokens, labels, *packed = (part.to(device).repeat(count, 1) for part in batch)
            samples = len(tokens) // count
            rows = indices.T.repeat_interleave(samples, 1)  # [layers, placements × batch]
            table = MixerTable.of(rows, len(model.mixer_names), rows.shape[1])
            logits = model(tokens, table=table, seq_idx=packed[0] if packed else None)
            tallies.append(tally(logits, labels).view(count, samples, 3))
    return [score_of(samples) for samples in torch.cat(tallies, 1).cpu()]


@torch.no_grad()
def evaluate_model(
    model: SupernetModel, batches: Batches, placement: Placement | None = None
) -> Score:
    """Score one placement, or the model as it stands: its only placement, or the main mixers."""
    device = model.lm_head.weight.device
    tallies = []
    with evaluating(model):
        for batch in batches:
            tokens, labels, *packed = (part.to(device) for part in batch)
            seq_idx = packed[0] if packed else None
            tallies.append(tally(model(tokens, placement=placement, seq_idx=seq_idx), labels))
    return score_of(torch.cat(tallies).cpu())


@contextmanager
def evaluating(model: SupernetModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def tally(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, right predictions and labelled tokens of each sample: (batch, 3) float64."""
    losses, counts = language_model_losses(logits, labels)
    right = (logits.argmax(-1) == labels).sum(1)  # -100 is no token, so it is never right
    return torch.stack((losses.double(), right.double(), counts.double()), 1)


def score_of(samples: Tensor) -> Score:
    """Means per token of (samples, 3) tallies, with the standard errors of these ratios."""
    total = samples[:, 2].sum()
    metrics, errors = {}, {}
    for column, name in enumerate(("loss", "accuracy")):
        mean = samples[:, column].sum() / total
        residuals = samples[:, column] - mean * samples[:, 2]  # of a ratio (Cochran 1977, ch. 6)
        metrics[name] = mean.item()
        errors[name] = (residuals.std() * len(samples) ** 0.5 / total).item()
    return Score(metrics, errors)
