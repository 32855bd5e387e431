"""Training: against a plain loop by hand, and through kills."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.supernet.tiny import MIXERS, run_config, run_values
from tossup.kernels.routing import MixerTable
from tossup.supernet.checkpoint import read_checkpoint
from tossup.supernet.config import RunConfig, TrainingConfig
from tossup.supernet.data import build_data
from tossup.supernet.devices import device_of
from tossup.supernet.errors import ConfigError
from tossup.supernet.files import exclusive
from tossup.supernet.mixers import GroupedMamba
from tossup.supernet.model import SupernetModel
from tossup.supernet.run_folder import CHANGEABLE, latest_checkpoint, list_checkpoints, write_config
from tossup.supernet.train import Trainer, learning_rate, train


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
    """Really killed, with SIGKILL, near a checkpoint that comes between two lines of the log."""
    values = run_values(
        tmp_path / "whole", steps=60, checkpoint_every=7, log_every=4, evaluate_every=5
    )
    train(RunConfig.model_validate(values))
    values["output"] = str(tmp_path / "killed")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    watched = "import sys; sys.stderr.isatty = lambda: True"  # the bar tells where a run begins
    run = f"{watched}; from tossup.supernet.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "train", str(config)]
    firsts, progress = [], set()
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while process.poll() is None and (firsts or len(progress) < 2):
            progress |= set((tmp_path / "killed").glob("checkpoints/[0-9]*"))
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        firsts.append(int(re.search(r"(\d+)/60 ", errors.decode())[1]))
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert len(firsts) == 2 and firsts[0] == 0 and firsts[1] % 7 == 0 and firsts[1] > 0
    assert latest_checkpoint(tmp_path / "killed").name == "00000060"
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


def test_finished_runs_stay_as_they_are(tmp_path):
    train(run_config(tmp_path))
    before = tensors(tmp_path), records(tmp_path)
    train(run_config(tmp_path, log_every=5))  # of no consequence for the weights
    assert_equal(tensors(tmp_path), before[0])
    assert records(tmp_path) == before[1]


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(run_config(tmp_path, steps=2))
    others = {
        "steps": 3,
        "batch_size": 5,
        "accumulation": 2,
        "table_per": "step",
        "learning_rate": 0.1,
        "final_learning_rate": 1e-4,
        "warmup_steps": 1,
        "betas": [0.8, 0.95],
        "eps": 1e-6,
        "weight_decay": 0.2,
        "clip_norm": None,
        "inactive": "decay",
        "init_from": "elsewhere",
        "frozen": ["norm.weight"],
        "dispatch": "dense",
        "dtype": "bfloat16",
        "device": "cpu:0",
        "table_per_rank": True,
    }
    with_device_dispatch = {"graph", "streams"}  # which is another run already
    fields = others.keys() | CHANGEABLE | with_device_dispatch
    assert fields == set(TrainingConfig.model_fields)
    for key, value in others.items():
        with pytest.raises(ConfigError, match=f"holds a run whose training.{key} is .*, not "):
            train(run_config(tmp_path, **{"steps": 2, key: value}))
    values = run_values(tmp_path, steps=2)
    with pytest.raises(ConfigError, match="a run whose seed is 3, not 4:"):
        train(RunConfig.model_validate(values | {"seed": 4}))
    mixers = dict(reversed(values["model"]["mixer"]["mixers"].items()))
    values["model"]["mixer"] = values["model"]["mixer"] | {"mixers": mixers}
    with pytest.raises(ConfigError, match=r"mixers is .'attention', 'mamba'., not .'mamba', 'att"):
        train(RunConfig.model_validate(values))


def test_a_run_that_never_came_to_a_checkpoint_holds_no_folder(tmp_path):
    for wrong in ({"device": "gpu"}, {"frozen": ["*.nothing"]}, {"learning_rate": 1e30}):
        with pytest.raises(ConfigError):
            train(run_config(tmp_path, **wrong))
    train(run_config(tmp_path))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == run_config(tmp_path).model_dump(mode="json")


def test_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    with (
        exclusive(tmp_path),
        pytest.raises(ConfigError, match="another process is training in"),
    ):
        train(run_config(tmp_path))
    train(run_config(tmp_path))

    def busy(self):
        raise BlockingIOError("of something else")

    monkeypatch.setattr(Trainer, "train_step", busy)
    with pytest.raises(BlockingIOError, match="of something else"):
        train(run_config(tmp_path / "other"))


def test_what_diverges_is_neither_logged_nor_saved(tmp_path):
    run = run_config(tmp_path, learning_rate=1e30, checkpoint_every=1, evaluate_every=1)
    with pytest.raises(ConfigError, match=r"diverged: .* at step \d+, with learning rate .*e\+"):
        train(run)
    for record in records(tmp_path):
        assert "NaN" not in json.dumps(record) and "Infinity" not in json.dumps(record)
    for folder in list_checkpoints(tmp_path):
        for tensor in load_file(folder / "model.safetensors").values():
            assert tensor.isfinite().all()


def test_an_evaluation_that_diverged_is_not_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"loss": math.inf})
    with pytest.raises(ConfigError, match="diverged: loss is inf at step 4, with learning rate "):
        train(run_config(tmp_path, evaluate_every=4))


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path):
    trainer = Trainer(run_config(tmp_path))
    trainer.train_step()
    trainer.step = 1
    with torch.no_grad():
        trainer.model.norm.weight[3] = float("nan")
    with pytest.raises(ConfigError, match=r"diverged: norm.weight is nan at step 1"):
        trainer.save()
    assert not list_checkpoints(tmp_path)


def test_the_log_goes_on_across_a_kill_between_two_lines(tmp_path):
    options = {"log_every": 5, "checkpoint_every": 3}
    train(run_config(tmp_path / "whole", **options))
    killed = run_config(tmp_path / "killed", **options)
    write_config(killed)
    trainer = Trainer(killed)
    for _ in range(3):
        trainer.train_step()
        trainer.step += 1
    trainer.save()
    train(killed)
    log = "metrics.jsonl"
    assert (tmp_path / "killed" / log).read_bytes() == (tmp_path / "whole" / log).read_bytes()


def test_what_happens_now_and_then_happens_after_the_last_step_too(tmp_path):
    train(
        run_config(tmp_path, log_every=5, evaluate_every=7, checkpoint_every=2, keep_checkpoints=3)
    )
    log = records(tmp_path)
    assert [record["step"] for record in log if "loss" in record] == [5, 10, 12]
    assert [record["step"] for record in log if "evaluation" in record] == [7, 12]
    assert [int(folder.name) for folder in list_checkpoints(tmp_path)] == [8, 10, 12]


class Ragged:
    """Micro-batches whose numbers of labelled tokens differ; in the third there are none."""

    def batch(self, step, batch_size):
        tokens = torch.arange(batch_size * 16).view(batch_size, 16) * (step + 3) % 32
        labels = tokens.roll(-1, 1).clone()
        labels[:, (13, 2, 0)[step % 3] :] = -100
        return tokens, labels


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_a_step_weighs_labelled_tokens_and_not_micro_batches(tmp_path, monkeypatch, clip_norm):
    run = run_config(tmp_path, accumulation=3, table_per="step", clip_norm=clip_norm)
    trainer = Trainer(run)
    trainer.data = Ragged()
    table = trainer.draw(0)
    batches = [Ragged().batch(micro, 4) for micro in range(3)]
    tokens, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = MixerTable.of(table.table.expand(-1, 4).repeat(1, 3), 2, 12)
    model = copy.deepcopy(trainer.model)
    loss = torch.nn.functional.cross_entropy(
        model(tokens, table=whole).flatten(0, 1), labels.flatten()
    )
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    gradients = {}

    def remember(used):
        gradients.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )

    monkeypatch.setattr(trainer.optimizer, "step", remember)
    trainer.train_step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    record = trainer.report.read()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_samples_without_labels_have_no_loss(tmp_path, monkeypatch):
    trainer = Trainer(run_config(tmp_path))
    trainer.data = Ragged()
    trainer.step = 2  # all of it ignored
    losses, loss = [], trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda *args: losses.append(loss(*args)) or losses[-1])
    trainer.train_step()
    assert [loss.item() for loss in losses] == [0]
    record = trainer.report.read()
    assert record["loss"] == 0 and record["grad_norm"] == 0
    assert sum(sum(counts) for counts in record["samples"].values()) == 2 * 4
    assert record["loss_by_mixer"] == {name: [None, None] for name in ("attention", "mamba")}


def test_mixers_losses_are_learned_from_and_reported(tmp_path, monkeypatch):
    """Mamba adds its outputs' mean square, averaged over a step's micro-batches."""
    forward = GroupedMamba.forward

    def lossy(self, hidden_states, losses=None, **kwargs):
        out = forward(self, hidden_states, **kwargs)
        losses["size"] = out.square().mean((1, 2)) * 1e4
        return out

    values = run_values(tmp_path, accumulation=2, clip_norm=None)
    values["model"]["mixer"] |= {
        "sampling_strategy": "weighted",
        "sampling_weights": {"attention": 0, "mamba": 1},
    }
    run = RunConfig.model_validate(values)
    trainers = []
    for kind in (forward, lossy):
        monkeypatch.setattr(GroupedMamba, "forward", kind)
        trainers.append(Trainer(run))
        monkeypatch.setattr(trainers[-1].optimizer, "step", lambda used: None)
        monkeypatch.setattr("tossup.supernet.train.forget_gradients", lambda *_: None)
        trainers[-1].train_step()
    plain, trainer = trainers
    total = torch.zeros(())
    for micro in range(2):
        losses = {}
        tokens, _ = trainer.data.batch(micro, 4)
        trainer.model(tokens, table=trainer.draw(micro), losses=losses)
        total = total + losses["mamba/size"].value / 2
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    without = dict(plain.model.named_parameters())
    assert any(parameter.grad is not None for parameter in parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if parameter.grad is not None:
            both = without[name].grad + (0 if gradient is None else gradient)
            torch.testing.assert_close(parameter.grad, both, rtol=1e-3, atol=1e-5)
    assert trainer.report.read()["mamba/size"] == pytest.approx(total.item(), rel=1e-5)


def test_a_pretrained_model_starts_the_main_mixers_once(tmp_path):
    values = run_values(tmp_path / "pretrained", steps=2)
    values["model"] |= {"mixer": values["model"]["mixer"]["mixers"]["attention"], "eos_token_id": 7}
    source = train(RunConfig.model_validate(values))
    pretrained = load_file(source / "model.safetensors")
    run = run_config(tmp_path / "run", steps=2, init_from=source)
    trainer = Trainer(run)
    trainer.start()
    assert trainer.model.config.eos_token_id == 7
    for name, parameter in trainer.model.named_parameters():
        if trainer.model.gate_of(name) in (None, (0, "attention"), (1, "attention")):
            assert torch.equal(parameter, pretrained[name.replace(".mixers.attention", "")]), name
    train(run)
    shutil.rmtree(source)
    trainer = Trainer(run)
    trainer.start()
    assert trainer.model.config.eos_token_id == 7
    assert_equal(
        dict(trainer.model.named_parameters()),
        dict(load_file(latest_checkpoint(run.output) / "model.safetensors")),
    )


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    run = run_config(tmp_path, steps=2)
    path = train(run) / "optimizer.safetensors"
    state = load_file(path)
    for change, sentence in (
        ({"norm.weight.exp_avg": torch.ones(3)}, r"norm.weight.exp_avg takes shape \(16,\), got"),
        ({"stray.exp_avg": torch.ones(3)}, "unknown tensor stray.exp_avg"),
        ({"report.by_mixer": torch.ones(3)}, r"by_mixer takes shape \(3, 2, 2\), got \(3,\)"),
    ):
        save_file({**state, **change}, path)
        with pytest.raises(ConfigError, match=sentence):
            Trainer(run).start()


def broken(path, how):
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(b"\xff garbage\n" * 9)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    "file, how, sentence",
    [
        ("config.yaml", "missing", "does not describe the run whose checkpoints are there: cannot"),
        ("config.yaml", "garbage", "config.yaml does not describe the run"),
        ("config.yaml", "", "config.yaml does not describe the run"),
        ("config.yaml", "text", "config.yaml does not describe the run"),
        ("metrics.jsonl", "garbage", "metrics.jsonl: line 1 is no record of training"),
        ("metrics.jsonl", '{"step": 1}\n[]\n', "metrics.jsonl: line 2 is no record of training"),
        ("checkpoints/00000002/model.safetensors", "missing", "cannot read tensors from .*model"),
        ("checkpoints/00000002/model.safetensors", "truncated", "cannot read tensors from .*model"),
        ("checkpoints/00000002/optimizer.safetensors", "missing", "cannot read tensors from .*opt"),
        ("checkpoints/00000002/optimizer.safetensors", "garbage", "cannot read tensors from .*opt"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, file, how, sentence):
    train(run_config(tmp_path, steps=2))
    broken(tmp_path / file, how)
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(run_config(tmp_path, steps=2))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"frozen": ["*"]}, "training.frozen leaves no parameter to train"),
        ({"device": "gpu"}, "training.device takes a device of this machine, .* got 'gpu'"),
        (
            {"device": "cuda:99"},
            "training.device takes a device .* got 'cuda:99': .*(CUDA|NVIDIA|ordinal)",
        ),
        ({"device": "meta"}, "training.device takes a device of this machine, .* got 'meta'"),
        ({"device": "xpu:7"}, "training.device takes a device of this machine, .* got 'xpu:7'"),
    ],
)
def test_what_a_run_cannot_be_made_of_is_one_sentence(tmp_path, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train(run_config(tmp_path, **wrong))


@pytest.mark.parametrize("impl, sentence", [("triton", "runs on cuda"), ("x", "TOSSUP_IMPL")])
def test_a_device_takes_mixers_with_a_backend_for_it(monkeypatch, impl, sentence):
    monkeypatch.setenv("TOSSUP_IMPL", impl)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=sentence):
        device_of("cpu")
    monkeypatch.setenv("TOSSUP_IMPL", "reference")
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setenv("TOSSUP_IMPL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device_of("cpu") == torch.device("cpu")


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=f"output: cannot write in {output}: "):
            train(run_config(output))


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": [1.0, 2.0]},
        {"learning_rate": float("inf")},
        {"eps": float("nan")},
    ],
)
def test_numbers_that_no_step_can_use_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run_config("x", **wrong)


def test_log_counts_and_losses_are_of_the_tables(tmp_path):
    run = run_config(tmp_path, log_every=4)
    train(run)
    model = SupernetModel(run.model)
    for record in records(tmp_path):
        steps = range(record["step"] - 4, record["step"])
        counts = sum(model.draw(run.seed, step, 4).count for step in steps)
        for m, name in enumerate(model.mixer_names):
            assert record["samples"][name] == counts[:, m].tolist()
        means = [record["loss_by_mixer"][name] for name in model.mixer_names]
        for layer in range(2):  # each layer's two means, weighted, are the mean of all
            weighted = sum(
                mean[layer] * n for mean, n in zip(means, counts[layer].tolist(), strict=True)
            )
            assert weighted / 16 == pytest.approx(record["loss"], rel=1e-5)


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


def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up():
    """As under transformers' schedules: an example is tried by training.steps=4 alone."""
    options = run_config("x", steps=4, warmup_steps=20, learning_rate=1.0).training
    rates = [learning_rate(options, step) for step in range(4)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_device_dispatch_trains_as_host_dispatch_does(tmp_path, accumulation):
    """The same losses and weights, though gradients lie where the last step left its own."""
    losses, weights = [], []
    for dispatch in ("device", "host"):
        values = run_values(tmp_path / dispatch, dispatch=dispatch, accumulation=accumulation)
        values["model"]["mixer"]["mixers"] = MIXERS | {"mamba1": {"type": "mamba1", "d_state": 4}}
        train(RunConfig.model_validate(values))
        records = (tmp_path / dispatch / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
        weights.append(load_file(latest_checkpoint(tmp_path / dispatch) / "model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_graph_takes_device_dispatch_and_cuda(tmp_path):
    with pytest.raises(ValueError, match="graph takes dispatch device, got host"):
        run_config(tmp_path, graph=True)
    values = run_values(tmp_path, dispatch="device", graph=True)
    values["model"]["mixer"]["mixers"] = {"mamba": {"type": "mamba1", "d_state": 4}}
    with pytest.raises(ConfigError, match=r"graph takes training\.device cuda, got cpu"):
        Trainer(RunConfig.model_validate(values))
