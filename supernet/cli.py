"""The command line: `tossup COMMAND [CONFIG] [key=value …]`.

CONFIG is a YAML file, or the folder of a run, which holds one; overrides name nested keys with dots
and take YAML values.
"""

import argparse
import importlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..autotune.errors import WrongResult
from .config import (
    EvaluationConfig,
    LatencyConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    check_placement,
)
from .errors import ConfigError
from .loader import describe, load_config, read_values


def train(path: Path | None, overrides: Sequence[str]) -> None:
    """train the supernet that CONFIG describes, or go on training it"""
    from .ranks import rank
    from .train import train as run_training

    folder = run_training(load_config(path, overrides, RunConfig))
    if rank() == 0:
        print(folder)


def search(path: Path | None, overrides: Sequence[str]) -> None:
    """search for the best placement of a trained supernet under CONFIG's budgets"""
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
    print(config.result_path(run.output))


def convert(path: Path | None, overrides: Sequence[str]) -> None:
    """write a checkpoint in another format, or one placement of a supernet"""
    from .conversion import ConvertConfig
    from .conversion import convert as run_conversion

    print(run_conversion(load_config(path, overrides, ConvertConfig)))


def evaluate(path: Path | None, overrides: Sequence[str]) -> None:
    """measure a checkpoint, or one placement of a run, on CONFIG's held-out data"""
    from .conversion import load_checkpoint, placement_of
    from .data import build_data
    from .devices import device_of
    from .evaluate import evaluate_model
    from .run_folder import check_same_data, latest_checkpoint

    config = load_config(path, overrides, EvaluationConfig)
    options = config.training
    wanted = config.checkpoint
    model = load_checkpoint(wanted or latest_checkpoint(config.output))
    placement = placement_of(config.placement, model.config)
    check_evaluation(config, placement, model.config)
    data = build_data(config.data, config.seed)
    if wanted is None:
        check_same_data(config, data)
    batches = data.evaluation(options.evaluation_batches, options.batch_size)
    score = evaluate_model(model.to(device_of(options.device)), batches, placement)
    print(json.dumps({"metrics": score.metrics, "standard_errors": score.standard_errors}))


def check_evaluation(
    config: EvaluationConfig, placement: tuple[str, ...] | None, model: ModelConfig
) -> None:
    """Raises ConfigError unless a checkpoint's model can take the placement and the data."""
    if config.data.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data takes a checkpoint of {config.data.vocab_size} tokens or more, "
            f"got one of {model.vocab_size}"
        )
    if placement is None:
        return
    check_placement(placement, list(model.mixers), model.num_layers)
    own = model.placement or tuple(model.mixers) * model.num_layers
    if not model.is_supernet and placement != own:
        raise ConfigError(
            "placement takes a supernet's checkpoint; this one holds a model of one placement"
        )


def latency(path: Path | None, overrides: Sequence[str]) -> None:
    """time each mixer of CONFIG's model, or draw a GPU's roofline, for a search by latency"""
    from .latency import write_latencies

    written, table = write_latencies(load_config(path, overrides, LatencyConfig))
    print(table.meaning)
    for name, mixer in table.mixers.items():
        error = "" if mixer.error is None else f" ± {mixer.error:.0%}"
        print(f"  {name}: {mixer.milliseconds:.4g}{error}  ({mixer.about})")
    print(written)


def inspect(
    archs: Sequence[str], ops: Sequence[str], as_json: bool, gpu: str | None = None
) -> None:
    """compile every kernel for GPUs that need not be there, and print what each takes"""
    import triton

    from ..autotune.inspection import ARCHS, OPS, table
    from ..autotune.inspection import inspect as inspect_kernels
    from ..autotune.workloads import ALIASES
    from ..kernels.configs import path_of

    folders = {op: folder for folder, op in ALIASES.items()}
    ops = [folders.get(op, op) for op in ops]
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET must be unset: the interpreter compiles nothing")
    names = [f"sm_{arch}" for arch in ARCHS]
    for option, values, known in (("--arch", archs, names), ("--op", ops, OPS)):
        for value in values:
            if value not in known:
                raise ConfigError(f"{option} takes {', '.join(known)}, got {value!r}")
    if gpu is not None and not path_of(gpu).exists():
        raise ConfigError(f"--gpu takes the name of a file of configurations; no {path_of(gpu)}")
    reports = inspect_kernels([ARCHS[names.index(arch)] for arch in archs], ops, gpu=gpu)
    found = {"triton": triton.__version__, "launches": reports}
    print(json.dumps(found, indent=1) if as_json else table(reports))


def bench(words: Sequence[str], device: str, as_json: bool, modules: Sequence[str] = ()) -> None:
    """race an op against its peers, on a shape of yours"""
    from .benchmark import benchmark

    print(benchmark(words, device, as_json, modules))


def tune(words: Sequence[str], archs: Sequence[str], again: bool, output: Path | None) -> None:
    """measure which launch configurations of an op are the fastest on this GPU, and keep them"""
    from .tuning import run_tuning

    run_tuning(words, archs, again, output)


Command = Callable[[Path | None, Sequence[str]], None]

# These write what they have found as they go
RESUMED = ("train", "search", "tune")

