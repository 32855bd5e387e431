"""A captured step beside host dispatch, on a GPU: the same tables, the same losses and weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.supernet.tiny import run_values
from tossup.kernels.routing import MixerTable
from tossup.supernet.config import RunConfig
from tossup.supernet.graphed_step import GraphedStep
from tossup.supernet.mixers import Attention, Mamba
from tossup.supernet.run_folder import latest_checkpoint
from tossup.supernet.stochastic import StochasticMixer
from tossup.supernet.train import Trainer, train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 12


def configured(output, device="cuda", packed=False, **training) -> RunConfig:
    """packed: samples hold several sequences, files of text."""
    training = {"device": device, "steps": STEPS, "accumulation": 2, **training}
    values = run_values(output, **training)
    if packed:
        values["model"]["vocab_size"] = 256
        folder = Path(__file__).parent
        values["data"] = dict(type="text", paths=[str(folder)], suffixes=[".py"], packed=True)
    values["model"]["mixer"]["mixers"] = {
        "attention": {"type": "attention", "heads": 4, "kv_heads": 2},
        "window": {"type": "attention", "heads": 2, "window_size": 3},
        "mamba": {"type": "mamba1", "d_state": 4},
        "grouped": {"type": "mamba", "d_inner": 32, "d_xb": 16, "state_size": 4},
    }
    return RunConfig.model_validate(values)


@needs_gpu
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed rows"])
@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "a stream per mixer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_train_as_host_dispatch_does(tmp_path, dtype, streams, packed):
    losses, weights = [], []
    graph = dict(dispatch="device", graph=True, streams=streams)
    for name, options in (("graph", graph), ("host", {})):
        config = configured(tmp_path / name, packed=packed, dtype=dtype, **options)
        train(config)
        records = (config.output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
        weights.append(load_file(latest_checkpoint(config.output) / "model.safetensors"))
    precise = dtype == "float32"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precise else 2e-2)
    if precise:
        torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)


@needs_gpu
def test_an_eager_step_waits_for_nothing(tmp_path):
    trainer = Trainer(configured(tmp_path, dispatch="device"))
    trainer.train_step()  # compiles, and makes what outlives a step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run_step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            trainer.report.norm.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_copies_nothing_to_the_host(tmp_path):
    trainer = Trainer(configured(tmp_path, dispatch="device", graph=True))
    for _ in range(5):
        trainer.train_step()
    assert trainer.update.graph is not None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        trainer.update()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert not [name for name in names if "DtoH" in name or "cudaStreamSynchronize" in name]


@needs_gpu
def test_activation_memory_is_that_of_the_largest_mixer():
    """Of three mixers at most 1.05 times what the hungriest of them takes alone."""

    def kept(mixers: dict[str, nn.Module]) -> int:
        layer = StochasticMixer(mixers, dispatch="device").cuda().bfloat16()
        rows = torch.arange(4, device="cuda")[None] % len(mixers)
        table = MixerTable.of(rows, len(mixers), 4)
        x = torch.randn(4, 2048, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = layer(x, table=table)  # as long as it lives, so does what backward needs
        return torch.cuda.memory_allocated() - before - out.nbytes

    makers = {
        "attention": lambda: Attention(512, 8),
        "window": lambda: Attention(512, 8, window_size=256),
        "mamba": lambda: Mamba(512),
    }
    alone = max(kept({name: make()}) for name, make in makers.items())
    together = kept({name: make() for name, make in makers.items()})
    assert together <= 1.05 * alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is wrong where there is no GPU")
def test_nothing_is_captured_without_a_gpu():
    with pytest.raises(ValueError, match="there is no CUDA device"):
        GraphedStep(lambda: None)
