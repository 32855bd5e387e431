"""`tossup convert`, and exports that were interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.supernet.conversion.checkpoints import (
    assert_same_tensors,
    logits,
    mistral,
    search_result,
    supernet,
    tensors_of,
)
from tossup.supernet.conversion import (
    ConvertConfig,
    convert,
    load_checkpoint,
    save_checkpoint,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.loader import load_config


class TestConvert:
    def test_placement_of_a_list(self, tmp_path):
        model = supernet()
        save_checkpoint(model, tmp_path / "in")
        words = [f"input={tmp_path}/in", f"output={tmp_path}/out", "format=apriel_hybrid_ssm"]
        words += ["placement=[mamba, attention, mamba]"]
        assert convert(load_config(None, words, ConvertConfig)) == tmp_path / "out"
        placement = ("mamba", "attention", "mamba")
        again = load_checkpoint(tmp_path / "out")
        assert not again.training
        assert torch.equal(logits(again), logits(model, placement=placement))

    @pytest.mark.parametrize("named", [True, False], ids=["ours", "Fast-LLM's"])
    def test_placement_of_a_search_result(self, named, tmp_path):
        model = supernet()
        save_checkpoint(model, tmp_path / "in")
        result = search_result([1, 0, 0])
        if named:
            result["config"]["mixers"] = ["mamba", "attention"]
        (tmp_path / "search.json").write_text(json.dumps(result))
        options = {"input": tmp_path / "in", "output": tmp_path / "o"}
        convert(ConvertConfig(**options, placement=tmp_path / "search.json"))
        placement = ("attention", "mamba", "mamba") if named else ("mamba",) + ("attention",) * 2
        assert load_checkpoint(tmp_path / "o").config.placement == placement
        convert(ConvertConfig(**options, placement="mamba"))  # in every layer
        again = load_checkpoint(tmp_path / "o")
        assert again.config.placement == ("mamba",) * 3 and not again.training

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
        with pytest.raises(ConfigError, match=r"placement: takes a list of mixer names, .*got 3"):
            load_config(None, ["input=a", "output=b", "placement=3"], ConvertConfig)


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
