"""Our own checkpoint: what is written is read, bit for bit, and what is broken is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.supernet.tiny import model_config
from tossup.supernet.checkpoint import (
    copy_tensors,
    model_tensors,
    read_checkpoint,
    save_model,
    save_tensors,
)
from tossup.supernet.config import ModelConfig
from tossup.supernet.errors import ConfigError
from tossup.supernet.model import SupernetModel

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(SupernetModel(model_config()), tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_bit_for_bit_in_its_dtype(tmp_path, dtype, tied):
    config = ModelConfig.model_validate(model_config().model_dump() | {"tie_embeddings": tied})
    model = SupernetModel(config).to(dtype)
    save_model(model, tmp_path)
    read = read_checkpoint(tmp_path)
    assert read.config == config
    assert (read.lm_head.weight is read.embed_tokens.weight) == tied
    ours, theirs = model_tensors(read), model_tensors(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name], tensor), name


def test_reading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    read_checkpoint(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_was_read_runs_and_learns(folder):
    torch.manual_seed(0)
    model, read = SupernetModel(model_config()), read_checkpoint(folder)
    table = model.draw(0, 0, 2)
    logits = read.train()(TOKENS, table=table)
    assert torch.equal(logits, model.train()(TOKENS, table=table))
    logits.sum().backward()
    assert read.embed_tokens.weight.grad is not None


def test_tensors_of_any_strides_are_written_as_they_read(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    views = {"transposed": tensor.T, "column": tensor[:, 1], "row": tensor[1]}
    save_tensors(views, tmp_path / "tensors")
    read = load_file(tmp_path / "tensors")
    assert all(torch.equal(read[name], view) for name, view in views.items())


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop("norm.weight"), "the checkpoint lacks norm.weight$"),
        (
            lambda t: t.update(stray=torch.ones(1)),
            "the checkpoint has the unknown tensor stray$",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(1)}),
            r"norm.weight takes shape \(16,\), got \(1,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, sentence):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=sentence):
        read_checkpoint(folder)
    model = SupernetModel(model_config())
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    with pytest.raises(ConfigError, match=sentence):
        copy_tensors(model_tensors(model), tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(model).items())


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("config.json", None, "cannot read .*config.json: No such file"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"\xff", "config.json is not JSON"),
        ("config.json", b"[]", "config.json takes a JSON object, got list"),
        ("config.json", b'{"model_type": "tossup"}', "config.json takes the key model"),
        ("config.json", b'{"model": {}}', "vocab_size: is required"),
        ("model.safetensors", None, "cannot read tensors from .*model.safetensors"),
        ("model.safetensors", b"", "cannot read tensors from .*model.safetensors"),
        ("model.safetensors", b"garbage " * 9, "cannot read tensors from .*model.safetensors"),
    ],
)
def test_a_broken_file_is_refused(folder, file, text, sentence):
    path = folder / file
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(ConfigError, match=sentence):
        read_checkpoint(folder)


def test_a_checkpoint_whose_replacement_was_killed_is_read(folder, tmp_path):
    written = json.loads((folder / "config.json").read_text())
    (tmp_path / "runs").mkdir()
    aside = tmp_path / "runs" / ".last.old"
    aside.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(aside / file)
    read = read_checkpoint(tmp_path / "runs" / "last")
    assert read.config == ModelConfig.model_validate(written["model"])
