"""Llama, by transformers' own code."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.supernet.conversion.checkpoints import (
    ATTENTION,
    MAMBA,
    assert_same_tensors,
    edited,
    logits,
    refuses,
    shaken,
    supernet,
    tensors_of,
)
from tossup.supernet.conversion import load_checkpoint, save_checkpoint
from tossup.supernet.errors import ConfigError


def llama(**settings) -> LlamaForCausalLM:
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return shaken(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-3},
        {"tie_word_embeddings": True, "eos_token_id": [2, 5], "pad_token_id": 0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=lambda settings: ", ".join(settings) or "defaults",
)
def test_there_and_back(settings, tmp_path):
    theirs = llama(**settings)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_checkpoint(tmp_path / "in")
    expected = logits(theirs).logits
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)
    save_checkpoint(ours, tmp_path / "out", "llama")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    again, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again).logits, expected)
    written, original = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "in")
    )
    ours_alone = {"rope_theta"}  # of transformers before its version 5
    assert {k: v for k, v in written.items() if k not in ours_alone} == {
        key: original.get(key) for key in written if key not in ours_alone
    }


def test_settings_left_out_have_transformers_defaults(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    left_out = {key: ... for key in ("num_key_value_heads", "rms_norm_eps", "rope_parameters")}
    folder = edited(tmp_path / "in", tmp_path / "bare", **left_out, head_dim=..., eos_token_id=...)
    ours, theirs = load_checkpoint(folder), LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(ours), logits(theirs).logits, rtol=0, atol=1e-5)
    assert ours.config.eos_token_id == theirs.config.eos_token_id == 2


@pytest.mark.parametrize("token", [37, 2.0, "2", True, -2])
def test_tokens_that_are_none_are_refused(token, tmp_path):
    llama().save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match="pad_token_id"):
        load_checkpoint(edited(tmp_path / "in", tmp_path / "edited", pad_token_id=token))


def test_old_checkpoints_pad_with_nothing(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    ours = load_checkpoint(edited(tmp_path / "in", tmp_path / "edited", pad_token_id=-1))
    assert ours.config.pad_token_id is None


def test_a_placement_of_attention_alone_is_a_llama(tmp_path):
    model = supernet({"full": ATTENTION, "mamba": MAMBA})
    save_checkpoint(model, tmp_path / "out", "llama", ("full",) * 3)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(model, placement="full")
    torch.testing.assert_close(logits(theirs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sliding_window": 8}, "config.json sets sliding_window to 8, which a tossup model"),
        ({"attention_bias": True}, "config.json sets attention_bias to True, which a tossup model"),
        ({"mlp_bias": True}, "config.json sets mlp_bias to True, which a tossup model"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}},
            "rope_parameters takes rope_type default",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config.json sets rope_scaling to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_model_of_ours_has_not_is_refused(settings, sentence, tmp_path):
    llama().save_pretrained(tmp_path / "in")
    refuses(sentence, edited(tmp_path / "in", tmp_path / "edited", **settings))
