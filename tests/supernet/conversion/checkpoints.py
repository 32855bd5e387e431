"""Checkpoints of other software, and small models: what the tests of conversion share."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tossup.supernet.config import ModelConfig
from tossup.supernet.conversion import (
    load_checkpoint,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.model import SupernetModel

DATA = Path(__file__).parents[2] / "data"
FIXTURES = ("apriel_hybrid", "apriel_hybrid_conv_before_repeat")

ATTENTION = {"type": "attention", "heads": 4, "kv_heads": 2, "rope_theta": 500.0}
MAMBA = {"type": "mamba", "d_inner": 32, "d_xb": 16, "state_size": 8}
TOKENS = torch.randint(0, 37, (2, 21), generator=torch.Generator().manual_seed(0))


def supernet(mixers=None, layers=3, **kwargs) -> SupernetModel:
    """A small supernet, every parameter moved off its initial value, so that a lost one shows."""
    mixers = mixers or {"attention": ATTENTION, "mamba": MAMBA}
    config = ModelConfig(
        vocab_size=37,
        hidden_size=32,
        num_layers=layers,
        intermediate_size=48,
        mixer={"type": "stochastic", "mixers": mixers},
        **kwargs,
    )
    return shaken(SupernetModel(config))


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model.eval()(tokens, **kwargs)


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def edited(folder: Path, target: Path, **settings) -> Path:
    """A copy of a checkpoint whose config.json has other settings; `...` takes one out."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {key: value for key, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    os.link(folder / "model.safetensors", target / "model.safetensors")
    return target


def edited_ssm(folder: Path, target: Path, **settings) -> Path:
    ssm = json.loads((folder / "config.json").read_text())["ssm_cfg"] | settings
    return edited(folder, target, ssm_cfg={k: v for k, v in ssm.items() if v is not ...})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def mistral(**settings) -> MistralForCausalLM:
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return shaken(
        MistralForCausalLM(MistralConfig(**shape, **{"sliding_window": None, **settings}))
    )


def pretrained_mixers(**settings):
    """Mixers for a supernet whose main one is what `mistral` makes."""
    return {"base": ATTENTION | {"head_dim": 8, "rope_theta": 10000.0} | settings, "mamba": MAMBA}


def search_result(assignments):
    layers = {str(layer): mixer for layer, mixer in enumerate(assignments)}
    return {"config": {"num_layers": 3}, "final_configuration": {"layer_assignments": layers}}


def refuses(sentence: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
