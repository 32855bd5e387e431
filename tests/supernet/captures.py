"""Steps captured by torch's own CUDA code, over a stand-in for CUDA: what test_captures.py runs.

Prints for each kind of step what its capture held and what a replay took; and for each thing that a
step must not do, planted in one, what became of the capture.
"""

import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.stand_ins.cuda import tally
from tests.supernet.test_graphed_step import configured
from tossup.supernet.model import language_model_losses
from tossup.supernet.train import Trainer

TALLY = tally()
BEFORE = torch.cuda.Event()


def trainer(**options: Any) -> Trainer:
    """About to capture: its eager steps are over."""
    folder = Path(tempfile.mkdtemp())
    made = Trainer(configured(folder, dispatch="device", graph=True, **options))
    for _ in range(3):
        made.train_step()
    return made


def counted(step: Callable[[], object]) -> dict[str, int]:
    before = {name: getattr(TALLY, name) for name in TALLY.counts}
    step()
    return {name: getattr(TALLY, name) - was for name, was in before.items()}


def captured_and_replayed(**options: Any) -> dict[str, dict[str, int]]:
    made = trainer(**options)
    assert made.update.graph is None
    return {"capture": counted(made.train_step), "replay": counted(made.train_step)}


def wait_for_what_was_before(losses: Tensor) -> None:
    torch.cuda.current_stream().wait_event(BEFORE)


def leave_a_stream(losses: Tensor) -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        losses.detach() * 2


PLANTED = {
    "nothing": lambda losses: None,
    "item": lambda losses: losses[0].item(),
    "a number of the host's": lambda losses: torch.ones(1).to(losses.device),
    "waiting for the device": lambda losses: torch.cuda.synchronize(),
    "waiting for what was before": wait_for_what_was_before,
    "a stream that stays away": leave_a_stream,
}


def outcome(planted: Callable[[Tensor], object]) -> str:
    def losses_and_counts(*args: Any) -> tuple[Tensor, Tensor]:
        losses, counts = language_model_losses(*args)
        planted(losses)
        return losses, counts

    TALLY.broken_by = b""
    made = trainer()
    with mock.patch("tossup.supernet.train.language_model_losses", losses_and_counts):
        try:
            made.train_step()
        except RuntimeError as error:
            refused = "during CUDA graph capture" in str(error)
            return "refused by torch" if refused else TALLY.broken_by.decode()
    return "captured"


if __name__ == "__main__":
    BEFORE.record()
    steps = {}
    for packed, streams, dtype in product((False, True), (False, True), ("float32", "bfloat16")):
        name = f"{'packed' if packed else 'whole'} rows, {'streams' if streams else 'one stream'}"
        steps[f"{name}, {dtype}"] = captured_and_replayed(
            packed=packed, streams=streams, dtype=dtype
        )
    outcomes = {name: outcome(planted) for name, planted in PLANTED.items()}
    print(json.dumps({"steps": steps, "outcomes": outcomes}))
