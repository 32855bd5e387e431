"""The command line: `tossup COMMAND [CONFIG] [key=value …]`.

CONFIG is a YAML file; overrides name nested keys with dots and take YAML values.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from .config import EvaluationConfig, ModelConfig, RunConfig, SearchConfig, check_placement
from .errors import ConfigError
from .loader import load_config, read_values


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
    from .devices import device_of
    from .evaluate import evaluate_model
    from .run_folder import latest_checkpoint

    config = load_config(path, overrides, EvaluationConfig)
    options = config.training
    model = load_checkpoint(config.checkpoint or latest_checkpoint(config.output))
    check_evaluation(config, model.config)
    batches = build_data(config.data, config.seed).evaluation(
        options.evaluation_batches, options.batch_size
    )
    score = evaluate_model(model.to(device_of(options.device)), batches, config.placement)
    print(json.dumps({"metrics": score.metrics, "standard_errors": score.standard_errors}))


def check_evaluation(config: EvaluationConfig, model: ModelConfig) -> None:
    """Raises ConfigError unless a checkpoint's model can take the placement and the data."""
    if config.data.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data takes a checkpoint of {config.data.vocab_size} tokens or more, "
            f"got one of {model.vocab_size}"
        )
    if config.placement is None:
        return
    check_placement(config.placement, list(model.mixers), model.num_layers)
    own = model.placement or tuple(model.mixers) * model.num_layers
    if not model.is_supernet and config.placement != own:
        raise ConfigError(
            "placement takes a supernet's checkpoint; this one holds a model of one placement"
        )


COMMANDS: dict[str, Callable[[Path | None, Sequence[str]], None]] = {
    "train": train,
    "search": search,
    "convert": convert,
    "eval": evaluate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 2 where its configuration or a file is wrong."""
    parser = argparse.ArgumentParser(prog="tossup", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"tossup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument("words", nargs="*", metavar="CONFIG key=value", help="file and overrides")
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command](*split(options.words))
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"tossup {options.command}: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"tossup {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def split(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """CONFIG, if there is one, and the overrides; a file's name may hold an equals sign."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return Path(words[0]), words[1:]
    return None, words
