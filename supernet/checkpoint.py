"""Tossup's own checkpoint: a folder of config.json and model.safetensors.

The one format that holds a whole supernet. Conversion to and from others is in `conversion/`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ModelConfig, validate
from .errors import ConfigError
from .files import directory_atomically, recover_directory
from .model import SupernetModel
from .stochastic import Dispatch

FORMAT = "tossup"


def save_model(model: SupernetModel, folder: Path) -> None:
    """Write the model into an existing folder."""
    config = {"model_type": FORMAT, "model": model.config.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(model_tensors(model), folder / "model.safetensors")


def write_checkpoint(model: SupernetModel, folder: Path | str) -> None:
    """Write the model as a folder of its own, whole or not at all."""
    with directory_atomically(folder) as temporary:
        save_model(model, temporary)


def read_checkpoint(folder: Path | str, dispatch: Dispatch = "host") -> SupernetModel:
    """The model of a folder that `save_model` wrote."""
    folder = Path(folder)
    recover_directory(folder)
    config = validate(json.loads((folder / "config.json").read_text())["model"], ModelConfig)
    model = SupernetModel(config, dispatch)
    load_tensors(model, load_file(folder / "model.safetensors"))
    return model


def model_tensors(model: SupernetModel) -> dict[str, Tensor]:
    """The parameters by name; a tied head is the embedding and is not stored twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


@torch.no_grad()
def load_tensors(model: SupernetModel, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises ConfigError where a tensor is missing, unknown, or of another shape.
    """
    parameters = dict(model.named_parameters())
    missing, unknown = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
    for what, names in (("lacks", missing), ("has the unknown tensor", unknown)):
        if names:
            raise ConfigError(f"the checkpoint {what} {min(names)}, and {len(names) - 1} more")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ConfigError(
                f"{name} takes shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
            )
        parameter.copy_(tensors[name])
