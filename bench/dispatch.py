"""Ways to follow a mixer table, side by side in one run: a training step of a stack of layers.

    python -m bench.dispatch [--device cuda] [--layers 24 --hidden 2048 --batch 4 --seqlen 4096]

item         drawn as a CUDA tensor, read with .item(), a Python branch: what Tossup began with
host         drawn on the CPU, a Python branch
conditional  each mixer in an IF node of one CUDA graph, which torch captures since 2.13
device       all mixers launched, the kernels follow the table
graph        the same step in one CUDA graph
forked       that graph, each mixer on a stream of its own
static       one mixer per layer, chosen beforehand, in one CUDA graph: a step without any dispatch

The first three run attention on torch's own kernels, cuDNN's where it can, and Mamba on mamba-ssm's
CUDA scan where it is built; the record names what ran. All ways train in bfloat16 with the same
optimizer, and route whole batches, as the branches need; with --per-sample, those that no branch
of a whole batch follows run alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

import tossup
from bench import conditional
from tossup.autotune.errors import said
from tossup.autotune.timing import Timing
from tossup.supernet.files import write_atomically
from tossup.supernet.graphed_step import GraphedStep
from tossup.supernet.mixers import Attention, Mamba
from tossup.supernet.optimizer import clip_grad_norm_

# In their order: what the others are compared with first, should the time end
WAYS = ("static", "graph", "device", "host", "item", "forked", "conditional")
LIBRARIES = ("item", "host", "conditional")
BRANCHES = ("item", "conditional", "static")  # one mixer for the whole batch
GRAPHS = ("conditional", "graph", "forked", "static")
ROUNDS, WARMUP = 15, 5


class LibraryAttention(Attention):
    """Attention on torch's fused kernels."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **packed: object) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)


def library_of_mamba() -> str:
    """Which it is. mamba-ssm's fused path takes causal-conv1d as well; without, it runs torch's
    convolution and a product for each projection."""
    package = type(library_mamba(64)).__module__.partition(".")[0]
    if package == "mamba_ssm":
        from mamba_ssm.modules import mamba_simple

        if mamba_simple.causal_conv1d_fn is None:
            package += " without causal_conv1d"
    return package


def library_mamba(hidden: int) -> nn.Module:
    """mamba-ssm's with its CUDA scan where that is built, otherwise Tossup's on its own kernels."""
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm import Mamba as LibraryMamba
    except ImportError:
        return Mamba(hidden)
    return LibraryMamba(hidden)


class Stack(nn.Module):
    """Layers of a norm and a stochastic mixer, on a residual stream."""

    def __init__(self, layers: int, hidden: int, way: str, placement: list[int]):
        super().__init__()
        heads, library = hidden // 128 or 1, way in LIBRARIES
        self.way = way
        makers: list[Callable[[], nn.Module]] = [
            lambda: (LibraryAttention if library else Attention)(hidden, heads),
            lambda: library_mamba(hidden) if library else Mamba(hidden),
        ]
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(layers))
        self.mixers = nn.ModuleList()
        for layer in range(layers):
            chosen = [makers[placement[layer]]] if way == "static" else makers
            mixers = {f"mixer{i}": make() for i, make in enumerate(chosen)}
            dispatch = "host" if library else "device"
            self.mixers.append(
                tossup.StochasticMixer(
                    mixers, layer=layer, dispatch=dispatch, streams=way == "forked"
                )
            )

    def forward(
        self, x: Tensor, table: tossup.MixerTable | None, choose: Callable | None
    ) -> Tensor:
        for layer, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            if self.way == "conditional":
                used = table.count[layer] > 0
                x = x + conditional.follow(mixer.mixers.values(), norm(x), used)
            else:
                placement = None if choose is None else f"mixer{choose(layer)}"
                x = x + mixer(norm(x), table=table, placement=placement)
        return x


