"""A search from configuration to result: model, held-out batches, journal, files."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ... import __version__
from ...kernels.backend import resolve_impl
from ..config import ModelConfig, RunConfig, SearchConfig
from ..conversion import load_checkpoint, refuse_foreign, save_checkpoint
from ..data import build_data
from ..devices import device_of
from ..errors import ConfigError
from ..evaluate import evaluate_placements
from ..model import SupernetModel
from ..run_folder import check_same_data, differences, latest_checkpoint
from . import search
from .beam import max_evaluations
from .journal import Fingerprints, Journal
from .result import Cost, refuse_another, write_result
from .scoring import Score
from .space import Placement, SearchSpace


def run_search(run: RunConfig, config: SearchConfig) -> dict[str, Any]:
    """Search the run's newest checkpoint, write the result (and a checkpoint), and return it.

    Raises ConfigError where the checkpoint is no supernet or not of the run's model, where the
    budgets do not fit it, where the files cannot be written, and where the result of another search
    is there.
    """
    checkpoint = latest_checkpoint(run.output)
    output = config.result_path(run.output)
    check_outputs(output, config)
    model = load_checkpoint(checkpoint, run.training.dispatch).to(device_of(run.training.device))
    check_model(run.model, model.config)
    space = SearchSpace.from_budgets(
        model.config.num_layers,
        list(model.mixer_names),
        config.budgets,
        config.filler,
        config.key("budgets"),
    )
    data = build_data(run.data, run.seed)
    check_same_data(run, data)
    batches = data.evaluation(config.batches, config.batch_size)
    cost = cost_model(config, model, seqlen=batches[0][0].shape[1])
    settings = config.model_dump(include={"batches", "batch_size", "candidates_per_forward"})
    settings |= run.training.model_dump(include={"dispatch", "device"})
    settings |= {"torch": torch.__version__, "tossup": __version__}
    settings["impl"] = resolve_impl("auto", torch.device(run.training.device))
    fingerprints = Fingerprints(fingerprint_of(checkpoint), data.fingerprint(), settings)
    refuse_another(output, config, space, fingerprints, cost)
    total = space.size
    if config.method == "beam":
        total = max_evaluations(
            space, config.beam_width, config.initial_beam_width, config.early_stop
        )
    bar = tqdm(
        total=total,
        unit="placement",
        desc="search",
        dynamic_ncols=True,
        delay=1,
        disable=None,  # where nobody watches
    )

    def score(placements: Sequence[Placement]) -> list[Score]:
        scores = evaluate_placements(model, batches, placements)
        bar.update(len(placements))
        return scores

    journal = config.journal(run.output)
    with bar, Journal(journal, score, fingerprints, config.candidates_per_forward) as memory:
        outcome = search(config, space, memory)
        bar.update(memory.reused)
        bar.total = bar.n
    result = write_result(output, config, outcome, fingerprints, cost=cost)
    if config.output_checkpoint_path is not None:
        save_checkpoint(
            model,
            config.output_checkpoint_path,
            config.output_checkpoint_format,
            outcome.winner.placement,
        )
    return result


def cost_model(config: SearchConfig, model: SupernetModel, seqlen: int) -> Cost:
    """What a placement costs. Raises ConfigError where the latency table is not of this model."""
    if config.latency_table is None:
        unit = f"forward FLOPs per token, {seqlen} tokens"
        return Cost(lambda placement: model.flops_per_token(seqlen, placement), unit)
    from ..latency import check_model, cost_of, read

    key = config.key("latency_table")
    table = read(config.latency_table, key)
    check_model(table, model.config, f"{key}: {config.latency_table}")
    digest = hashlib.sha256(table.text().encode()).hexdigest()
    return Cost(partial(cost_of, table), table.meaning, digest)


def check_outputs(output: Path, config: SearchConfig) -> None:
    """Find out before the search whether its files can be written, and not after it."""
    key = config.key("output_path")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot make the folder of {output}: {error.strerror}") from error
    if output.is_dir():
        raise ConfigError(f"{key} takes a file, got the folder {output}")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{key}: cannot write into {output.parent}")
    if config.output_checkpoint_path is not None:
        refuse_foreign(config.output_checkpoint_path)


def check_model(wanted: ModelConfig, found: ModelConfig) -> None:
    """Raises ConfigError unless a checkpoint's model is the run's, and a supernet."""
    if not found.is_supernet:
        raise ConfigError("search takes a run whose model.mixer is of type stochastic")
    was, now = (config.model_dump(mode="json") for config in (found, wanted.told_by(found)))
    for key, theirs, ours in differences(was, now, "model"):
        raise ConfigError(
            f"{key} is {ours}, and the checkpoint was trained with {theirs}: "
            "search with the configuration of the training"
        )


def fingerprint_of(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's configuration and tensors."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with open(checkpoint / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
