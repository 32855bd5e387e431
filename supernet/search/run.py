"""A search from configuration to result: model, held-out batches, journal, files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint import read_checkpoint
from ..config import RunConfig, SearchConfig, StochasticMixerConfig
from ..conversion import save_checkpoint
from ..data import build_data
from ..errors import ConfigError
from ..evaluate import evaluate_placements
from ..train import latest_checkpoint
from . import search
from .beam import max_evaluations
from .journal import Fingerprints, Journal
from .result import write_result
from .scoring import Score
from .space import Placement, SearchSpace


def run_search(run: RunConfig, config: SearchConfig) -> dict[str, Any]:
    """Search the run's newest checkpoint, write the result (and a checkpoint), and return it.

    Raises ConfigError where the budgets do not fit the model, or the model is no supernet.
    """
    if not isinstance(run.model.mixer, StochasticMixerConfig) or not run.model.is_supernet:
        raise ConfigError("search takes a run whose model.mixer is of type stochastic")
    try:
        space = SearchSpace.from_budgets(
            run.model.num_layers, list(run.model.mixers), config.budgets
        )
    except ValueError as error:
        raise ConfigError(f"search.{error}") from error

    checkpoint = latest_checkpoint(run.output)
    model = read_checkpoint(checkpoint, run.training.dispatch).to(run.training.device)
    data = build_data(run.data, run.seed)
    batches = data.evaluation(config.batches, config.batch_size)
    fingerprints = Fingerprints(
        fingerprint_of(checkpoint),
        data.fingerprint(),
        config.model_dump(include={"batches", "batch_size", "candidates_per_forward"}),
    )
    total = space.size
    if config.method == "beam":
        total = max_evaluations(
            space, config.beam_width, config.initial_beam_width, config.early_stop
        )
    bar = tqdm(total=total, unit="placement", desc="search", dynamic_ncols=True)

    def score(placements: Sequence[Placement]) -> list[Score]:
        scores = evaluate_placements(model, batches, placements)
        bar.update(len(placements))
        return scores

    with bar, Journal(config.journal, score, fingerprints, config.candidates_per_forward) as memory:
        outcome = search(config, space, memory)
        bar.total = bar.n
    seqlen = batches[0][0].shape[1]
    result = write_result(
        config,
        outcome,
        fingerprints,
        cost=lambda placement: model.flops_per_token(seqlen, placement),
    )
    if config.output_checkpoint_path is not None:
        save_checkpoint(
            model,
            config.output_checkpoint_path,
            config.output_checkpoint_format,
            outcome.winner.placement,
        )
    return result


def fingerprint_of(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's configuration and tensors."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with open(checkpoint / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
