"""Training on rows that hold several sequences, against each of them by itself."""

import copy

import pytest
import torch

from tests.supernet.tiny import run_values
from tossup.kernels.routing import MixerTable
from tossup.supernet.config import RunConfig
from tossup.supernet.train import Trainer


@pytest.mark.parametrize("dispatch", ["host", "device", "dense"])
def test_packed_sequences_train_as_each_by_itself(tmp_path, monkeypatch, dispatch):
    for index in range(12):
        (tmp_path / f"{index}.txt").write_bytes(bytes(range(index, index + 9)))
    values = run_values(tmp_path / "run", accumulation=2, dispatch=dispatch, clip_norm=None)
    values["model"]["vocab_size"] = 256
    values["data"] = dict(type="text", paths=[str(tmp_path)], length=21, packed=True, held_out=0.4)
    trainer = Trainer(RunConfig.model_validate(values))
    model = copy.deepcopy(trainer.model)
    for block in model.layers:
        block.mixer.dispatch = "host"
    losses = []
    for micro in range(2):
        tokens, labels, seq_idx = trainer.data.batch(micro, 4)
        table = trainer.model.draw(trainer.config.seed, micro, 4).table
        for row in range(4):
            own = MixerTable.of(table[:, row : row + 1], 2, 1)
            for number in seq_idx[row].unique():
                at = seq_idx[row] == number
                logits = model(tokens[row, at][None], table=own)[0]
                losses.append(torch.nn.functional.cross_entropy(
                    logits, labels[row, at], ignore_index=-100, reduction="none"
                ))  # fmt: skip
                losses[-1] = losses[-1][labels[row, at] != -100]
    loss = torch.cat(losses).mean()
    loss.backward()
    monkeypatch.setattr(trainer.optimizer, "step", lambda used: None)
    monkeypatch.setattr("tossup.supernet.train.forget_gradients", lambda *_: None)
    trainer.train_step()
    assert trainer.report.read()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
