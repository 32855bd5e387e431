"""Training: a step's data, its mixer tables and its learning rate are functions of its number.

So a run that was killed at any moment goes on from its last checkpoint to the same weights, bit for
bit. A run's folder holds config.yaml, metrics.jsonl and checkpoints/<step>.
"""

import json
import math
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..kernels.routing import MixerTable
from .checkpoint import load_tensors, save_model, save_tensors
from .config import RunConfig, TrainingConfig
from .data import build_data
from .errors import ConfigError
from .evaluate import evaluate_model
from .files import directory_atomically, exclusive, recover_directory, write_atomically
from .metrics import Mean, accumulate
from .model import SupernetModel, language_model_losses
from .optimizer import GatedAdamW, clip_grad_norm

# What may change between a run and its continuation: nothing that a step's result depends on.
CHANGEABLE = {"log_every", "evaluate_every", "evaluation_batches", "checkpoint_every"}
CHANGEABLE |= {"keep_checkpoints"}


def train(config: RunConfig) -> Path:
    """Train, or go on training, and return the folder of the last checkpoint.

    Raises ConfigError where the output folder holds a run of another configuration, or another
    process is training there.
    """
    try:
        with exclusive(config.output):
            claim_folder(config)
            trainer = Trainer(config)
            trainer.resume()
            trainer.run()
    except BlockingIOError as error:
        raise ConfigError(f"output: another process is training in {config.output}") from error
    return latest_checkpoint(config.output)


class Trainer:
    """Model, optimizer and counters of one run; everything else follows from the step's number."""

    def __init__(self, config: RunConfig):
        self.config, self.options = config, config.training
        self.device = torch.device(self.options.device)
        torch.manual_seed(config.seed)
        self.model = SupernetModel(config.model, self.options.dispatch).to(self.device)
        self.model.train()
        freeze(self.model, self.options.frozen)
        self.optimizer = build_optimizer(self.model, self.options)
        self.data = build_data(config.data, config.seed)
        self.step = 0
        self.report = Report(config.model.num_layers, self.model.mixer_names, self.device)

    def run(self) -> None:
        options = self.options
        bar = tqdm(
            total=options.steps, initial=self.step, unit="step", desc="train", dynamic_ncols=True
        )
        with bar, open(self.config.output / "metrics.jsonl", "a") as log:
            while self.step < options.steps:
                self.train_step()
                self.step += 1
                last = self.step == options.steps
                if last or self.step % options.log_every == 0:
                    record = {"step": self.step, **self.report.read()}
                    write_record(log, record)
                    bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                if options.evaluate_every and (last or self.step % options.evaluate_every == 0):
                    write_record(log, {"step": self.step, "evaluation": self.evaluate()})
                if last or self.step % options.checkpoint_every == 0:
                    self.save()
                bar.update()

    def train_step(self) -> None:
        options = self.options
        rate = learning_rate(options, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        used = torch.zeros(
            self.config.model.num_layers, len(self.model.mixer_names), device=self.device
        )
        for micro in range(options.accumulation):
            table = self.draw(micro)
            loss = self.micro_batch(micro, table)
            (loss / options.accumulation).backward()
            used += table.count.to(self.device) if table else 0
        norm = clip_grad_norm(self.optimizer, options.clip_norm or math.inf, used)
        self.optimizer.step(used)
        self.optimizer.zero_grad()
        self.report.add_step(rate, norm)

    def draw(self, micro: int) -> MixerTable | None:
        if not self.config.model.is_supernet:
            return None
        per_step = self.options.table_per == "step"
        count = self.step if per_step else self.step * self.options.accumulation + micro
        return self.model.draw(self.config.seed, count, self.options.batch_size)

    def micro_batch(self, micro: int, table: MixerTable | None) -> Tensor:
        count = self.step * self.options.accumulation + micro
        tokens, labels = self.data.batch(count, self.options.batch_size)
        extra: dict[str, Mean] = {}
        metrics: dict[str, Mean] = {}
        bfloat16 = self.options.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.model(tokens.to(self.device), table=table, losses=extra, metrics=metrics)
        losses, counts = language_model_losses(logits, labels.to(self.device))
        self.report.add(losses.detach(), counts, table, {**extra, **metrics})
        loss = losses.sum() / counts.sum().clamp(min=1)
        return loss + sum(mean.value for mean in extra.values())

    def evaluate(self) -> dict[str, float]:
        batches = self.data.evaluation(self.options.evaluation_batches, self.options.batch_size)
        return dict(evaluate_model(self.model, batches).metrics)

    def save(self) -> None:
        checkpoints = self.config.output / "checkpoints"
        with directory_atomically(checkpoints / f"{self.step:08d}") as folder:
            save_model(self.model, folder)
            save_tensors(optimizer_tensors(self.optimizer), folder / "optimizer.safetensors")
        for old in list_checkpoints(self.config.output)[: -self.options.keep_checkpoints]:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one, and forget what was logged after it."""
        folders = list_checkpoints(self.config.output)
        if folders:
            load_tensors(self.model, load_file(folders[-1] / "model.safetensors"))
            load_optimizer(self.optimizer, load_file(folders[-1] / "optimizer.safetensors"))
            self.step = int(folders[-1].name)
        metrics = self.config.output / "metrics.jsonl"
        if metrics.exists():
            write_atomically(metrics, "".join(records_until(metrics, self.step)))


class Report:
    """Sums between two log lines, kept on the device and read when a line is written."""

    def __init__(self, layers: int, mixers: tuple[str, ...], device: torch.device):
        self.layers, self.mixers, self.device = layers, mixers, device
        self.clear()

    def clear(self) -> None:
        self.loss = Mean(*torch.zeros(2, device=self.device))
        # [layers, mixers]: summed loss and number of labelled tokens and samples that took a mixer
        shape = (3, self.layers, len(self.mixers))
        self.by_mixer = torch.zeros(shape, device=self.device)
        self.extra: dict[str, Mean] = {}
        self.rate, self.norm = 0.0, torch.zeros((), device=self.device)

    def add(
        self, losses: Tensor, counts: Tensor, table: MixerTable | None, extra: dict[str, Mean]
    ) -> None:
        """losses, counts: (batch,), summed over each sample's tokens."""
        self.loss += Mean(losses.sum(), counts.sum())
        for key, mean in extra.items():
            accumulate(self.extra, key, Mean(mean.total.detach(), mean.count))
        if table is not None:
            row = table.table.to(self.device).expand(-1, len(losses))
            # [layers, mixers, batch]
            taken = row[:, None] == torch.arange(len(self.mixers), device=self.device)[:, None]
            samples = torch.stack((losses, counts.float(), torch.ones_like(losses)))
            self.by_mixer += torch.einsum("lmb,kb->klm", taken.float(), samples)

    def add_step(self, rate: float, norm: Tensor) -> None:
        self.rate, self.norm = rate, norm

    def read(self) -> dict[str, Any]:
        """The log line's values; the only place where the host waits for the device."""
        losses, tokens, samples = self.by_mixer.cpu()
        record: dict[str, Any] = {
            "loss": self.loss.value.item(),
            "learning_rate": self.rate,
            "grad_norm": self.norm.item(),
            **{key: mean.value.item() for key, mean in self.extra.items()},
        }
        if samples.any():
            record["samples"], record["loss_by_mixer"] = {}, {}
            for m, name in enumerate(self.mixers):
                means = losses[:, m] / tokens[:, m].clamp(min=1)
                record["samples"][name] = samples[:, m].int().tolist()
                record["loss_by_mixer"][name] = [
                    mean if taken else None
                    for mean, taken in zip(means.tolist(), samples[:, m], strict=True)
                ]
        self.clear()
        return record


def learning_rate(options: TrainingConfig, step: int) -> float:
    """Linear warm-up to learning_rate, then a cosine to final_learning_rate (SGDR, eq. 5)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    low = options.final_learning_rate
    return low + (options.learning_rate - low) * cosine


def freeze(model: SupernetModel, patterns: tuple[str, ...]) -> None:
    """Stop the gradients of parameters whose names match; a pattern that matches none is wrong."""
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if fnmatch(name, pattern)]
        if not matched:
            raise ConfigError(
                f"training.frozen takes patterns of parameter names, got {pattern!r}, "
                "which matches none"
            )
        for parameter in matched:
            parameter.requires_grad_(False)


def build_optimizer(model: SupernetModel, options: TrainingConfig) -> GatedAdamW:
    """One group per gate and kind; matrices decay; norms, biases, taps, A_log and D do not."""
    groups: dict[tuple[Any, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and not name.endswith("A_log")
            groups.setdefault((model.gate_of(name), decays), []).append(parameter)
    names = model.mixer_names
    return GatedAdamW(
        [
            {
                "params": parameters,
                "gate": (gate[0], names.index(gate[1])) if gate else None,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (gate, decays), parameters in groups.items()
        ],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        inactive=options.inactive,
    )


def optimizer_tensors(optimizer: GatedAdamW) -> dict[str, Tensor]:
    """Its state as named tensors: "<parameter's number>.<moment>"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: GatedAdamW, tensors: dict[str, Tensor]) -> None:
    skeleton = optimizer.state_dict()
    for i, values in skeleton["state"].items():
        skeleton["state"][i] = {key: tensors[f"{i}.{key}"] for key in values}
    optimizer.load_state_dict(skeleton)


