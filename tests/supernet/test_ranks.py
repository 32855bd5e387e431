"""Two ranks train as one process does that takes their batches one after the other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.supernet.test_graphed_step import configured
from tossup.supernet.config import RunConfig
from tossup.supernet.errors import ConfigError
from tossup.supernet.ranks import messages
from tossup.supernet.run_folder import latest_checkpoint, list_checkpoints
from tossup.supernet.train import train

ROOT = Path(__file__).parents[2]


def on_two_ranks(*program: str) -> str:
    """What it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*launcher, *program],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def train_on_two_ranks(config: RunConfig) -> str:
    path = config.output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return on_two_ranks("-m", "tossup.supernet", "train", str(path))


def results(config: RunConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    weights = load_file(latest_checkpoint(config.output) / "model.safetensors")
    return [json.loads(line) for line in lines], weights


@pytest.mark.parametrize(("dispatch", "per_rank"), [("device", True), ("host", False)])
def test_two_ranks_train_as_two_micro_batches(tmp_path, dispatch, per_rank):
    """One table for all ranks is one for all micro-batches; tables per rank are per micro-batch."""
    options = dict(device="cpu", dispatch=dispatch, log_every=3, checkpoint_every=8)
    ranks = configured(tmp_path / "ranks", accumulation=1, table_per_rank=per_rank, **options)
    table_per = "micro_batch" if per_rank else "step"
    alone = configured(tmp_path / "alone", accumulation=2, table_per=table_per, **options)
    train(alone)
    printed = train_on_two_ranks(ranks)
    assert printed == f"{latest_checkpoint(ranks.output)}\n"
    (got, weights), (expected, theirs) = results(ranks), results(alone)
    for mine, other in zip(got, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["samples"] == other["samples"]
    torch.testing.assert_close(weights, theirs, rtol=1e-3, atol=1e-4)

    shutil.rmtree(list_checkpoints(ranks.output)[-1])
    train_on_two_ranks(ranks)
    again, resumed = results(ranks)
    assert again == got
    with pytest.raises(ConfigError, match="is of a run on 2 ranks: go on with as many, got 1"):
        train(ranks)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_a_process_leaves_its_group_before_python_ends(tmp_path):
    """Gloo's threads abort it otherwise, now and then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, torch\n"
        "from torch.distributed import is_initialized\n"
        "from tossup.supernet.ranks import Ranks\n"
        "import os\n"
        "atexit.register(lambda: os.write(1, b'in a group: %d\\n' % is_initialized()))\n"
        "ranks = Ranks(torch.device('cpu'))\n"
        "assert is_initialized() and ranks.gather(ranks.rank) == [0, 1]\n"
    )
    assert on_two_ranks(str(program)) == "in a group: 0\n" * 2


SHARDED = """
import copy, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import tossup
from tossup.supernet.ranks import end

dist.init_process_group("gloo")
torch.manual_seed(0)
router = tossup.Router(tossup.Strategy(mixers=2), layers=2, seed=3)
make = lambda: {"a": tossup.Attention(16, 2), "m": tossup.Mamba(16, d_state=4)}
whole = torch.nn.Sequential(
    torch.nn.Linear(16, 16),
    *(tossup.StochasticMixer(make(), layer=i, router=router) for i in range(2)),
)
model, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
for module in (model[1], model[2], model):
    fully_shard(module, mesh=mesh)
groups = [tossup.parameter_groups(m) for m in (whole, model)]
optimizers = [tossup.GatedAdamW(g, lr=1e-2, router=router) for g in groups]
for step in range(3):
    used = router.draw(batch=2).count
    x, norms = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step)), []
    for m, optimizer in zip((whole, model), optimizers):
        optimizer.zero_grad()
        (1e6 * m(x).square().mean()).backward()
        norms.append(tossup.clip_grad_norm_(optimizer, 0.5, used))
        optimizer.step(used=used)
    assert norms[0] > 0.5
    torch.testing.assert_close(*norms)
for ours, theirs in zip(model.parameters(), whole.parameters()):
    torch.testing.assert_close(ours.full_tensor().data, theirs.data)
