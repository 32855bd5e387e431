"""Training: a step's data, its mixer tables and its learning rate are functions of its number.

So a run that was killed at any moment goes on from its last checkpoint to the same weights, bit for
bit.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.routing import MixerTable
from ..kernels.transfer import send
from .checkpoint import (
    copy_tensors,
    model_tensors,
    open_tensors,
    read_config,
    save_model,
    save_tensors,
)
from .config import RunConfig, TrainingConfig
from .conversion import load_into
from .data import IGNORED, Batch, build_data
from .devices import device_of
from .errors import ConfigError
from .evaluate import evaluate_model
from .files import directory_atomically
from .graphed_step import GraphedStep
from .metrics import Mean
from .model import SupernetModel, language_model_losses
from .optimizer import GatedAdamW, clip_grad_norm_, forget_gradients, parameter_groups
from .ranks import Ranks
from .report import Report
from .run_folder import (
    DATA,
    check_same_run,
    fingerprint_of,
    forget_after,
    latest_checkpoint,
    list_checkpoints,
    locked,
    refuse_changed,
    write_config,
    write_record,
)
from .stochastic import StochasticMixer

REPORT = "report."  # before the names of the report's sums, which optimizer.safetensors holds too
RANKS = "ranks"  # and how many there were


def train(config: RunConfig) -> Path:
    """Train, or go on training, and return the folder of the last checkpoint.

    Raises ConfigError where the output folder holds a run of another configuration, another process
    is training there, or the loss is no longer finite.
    """
    ranks = Ranks(device_of(config.training.device))
    with locked(config.output) if ranks.first else nullcontext():
        if ranks.first:
            check_same_run(config)
        ranks.wait()
        trainer = Trainer(config, ranks)
        trainer.start()
        if ranks.first:
            write_config(config)
        trainer.run()
        written = latest_checkpoint(config.output) if ranks.first else config.output
    return ranks.gather(written)[0]


class Trainer:
    """Model, optimizer and counters of one run; everything else follows from the step's number.

    ranks: the processes that train together; by default this one alone, or torchrun's.
    """

    def __init__(self, config: RunConfig, ranks: Ranks | None = None):
        self.config, self.options = config, config.training
        self.device = device_of(self.options.device)
        self.ranks = Ranks(self.device) if ranks is None else ranks
        torch.manual_seed(config.seed)
        self.model = SupernetModel(config.model, self.options.dispatch).to(self.device)
        self.model.train()
        for mixer in stochastic_mixers(self.model):
            mixer.streams = self.options.streams
        freeze(self.model, self.options.frozen)
        self.optimizer = build_optimizer(self.model, self.options)
        self.data = build_data(config.data, config.seed)
        self.step = 0
        self.report = Report(config.model.num_layers, self.model.mixer_names, self.device)
        self.inputs = Inputs(self.device)
        self.update = self.run_step
        if self.options.graph:
            self.update = graphed(self.run_step, self.device, self.ranks)
            for group in self.optimizer.param_groups:
                group["lr"] = self.inputs.rate

    def start(self) -> None:
        """Go back to the last checkpoint, if there is one, and forget what was logged after it."""
        folders = list_checkpoints(self.config.output)
        if folders:
            self.load(folders[-1])
        elif self.options.init_from is not None:
            load_into(self.model, self.options.init_from)
        steps = set(self.ranks.gather(self.step))
        if len(steps) > 1:
            raise ConfigError(
                f"output takes a folder that all ranks share, but they found steps {sorted(steps)}"
            )
        if self.ranks.first:
            forget_after(self.config.output / "metrics.jsonl", self.step)

    def run(self) -> None:
        options = self.options
        nothing_to_say = self.step == options.steps or not self.ranks.first
        bar = tqdm(
            desc="train",
            total=options.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=nothing_to_say or None,  # None: where nobody watches
        )
        metrics = self.config.output / "metrics.jsonl" if self.ranks.first else Path(os.devnull)
        with bar, open(metrics, "a") as log:
            while self.step < options.steps:
                self.train_step()
                self.step += 1
                if self.due(options.log_every):
                    self.report.collect(self.ranks)
                    self.log(log, bar)
                if self.due(options.evaluate_every):
                    evaluation = self.evaluate()
                    self.check_finite(evaluation)
                    write_record(log, {"step": self.step, "evaluation": evaluation})
                if self.due(options.checkpoint_every):
                    self.report.collect(self.ranks)
                    if self.ranks.first:
                        self.save()
                    self.ranks.wait()
                bar.update()

    def log(self, log: TextIO, bar: tqdm) -> None:
        """Write a line of what was trained since the last one; the first rank knows it all."""
        if self.ranks.first:
            self.check_finite(self.report.scalars())
            record = {"step": self.step, **self.report.read()}
            write_record(log, record)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now."""
        last = self.step == self.options.steps
        return every is not None and (last or self.step % every == 0)

    def train_step(self) -> None:
        """One update from the mean loss over all labelled tokens of the step's micro-batches."""
        self.report.rate = learning_rate(self.options, self.step)
        if not self.options.graph:
            for group in self.optimizer.param_groups:
                group["lr"] = self.report.rate
        first, accumulation = self.step * self.options.accumulation, self.options.accumulation
        batches = [
            self.data.batch(self.ranks.own(first + micro), self.options.batch_size)
            for micro in range(accumulation)
        ]
        self.inputs.fill(self.step, self.report.rate, batches)
        self.ranks.sum_([self.inputs.labelled])
        self.inputs.labelled.clamp_(min=1)
        self.update()

    def run_step(self) -> None:
        """The part of a step that is on the device, of what `inputs` holds there."""
        used = torch.zeros(
            self.config.model.num_layers, len(self.model.mixer_names), device=self.device
        )
        for micro in range(self.options.accumulation):
            table = self.draw(micro)
            self.loss(micro, table).backward()
            used += table.to(self.device).count if table else 0
        self.share(used)
        norm = clip_grad_norm_(self.optimizer, self.options.clip_norm or math.inf, used)
        self.optimizer.step(used=used)
        forget_gradients(self.model, self.optimizer)
        self.report.add_norm(norm)

    def share(self, used: Tensor) -> None:
        """Add up the ranks' gradients, and in place how often they used each mixer."""
        if self.ranks.count == 1:
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        groups = self.optimizer.param_groups
        gradients = [parameter.grad for group in groups for parameter in group["params"]]
        self.ranks.sum_([*gradients, used])

    def draw(self, micro: int) -> MixerTable | None:
        if not self.config.model.is_supernet:
            return None
        step = self.inputs.step if self.options.dispatch == "device" else self.step
        if self.options.table_per == "micro_batch":
            step = step * self.options.accumulation + micro
        if self.options.table_per_rank:
            step = self.ranks.own(step)
        return self.model.draw(self.config.seed, step, self.options.batch_size)

    def loss(self, micro: int, table: MixerTable | None) -> Tensor:
        """A micro-batch's part of the mean over all labelled tokens of the step."""
        tokens, labels, *packed = (part[micro] for part in self.inputs.batches)
        extra: dict[str, Mean] = {}
        metrics: dict[str, Mean] = {}
        bfloat16 = self.options.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.model(
                tokens,
                table=table,
                seq_idx=packed[0] if packed else None,
                losses=extra,
                metrics=metrics,
            )
        losses, counts = language_model_losses(logits, labels)
        self.report.add(losses.detach(), counts, table, {**extra, **metrics})
        auxiliary = sum(mean.value for mean in extra.values())
        parts = self.options.accumulation * self.ranks.count
        return losses.sum() / self.inputs.labelled + auxiliary / parts

    def evaluate(self) -> dict[str, float]:
        batches = self.data.evaluation(self.options.evaluation_batches, self.options.batch_size)
        return dict(evaluate_model(self.model, batches).metrics)

    def check_finite(self, values: Mapping[str, float]) -> None:
        """Raise ConfigError unless the values are finite, before they are logged or saved."""
        for key, value in values.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"training diverged: {key} is {value} at step {self.step}, with learning rate "
                    f"{learning_rate(self.options, self.step - 1):g}; "
                    "take a lower training.learning_rate"
                )

    def save(self) -> None:
        weights = model_tensors(self.model)
        self.check_finite({name: tensor.abs().max().item() for name, tensor in weights.items()})
        checkpoints = self.config.output / "checkpoints"
        with directory_atomically(checkpoints / f"{self.step:08d}") as folder:
            save_model(self.model, folder)
            sums = {REPORT + name: tensor for name, tensor in self.report.tensors().items()}
            state = optimizer_tensors(self.model, self.optimizer)
            state[RANKS] = torch.tensor(self.ranks.count)
            state[DATA] = fingerprint_of(self.data)
            save_tensors({**state, **sums}, folder / "optimizer.safetensors")
        for old in list_checkpoints(self.config.output)[: -self.options.keep_checkpoints]:
            shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        """Go back to a checkpoint. Raises ConfigError where it is not whole."""
        copy_tensors(model_tensors(self.model), open_tensors(folder / "model.safetensors"))
        self.model.config = self.model.config.told_by(read_config(folder))
        state = open_tensors(folder / "optimizer.safetensors")
        ranks = int(state.pop(RANKS, torch.tensor(1)))
        if ranks != self.ranks.count:
            raise ConfigError(
                f"{folder} is of a run on {ranks} ranks: go on with as many, got {self.ranks.count}"
            )
        if DATA in state:
            refuse_changed(state.pop(DATA), self.data, folder)
        names = [name for name in state if name.startswith(REPORT)]
        sums = {name.removeprefix(REPORT): state.pop(name) for name in names}
        if self.ranks.first:  # they are all ranks' together
            self.report.load(sums)
        copy_tensors(optimizer_tensors(self.model, self.optimizer), state)
        self.step = int(folder.name)


