"""Mistral: attention in every layer, as transformers' MistralForCausalLM computes it.

What it calls a sliding window is our window: so many tokens, the query itself included. Where
config.json leaves a setting out, MistralConfig's default holds; no window is an explicit null.
"""

from ..config import OF_TEXT, AttentionConfig, ModelConfig
from ..errors import ConfigError
from ..loader import validate
from .format import (
    Format,
    Settings,
    mixers_by_type,
    read_settings,
    refuse_unknown,
    write_settings,
)

DECODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    **{name: name for name in OF_TEXT},
}
ATTENTION = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window_size": "sliding_window",
}
DEFAULTS: Settings = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "max_position_embeddings": None,  # transformers' is the same for all, and refuses nothing
    "num_key_value_heads": 8,
    "head_dim": None,
    "sliding_window": 4096,
}
SETTINGS = (*DECODER.values(), *ATTENTION.values(), "hidden_act", "rope_theta", "rope_parameters")

TENSORS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "layers.{}.input_layernorm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.post_attention_layernorm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
}
ATTENTION_TENSORS = {
    "layers.{}.mixer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.mixer.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
}


def config_from(settings: Settings) -> ModelConfig:
    """The configuration that a Mistral config.json describes."""
    refuse_unknown(settings, SETTINGS, "config.json")
    decoder = decoder_from(settings)
    placement = ["attention"] * decoder["num_layers"]
    mixers = {"attention": attention_from(settings)}
    mixer = {"type": "stochastic", "mixers": mixers}
    return validate({**decoder, "mixer": mixer, "placement": placement}, ModelConfig)


def config_to(config: ModelConfig) -> Settings:
    """The Mistral config.json of a configuration."""
    mixers = mixers_by_type(config, "mistral", ("attention",))
    return {**decoder_to(config), **attention_to(mixers["attention"])}


def decoder_from(settings: Settings) -> Settings:
    """All of a ModelConfig but its mixers."""
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act takes silu, got {activation!r} in config.json")
    decoder = read_settings(settings, DECODER, DEFAULTS, "config.json")
    if decoder["pad_token_id"] == -1:  # of old checkpoints: none
        decoder["pad_token_id"] = None
    return decoder


def decoder_to(config: ModelConfig) -> Settings:
    settings = {**write_settings(config, DECODER), "hidden_act": "silu"}
    if config.max_position_embeddings is None:
        del settings["max_position_embeddings"]  # null is no number of positions
    return settings


def attention_from(settings: Settings) -> Settings:
    """The AttentionConfig of all layers that attend."""
    attention = read_settings(settings, ATTENTION, DEFAULTS, "config.json")
    return {"type": "attention", **attention, "rope_theta": rope_theta_from(settings)}


def attention_to(attention: AttentionConfig) -> Settings:
    if attention.rope_theta is None:
        raise ConfigError("rope_theta takes a number in this format, got none (no positions)")
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
    # transformers reads rope_theta before its version 5, rope_parameters from then on.
    both = {"rope_theta": attention.rope_theta, "rope_parameters": rope}
    return {**write_settings(attention, ATTENTION), **both}


def rope_theta_from(settings: Settings) -> float:
    rope: Settings = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        raise ConfigError(
            f"rope_parameters takes rope_type default and a rope_theta, got {rope} in config.json"
        )
    theta = {"rope_theta": 10000.0, **settings, **rope}["rope_theta"]
    if theta is None:
        raise ConfigError("rope_theta takes a number, got null in config.json")
    return theta


MISTRAL = Format(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config_from=config_from,
    config_to=config_to,
    tensors=TENSORS,
    layer_tensors=LAYER_TENSORS,
    mixer_tensors={"attention": ATTENTION_TENSORS},
)