# Each command, and where the configuration lives whose keys it takes.
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "train": (train, "config", "RunConfig"),
    "search": (search, "config", "RunConfig"),
    "convert": (convert, "conversion", "ConvertConfig"),
    "eval": (evaluate, "config", "EvaluationConfig"),
    "latency": (latency, "config", "LatencyConfig"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 where it succeeded, 1 where what was to be timed is wrong, 2 where its configuration
    or a file is, 130 on Ctrl-C, 141 where nobody reads what it prints any more.
    """
    parser = argparse.ArgumentParser(prog="tossup", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"tossup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, configured in COMMANDS.items():
        add_configured(commands, name, *configured)
    add_bench(commands)
    add_inspect(commands)
    add_tune(commands)
    options = parse(parser, arguments)
    try:
        options.run(options)
        print(end="", flush=True)
    except BrokenPipeError:
        if is_read():
            raise  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
        return 141
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if options.command in RESUMED else ""
        print(f"tossup {options.command}: stopped{goes_on}", file=sys.stderr)
        return 130
    except WrongResult as error:
        print(f"tossup {options.command}: not timed: {error}", file=sys.stderr)
        return 1
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


def is_read() -> bool:
    """Whether anybody still reads what is printed, as `head` does not in the end."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def add_command(commands: Any, name: str, about: str | None) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=about, description=about, add_help=False)


def runs(
    sub: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    shows: str,
    lines: Callable[[], Iterable[str]],
) -> None:
    """What a command's words and options do; its help ends in lines that take imports to know."""
    sub.add_argument("-h", "--help", action="store_true", help=f"show this, and {shows}")

    def run(options: argparse.Namespace) -> None:
        if not options.help:
            command(options)
            return
        sub.print_help()
        print(f"\n{shows}:", *lines(), sep="\n  ")

    sub.set_defaults(run=run)


def add_configured(commands: Any, name: str, command: Command, module: str, config: str) -> None:
    """A command that takes CONFIG and overrides."""
    sub = add_command(commands, name, command.__doc__)
    sub.add_argument("words", nargs="*", metavar="CONFIG key=value", help="file and overrides")

    def keys() -> Iterable[str]:
        return describe(getattr(importlib.import_module(f".{module}", __package__), config))

    parts = split if config == "ConvertConfig" else split_run
    runs(sub, lambda o: command(*parts(o.words)), "keys", keys)


def add_bench(commands: Any) -> None:
    sub = add_command(commands, "bench", bench.__doc__)
    sub.add_argument("words", nargs="*", metavar="OP key=value", help="an op, and its keys")
    sub.add_argument("--device", default="cpu", help="cpu, the default, or cuda")
    sub.add_argument("--json", action="store_true", help="print JSON, with every round's seconds")
    sub.add_argument(
        "--workloads", action="append", default=[], metavar="MODULE",
        help="import what adds ops of yours; may be given again (bench/README.md shows one)",
    )  # fmt: skip

    def ops() -> Iterable[str]:
        from .benchmark import describe_ops

        return describe_ops(directed=True)

    def run(options: argparse.Namespace) -> None:
        bench(options.words, options.device, options.json, options.workloads)

    runs(sub, run, "ops and their keys", ops)


def add_inspect(commands: Any) -> None:
    sub = add_command(commands, "inspect", inspect.__doc__)
    sub.add_argument("--arch", nargs="+", default=["sm_90"], help="GPUs; sm_90 by default")
    sub.add_argument("--op", nargs="+", default=[], help="folders of kernels/; all by default")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--gpu", help="whose tuned configurations, by a file's name in kernels/configs/"
    )

    def known() -> Iterable[str]:
        from ..autotune.inspection import ARCHS, OPS
        from ..autotune.workloads import ALIASES

        yield f"--arch {' '.join(f'sm_{arch}' for arch in ARCHS)}"
        yield f"--op {' '.join(OPS)}"
        yield from (f"  {op} stands for {folder}" for folder, op in ALIASES.items())

    runs(sub, lambda o: inspect(o.arch, o.op, o.json, o.gpu), "what there is", known)


def add_tune(commands: Any) -> None:
    sub = add_command(commands, "tune", tune.__doc__)
    sub.add_argument("words", nargs="*", metavar="OP key=value", help="as `bench`; all by default")
    sub.add_argument(
        "--arch", action="append", default=[], metavar="sm_90",
        help="only list what compiling leaves, for this GPU; for others too where given again",
    )  # fmt: skip
    sub.add_argument("--again", action="store_true", help="measure what is known as well")
    sub.add_argument("--output", type=Path, help="the file; the GPU's own by default")

    def ops() -> Iterable[str]:
        from .benchmark import describe_ops

        return describe_ops(directed=False)

    runs(sub, lambda o: tune(o.words, o.arch, o.again, o.output), "ops and their keys", ops)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Words may stand before and behind options, which argparse alone does not take."""
    options, others = parser.parse_known_args(arguments)
    if others and (not hasattr(options, "words") or any(word[:1] == "-" for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.words += others
    return options


def split(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """CONFIG, if there is one, and the overrides; a file's name may hold an equals sign."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return Path(words[0]), words[1:]
    return None, words


def split_run(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """The same where CONFIG describes a run, and may be its folder, wherever that stands now."""
    if not words:
        raise ConfigError("CONFIG is required, a YAML file or the folder of a run")
    path, overrides = split(words)
    if path is None or not path.is_dir():
        return path, overrides
    if not (path / "config.yaml").exists():
        raise ConfigError(
            f"CONFIG takes a YAML file or the folder of a run, got {path}, without config.yaml"
        )
    return path / "config.yaml", [f"output={json.dumps(str(path))}", *overrides]
