"""The folder of a training run: config.yaml, metrics.jsonl and checkpoints/<step>."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import RunConfig
from .data import Dataset
from .errors import ConfigError
from .files import exclusive, write_atomically
from .loader import load_config

# What may change between a run and its continuation: nothing that a step's result depends on.
CHANGEABLE = {"log_every", "evaluate_every", "evaluation_batches", "checkpoint_every"}
CHANGEABLE |= {"keep_checkpoints"}

DATA = "data"  # in a checkpoint's optimizer.safetensors: the fingerprint of what was trained on


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from training in the folder, which is made where it is missing.

    Raises ConfigError where another process does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(output))
        except BlockingIOError as error:
            raise ConfigError(f"output: another process is training in {output}") from error
        except OSError as error:
            raise ConfigError(f"output: cannot write in {output}: {error.strerror}") from error
        yield


def check_same_run(config: RunConfig) -> None:
    """Raise ConfigError where the folder holds checkpoints of a run that is not this one."""
    if not list_checkpoints(config.output):
        return
    path = config.output / "config.yaml"
    try:
        theirs = load_config(path, (), RunConfig)
    except ConfigError as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} does not describe the run whose checkpoints are there: {problem}"
        ) from error
    for key, was, now in differences(decisive(theirs), decisive(config)):
        raise ConfigError(
            f"{config.output} holds a run whose {key} is {was}, not {now}: "
            "take another output, or remove the folder"
        )


def check_same_data(config: RunConfig, data: Dataset) -> None:
    """Raise ConfigError where the newest checkpoint was trained on data that the same configuration
    no longer names: what is held out now may be among it. Others may be measured on anything."""
    folder, settings = latest_checkpoint(config.output), config.output / "config.yaml"
    path = folder / "optimizer.safetensors"
    if not (settings.exists() and path.exists()):  # which may be left behind to save room
        return
    theirs = load_config(settings, (), RunConfig)
    if (theirs.data, theirs.seed) != (config.data, config.seed):
        return
    try:
        with safe_open(path, "pt") as file:
            trained_on = file.get_tensor(DATA) if DATA in file.keys() else None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read tensors from {path}: {error}") from error
    if trained_on is not None:
        refuse_changed(trained_on, data, folder)


def refuse_changed(fingerprint: Tensor, data: Dataset, folder: Path) -> None:
    if not torch.equal(fingerprint, fingerprint_of(data)):
        raise ConfigError(
            f"data has changed since {folder} was trained on it, and with it what is held out: "
            "restore it, or train anew"
        )


def fingerprint_of(data: Dataset) -> Tensor:
    return torch.tensor([*bytes.fromhex(data.fingerprint())], dtype=torch.uint8)


def write_config(config: RunConfig) -> None:
    """Write config.yaml, over that of a run that never came to a checkpoint."""
    values = config.model_dump(mode="json")
    write_atomically(config.output / "config.yaml", yaml.safe_dump(values, sort_keys=False))


def decisive(config: RunConfig) -> dict[str, Any]:
    """The part of a run's configuration that its weights depend on."""
    return config.model_dump(
        mode="json", exclude={"output": True, "search": True, "training": CHANGEABLE}
    )


def differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key whose value differs, with both. The order of mixers counts: it numbers them."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield key, was, now
    elif key.endswith("mixers") and list(was) != list(now):
        yield key, list(was), list(now)
    else:
        for part in {**was, **now}:
            inner = f"{key}.{part}" if key else part
            yield from differences(was.get(part), now.get(part), inner)


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def latest_checkpoint(output: Path) -> Path:
    """The newest checkpoint of a run's folder. Raises ConfigError where there is none."""
    folders = list_checkpoints(output)
    if not folders:
        raise ConfigError(f"{output} holds no checkpoint: run tossup train first")
    return folders[-1]


def checkpoint_of(path: Path) -> Path:
    """A checkpoint's folder itself, or the newest checkpoint of a run's folder."""
    is_run = not (path / "config.json").exists() and list_checkpoints(path)
    return latest_checkpoint(path) if is_run else path


def forget_after(metrics: Path, step: int) -> None:
    """Cut a log to what was written up to a step."""
    if metrics.exists():
        write_atomically(metrics, "".join(records_until(metrics, step)))


def records_until(metrics: Path, step: int) -> Iterator[str]:
    """The log's whole lines up to a step. A kill may have torn the last one.

    Raises ConfigError for any other line that is not a record.
    """
    with open(metrics, errors="replace") as log:
        for number, line in enumerate(log, 1):
            if not line.endswith("\n"):
                return
            try:
                wanted = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{metrics}: line {number} is no record of training; remove the line"
                ) from error
            if wanted:
                yield line


def write_record(log: TextIO, record: dict[str, Any]) -> None:
    log.write(json.dumps(record, allow_nan=False) + "\n")
    log.flush()