class Step:
    """One training step, one way."""

    def __init__(self, way: str, options: argparse.Namespace):
        self.way, self.options, self.device = way, options, torch.device(options.device)
        torch.manual_seed(0)
        self.placement = torch.randint(2, (options.layers,)).tolist()
        mixers = 1 if way == "static" else 2
        self.strategy = tossup.Strategy(mixers=mixers, per_sample=options.per_sample)
        with self.device:
            stack = Stack(options.layers, options.hidden, way, self.placement)
        self.stack = stack.to(torch.bfloat16)
        groups = tossup.parameter_groups(self.stack)
        self.optimizer = tossup.GatedAdamW(groups, lr=torch.tensor(1e-4, device=self.device))
        shape = options.batch, options.seqlen, options.hidden
        self.x = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        self.steps = 0
        if way == "conditional":
            for parameter in self.stack.mixers.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> None:
        table = choose = None
        if self.way == "item":
            drawn = torch.randint(2, (self.options.layers,), device=self.device)
            used = F.one_hot(drawn, 2)
            choose = lambda layer: int(drawn[layer].item())  # noqa: E731
        else:
            on_host = self.way == "host"
            step = self.steps if on_host else self.counter
            table = tossup.draw(
                self.strategy, 0, step, self.options.layers, self.options.batch,
                device="cpu" if on_host else self.device,
            )  # fmt: skip
            used = table.to(self.device).count
            self.counter += 1
            self.steps += 1
        self.stack(self.x, table, choose).float().square().mean().backward()
        clip_grad_norm_(self.optimizer, 1.0, used)
        self.optimizer.step(used=used)
        for group in self.optimizer.param_groups:
            if group["gate"] is None or self.way in ("item", "host"):
                for parameter in group["params"]:
                    parameter.grad = None
        for mixer in self.stack.mixers:
            mixer.forget_gradients()


def measure(way: str, options: argparse.Namespace) -> dict[str, object]:
    """Seconds of a step, and the bytes of its peak; launches and waits of one step on a GPU."""
    on_gpu = options.device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step = Step(way, options)
    run: Callable[[], None] = step
    if way in GRAPHS and on_gpu:
        run = GraphedStep(step)
    if on_gpu:  # a replay allocates nothing: what it needs is seen where it is captured
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP):
        run()
    wait()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    timing = Timing(seconds)
    record = {"way": way, "seconds": timing.median, "spread": timing.spread}
    if on_gpu:
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        try:
            record |= calls_of(run)
        except RuntimeError as error:  # of a profiler that is refused: times hold without it
            record["not_profiled"] = said(error)
    return record


def calls_of(run: Callable[[], None]) -> dict[str, int]:
    """What one step asks of the driver."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = [event.name for event in profile.events()]
    return {
        "launches": sum("Launch" in name for name in names),
        "syncs": sum(name in ("cudaStreamSynchronize", "cudaMemcpy") for name in names),
        "copies_to_host": sum("DtoH" in name for name in names),
    }


def measured_apart(way: str, options: argparse.Namespace) -> dict[str, object]:
    """`measure` in a process of its own, so that no way meets memory, or a profiler, that another
    left, and what one dies of, such as a library's error, is no other's end."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, way, options).result()
        except Exception as error:
            return {"way": way, "failed": said(error)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--per-sample", action="store_true", help="route samples, not batches")
    for name, default in (("layers", 24), ("hidden", 2048), ("batch", 4), ("seqlen", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    options = parser.parse_args()
    if "conditional" in options.ways and not conditional.AVAILABLE:
        print(f"conditional: torch {torch.__version__} captures no IF nodes: not measured")
        options.ways = [way for way in options.ways if way != "conditional"]
    if options.device == "cpu":
        options.ways = [way for way in options.ways if way not in GRAPHS]
    if options.per_sample:
        options.ways = [way for way in options.ways if way not in BRANCHES]
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "mamba": library_of_mamba(),
        "shape": {name: getattr(options, name) for name in ("layers", "hidden", "batch", "seqlen")},
        "per_sample": options.per_sample,
        "ways": [],
    }
    for way in options.ways:
        record["ways"].append(measured_apart(way, options))
        print(json.dumps(record["ways"][-1]), flush=True)
        if options.output is not None:
            write_atomically(options.output, json.dumps(record, indent=1) + "\n")
    return 1 if any("failed" in way for way in record["ways"]) else 0


if __name__ == "__main__":
    sys.exit(main())
