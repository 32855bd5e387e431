"""Llama: attention to all tokens in every layer, as transformers' LlamaForCausalLM computes it.

Its tensors are Mistral's. Where config.json leaves a setting out, LlamaConfig's default holds.
"""

from ..config import ModelConfig
from ..errors import ConfigError
from ..loader import validate
from .format import Format, Settings, mixers_by_type, refuse_unknown
from .mistral import (
    ATTENTION_TENSORS,
    LAYER_TENSORS,
    SETTINGS,
    TENSORS,
    attention_from,
    attention_to,
    decoder_from,
    decoder_to,
)

DEFAULTS: Settings = {"num_key_value_heads": None}  # as many as heads
# How pretraining split its products: the sums are the same.
OTHERS = ("pretraining_tp",)


def config_from(settings: Settings) -> ModelConfig:
    """The configuration that a Llama config.json describes."""
    known = {*SETTINGS, *OTHERS} - {"sliding_window"}
    refuse_unknown(settings, known, "config.json")
    settings = {**DEFAULTS, **settings, "sliding_window": None}
    decoder = decoder_from(settings)
    mixer = {"type": "stochastic", "mixers": {"attention": attention_from(settings)}}
    placement = ["attention"] * decoder["num_layers"]
    return validate({**decoder, "mixer": mixer, "placement": placement}, ModelConfig)


def config_to(config: ModelConfig) -> Settings:
    """The Llama config.json of a configuration."""
    attention = mixers_by_type(config, "llama", ("attention",))["attention"]
    if attention.window_size is not None:
        raise ConfigError(f"llama takes attention without a window, got {attention.window_size}")
    settings = {**decoder_to(config), **attention_to(attention)}
    del settings["sliding_window"]
    return settings


LLAMA = Format(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config_from=config_from,
    config_to=config_to,
    tensors=TENSORS,
    layer_tensors=LAYER_TENSORS,
    mixer_tensors={"attention": ATTENTION_TENSORS},
)