class Inputs:
    """What differs from step to step, in memory on the device that stays where it is.

    batches: tokens, labels and perhaps seq_idx, (accumulation, batch_size, seqlen). labelled:
    float32, (), how many labels count in the step. rate: float32, (). step: int64, ().
    Raises ValueError for batches of another shape than the first ones.
    """

    def __init__(self, device: torch.device):
        self.batches: list[Tensor] = []  # until their shapes are known
        self.labelled, self.rate = torch.zeros(2, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def fill(self, step: int, rate: float, batches: Sequence[Batch]) -> None:
        stacked = [torch.stack(parts) for parts in zip(*batches, strict=True)]
        if not self.batches:
            self.batches = [torch.empty_like(part, device=self.step.device) for part in stacked]
        shapes, got = ([tuple(part.shape) for part in of] for of in (self.batches, stacked))
        if shapes != got:
            raise ValueError(f"batches must keep the shapes {shapes} of the first step, got {got}")
        for part, new in zip(self.batches, stacked, strict=True):
            part.copy_(send(new, part.device))
        self.labelled.fill_(int((stacked[1] != IGNORED).sum()))
        self.rate.fill_(rate)
        self.step.fill_(step)


def graphed(step: Callable[[], None], device: torch.device, ranks: Ranks) -> Callable[[], None]:
    """The step, to be captured. Raises ConfigError where the device captures nothing."""
    if device.type != "cuda":
        raise ConfigError(f"training.graph takes training.device cuda, got {device}")
    return GraphedStep(step, other_threads=ranks.count > 1)  # NCCL's watchdog is one


def stochastic_mixers(model: SupernetModel) -> Iterator[StochasticMixer]:
    return (module for module in model.modules() if isinstance(module, StochasticMixer))


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
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"training.frozen leaves no parameter to train, got {list(patterns)}")


def build_optimizer(model: SupernetModel, options: TrainingConfig) -> GatedAdamW:
    return GatedAdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        inactive=options.inactive,
    )


def optimizer_tensors(model: SupernetModel, optimizer: GatedAdamW) -> dict[str, Tensor]:
    """Its state itself, by name: "<parameter>.<moment>"."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }
