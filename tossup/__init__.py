"""Tossup: supernets of sequence mixers, on kernels with fused stochastic dispatch.

The public names, each imported from its module when it is first used, so that `import tossup`
imports neither torch nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.causal_conv1d import causal_conv1d
    from .kernels.causal_conv1d_update import causal_conv1d_update
    from .kernels.flash_attention import bounds_of, flash_attention
    from .kernels.linear import linear
    from .kernels.repeat_groups import repeat_groups
    from .kernels.rotary import rotary, rotary_angles
    from .kernels.routing import MixerTable, Route, Strategy, draw
    from .kernels.selective_scan import selective_scan
    from .kernels.selective_state_update import selective_state_update
    from .supernet.config import ModelConfig, StochasticMixerConfig
    from .supernet.conversion import load_checkpoint, save_checkpoint
    from .supernet.mixers import Attention, GroupedMamba, Mamba
    from .supernet.model import SupernetModel
    from .supernet.optimizer import (
        GatedAdamW,
        clip_grad_norm_,
        forget_gradients,
        parameter_groups,
    )
    from .supernet.router import Router
    from .supernet.stochastic import StochasticMixer

__version__ = "0.1.0"

_MODULES = {
    "Attention": "supernet.mixers",
    "GatedAdamW": "supernet.optimizer",
    "GroupedMamba": "supernet.mixers",
    "Mamba": "supernet.mixers",
    "MixerTable": "kernels.routing",
    "ModelConfig": "supernet.config",
    "Route": "kernels.routing",
    "Router": "supernet.router",
    "StochasticMixer": "supernet.stochastic",
    "StochasticMixerConfig": "supernet.config",
    "Strategy": "kernels.routing",
    "SupernetModel": "supernet.model",
    "bounds_of": "kernels.flash_attention",
    "causal_conv1d": "kernels.causal_conv1d",
    "causal_conv1d_update": "kernels.causal_conv1d_update",
    "clip_grad_norm_": "supernet.optimizer",
    "draw": "kernels.routing",
    "flash_attention": "kernels.flash_attention",
    "forget_gradients": "supernet.optimizer",
    "linear": "kernels.linear",
    "load_checkpoint": "supernet.conversion",
    "parameter_groups": "supernet.optimizer",
    "repeat_groups": "kernels.repeat_groups",
    "rotary": "kernels.rotary",
    "rotary_angles": "kernels.rotary",
    "save_checkpoint": "supernet.conversion",
    "selective_scan": "kernels.selective_scan",
    "selective_state_update": "kernels.selective_state_update",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
