"""Training on the Triton kernels, in the interpreter, beside the CPU backend."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.supernet.tiny import run_config
from tossup.kernels import backend
from tossup.kernels.backend import load_backend
from tossup.supernet.model import SupernetModel
from tossup.supernet.run_folder import latest_checkpoint
from tossup.supernet.train import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret beside a GPU")
def test_twenty_steps_agree(tmp_path, monkeypatch):
    """Sample by sample another mixer: the same losses, and every weight moved by as much."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loaded, losses, weights = [], [], []

    def spy(package: str, impl: str):
        loaded.append(impl)
        return load_backend(package, impl)

    monkeypatch.setattr(backend, "load_backend", spy)
    for impl in ("triton", "cpu"):
        monkeypatch.setenv("TOSSUP_IMPL", impl)
        config = run_config(tmp_path / impl, steps=20, batch_size=2)
        loaded.clear()
        train(config)
        assert set(loaded) == {impl}
        records = (tmp_path / impl / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
        weights.append(load_file(latest_checkpoint(tmp_path / impl) / "model.safetensors"))
    ours, theirs = losses
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-4)
    torch.manual_seed(config.seed)
    for name, before in SupernetModel(config.model).state_dict().items():
        moved, as_well = (after[name] - before for after in weights)
        assert moved.norm() > 0, name
        assert (moved - as_well).norm() < 1e-3 * moved.norm(), name
