"""Padding and packed sequences under device dispatch: followed as ever, and nobody is asked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.supernet.host_reads import RefuseHostReads
from tests.supernet.test_device_dispatch import (
    GROUPED,
    MIXERS,
    every_backend,
    model_of,
    table_of,
)
from tests.support import poison_memory
from tossup.kernels.routing import MixerTable
from tossup.supernet.mixers import Attention, packing

SEQLEN = 21
NUMBERS = torch.tensor(
    [[0] * 9 + [1] * 12, [0] * 21, [0, 1] + [2] * 19, [5] * 16 + [1] * 4 + [2]], dtype=torch.int32
)
COUNTS = torch.arange(SEQLEN) < torch.tensor([21, 9, 1, 17])[:, None]
EVERY = table_of([0, 1, 2, 2], [2, 0, 1, 0])


def seen(numbers: Tensor) -> Tensor:
    """A mask of queries and keys, as transformers makes it of sequences."""
    return ((numbers[:, :, None] == numbers[:, None]) & torch.ones(SEQLEN, SEQLEN).tril().bool())[
        :, None
    ]


TOLD = {
    "numbers": {"seq_idx": NUMBERS},
    "padding on the right": {"attention_mask": COUNTS},
    "padding on the left": {"attention_mask": COUNTS.flip(1).long()},
}
OF_ONE_ROW = {
    "bounds": {"cu_seqlens": torch.tensor([0, 9, 10, 21], dtype=torch.int32)},
    "transformers' bounds": {"cu_seq_lens_q": torch.tensor([0, 9, 10, 21], dtype=torch.int32)},
    "positions": {"position_ids": torch.cat([torch.arange(n) for n in (9, 1, 11)])[None]},
    "a mask of queries and keys": {"attention_mask": seen(NUMBERS[2:3])},
    "whole": {"position_ids": torch.arange(SEQLEN)[None]},
}


def losses_and_gradients(model, table: MixerTable, **told: Tensor) -> list[Tensor]:
    """Of the tokens that count; what padding gives is nobody's business."""
    tokens = torch.randint(32, (4, SEQLEN), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, table=table, **told)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    counts = told.get("attention_mask", torch.ones(4, SEQLEN)).bool()
    losses = torch.where(counts, losses.view_as(counts), 0).sum(1)
    losses.sum().backward()
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    grads = [
        z if p.grad is None else p.grad for p, z in zip(model.parameters(), zeros, strict=True)
    ]
    return [losses.detach(), *grads]


@pytest.mark.parametrize("mixers", [MIXERS, GROUPED], ids=["mamba1", "grouped"])
@pytest.mark.parametrize("told", TOLD)
@every_backend
def test_a_model_agrees_with_host_and_dense(impl, told, mixers, monkeypatch):
    theirs = [
        losses_and_gradients(model_of(dispatch, 2, mixers), EVERY, **TOLD[told])
        for dispatch in ("host", "dense")
    ]
    plain = losses_and_gradients(model_of("host", 2, mixers), EVERY)
    assert not torch.allclose(plain[0], theirs[0][0])
    monkeypatch.setenv("TOSSUP_IMPL", impl)
    poison_memory(monkeypatch)
    ours = losses_and_gradients(model_of("device", 2, mixers), EVERY, **TOLD[told])
    for expected in theirs:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", range(3), ids=MIXERS)
@pytest.mark.parametrize("told", OF_ONE_ROW)
def test_a_layer_follows_what_transformers_tells_it(told, mixer):
    torch.manual_seed(0)
    x, table = torch.randn(1, SEQLEN, 16), MixerTable.of(torch.tensor([[mixer]]), 3, 1)
    results = []
    for dispatch in ("device", "host"):
        layer = model_of(dispatch, layers=1).layers[0].mixer
        source = x.clone().requires_grad_()
        out = layer(source, table=table, **OF_ONE_ROW[told])
        out.square().sum().backward()
        results.append((out.detach(), source.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_sequences_are_found_before_mixers_part(monkeypatch):
    """On streams of their own none could use what another one makes meanwhile."""
    attend = Attention.routed_forward

    def late(*_):
        raise AssertionError("a mixer made what others share")

    def attend_alone(*args):
        with monkeypatch.context() as patch:
            patch.setattr(packing, "bounds_of", late)
            attend(*args)

    monkeypatch.setattr(Attention, "routed_forward", attend_alone)
    losses_and_gradients(model_of("device"), EVERY, seq_idx=NUMBERS)


@pytest.mark.parametrize("told", TOLD)
def test_a_layer_may_be_told_mixer_by_mixer(told):
    x, table = torch.randn(4, SEQLEN, 16), table_of([0, 1, 2, 2])
    layers = [model_of(dispatch, layers=1).layers[0].mixer for dispatch in ("device", "host")]
    each = dict.fromkeys(MIXERS, TOLD[told])
    ours, theirs = (layer(x, table=table, preprocessed=each) for layer in layers)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", TOLD)
def test_a_layer_compiles(told):
    layer = model_of("device", layers=1).layers[0].mixer
    x, table = torch.randn(4, SEQLEN, 16), table_of([0, 1, 2, 2])
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(
            compiled(x, table=table, **TOLD[told]), layer(x, table=table, **TOLD[told])
        )


def test_a_step_with_masks_asks_the_device_nothing():
    for told in TOLD.values():
        meta = model_of("device").to("meta")
        for name, tensor in told.items():
            logits = meta(
                torch.zeros(4, SEQLEN, dtype=torch.int64, device="meta"),
                table=EVERY.to(torch.device("meta")),
                **{name: tensor.to("meta")},
            )
            logits.sum().backward()
        packing.KNOWN.clear()
        with RefuseHostReads():
            losses_and_gradients(model_of("device"), EVERY, **told)


ASKED = {
    "padding": {"attention_mask": COUNTS},
    "queries and keys": {"attention_mask": seen(NUMBERS)},
    "positions": OF_ONE_ROW["positions"],
}


@pytest.mark.parametrize("told", ASKED)
def test_a_host_that_waits_asks(told):
    """So that the check above can fail."""
    ((name, tensor),) = ASKED[told].items()
    x = torch.zeros(len(tensor), SEQLEN, device="meta")
    told = {"attention_mask": None, name: tensor.to("meta")}
    assert packing.packing_of(x, left=-1, waits=False, **told) is not None
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        packing.packing_of(x, left=-1, **told)


def test_rows_that_are_whole_have_no_packing_where_the_host_may_ask():
    x, positions = torch.zeros(1, SEQLEN), torch.arange(SEQLEN)[None]
    whole = torch.ones(1, SEQLEN)
    for told in (dict(position_ids=positions, attention_mask=None), dict(attention_mask=whole)):
        assert packing.packing_of(x, left=-1, **told) is None
        assert packing.packing_of(x, left=-1, waits=False, **told) is not None


def test_a_mask_that_cannot_be_followed_is_an_error_of_the_device():
    holes = COUNTS.clone()
    holes[0, 3:5] = False
    with pytest.raises(RuntimeError, match="attention_mask must pad the sides alone"):
        model_of("device")(torch.zeros(4, SEQLEN).long(), table=EVERY, attention_mask=holes)
    with pytest.raises(ValueError, match="attention_mask must pad the sides alone"):
        model_of("host")(torch.zeros(4, SEQLEN).long(), table=EVERY, attention_mask=holes)
