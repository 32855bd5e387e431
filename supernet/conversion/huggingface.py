"""Folders as Hugging Face's libraries write and read them: config.json and safetensors."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import (
    check_names,
    model_of,
    model_tensors,
    open_tensors,
    read_json,
    save_tensors,
)
from ..errors import ConfigError
from ..model import SupernetModel
from ..stochastic import Dispatch
from .format import Format

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_model(folder: Path, fmt: Format, dispatch: Dispatch) -> SupernetModel:
    """The model of a folder in this format, with every parameter in its tensor's own dtype.

    Raises ConfigError where settings, tensors or their shapes do not fit.
    """
    config = fmt.config_from(read_json(folder / "config.json"))
    stored = read_tensors(folder)
    if config.tie_embeddings:
        drop_tied_head(stored, fmt)
    with torch.device("meta"):
        names = fmt.tensor_names(SupernetModel(config, dispatch))
    check_names(folder, set(names.values()), stored.keys())
    return model_of(config, {ours: stored[theirs] for ours, theirs in names.items()}, dispatch)


def write_model(model: SupernetModel, folder: Path, fmt: Format) -> None:
    """Write a model without choices into an existing folder, in the dtypes that it has.

    Raises ConfigError where the format cannot express its configuration.
    """
    settings = fmt.config_to(model.config)
    names = fmt.tensor_names(model)
    tensors = {names[ours]: tensor for ours, tensor in model_tensors(model).items()}
    heading = {"architectures": [fmt.architecture], "model_type": fmt.model_type}
    dtype = str(most_common_dtype(tensors)).removeprefix("torch.")
    config = {**heading, "dtype": dtype, **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, or of the shards that an index lists."""
    if (folder / WEIGHTS).exists():
        return open_tensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ConfigError(f"{folder / INDEX} takes the key weight_map, an object of file names")
        tensors: dict[str, Tensor] = {}
        for shard in sorted({str(place) for place in places.values()}):
            if not (folder / shard).exists():
                raise ConfigError(f"{folder} lacks the shard {shard} that its {INDEX} names")
            tensors |= open_tensors(folder / shard)
        return tensors
    raise ConfigError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}; weights are read from safetensors alone"
    )


def drop_tied_head(stored: dict[str, Tensor], fmt: Format) -> None:
    """Some writers store a tied head as well; it has to be the embedding."""
    head, embedding = (fmt.tensors[name] for name in ("lm_head.weight", "embed_tokens.weight"))
    if head in stored and embedding in stored:
        if not torch.equal(stored.pop(head), stored[embedding]):
            raise ConfigError(f"tie_word_embeddings is set, but {head} differs from {embedding}")


def most_common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """By elements: Mamba's A and D may stay in float32 where all else is not."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]
