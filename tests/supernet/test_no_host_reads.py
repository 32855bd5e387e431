"""Under device dispatch a step asks the device nothing: proved without one.

On the meta device tensors hold no data, so whoever reads one raises. What meta lets pass, or does
not run (a mask as an index), a mode over every op refuses. Each check is shown
to catch a read that was planted.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.supernet.host_reads import RefuseHostReads
from tests.supernet.test_graphed_step import configured
from tossup.supernet.model import language_model_losses
from tossup.supernet.train import Trainer

HERE = "cuda" if torch.cuda.is_available() else "cpu"
every_data = pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed rows"])


class Launches:
    """In place of a Triton kernel: takes its arguments and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.fixture
def trainer_on(tmp_path) -> Iterator[Callable[..., Trainer]]:
    """trainer_on(device, planted, packed): a trainer after its first step, which does `planted`
    with each micro-batch's losses, and trains on rows of several sequences or of one. One at a
    time."""
    patch = pytest.MonkeyPatch()

    def build(
        device: str, planted: Callable[[Tensor], object] = lambda losses: None, packed: bool = False
    ) -> Trainer:
        def losses_and_counts(*args):
            losses, counts = language_model_losses(*args)
            if first_step_is_over:
                planted(losses)
            return losses, counts

        first_step_is_over = False
        patch.undo()
        patch.setattr("tossup.supernet.train.language_model_losses", losses_and_counts)
        patch.setattr("tossup.supernet.train.device_of", torch.device)
        patch.setattr("tossup.kernels.routing.resolve_impl", lambda *_: "triton")
        if device == "meta":  # nothing runs a kernel there, and torch has not the other two
            patch.setattr("tossup.kernels.routing.kernel.draw_kernel", Launches())
            patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        trainer = Trainer(configured(tmp_path / device, device, packed, dispatch="device"))
        trainer.train_step()  # makes what outlives a step
        first_step_is_over = True
        return trainer

    yield build
    patch.undo()


@every_data
def test_a_step_runs_where_there_is_nothing_to_read(trainer_on, packed):
    trainer_on("meta", packed=packed).run_step()


@every_data
def test_a_step_takes_no_op_that_reads_or_copies_from_the_host(trainer_on, packed):
    trainer = trainer_on(HERE, packed=packed)
    with RefuseHostReads():
        trainer.run_step()


PLANTED = {
    "item": lambda losses: losses[0].item(),
    "a truth": lambda losses: bool((losses > 0).all()),
    "a number as an index": lambda losses: losses[(losses > 0).sum()],
    "as many as there are": lambda losses: (losses > 0).nonzero(),
    "a mask as an index": lambda losses: losses[losses > 0],
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_both_checks_catch_a_planted_read(planted, trainer_on):
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        trainer_on("meta", planted).run_step()
    trainer = trainer_on(HERE, planted)
    with pytest.raises(RuntimeError, match="reads the device"), RefuseHostReads():
        trainer.run_step()


def store_masked(losses: Tensor) -> None:
    losses.detach()[losses > 0] = losses.detach().sum()


def test_the_mode_catches_what_meta_does_not(trainer_on):
    for planted, message in (
        (store_masked, "reads the device"),
        (lambda losses: torch.tensor([1.0], device=losses.device), "copies from the host"),
    ):
        trainer_on("meta", planted).run_step()
        trainer = trainer_on(HERE, planted)
        with pytest.raises(RuntimeError, match=message), RefuseHostReads():
            trainer.run_step()


def test_a_read_in_the_optimizer_is_caught(trainer_on, monkeypatch):
    monkeypatch.setattr(
        "tossup.supernet.optimizer.gradient_norm",
        lambda bucket, gradients, used: used.sum() if used.tolist() else None,
    )
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        trainer_on("meta")


def test_host_dispatch_cannot_run_there(trainer_on):
    """Its branch is on the host, so the proof would be worth nothing if it passed."""
    trainer = trainer_on("meta")
    for block in trainer.model.layers:
        block.mixer.dispatch = "host"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        trainer.run_step()
