"""Under device dispatch a step asks the device nothing: proved without one.

On the meta device tensors hold no data, so whoever reads one raises. What meta lets pass, or does
not run (a fused optimizer, a mask as an index), a mode over every op refuses. Each check is shown
to catch a read that was planted.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.supernet.test_device_dispatch import model_of
from tossup.kernels.routing import MixerTable
from tossup.supernet.model import SupernetModel, language_model_losses
from tossup.supernet.optimizer import GatedAdamW, clip_grad_norm, parameter_groups
from tossup.supernet.report import Report
from tossup.supernet.train import forget_gradients

LAYERS, MIXERS, BATCH, SEQLEN = 2, 3, 4, 21

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}
INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}


class RefuseHostReads(TorchDispatchMode):
    """Raises where an op's result or shape takes the host a look at the device.

    What an op does inside is not seen: that of Tossup's is its kernels.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in READS or masked:
            raise RuntimeError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


def table_on(device: str) -> MixerTable:
    if device == "meta":  # a table that nobody can look at
        shapes = (LAYERS, BATCH), (LAYERS, MIXERS), (LAYERS, MIXERS, BATCH)
        return MixerTable(*(torch.empty(s, dtype=torch.int32, device=device) for s in shapes))
    rows = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 0]])
    return MixerTable.of(rows, MIXERS, BATCH)


class Step:
    """A training step of two micro-batches, of the parts that `train` is made of."""

    def __init__(self, device: str, optimize: bool):
        self.model: SupernetModel = model_of("device", LAYERS).to(device)
        groups = parameter_groups(self.model)
        self.optimizer = GatedAdamW(groups, lr=torch.tensor(1e-3, device=device))
        self.report = Report(LAYERS, self.model.mixer_names, torch.device(device))
        self.table, self.optimize = table_on(device), optimize
        self.tokens = torch.zeros((BATCH, SEQLEN), dtype=torch.int64, device=device)

    def __call__(self, planted: Callable[[Tensor], object] = lambda losses: None) -> None:
        used = torch.zeros(LAYERS, MIXERS, device=self.tokens.device)
        for _ in range(2):
            logits = self.model(self.tokens, table=self.table)
            losses, counts = language_model_losses(logits, self.tokens)
            planted(losses)
            self.report.add(losses.detach(), counts, self.table, {})
            (losses.sum() / counts.sum()).backward()
            used += self.table.count
        norm = clip_grad_norm(self.optimizer, 1.0, used)
        if self.optimize:
            self.optimizer.step(used)
        forget_gradients(self.model, self.optimizer)
        self.report.add_norm(norm)


def test_a_step_runs_where_there_is_nothing_to_read():
    step = Step("meta", optimize=False)  # torch has no fused AdamW there
    step()
    step()


def test_a_step_takes_no_op_that_reads():
    step = Step("cpu", optimize=True)
    with RefuseHostReads():
        step()
        step()


PLANTED = {
    "item": lambda losses: losses[0].item(),
    "a truth": lambda losses: bool((losses > 0).all()),
    "a number as an index": lambda losses: losses[(losses > 0).sum()],
    "as many as there are": lambda losses: (losses > 0).nonzero(),
    "a mask as an index": lambda losses: losses[losses > 0],
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_both_checks_catch_a_planted_read(planted):
    on_meta = Step("meta", optimize=False)
    on_meta()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        on_meta(planted)
    with pytest.raises(RuntimeError, match="reads the device"), RefuseHostReads():
        Step("cpu", optimize=True)(planted)


def test_the_mode_catches_a_masked_store_which_meta_does_not():
    def store(losses: Tensor) -> None:
        losses.detach()[losses > 0] = 0.0

    Step("meta", optimize=False)(store)
    with pytest.raises(RuntimeError, match="reads the device"), RefuseHostReads():
        Step("cpu", optimize=True)(store)


def test_host_dispatch_cannot_run_there():
    """Its branch is on the host, so the proof would be worth nothing if it passed."""
    step = Step("meta", optimize=False)
    for block in step.model.layers:
        block.mixer.dispatch = "host"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step()
