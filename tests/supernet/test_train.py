"""Training: against a plain loop by hand, and through kills."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.supernet.tiny import run_config, run_values
from tossup.supernet.checkpoint import read_checkpoint
from tossup.supernet.config import RunConfig
from tossup.supernet.data import build_data
from tossup.supernet.errors import ConfigError
from tossup.supernet.files import exclusive
from tossup.supernet.model import SupernetModel
from tossup.supernet.train import Trainer, latest_checkpoint, learning_rate, train


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def tensors(output):
    folder = latest_checkpoint(output)
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_run_is_the_plain_loop_it_says_it_is(tmp_path):
    """Per-mixer torch AdamW, stepped by hand only where the table used the mixer."""
    run = run_config(
        tmp_path, accumulation=2, warmup_steps=3, weight_decay=0.3, clip_norm=0.5, eps=1e-6
    )
    train(run)
    torch.manual_seed(run.seed)
    model = SupernetModel(run.model)
    data = build_data(run.data, run.seed)
    optimizers = {}
    for name, parameter in model.named_parameters():
        decay = 0.3 if parameter.ndim == 2 and "A_log" not in name else 0.0
        optimizers.setdefault(model.gate_of(name), []).append(
            {"params": [parameter], "weight_decay": decay}
        )
    optimizers = {
        gate: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, foreach=False)
        for gate, groups in optimizers.items()
    }
    for step in range(12):
        used = {None}
        for micro in (0, 1):
            table = model.draw(run.seed, 2 * step + micro, 4)
            for layer, counts in enumerate(table.count.tolist()):
                used |= {(layer, model.mixer_names[m]) for m, n in enumerate(counts) if n}
            tokens, labels = data.batch(2 * step + micro, 4)
            logits = model(tokens, table=table).flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, labels.flatten()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for gate in used:
            for group in optimizers[gate].param_groups:
                group["lr"] = learning_rate(run.training, step)
            optimizers[gate].step()
        model.zero_grad()
    trained = load_file(latest_checkpoint(tmp_path) / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(tmp_path):
    """Really killed, with SIGKILL, again and again, until it gets through."""
    values = run_values(tmp_path / "whole", steps=40, checkpoint_every=3, evaluate_every=5)
    train(RunConfig.model_validate(values))
    values["output"] = str(tmp_path / "killed")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "tossup.supernet", "train", str(config)]
    kills, progress = 0, set()
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        before = len(progress)
        while process.poll() is None and len(progress) < before + 9:
            progress |= set((tmp_path / "killed").glob("checkpoints/[0-9.]*"))
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 1
    assert_equal(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"))
    assert records(tmp_path / "killed") == records(tmp_path / "whole")


def test_a_kill_before_the_first_checkpoint_begins_anew(tmp_path):
    run = run_config(tmp_path / "a")
    train(run)
    again = run_config(tmp_path / "b")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "loss": 0}\n{"step": 2, "lo')
    train(again)
    assert records(tmp_path / "b") == records(tmp_path / "a")


def test_finished_runs_stay_as_they_are_and_others_are_refused(tmp_path):
    train(run_config(tmp_path))
    before = tensors(tmp_path), records(tmp_path)
    train(run_config(tmp_path, log_every=5))  # of no consequence for the weights
    assert_equal(tensors(tmp_path), before[0])
    assert records(tmp_path) == before[1]
    with pytest.raises(ConfigError, match=r"a run whose training.learning_rate is 0.001, not 0.1:"):
        train(run_config(tmp_path, learning_rate=0.1))


def test_one_process_trains_in_a_folder(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(ConfigError, match="another process is training in"),
    ):
        train(run_config(tmp_path))
    train(run_config(tmp_path))


def test_log_counts_and_losses_are_of_the_tables(tmp_path):
    run = run_config(tmp_path, log_every=4)
    train(run)
    (first, *_) = records(tmp_path)
    model = SupernetModel(run.model)
    counts = sum(model.draw(run.seed, step, 4).count for step in range(4))
    for m, name in enumerate(model.mixer_names):
        assert first["samples"][name] == counts[:, m].tolist()
    means = [first["loss_by_mixer"][name] for name in model.mixer_names]
    for layer in range(2):  # each layer's two means, weighted, are the mean of all
        weighted = sum(
            mean[layer] * n for mean, n in zip(means, counts[layer].tolist(), strict=True)
        )
        assert weighted / 16 == pytest.approx(first["loss"], rel=1e-5)


def test_one_table_per_step_or_one_per_micro_batch(tmp_path):
    trainer = Trainer(run_config(tmp_path, accumulation=3))
    assert len({tuple(trainer.draw(m).table.flatten().tolist()) for m in range(3)}) > 1
    trainer = Trainer(run_config(tmp_path, accumulation=3, table_per="step"))
    assert len({tuple(trainer.draw(m).table.flatten().tolist()) for m in range(3)}) == 1


def test_frozen_parameters_stay(tmp_path):
    run = run_config(tmp_path, frozen=("*.mlp.*", "embed_tokens.weight"))
    torch.manual_seed(run.seed)
    start = dict(SupernetModel(run.model).named_parameters())
    trained = dict(read_checkpoint(train(run)).named_parameters())
    for name, parameter in trained.items():
        frozen = ".mlp." in name or name == "embed_tokens.weight"
        assert torch.equal(parameter, start[name]) == frozen
    with pytest.raises(ConfigError, match=r"got '\*.gate', which matches none"):
        Trainer(run_config(tmp_path, frozen=("*.gate",)))


@pytest.mark.parametrize("inactive", ["skip", "decay"])
def test_a_mixer_that_nobody_took_stays_unless_it_decays(tmp_path, inactive):
    values = run_values(tmp_path, inactive=inactive)
    values["model"]["mixer"] |= {
        "sampling_strategy": "weighted",
        "sampling_weights": {"attention": 1, "mamba": 0},
    }
    run = RunConfig.model_validate(values)
    torch.manual_seed(run.seed)
    start = dict(SupernetModel(run.model).named_parameters())
    for name, parameter in read_checkpoint(train(run)).named_parameters():
        if ".mixers.mamba." in name and name.endswith("_proj.weight"):
            assert torch.equal(parameter, start[name]) == (inactive == "skip")


def test_bfloat16_trains_as_float32_does_to_its_precision(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        train(run_config(tmp_path / dtype, dtype=dtype, learning_rate=3e-3))
        losses[dtype] = [record["loss"] for record in records(tmp_path / dtype)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_an_ordinary_model_trains_too(tmp_path):
    values = run_values(tmp_path)
    values["model"]["placement"] = ["mamba", "attention"]
    train(RunConfig.model_validate(values))
    log = records(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert "samples" not in log[0]


def test_the_rate_warms_up_and_falls_along_a_cosine():
    options = run_config(
        "x", steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.2
    ).training
    rates = [learning_rate(options, step) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6) and rates[110] == pytest.approx(0.2)
