"""AprielHybridSSM, by the fixtures and logits of ServiceNow's own code."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.supernet.conversion.checkpoints import (
    ATTENTION,
    DATA,
    FIXTURES,
    MAMBA,
    assert_same_tensors,
    edited,
    edited_ssm,
    logits,
    supernet,
    tensors_of,
)
from tossup.supernet.checkpoint import model_tensors
from tossup.supernet.conversion import (
    load_checkpoint,
    save_checkpoint,
)


@pytest.mark.parametrize("name", FIXTURES)
def test_import_gives_the_logits_of_the_formats_own_code(name):
    expected = load_file(DATA / name / "expected.safetensors")
    actual = logits(load_checkpoint(DATA / name), expected["tokens"])
    torch.testing.assert_close(actual, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FIXTURES)
def test_export_of_an_import_is_the_same_checkpoint(name, tmp_path):
    save_checkpoint(load_checkpoint(DATA / name), tmp_path / "out", "apriel_hybrid_ssm")
    weights = tmp_path / "out" / "model.safetensors"
    assert_same_tensors(load_file(weights), load_file(DATA / name / "model.safetensors"))
    with safe_open(weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}

    theirs = json.loads((DATA / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": theirs["rope_theta"]}
    assert ours.pop("rope_parameters") == rope  # theirs is from before transformers 5
    assert ours.pop("pad_token_id") is theirs.get("pad_token_id")
    ssm = ours.pop("ssm_cfg")
    assert ssm == {key: theirs["ssm_cfg"][key] for key in ssm}
    assert ours == {key: theirs[key] for key in ours}
    not_needed = {"ssm_cfg", "attention_dropout", "use_cache"}
    not_needed |= {"layer_types", "linear_attn_config"}
    assert theirs.keys() - ours.keys() == {*not_needed, "transformers_version"}


def test_tensor_names_and_shapes(tmp_path):
    model = supernet({"a": ATTENTION, "m": MAMBA | {"bias": True}}, layers=2)
    save_checkpoint(model, tmp_path / "out", "apriel_hybrid_ssm", ("a", "m"))
    shapes = {k: tuple(t.shape) for k, t in tensors_of(tmp_path / "out").items()}
    layer = {"input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,)}
    layer |= {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32)}
    layer |= {"mlp.down_proj.weight": (32, 48)}
    attention = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    t = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    m2 = {
        "mixer.in_proj.weight": (96, 32),
        "mixer.in_proj.bias": (96,),
        "mixer.dt_in_proj.weight": (2, 32),
        "mixer.dt_in_proj.bias": (2,),
        "mixer.dt_proj.weight": (32, 2),
        "mixer.dt_proj.bias": (32,),
        "mixer.conv1d.weight": (32, 1, 4),
        "mixer.conv1d.bias": (32,),
        "mixer.A_log": (32, 8),
        "mixer.D": (32,),
        "mixer.out_proj.weight": (32, 32),
        "mixer.out_proj.bias": (32,),
    }
    assert shapes == {
        "model.embed_tokens.weight": (37, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (37, 32),
        **{f"model.layers.0.{name}": shape for name, shape in (layer | t).items()},
        **{f"model.layers.1.{name}": shape for name, shape in (layer | m2).items()},
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repeat_kv_before_conv": False, "conv_bias": False},
        {"bias": True, "dt_proj_bias": False, "d_conv": 2, "dt_rank": 5, "dt_max": 0.3},
    ],
    ids=["defaults", "conv first", "biases"],
)
def test_mamba_settings_come_back(settings, tmp_path):
    model = supernet({"m": MAMBA | settings}, placement=("m",) * 3)
    save_checkpoint(model, tmp_path / "out", "apriel_hybrid_ssm")
    again = load_checkpoint(tmp_path / "out")
    assert again.config.mixers["mamba"].model_dump() == {
        **model.config.mixers["m"].model_dump(),
        "dt_rank": settings.get("dt_rank", 2),
    }
    assert_same_tensors(model_tensors(again), model_tensors(model))
    assert torch.equal(logits(again), logits(model))


def test_a_pattern_repeats_and_one_entry_fills_all_layers(tmp_path):
    model = supernet(layers=5)
    for pattern, placement in ((["m2", "t"], "mamama"), (["t"], "aaaaa"), (["m2"], "mmmmm")):
        names = tuple({"a": "attention", "m": "mamba"}[kind] for kind in placement[:5])
        full = tmp_path / f"full{placement}"
        save_checkpoint(model, full, "apriel_hybrid_ssm", names)
        folder = edited(full, tmp_path / placement, hybrid_block_layout=pattern)
        again = load_checkpoint(folder)
        assert again.config.placement == names
        assert set(again.config.mixers) == set(names)
        assert torch.equal(logits(again), logits(model, placement=names))


def test_settings_that_are_left_out_take_the_formats_defaults(tmp_path):
    mamba = MAMBA | {"d_inner": 4096, "d_xb": 64, "state_size": 64}
    model = supernet({"m": mamba}, layers=1, placement=("m",))
    save_checkpoint(model, tmp_path / "full", "apriel_hybrid_ssm")
    ssm = {"d_xb": 64, "dt_rank": "auto", "chunk_size": 128, "activation": "identity"}
    again = load_checkpoint(edited(tmp_path / "full", tmp_path / "bare", ssm_cfg=ssm))
    assert again.config.mixers["mamba"].dt_rank == "auto"
    assert torch.equal(logits(again), logits(model))


def test_nulls_mean_the_hidden_size(tmp_path):
    mamba = MAMBA | {"d_inner": 64, "d_xb": 32}
    save_checkpoint(
        supernet({"m": mamba}, placement=("m",) * 3), tmp_path / "full", "apriel_hybrid_ssm"
    )
    settings = {"d_inner": None, "d_xb": None, "expand": 2}
    again = load_checkpoint(edited_ssm(tmp_path / "full", tmp_path / "null", **settings))
    assert (again.config.mixers["mamba"].d_inner, again.config.mixers["mamba"].d_xb) == (64, 32)


@pytest.mark.parametrize("name", FIXTURES)
def test_rope_theta_of_transformers_5(name, tmp_path):
    theta = json.loads((DATA / name / "config.json").read_text())["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta}
    folder = edited(DATA / name, tmp_path / "v5", rope_theta=..., rope_parameters=rope)
    assert load_checkpoint(folder).config == load_checkpoint(DATA / name).config
