"""A supernet small enough for every test, of two quite different mixers."""

from typing import Any

from tossup.supernet.config import ModelConfig, RunConfig

MIXERS: dict[str, Any] = {
    "attention": {"type": "attention", "heads": 4, "kv_heads": 2},
    "mamba": {"type": "mamba", "d_inner": 16, "d_xb": 8, "state_size": 4, "dt_rank": 2},
}


def model_values(layers: int = 3, **mixer: Any) -> dict[str, Any]:
    return {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_layers": layers,
        "intermediate_size": 24,
        "mixer": {"type": "stochastic", "mixers": MIXERS, **mixer},
    }


def model_config(layers: int = 3, **mixer: Any) -> ModelConfig:
    return ModelConfig.model_validate(model_values(layers, **mixer))


def run_values(output: Any, layers: int = 2, **training: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "seed": 3,
        "model": model_values(layers, per_sample=True),
        "data": {"type": "mqar", "vocab_size": 32, "length": 16, "pairs": 2},
        "training": {"steps": 12, "batch_size": 4, "log_every": 1, **training},
    }


def run_config(output: Any, layers: int = 2, **training: Any) -> RunConfig:
    return RunConfig.model_validate(run_values(output, layers, **training))
