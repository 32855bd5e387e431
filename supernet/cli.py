"""The command line: `tossup COMMAND [CONFIG] [key=value …]`.

CONFIG is a YAML file; overrides name nested keys with dots and take YAML values.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import EvaluationConfig, RunConfig, SearchConfig, load_config, read_values
from .errors import ConfigError


def train(path: Path | None, overrides: Sequence[str]) -> None:
    """train the supernet that CONFIG describes, or go on training it"""
    from .train import train as run_training

    print(run_training(load_config(path, overrides, RunConfig)))


def search(path: Path | None, overrides: Sequence[str]) -> None:
    """search the best placement of a trained supernet under CONFIG's budgets"""
    from .search.run import run_search

    if "model" in read_values(path):
        run = load_config(path, overrides, RunConfig)
        config = run.search
    else:
        config = load_config(path, overrides, SearchConfig)
        if config.training_config is None:
            raise ConfigError("training_config: is required where CONFIG holds no model")
        run = load_config(config.training_config, (), RunConfig)
    if config is None:
        raise ConfigError("search: is required")
    final = run_search(run, config)["final_configuration"]
    print(f"{config.score_metric} {final['score']:.6g}: {' '.join(final['placement'])}")
    print(config.output_path)


def convert(path: Path | None, overrides: Sequence[str]) -> None:
    """write a checkpoint in another format, or one placement of a supernet"""
    from .conversion import ConvertConfig
    from .conversion import convert as run_conversion

    print(run_conversion(load_config(path, overrides, ConvertConfig)))


def evaluate(path: Path | None, overrides: Sequence[str]) -> None:
    """measure a checkpoint, or one placement of a run, on CONFIG's held-out data"""
    from .conversion import load_checkpoint
    from .data import build_data
    from .evaluate import evaluate_model
    from .train import latest_checkpoint

    config = load_config(path, overrides, EvaluationConfig)
    options = config.training
    model = load_checkpoint(config.checkpoint or latest_checkpoint(config.output))
    batches = build_data(config.data, config.seed).evaluation(
        options.evaluation_batches, options.batch_size
    )
    score = evaluate_model(model.to(options.device), batches, config.placement)
    print(json.dumps({"metrics": score.metrics, "standard_errors": score.standard_errors}))


COMMANDS: dict[str, Callable[[Path | None, Sequence[str]], None]] = {
    "train": train,
    "search": search,
    "convert": convert,
    "eval": evaluate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 2 where its configuration is wrong."""
    parser = argparse.ArgumentParser(prog="tossup", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument("words", nargs="*", metavar="CONFIG key=value", help="file and overrides")
    options = parser.parse_args(arguments)
    words = list(options.words)
    path = Path(words.pop(0)) if words and "=" not in words[0] else None
    try:
        COMMANDS[options.command](path, words)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"tossup {options.command}: {line}", file=sys.stderr)
        return 2
    return 0
