"""What conversion refuses, in one sentence that names the cause."""

import json

import pytest

from tests.supernet.conversion.checkpoints import (
    ATTENTION,
    DATA,
    MAMBA,
    edited,
    edited_ssm,
    mistral,
    refuses,
    supernet,
)
from tossup.supernet.conversion import (
    ConvertConfig,
    convert,
    load_checkpoint,
    place,
    save_checkpoint,
)
from tossup.supernet.errors import ConfigError


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
            ({}, "qwen", "aaa", "format takes one of .*, got 'qwen'"),
            (
                {"w": ATTENTION | {"window_size": 4}},
                "llama",
                "www",
                "llama takes attention without a window, got 4",
            ),
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
