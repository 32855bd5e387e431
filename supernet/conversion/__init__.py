"""Checkpoints in our format and in others', and one placement of a supernet as an ordinary model.

| format | holds | is |
|---|---|---|
| tossup | any model, supernets included | our own |
| apriel_hybrid_ssm | attention and grouped Mamba, layer by layer | ServiceNow's AprielHybridSSM |
| mistral | attention in every layer | transformers' MistralForCausalLM |
| llama | attention without a window in every layer | transformers' LlamaForCausalLM |

Weights are written in the dtype that they have in the model, and a model that is read has its
file's dtypes, so that tensors come back bit for bit. Token ids and the position limit of a
config.json are kept as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ...autotune.schema import Strict
from ..checkpoint import FORMAT, read_checkpoint, read_json, save_model
from ..config import NamesOrResult
from ..errors import ConfigError
from ..files import directory_atomically, recover_directory
from ..model import SupernetModel
from ..run_folder import checkpoint_of
from ..stochastic import Dispatch
from .apriel_hybrid import APRIEL_HYBRID
from .huggingface import read_model, write_model
from .llama import LLAMA
from .mistral import MISTRAL
from .placement import place, placement_of
from .pretrained import load_pretrained

__all__ = [
    "ConvertConfig",
    "convert",
    "load_checkpoint",
    "load_into",
    "place",
    "placement_of",
    "save_checkpoint",
]

FormatName = Literal["tossup", "apriel_hybrid_ssm", "mistral", "llama"]
CHECKPOINT = {"config.json", "model.safetensors"}
FORMATS = {fmt.model_type: fmt for fmt in (APRIEL_HYBRID, MISTRAL, LLAMA)}


class ConvertConfig(Strict):
    """What `tossup convert` reads and writes."""

    input: Path = Field(description="a checkpoint of any format, or a run, for its newest one")
    output: Path = Field(description="the folder to write; a checkpoint there is replaced")
    format: FormatName = "tossup"
    placement: NamesOrResult = Field(
        None,
        description="a mixer name per layer, one for all layers, or a search result; none keeps "
        "what input has",
    )


def convert(config: ConvertConfig) -> Path:
    """Read a checkpoint, fix its placement if one is given, write it, and return where it is."""
    model = load_checkpoint(config.input)
    placement = placement_of(config.placement, model.config)
    save_checkpoint(model, config.output, config.format, placement)
    return config.output


def load_checkpoint(path: Path | str, dispatch: Dispatch = "host") -> SupernetModel:
    """The model of a checkpoint's folder; its config.json says in which format it is.

    path: of a checkpoint, or of a run, whose newest checkpoint it is then.
    Returns it in evaluation mode, on the CPU and in the file's dtypes, as transformers'
    `from_pretrained` does: call its `train()` before training it further.
    Raises ConfigError where the format is unknown, or holds what a model of ours cannot.
    """
    folder = checkpoint_of(Path(path))
    recover_directory(folder)
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type == FORMAT:
        return read_checkpoint(folder, dispatch).eval()
    architectures = settings.get("architectures") or ()
    for fmt in FORMATS.values():
        if model_type == fmt.model_type or fmt.architecture in architectures:
            return read_model(folder, fmt, dispatch).eval()
    raise ConfigError(
        f"model_type takes one of {[FORMAT, *FORMATS]}, got {model_type!r} in {folder}/config.json"
    )


def save_checkpoint(
    model: SupernetModel,
    path: Path | str,
    format: FormatName = "tossup",
    placement: Sequence[str] | None = None,
) -> None:
    """Write the model, or one placement of it, as a folder that is there whole or not at all.

    format: see the table above; all but tossup need a placement where the model is a supernet.
    placement: one of the supernet's mixers for each layer.
    A checkpoint that is at `path` is replaced. Raises ConfigError where the format cannot hold the
    model, or `path` is anything but a checkpoint.
    """
    if format != FORMAT and format not in FORMATS:
        raise ConfigError(f"format takes one of {[FORMAT, *FORMATS]}, got {format!r}")
    refuse_foreign(Path(path))
    if placement is not None:
        model = place(model, placement)
    with directory_atomically(path) as folder:
        if format == FORMAT:
            save_model(model, folder)
        else:
            write_model(model, folder, FORMATS[format])


def load_into(model: SupernetModel, path: Path | str) -> None:
    """Start a supernet from a pretrained checkpoint of an ordinary model, of any format.

    Embedding, norms, MLPs and the main mixer of each layer receive its weights; other mixers keep
    their initialisation. The supernet's configuration takes over token ids and the position limit
    where it has none. Raises ConfigError where the two do not fit.
    """
    load_pretrained(model, load_checkpoint(path))


def refuse_foreign(path: Path) -> None:
    """Replacing a folder deletes what is in it: it has to be empty, or a checkpoint of ours alone.

    Raises ConfigError where it is neither, or has no name by which it could be replaced.
    """
    if path.name in ("", "..") or path.is_symlink():
        raise ConfigError(f"output takes a folder's own name, got {str(path)!r}, which is none")
    recover_directory(path)
    if not path.exists():
        return
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    if names and not (CHECKPOINT <= names <= CHECKPOINT | {"optimizer.safetensors"}):
        raise ConfigError(
            "output takes a new folder, or one that holds a checkpoint and nothing else, "
            f"and {path} is neither"
        )
