"""AprielHybridSSM (ServiceNow): Mistral's decoder with attention or grouped Mamba in each layer.

`hybrid_block_layout` names each layer's mixer: t is Mistral's attention, m2 the Mamba. The format's
own class takes one entry per layer, which is what we write; Fast-LLM writes the shortest pattern
that repeats, and both are read. Its other blocks (m2d, gdn, kl, swa, i) have no mixer here.
"""

from typing import Any

from ..config import ModelConfig
from ..errors import ConfigError
from ..loader import validate
from .format import (
    Format,
    Settings,
    layer_mixers,
    mixers_by_type,
    read_settings,
    refuse_unknown,
    write_settings,
)
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

LAYOUT = {"attention": "t", "mamba": "m2"}
SSM = {
    "d_inner": "d_inner",
    "d_xb": "d_xb",
    "state_size": "d_state",
    "dt_rank": "dt_rank",
    "d_conv": "d_conv",
    "repeat_kv_before_conv": "repeat_kv_before_conv",
    "conv_bias": "conv_bias",
    "dt_proj_bias": "dt_proj_bias",
    "bias": "bias",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_scale": "dt_scale",
    "dt_init_floor": "dt_init_floor",
    "dt_init": "dt_init",
}
SSM_DEFAULTS: Settings = {
    "d_inner": 4096,
    "d_xb": None,
    "d_state": 64,
    "dt_rank": "auto",
    "d_conv": 4,
    "repeat_kv_before_conv": True,
    "conv_bias": True,
    "dt_proj_bias": True,
    "bias": False,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_scale": 1.0,
    "dt_init_floor": 1e-4,
    "dt_init": "random",
}
# Settings of the format's other blocks, which m2 does not read; expand it reads without d_inner.
OTHER_BLOCKS = ("gdn_cfg", "layer_types", "linear_attn_config")
OTHER_SSM = ("activation", "chunk_size", "expand", "n_qk_heads", "n_v_heads", "use_fast_path")

MAMBA_TENSORS = {
    "layers.{}.mixer.in_proj.weight": "model.layers.{}.mixer.in_proj.weight",
    "layers.{}.mixer.in_proj.bias": "model.layers.{}.mixer.in_proj.bias",
    "layers.{}.mixer.dt_in_proj.weight": "model.layers.{}.mixer.dt_in_proj.weight",
    "layers.{}.mixer.dt_in_proj.bias": "model.layers.{}.mixer.dt_in_proj.bias",
    "layers.{}.mixer.dt_proj.weight": "model.layers.{}.mixer.dt_proj.weight",
    "layers.{}.mixer.dt_proj.bias": "model.layers.{}.mixer.dt_proj.bias",
    "layers.{}.mixer.conv1d.weight": "model.layers.{}.mixer.conv1d.weight",
    "layers.{}.mixer.conv1d.bias": "model.layers.{}.mixer.conv1d.bias",
    "layers.{}.mixer.A_log": "model.layers.{}.mixer.A_log",
    "layers.{}.mixer.D": "model.layers.{}.mixer.D",
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.mixer.out_proj.weight",
    "layers.{}.mixer.out_proj.bias": "model.layers.{}.mixer.out_proj.bias",
}


def config_from(settings: Settings) -> ModelConfig:
    """The configuration that an AprielHybridSSM config.json describes.

    Its mixers are called attention and mamba; one that no layer uses is left out.
    """
    known = (*SETTINGS, *OTHER_BLOCKS, "hybrid_block_layout", "ssm_cfg")
    refuse_unknown(settings, known, "config.json")
    decoder = decoder_from(settings)
    placement = placement_from(settings, decoder["num_layers"])
    mixers: Settings = {}
    if "attention" in placement:
        mixers["attention"] = attention_from(settings)
    if "mamba" in placement:
        mixers["mamba"] = mamba_from(settings.get("ssm_cfg") or {}, decoder["hidden_size"])
    mixer = {"type": "stochastic", "mixers": mixers}
    return validate({**decoder, "mixer": mixer, "placement": placement}, ModelConfig)


def config_to(config: ModelConfig) -> Settings:
    """The AprielHybridSSM config.json of a configuration."""
    mixers = mixers_by_type(config, "apriel_hybrid_ssm", tuple(LAYOUT))
    settings = decoder_to(config)
    settings["hybrid_block_layout"] = [LAYOUT[mixer.type] for mixer in layer_mixers(config)]
    if "attention" in mixers:
        settings |= attention_to(mixers["attention"])
    else:
        settings |= attention_for_nobody(config.hidden_size)
    if "mamba" in mixers:
        settings["ssm_cfg"] = write_settings(mixers["mamba"], SSM)
    return settings


def placement_from(settings: Settings, layers: int) -> list[str]:
    """The mixers' names, layer by layer, of a layout that has an entry for each or repeats."""
    pattern = settings.get("hybrid_block_layout")
    if not isinstance(pattern, list) or not pattern or len(pattern) > layers:
        raise ConfigError(
            f"hybrid_block_layout takes 1 to {layers} entries, one for each layer or a pattern "
            f"that repeats, got {pattern!r} in config.json"
        )
    names = {block: name for name, block in LAYOUT.items()}
    for block in pattern:
        if block not in names:
            raise ConfigError(
                f"hybrid_block_layout takes the blocks {list(names)}, got {block!r} in config.json"
            )
    return [names[pattern[layer % len(pattern)]] for layer in range(layers)]


def mamba_from(ssm: Settings, hidden_size: int) -> Settings:
    """The MambaConfig of all m2 layers. Nulls mean what the format's Mamba2 takes them for."""
    refuse_unknown(ssm, (*SSM.values(), *OTHER_SSM), "ssm_cfg")
    mamba: dict[str, Any] = read_settings(ssm, SSM, SSM_DEFAULTS, "ssm_cfg")
    if mamba["d_inner"] is None:
        mamba["d_inner"] = int(ssm.get("expand", 1) * hidden_size)
    if mamba["d_xb"] is None:
        mamba["d_xb"] = hidden_size
    return {"type": "mamba", **mamba}


def attention_for_nobody(hidden_size: int) -> Settings:
    """Attention settings that the format's configuration class accepts where no layer attends."""
    return {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": hidden_size}


APRIEL_HYBRID = Format(
    model_type="apriel_hybrid_ssm",
    architecture="AprielHybridSSMForCausalLM",
    config_from=config_from,
    config_to=config_to,
    tensors=TENSORS,
    layer_tensors=LAYER_TENSORS,
    mixer_tensors={"attention": ATTENTION_TENSORS, "mamba": MAMBA_TENSORS},
)
