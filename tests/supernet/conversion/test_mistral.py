"""Mistral, by transformers' own code."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from tests.supernet.conversion.checkpoints import (
    ATTENTION,
    MAMBA,
    assert_same_tensors,
    edited,
    logits,
    mistral,
    refuses,
    supernet,
    tensors_of,
)
from tossup.supernet import conversion
from tossup.supernet.conversion import (
    load_checkpoint,
    save_checkpoint,
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"window_size": 6}, {"kv_heads": 1, "head_dim": 16}, {"kv_heads": None}],
    ids=["full", "window", "wide heads", "mha"],
)
def test_export_gives_transformers_the_same_logits(settings, tied, tmp_path):
    model = supernet(
        {"full": ATTENTION | settings, "mamba": MAMBA}, tie_embeddings=tied, norm_eps=1e-3
    )
    save_checkpoint(model, tmp_path / "out", "mistral", ("full",) * 3)
    theirs, report = MistralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id is None
    expected = logits(model, placement=("full",) * 3)
    torch.testing.assert_close(logits(theirs).logits, expected, rtol=0, atol=1e-5)
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is not tied

    again = load_checkpoint(tmp_path / "out")
    assert again.config.tie_embeddings is tied
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("shard", ["5GB", "8KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("window", [None, 5])
def test_import_of_what_transformers_saves(window, shard, tmp_path):
    theirs = mistral(sliding_window=window)
    theirs.save_pretrained(tmp_path / "in", max_shard_size=shard)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() is (shard == "8KB")
    ours = load_checkpoint(tmp_path / "in")
    torch.testing.assert_close(logits(ours), logits(theirs).logits, rtol=0, atol=1e-5)
    save_checkpoint(ours, tmp_path / "out", "mistral")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))


def test_a_setting_left_out_has_transformers_default(tmp_path):
    mistral().save_pretrained(tmp_path / "in")
    left_out = {"sliding_window": ..., "num_key_value_heads": ..., "rms_norm_eps": ...}
    left_out |= {"rope_parameters": ..., "tie_word_embeddings": ..., "head_dim": ...}
    folder = edited(tmp_path / "in", tmp_path / "bare", num_attention_heads=8, **left_out)
    defaults = MistralConfig.from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    config = conversion.MISTRAL.config_from(values)
    attention = config.mixers["attention"]
    assert attention.window_size == defaults.sliding_window
    assert attention.kv_heads == defaults.num_key_value_heads
    assert attention.rope_theta == defaults.rope_parameters["rope_theta"]
    assert config.norm_eps == defaults.rms_norm_eps
    assert config.tie_embeddings is defaults.tie_word_embeddings


def test_what_ends_a_text_comes_back(tmp_path):
    said = {"bos_token_id": 3, "eos_token_id": [2, 5], "pad_token_id": 0}
    mistral(**said, max_position_embeddings=77).save_pretrained(tmp_path / "in")
    ours = load_checkpoint(tmp_path / "in")
    save_checkpoint(ours, tmp_path / "ours")
    save_checkpoint(load_checkpoint(tmp_path / "ours"), tmp_path / "out", "mistral")
    again = MistralForCausalLM.from_pretrained(tmp_path / "out")
    assert {key: getattr(again.config, key) for key in said} == said
    assert again.config.max_position_embeddings == 77
    assert again.generation_config.eos_token_id == [2, 5]
    # Whatever comes first is made an end
    prompt = torch.tensor([[1, 4, 7]])
    first = ours.generate(prompt, max_new_tokens=1)[0, -1].item()
    ours.config = ours.config.model_copy(update={"eos_token_id": (first,)})
    assert ours.generate(prompt, max_new_tokens=5).shape == (1, 4)
    assert ours.generate(prompt, max_new_tokens=5, eos_token_id=[]).shape == (1, 8)


@pytest.mark.parametrize("rope", [..., {"rope_type": "default", "rope_theta": None}])
def test_a_null_rotary_base_is_refused(rope, tmp_path):
    mistral().save_pretrained(tmp_path / "in")
    theta = None if rope is ... else 500.0
    folder = edited(tmp_path / "in", tmp_path / "out", rope_theta=theta, rope_parameters=rope)
    refuses("rope_theta takes a number, got null in config.json", folder)


def test_bfloat16_stays_bfloat16(tmp_path):
    mistral().bfloat16().save_pretrained(tmp_path / "in")
    model = load_checkpoint(tmp_path / "in")
    assert model.norm.weight.dtype == torch.bfloat16
    save_checkpoint(model, tmp_path / "out", "mistral")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = logits(MistralForCausalLM.from_pretrained(tmp_path / "in")).logits
    assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    mistral(tie_word_embeddings=True).save_pretrained(tmp_path / "in")
    tensors = tensors_of(tmp_path / "in")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    model = load_checkpoint(tmp_path / "in")
    assert model.lm_head.weight is model.embed_tokens.weight
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    refuses(r"tie_word_embeddings is set, but lm_head.weight differs", tmp_path / "in")