def claim_folder(config: RunConfig) -> None:
    """Write config.yaml, or check that the run that is there is this one."""
    path = config.output / "config.yaml"
    ours = config.model_dump(mode="json")
    if not path.exists():
        write_atomically(path, yaml.safe_dump(ours, sort_keys=False))
        return
    theirs = yaml.safe_load(path.read_text())
    for key, was, now in differences(decisive(theirs), decisive(ours)):
        raise ConfigError(
            f"{config.output} holds a run whose {key} is {was}, not {now}: "
            "take another output, or remove the folder"
        )


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that its weights depend on."""
    kept = {key: value for key, value in config.items() if key not in ("output", "search")}
    kept["training"] = {k: v for k, v in config["training"].items() if k not in CHANGEABLE}
    return kept


def differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for part in {**was, **now}:
            inner = f"{key}.{part}" if key else part
            yield from differences(was.get(part), now.get(part), inner)
    elif was != now:
        yield key, was, now


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    if not folder.exists():
        return []
    for leftover in folder.glob(".*.old"):
        recover_directory(leftover.with_name(leftover.name[1:-4]))
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def latest_checkpoint(output: Path) -> Path:
    """The newest checkpoint of a run's folder. Raises ConfigError where there is none."""
    folders = list_checkpoints(output)
    if not folders:
        raise ConfigError(f"{output} holds no checkpoint: run tossup train first")
    return folders[-1]


def records_until(path: Path, step: int) -> Iterator[str]:
    """The log's whole lines up to a step. A kill may have torn the last one."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            yield line


def write_record(log: Any, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()
