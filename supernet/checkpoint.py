"""Tossup's own checkpoint: a folder of config.json and model.safetensors.

The one format that holds a whole supernet. Conversion to and from others is in `conversion/`.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import ModelConfig
from .errors import ConfigError
from .files import recover_directory
from .loader import validate
from .model import SupernetModel
from .stochastic import Dispatch

FORMAT = "tossup"


def save_model(model: SupernetModel, folder: Path) -> None:
    """Write the model into an existing folder, in the dtypes that it has."""
    config = {"model_type": FORMAT, "model": model.config.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(model_tensors(model), folder / "model.safetensors")


def read_checkpoint(folder: Path | str, dispatch: Dispatch = "host") -> SupernetModel:
    """The model of a folder that `save_model` wrote, on the CPU and in the file's dtypes.

    Raises ConfigError where a file is missing or broken, or tensors and configuration do not fit.
    """
    folder = Path(folder)
    recover_directory(folder)
    config = read_config(folder)
    return model_of(config, open_tensors(folder / "model.safetensors"), dispatch)


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config.get("model"), dict):
        raise ConfigError(f"{path} takes the key model, with a model's configuration")
    return validate(config["model"], ModelConfig)


def model_of(
    config: ModelConfig, tensors: Mapping[str, Tensor], dispatch: Dispatch = "host"
) -> SupernetModel:
    """A model whose parameters are these tensors themselves, in their dtypes.

    It is never initialised, which would take time and random numbers. Raises ConfigError where
    tensors are missing, unknown or of other shapes.
    """
    with torch.device("meta"):
        model = SupernetModel(config, dispatch)
    parameters = dict(model.named_parameters())
    check_tensors(parameters, tensors)
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensors[name]))
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def model_tensors(model: SupernetModel) -> dict[str, Tensor]:
    """The parameters by name; a tied head is the embedding and is not stored twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as readable as others of its folder (save_file's is private)."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ConfigError where it is missing or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read tensors from {path}: {error}") from error


def copy_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names, to their dtypes and devices.

    Raises ConfigError, before anything is copied, unless names and shapes agree.
    """
    check_tensors(into, tensors)
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    check_names("the checkpoint", expected.keys(), tensors.keys())
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise ConfigError(
                f"{name} takes shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
            )


def check_names(source: object, expected: Set[str], found: Set[str]) -> None:
    """Raise ConfigError unless a source of tensors has exactly those that are expected."""
    for what, names in (
        ("lacks", expected - found),
        ("has the unknown tensor", found - expected),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{source} {what} {min(names)}{more}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ConfigError where there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} takes a JSON object, got {type(values).__name__}")
    return values
