"""A supernet's start from a pretrained model without choices."""

import torch

from ..checkpoint import model_tensors
from ..config import ModelConfig, StochasticMixerConfig
from ..errors import ConfigError
from ..model import SupernetModel
from .format import filled, layer_mixers

SHAPE = (
    *("vocab_size", "hidden_size", "num_layers", "intermediate_size"),
    *("norm_eps", "tie_embeddings"),
)


@torch.no_grad()
def load_pretrained(model: SupernetModel, pretrained: SupernetModel) -> None:
    """Give a supernet's main mixers, and all that placements share, a pretrained model's weights.

    The other mixers keep their initialisation. Raises ConfigError unless the pretrained model is
    what the supernet is with its main mixer in every layer: a head count, a window or a rotary base
    that differs would change what the weights compute, even where the shapes agree.
    """
    if not isinstance(model.config.mixer, StochasticMixerConfig) or not model.config.is_supernet:
        raise ConfigError("pretrained weights go into a supernet; this model is none")
    check_same(model.config, pretrained.config)
    main = model.config.mixer.main
    model.config = model.config.told_by(pretrained.config)
    tensors = model_tensors(pretrained)
    for name, parameter in model.named_parameters():
        gate = model.gate_of(name)
        if gate is None:
            parameter.copy_(tensors[name])
        elif gate[1] == main:
            parameter.copy_(tensors[name.replace(f".mixers.{main}.", ".", 1)])


def check_same(config: ModelConfig, pretrained: ModelConfig) -> None:
    assert isinstance(config.mixer, StochasticMixerConfig)
    for key in SHAPE:
        mine, its = getattr(config, key), getattr(pretrained, key)
        if mine != its:
            raise ConfigError(f"{key} takes the pretrained model's {its}, got {mine}")
    name = config.mixer.main
    main = filled(config.mixers[name], config.hidden_size)
    for layer, mixer in enumerate(layer_mixers(pretrained)):
        if mixer.type != main.type:
            raise ConfigError(
                f"the main mixer {name} takes the pretrained model's {mixer.type} "
                f"in layer {layer}, got {main.type}"
            )
        for key, its in mixer:
            if getattr(main, key) != its:
                raise ConfigError(
                    f"{key} of the main mixer {name} takes the pretrained model's {its}, "
                    f"got {getattr(main, key)}"
                )