layers = torch.nn.ModuleList(
    tossup.StochasticMixer(make(), layer=i, dispatch="device") for i in range(2)
)
parts, x = copy.deepcopy(layers), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9))
fully_shard(parts[0], mesh=mesh)  # and not the other one
optimizers = [tossup.GatedAdamW(tossup.parameter_groups(m)) for m in (layers, parts)]
for _ in range(3):
    for m, optimizer in zip((layers, parts), optimizers):
        table = tossup.MixerTable.of(torch.tensor([[0, 1], [1, 1]]), 2, 2)
        m[1](m[0](x, table=table), table=table).sum().backward()
    for (name, one), other in zip(layers.named_parameters(), parts.parameters()):
        if not name.startswith("1.mixers.a"):  # which nobody took
            found = other.grad.full_tensor() if name[0] == "0" else other.grad
            torch.testing.assert_close(found, one.grad, rtol=1e-4, atol=1e-4)
    for m, optimizer in zip((layers, parts), optimizers):
        tossup.forget_gradients(m, optimizer)
for make in (lambda: tossup.Mamba(16, d_state=4), lambda: tossup.GroupedMamba(16, 16, 8, 4)):
    with torch.device("meta"):
        mixer = make()
    fully_shard(mixer, mesh=mesh)
    mixer.to_empty(device="cpu")
    mixer.reset_parameters()
    A_log, bias = mixer.A_log.full_tensor(), mixer.dt_proj.bias.full_tensor()
    assert torch.equal(A_log, torch.arange(1.0, 5).log().expand_as(A_log))
    dt = torch.nn.functional.softplus(bias)
    assert 0.001 <= dt.min() and dt.max() <= 0.1 and (mixer.D.full_tensor() == 1).all()
if dist.get_rank() == 0:
    print("the same", flush=True)
end(0)
"""


def test_a_sharded_model_is_clipped_and_steps_as_the_whole_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SHARDED)
    assert on_two_ranks(str(program)) == "the same\n"


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import tossup
from tossup.supernet.ranks import end

dist.init_process_group("gloo")
rank = dist.get_rank()
weights = []
for dispatch, shared in (("host", False), ("host", True), ("device", True)):
    torch.manual_seed(0)
    router = tossup.Router(tossup.Strategy(mixers=2), layers=1, seed=rank + 1)
    mixers = {"a": tossup.Attention(16, 2), "m": tossup.Mamba(16, d_state=4)}
    model = DistributedDataParallel(
        tossup.StochasticMixer(mixers, router=router, dispatch=dispatch),
        find_unused_parameters=True,
    )
    optimizer = tossup.GatedAdamW(tossup.parameter_groups(model), lr=1e-2, router=router)
    apart = 0
    for step in range(6):
        used = router.draw(batch=2).count
        counts = [torch.empty_like(used) for _ in range(2)]
        dist.all_gather(counts, used)
        apart += not torch.equal(*counts)
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2 * step + rank))
        model(x).square().mean().backward()
        if shared:
            dist.all_reduce(used)
        optimizer.step(used=used)
        if dispatch == "device":
            tossup.forget_gradients(model, optimizer)
        else:
            optimizer.zero_grad()
    assert apart
    weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    both = [torch.empty_like(weights[-1]) for _ in range(2)]
    dist.all_gather(both, weights[-1])
    if rank == 0:
        print("the same" if torch.equal(*both) else "apart", flush=True)
torch.testing.assert_close(*weights[1:], rtol=1e-4, atol=1e-6)
end(0)
"""


def test_ranks_with_tables_of_their_own_add_up_what_was_used(tmp_path):
    """As the README has it: each would else update the mixers of its own tables alone."""
    program = tmp_path / "program.py"
    program.write_text(DISTRIBUTED)
    assert on_two_ranks(str(program)) == "apart\nthe same\nthe same\n"


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_ends_with_its_code_and_says_what_it_had_to(tmp_path, code):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "from tossup.supernet.ranks import Ranks, end\n"
        "sys.stdout.reconfigure(write_through=False)  # which torchrun makes true\n"
        "if Ranks(torch.device('cpu')).first:\n"
        "    print('the last word')\n"
        f"end({code})\n"
    )
    if code == 0:
        assert on_two_ranks(str(program)) == "the last word\n"
    else:
        with pytest.raises(AssertionError, match=f"exitcode: {code}"):
            on_two_ranks(str(program))


def test_messages_hold_every_tensor_once_and_no_more_than_their_size():
    sizes = [3, 1, 4, 40, 1, 0, 9, 2]
    tensors = [
        torch.zeros(n, dtype=(torch.int32, torch.float16)[i % 2]) for i, n in enumerate(sizes)
    ]
    found = list(messages(tensors, size=16))
    assert sorted(id(t) for parts in found for t in parts) == sorted(map(id, tensors))
    for parts in found:
        assert len({tensor.dtype for tensor in parts}) == 1
        assert len(parts) == 1 or sum(tensor.nbytes for tensor in parts) <= 16
    assert len(found) == 7
