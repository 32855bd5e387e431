"""What a Hugging Face checkpoint format is, to us: two functions and a table of names.

A format is declared once and read in both directions. Its table names our tensors and its own; its
functions turn a `config.json` into a ModelConfig and back. Whatever a format or a ModelConfig asks
for that the other side cannot express is refused with a sentence, and never left out.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import AttentionConfig, MambaConfig, ModelConfig
from ..errors import ConfigError
from ..model import SupernetModel

Settings = dict[str, Any]  # what a config.json holds

# Settings without a say in what the weights compute, of any format: they are not kept.
NEUTRAL = (
    *("_from_model_config", "_name_or_path", "architectures", "auto_map", "model_type"),
    *("tokenizer_class", "dtype", "torch_dtype", "transformers_version", "use_cache"),
)


@dataclass(frozen=True)
class Format:
    """A checkpoint format of ordinary models.

    model_type, architecture: what its config.json calls itself. config_from, config_to: that file
    to our configuration, and back. tensors: ours to theirs. layer_tensors: the same for each layer,
    whose number stands for {}. mixer_tensors: the same for each type of mixer that there is.
    """

    model_type: str
    architecture: str
    config_from: Callable[[Settings], ModelConfig]
    config_to: Callable[[ModelConfig], Settings]
    tensors: Mapping[str, str]
    layer_tensors: Mapping[str, str]
    mixer_tensors: Mapping[str, Mapping[str, str]]

    def tensor_names(self, model: SupernetModel) -> dict[str, str]:
        """Each of the model's parameters, and the format's name for it."""
        table = dict(self.tensors)
        for layer, mixer in enumerate(layer_mixers(model.config)):
            names = {**self.layer_tensors, **self.mixer_tensors[mixer.type]}
            for ours, theirs in names.items():
                table[ours.format(layer)] = theirs.format(layer)
        return {name: table[name] for name, _ in model.named_parameters()}


def layer_mixers(config: ModelConfig) -> list[Any]:
    """The configuration of each layer's mixer, with every default filled in.

    Raises ConfigError where the layers hold several mixers each.
    """
    if config.is_supernet:
        raise ConfigError(
            "placement: is required to write a supernet in any format but tossup, "
            f"as one of the mixers {list(config.mixers)} for each layer"
        )
    names = config.placement or tuple(config.mixers) * config.num_layers
    return [filled(config.mixers[name], config.hidden_size) for name in names]


def filled(mixer: Any, hidden_size: int) -> Any:
    """A mixer's configuration with the defaults written out that depend on other values."""
    if isinstance(mixer, AttentionConfig):
        return mixer.model_copy(
            update={
                "kv_heads": mixer.kv_heads or mixer.heads,
                "head_dim": mixer.head_dim or hidden_size // mixer.heads,
            }
        )
    if isinstance(mixer, MambaConfig):
        auto = math.ceil(hidden_size / 16)
        return mixer.model_copy(
            update={
                "d_xb": mixer.d_xb or mixer.d_inner,
                "dt_rank": auto if mixer.dt_rank == "auto" else mixer.dt_rank,
            }
        )
    return mixer


def mixers_by_type(config: ModelConfig, model_type: str, types: Iterable[str]) -> dict[str, Any]:
    """The one configuration of each type of mixer that the layers use.

    Raises ConfigError where a layer's type is none of `types`, or two layers of one type differ:
    a config.json holds one configuration of each type, for all layers.
    """
    found: dict[str, Any] = {}
    for layer, mixer in enumerate(layer_mixers(config)):
        if mixer.type not in types:
            raise ConfigError(
                f"{model_type} takes mixers of type {' or '.join(types)}, "
                f"got {mixer.type} in layer {layer}"
            )
        other = found.setdefault(mixer.type, mixer)
        for key, value in mixer:
            if value != getattr(other, key):
                raise ConfigError(
                    f"{model_type} takes one {key} for all layers of {mixer.type}, "
                    f"got {getattr(other, key)} and, in layer {layer}, {value}"
                )
    return found


def read_settings(
    settings: Settings, names: Mapping[str, str], defaults: Settings, where: str
) -> Settings:
    """Our keys, with the values of theirs; `names` maps ours to theirs, `where` says which file.

    Raises ConfigError where one is missing that has no default.
    """
    settings = {**defaults, **settings}
    for key in names.values():
        if key not in settings:
            raise ConfigError(f"{where} lacks {key}")
    return {ours: settings[theirs] for ours, theirs in names.items()}


def write_settings(config: Any, names: Mapping[str, str]) -> Settings:
    """Their keys, with the values of ours."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def refuse_unknown(settings: Settings, known: Iterable[str], where: str) -> None:
    """Raises ConfigError where a setting asks for something that we do not know.

    One that is null, false, zero or empty asks for nothing.
    """
    known = {*known, *NEUTRAL}
    for key, value in settings.items():
        if value and key not in known:
            raise ConfigError(f"{where} sets {key} to {value!r}, which a tossup model has not")
