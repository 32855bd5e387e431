"""Checkpoints of other software, read and written: their logits, their tensors, their refusals."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from tossup.supernet import conversion
from tossup.supernet.checkpoint import model_tensors
from tossup.supernet.config import ModelConfig
from tossup.supernet.conversion import (
    ConvertConfig,
    convert,
    load_checkpoint,
    load_into,
    place,
    save_checkpoint,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.loader import load_config
from tossup.supernet.model import SupernetModel

DATA = Path(__file__).parents[1] / "data"
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


class TestApriel:
    @pytest.mark.parametrize("name", FIXTURES)
    def test_import_gives_the_logits_of_the_formats_own_code(self, name):
        expected = load_file(DATA / name / "expected.safetensors")
        actual = logits(load_checkpoint(DATA / name), expected["tokens"])
        torch.testing.assert_close(actual, expected["logits"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", FIXTURES)
    def test_export_of_an_import_is_the_same_checkpoint(self, name, tmp_path):
        save_checkpoint(load_checkpoint(DATA / name), tmp_path / "out", "apriel_hybrid_ssm")
        weights = tmp_path / "out" / "model.safetensors"
        assert_same_tensors(load_file(weights), load_file(DATA / name / "model.safetensors"))
        with safe_open(weights, "pt") as file:
            assert file.metadata() == {"format": "pt"}

        theirs = json.loads((DATA / name / "config.json").read_text())
        ours = json.loads((tmp_path / "out" / "config.json").read_text())
        rope = {"rope_type": "default", "rope_theta": theirs["rope_theta"]}
        assert ours.pop("rope_parameters") == rope  # theirs is from before transformers 5
        assert ours.pop("bos_token_id") is ours.pop("eos_token_id") is None
        ssm = ours.pop("ssm_cfg")
        assert ssm == {key: theirs["ssm_cfg"][key] for key in ssm}
        assert ours == {key: theirs[key] for key in ours}
        not_needed = {"bos_token_id", "eos_token_id", "ssm_cfg", "attention_dropout", "use_cache"}
        not_needed |= {"layer_types", "linear_attn_config", "max_position_embeddings"}
        assert theirs.keys() - ours.keys() == {*not_needed, "transformers_version"}

    def test_tensor_names_and_shapes(self, tmp_path):
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
    def test_mamba_settings_come_back(self, settings, tmp_path):
        model = supernet({"m": MAMBA | settings}, placement=("m",) * 3)
        save_checkpoint(model, tmp_path / "out", "apriel_hybrid_ssm")
        again = load_checkpoint(tmp_path / "out")
        assert again.config.mixers["mamba"].model_dump() == {
            **model.config.mixers["m"].model_dump(),
            "dt_rank": settings.get("dt_rank", 2),
        }
        assert_same_tensors(model_tensors(again), model_tensors(model))
        assert torch.equal(logits(again), logits(model))

    def test_a_pattern_repeats_and_one_entry_fills_all_layers(self, tmp_path):
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

    def test_settings_that_are_left_out_take_the_formats_defaults(self, tmp_path):
        mamba = MAMBA | {"d_inner": 4096, "d_xb": 64, "state_size": 64}
        model = supernet({"m": mamba}, layers=1, placement=("m",))
        save_checkpoint(model, tmp_path / "full", "apriel_hybrid_ssm")
        ssm = {"d_xb": 64, "dt_rank": "auto", "chunk_size": 128, "activation": "identity"}
        again = load_checkpoint(edited(tmp_path / "full", tmp_path / "bare", ssm_cfg=ssm))
        assert again.config.mixers["mamba"].dt_rank == "auto"
        assert torch.equal(logits(again), logits(model))

    def test_nulls_mean_the_hidden_size(self, tmp_path):
        mamba = MAMBA | {"d_inner": 64, "d_xb": 32}
        save_checkpoint(
            supernet({"m": mamba}, placement=("m",) * 3), tmp_path / "full", "apriel_hybrid_ssm"
        )
        settings = {"d_inner": None, "d_xb": None, "expand": 2}
        again = load_checkpoint(edited_ssm(tmp_path / "full", tmp_path / "null", **settings))
        assert (again.config.mixers["mamba"].d_inner, again.config.mixers["mamba"].d_xb) == (64, 32)

    @pytest.mark.parametrize("name", FIXTURES)
    def test_rope_theta_of_transformers_5(self, name, tmp_path):
        theta = json.loads((DATA / name / "config.json").read_text())["rope_theta"]
        rope = {"rope_type": "default", "rope_theta": theta}
        folder = edited(DATA / name, tmp_path / "v5", rope_theta=..., rope_parameters=rope)
        assert load_checkpoint(folder).config == load_checkpoint(DATA / name).config


class TestMistral:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"window_size": 6}, {"kv_heads": 1, "head_dim": 16}, {"kv_heads": None}],
        ids=["full", "window", "wide heads", "mha"],
    )
    def test_export_gives_transformers_the_same_logits(self, settings, tied, tmp_path):
        model = supernet(
            {"full": ATTENTION | settings, "mamba": MAMBA}, tie_embeddings=tied, norm_eps=1e-3
        )
        save_checkpoint(model, tmp_path / "out", "mistral", ("full",) * 3)
        theirs, report = MistralForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
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
    def test_import_of_what_transformers_saves(self, window, shard, tmp_path):
        theirs = mistral(sliding_window=window)
        theirs.save_pretrained(tmp_path / "in", max_shard_size=shard)
        assert (tmp_path / "in" / "model.safetensors.index.json").exists() is (shard == "8KB")
        ours = load_checkpoint(tmp_path / "in")
        torch.testing.assert_close(logits(ours), logits(theirs).logits, rtol=0, atol=1e-5)
        save_checkpoint(ours, tmp_path / "out", "mistral")
        assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))

    def test_a_setting_left_out_has_transformers_default(self, tmp_path):
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

    def test_bfloat16_stays_bfloat16(self, tmp_path):
        mistral().bfloat16().save_pretrained(tmp_path / "in")
        model = load_checkpoint(tmp_path / "in")
        assert model.norm.weight.dtype == torch.bfloat16
        save_checkpoint(model, tmp_path / "out", "mistral")
        assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in"))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
        expected = logits(MistralForCausalLM.from_pretrained(tmp_path / "in")).logits
        assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()

    def test_a_tied_head_may_be_stored_if_it_is_the_embedding(self, tmp_path):
        mistral(tie_word_embeddings=True).save_pretrained(tmp_path / "in")
        tensors = tensors_of(tmp_path / "in")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "in" / "model.safetensors")
        model = load_checkpoint(tmp_path / "in")
        assert model.lm_head.weight is model.embed_tokens.weight
        tensors["lm_head.weight"][3, 2] += 1
        save_file(tensors, tmp_path / "in" / "model.safetensors")
        refuses(r"tie_word_embeddings is set, but lm_head.weight differs", tmp_path / "in")


class TestPlacement:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_every_placement_survives_export_and_import(self, tied, tmp_path):
        model = supernet(tie_embeddings=tied)
        for placement in itertools.product(model.mixer_names, repeat=3):
            placed = place(model, placement)
            assert placed.config.placement == placement and not placed.config.is_supernet
            assert (placed.lm_head.weight is placed.embed_tokens.weight) is tied
            expected = logits(model, placement=placement)
            assert torch.equal(logits(placed), expected)
            formats = ["tossup", "apriel_hybrid_ssm"]
            for name in formats + ["mistral"] * (set(placement) == {"attention"}):
                save_checkpoint(model, tmp_path / name, name, placement)
                again = load_checkpoint(tmp_path / name)
                assert again.config.placement == placement
                assert_same_tensors(model_tensors(again), model_tensors(placed))
                assert torch.equal(logits(again), expected)

    def test_the_model_and_its_placement_share_nothing(self):
        model = supernet()
        before = logits(model)
        with torch.no_grad():
            for parameter in place(model, ("attention",) * 3).parameters():
                parameter.zero_()
        assert torch.equal(logits(model), before)

    def test_no_random_number_is_drawn(self):
        model, state = supernet(), torch.get_rng_state()
        place(model, ("mamba",) * 3)
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_whole_supernet_is_kept(self, tmp_path):
        model = supernet()
        save_checkpoint(model, tmp_path / "out")
        again = load_checkpoint(tmp_path / "out", dispatch="dense")
        assert again.config == model.config
        assert_same_tensors(model_tensors(again), model_tensors(model))

    def test_mixers_of_one_configuration_under_two_names(self, tmp_path):
        model = supernet({"first": ATTENTION, "second": ATTENTION | {"head_dim": 8}})
        placement = ("second", "first", "second")
        save_checkpoint(model, tmp_path / "out", "mistral", placement)
        assert torch.equal(
            logits(load_checkpoint(tmp_path / "out")), logits(model, placement=placement)
        )

    def test_a_model_of_one_plain_mixer(self, tmp_path):
        config = supernet().config.model_dump() | {"mixer": ATTENTION}
        model = shaken(SupernetModel(ModelConfig(**config)))
        save_checkpoint(model, tmp_path / "out", "mistral")
        assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))


class TestConvert:
    def test_placement_of_a_list(self, tmp_path):
        model = supernet()
        save_checkpoint(model, tmp_path / "in")
        words = [f"input={tmp_path}/in", f"output={tmp_path}/out", "format=apriel_hybrid_ssm"]
        words += ["placement=[mamba, attention, mamba]"]
        assert convert(load_config(None, words, ConvertConfig)) == tmp_path / "out"
        placement = ("mamba", "attention", "mamba")
        again = load_checkpoint(tmp_path / "out")
        assert torch.equal(logits(again), logits(model, placement=placement))

    @pytest.mark.parametrize("named", [True, False], ids=["ours", "Fast-LLM's"])
    def test_placement_of_a_search_result(self, named, tmp_path):
        model = supernet()
        save_checkpoint(model, tmp_path / "in")
        result = search_result([1, 0, 0])
        if named:
            result["config"]["mixers"] = ["mamba", "attention"]
        (tmp_path / "search.json").write_text(json.dumps(result))
        convert(
            ConvertConfig(
                input=tmp_path / "in", output=tmp_path / "o", placement=tmp_path / "search.json"
            )
        )
        placement = ("attention", "mamba", "mamba") if named else ("mamba",) + ("attention",) * 2
        assert load_checkpoint(tmp_path / "o").config.placement == placement

    def test_one_format_to_another(self, tmp_path):
        mistral().save_pretrained(tmp_path / "in")
        config = {"input": tmp_path / "in", "output": tmp_path / "out"}
        convert(ConvertConfig(**config, format="apriel_hybrid_ssm"))
        convert(ConvertConfig(input=tmp_path / "out", output=tmp_path / "back", format="mistral"))
        assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "in"))

    @pytest.mark.parametrize(
        ("result", "sentence"),
        [
            ({}, r"has no final_configuration.layer_assignments that gives each layer one of the"),
            (
                {"config": {}, "final_configuration": {"layer_assignments": {"0": 2}}},
                "has no final",
            ),
            (
                {"config": {}, "final_configuration": {"layer_assignments": {"0": 1}}},
                "the model's 3",
            ),
        ],
        ids=["empty", "unknown mixer", "other length"],
    )
    def test_unusable_results(self, result, sentence, tmp_path):
        save_checkpoint(supernet(), tmp_path / "in")
        (tmp_path / "r.json").write_text(json.dumps(result))
        config = {"input": tmp_path / "in", "output": tmp_path / "o"}
        with pytest.raises(ConfigError, match=sentence):
            convert(ConvertConfig(**config, placement=tmp_path / "r.json"))
        assert not (tmp_path / "o").exists()

    def test_a_placement_of_another_kind(self):
        with pytest.raises(ConfigError, match=r"placement: takes a list of mixer names or .*got 3"):
            load_config(None, ["input=a", "output=b", "placement=3"], ConvertConfig)


class TestPretrained:
    def test_the_main_mixer_receives_the_weights(self, tmp_path):
        theirs = mistral()
        theirs.save_pretrained(tmp_path / "in")
        model = supernet(pretrained_mixers(), layers=2, norm_eps=1e-6)
        others = {k: t.clone() for k, t in model_tensors(model).items() if ".mamba." in k}
        load_into(model, tmp_path / "in")
        torch.testing.assert_close(logits(model), logits(theirs).logits, rtol=0, atol=1e-5)
        assert others and all(torch.equal(model_tensors(model)[k], t) for k, t in others.items())

    @pytest.mark.parametrize(
        ("model", "sentence"),
        [
            ({"layers": 3}, "num_layers takes the pretrained model's 2, got 3"),
            ({"norm_eps": 1e-5}, "norm_eps takes the pretrained model's 1e-06, got 1e-05"),
            ({"heads": 8}, "heads of the main mixer base takes the pretrained model's 4, got 8"),
            ({"rope_theta": 1.0}, "rope_theta of the main mixer base takes .* 10000.0, got 1.0"),
            ({"window_size": 7}, "window_size of the main mixer base takes .* None, got 7"),
            ({"main": "mamba"}, "the main mixer mamba takes .* attention in layer 0, got mamba"),
            ({"placement": ("base",) * 2}, "pretrained weights go into a supernet; this model is"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_does_not_fit(self, model, sentence, tmp_path):
        mistral().save_pretrained(tmp_path / "in")
        attention = {k: v for k, v in model.items() if k in ("heads", "rope_theta", "window_size")}
        mixers = pretrained_mixers(**attention)
        if "main" in model:
            mixers = dict(reversed(mixers.items()))
        shape = {"layers": 2, "norm_eps": 1e-6}
        shape |= {k: v for k, v in model.items() if k not in attention and k != "main"}
        with pytest.raises(ConfigError, match=sentence):
            load_into(supernet(mixers, **shape), tmp_path / "in")


class TestRefusedImports:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"hidden_act": "gelu"}, "hidden_act takes silu, got 'gelu' in config.json"),
            ({"attention_bias": True}, "config.json sets attention_bias to True, which a tossup"),
            ({"attention_dropout": 0.1}, "config.json sets attention_dropout to 0.1, which a"),
            ({"rope_scaling": {"type": "yarn"}}, r"sets rope_scaling to \{'type': 'yarn'\}, which"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters takes rope_type default"),
            ({"quantization_config": {"bits": 4}}, "config.json sets quantization_config to"),
            ({"hybrid_block_layout": ["t", "gdn"]}, r"takes the blocks \['t', 'm2'\], got 'gdn'"),
            ({"hybrid_block_layout": ["t"] * 5}, "takes 1 to 4 entries, one for each layer or a"),
            ({"hybrid_block_layout": []}, r"hybrid_block_layout takes 1 to 4 .*, got \[\] in"),
            ({"hybrid_block_layout": ...}, "hybrid_block_layout takes 1 to 4 .*, got None in"),
            ({"vocab_size": ...}, "config.json lacks vocab_size"),
            ({"num_attention_heads": 3}, "kv_heads must divide heads"),
            ({"model_type": "apriel2", "architectures": ["Apriel2"]}, "model_type takes one of"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings(self, settings, sentence, tmp_path):
        refuses(sentence, edited(DATA / "apriel_hybrid", tmp_path / "in", **settings))

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"headdim": 64}, "ssm_cfg sets headdim to 64, which a tossup model has not"),
            ({"d_conv": 5}, "d_conv: input should be less than or equal to 4, got 5"),
            ({"d_inner": 128}, "mixer.A_log takes shape .128, 16., got .64, 16."),
            ({"conv_bias": False}, "has the unknown tensor model.layers.1.mixer.conv1d.bias"),
            ({"bias": True}, "lacks model.layers.1.mixer.dt_in_proj.bias, and 5 more"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_ssm_settings(self, settings, sentence, tmp_path):
        refuses(sentence, edited_ssm(DATA / "apriel_hybrid", tmp_path / "in", **settings))

    def test_mistral_with_layer_types(self, tmp_path):
        mistral().save_pretrained(tmp_path / "in")
        kinds = ["sliding_attention", "full_attention"]
        folder = edited(tmp_path / "in", tmp_path / "edited", layer_types=kinds)
        refuses("config.json sets layer_types to", folder)

    def test_folders_that_hold_no_weights_we_read(self, tmp_path):
        refuses("cannot read .*config.json: No such file or directory", tmp_path / "none")
        mistral().save_pretrained(tmp_path / "in", max_shard_size="8KB")
        shard = sorted((tmp_path / "in").glob("*.safetensors"))[1]
        shard.unlink()
        refuses(f"lacks the shard {shard.name} that its model.safetensors.index", tmp_path / "in")
        (tmp_path / "in" / "model.safetensors.index.json").unlink()
        (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"")
        refuses("weights are read from safetensors alone", tmp_path / "in")
        (tmp_path / "in" / "config.json").write_text("{")
        refuses("config.json is not JSON", tmp_path / "in")


class TestRefusedExports:
    @pytest.mark.parametrize(
        ("mixers", "format", "placement", "sentence"),
        [
            ({}, "apriel_hybrid_ssm", None, r"placement: is required to write a supernet in any"),
            ({}, "mistral", "amm", "mistral takes mixers of type attention, got mamba in layer 1"),
            ({}, "tossup", "am", "placement takes one mixer name for each of the 3 layers, got"),
            ({}, "tossup", "axm", r"placement takes names of the mixers \['a', 'm'\], got 'x'"),
            ({}, "llama", "aaa", "format takes one of .*, got 'llama'"),
            (
                {"o": {"type": "mamba1"}},
                "apriel_hybrid_ssm",
                "amo",
                "takes mixers of type attention or mamba, got mamba1 in layer 2",
            ),
            (
                {"w": ATTENTION | {"window_size": 4}},
                "apriel_hybrid_ssm",
                "amw",
                "takes one window_size for all layers of attention, got None and, in layer 2, 4",
            ),
            (
                {"n": MAMBA | {"state_size": 4}},
                "apriel_hybrid_ssm",
                "mna",
                "takes one state_size for all layers of mamba, got 8 and, in layer 1, 4",
            ),
            (
                {"p": ATTENTION | {"rope_theta": None}},
                "mistral",
                "ppp",
                "rope_theta takes a number in this format, got none",
            ),
        ],
    )
    def test_models(self, mixers, format, placement, sentence, tmp_path):
        model = supernet({"a": ATTENTION, "m": MAMBA, **mixers})
        with pytest.raises(ConfigError, match=sentence):
            save_checkpoint(model, tmp_path / "out", format, placement and tuple(placement))
        assert not list(tmp_path.iterdir())

    def test_an_ordinary_model_has_no_other_placement(self, tmp_path):
        model = place(supernet(), ("mamba",) * 3)
        with pytest.raises(ConfigError, match="placement takes a supernet; this model has one"):
            save_checkpoint(model, tmp_path / "out", placement=("attention",) * 3)

    def test_folders_that_are_no_checkpoint_are_kept(self, tmp_path):
        model, thesis = supernet(), tmp_path / "thesis.tex"
        thesis.write_text("years of work")
        for path in (tmp_path, thesis):
            with pytest.raises(ConfigError, match="one that holds a checkpoint and nothing else"):
                save_checkpoint(model, path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="one that holds a checkpoint and nothing else"):
            save_checkpoint(model, tmp_path)
        thesis.rename(tmp_path.with_suffix(".tex"))
        with pytest.raises(ConfigError, match="one that holds a checkpoint and nothing else"):
            save_checkpoint(model, tmp_path)  # any program may call a file config.json
        assert tmp_path.with_suffix(".tex").read_text() == "years of work"

    def test_an_import_is_not_replaced_with_its_tokenizer(self, tmp_path):
        save_checkpoint(supernet(), tmp_path / "hf", "mistral", ("attention",) * 3)
        (tmp_path / "hf" / "tokenizer.json").write_text("{}")
        config = ConvertConfig(input=tmp_path / "hf", output=tmp_path / "hf")
        with pytest.raises(ConfigError, match="one that holds a checkpoint and nothing else"):
            convert(config)
        assert (tmp_path / "hf" / "tokenizer.json").exists()
        (tmp_path / "hf" / "tokenizer.json").unlink()
        convert(config)
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "tossup"

    def test_a_training_checkpoint_may_be_replaced(self, tmp_path):
        save_checkpoint(supernet(), tmp_path / "out")
        (tmp_path / "out" / "optimizer.safetensors").write_bytes(b"")
        save_checkpoint(supernet(), tmp_path / "out")
        assert not (tmp_path / "out" / "optimizer.safetensors").exists()
        (tmp_path / "empty").mkdir()
        save_checkpoint(supernet(), tmp_path / "empty")
        assert load_checkpoint(tmp_path / "empty").config.is_supernet


class TestInterruptedExports:
    @pytest.mark.parametrize("format", ["tossup", "apriel_hybrid_ssm"])
    def test_failure_keeps_what_was_there(self, format, tmp_path, monkeypatch):
        model = supernet()
        save_checkpoint(model, tmp_path / "out", format, ("mamba",) * 3)
        before = tensors_of(tmp_path / "out")

        def disk_full(tensors, path):
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        for module in ("checkpoint", "conversion.huggingface"):
            monkeypatch.setattr(f"tossup.supernet.{module}.save_tensors", disk_full)
        for folder in ("out", "new"):
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(model, tmp_path / folder, format, ("attention",) * 3)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert_same_tensors(tensors_of(tmp_path / "out"), before)

    def test_a_kill_leaves_no_half_checkpoint(self, tmp_path):
        save_checkpoint(supernet(), tmp_path / "in")
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from tossup.supernet import conversion\n"
            "from tossup.supernet.conversion import huggingface\n"
            "def killed(tensors, path):\n"
            "    path.write_bytes(b'half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "huggingface.save_tensors = killed\n"
            "model = conversion.load_checkpoint(sys.argv[1])\n"
            "conversion.save_checkpoint(model, sys.argv[2], 'mistral', ('attention',) * 3)\n"
        )
        paths = [str(tmp_path / "in"), str(tmp_path / "out")]
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", script, *paths], cwd=root, check=False)
        assert done.returncode == -9
        assert not (tmp_path / "out").exists()
        save_checkpoint(load_checkpoint(paths[0]), paths[1], "mistral", ("attention",) * 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


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
