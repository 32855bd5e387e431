"""`tossup latency`: how long each mixer of a model takes, measured or by a roofline; and what a
search's placements cost by such a table."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from ..autotune.latency import Latency, LatencyTable, measure, read_table
from ..autotune.machine import name_of
from ..autotune.peaks import PEAKS, Peak
from ..autotune.roofline import estimate, floor_of
from ..autotune.timing import CpuStopwatch, GpuStopwatch
from ..autotune.workloads.workload import SHORT
from ..kernels.configs import slug
from .config import LatencyConfig, ModelConfig
from .devices import device_of
from .errors import ConfigError
from .files import write_atomically
from .mixers import build_mixer
from .mixers.cache import Cache
from .search.space import Placement

PROMPT = 1024  # tokens that go into a cache at a time


def write_latencies(config: LatencyConfig) -> tuple[Path, LatencyTable]:
    """Raises ConfigError where a GPU's peaks are not known, or tables do not go together."""
    table = measured(config) if config.gpu is None else roofline(config, config.gpu)
    name = "latency" if config.gpu is None else f"roofline-{slug(config.gpu)}"
    of = "" if config.direction == "forward" else f"-{config.direction}"
    path = config.table or config.output / f"{name}{of}.json"
    write_atomically(path, table.text())
    return path, table


def measured(config: LatencyConfig) -> LatencyTable:
    """Every mixer of a layer on training.device, where all samples take it."""
    device = device_of(config.training.device)
    mixers = {name: mixer.to(device, dtype_of(config)) for name, mixer in mixers_of(config).items()}
    calls = {name: call_of(config, mixer, device) for name, mixer in mixers.items()}
    stopwatch = GpuStopwatch() if device.type == "cuda" else CpuStopwatch()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return table_of(config, "measured", name_of(device), versions, measure(calls, stopwatch))


def roofline(config: LatencyConfig, gpu: str) -> LatencyTable:
    if gpu not in PEAKS:
        raise ConfigError(f"gpu takes {', '.join(PEAKS)}, got {gpu!r}")
    peak, tables = PEAKS[gpu], []
    shell = table_of(config, "roofline", gpu, {}, {})
    for path in config.measured:
        table = read(path, "measured")
        if table.source != "measured" or table.setting != shell.setting:
            raise ConfigError(
                f"measured takes tables measured on {shell.setting}; "
                f"{path} is {table.source}: {table.setting}"
            )
        check_model(table, config.model, f"measured: {path}")
        tables.append(table)
    mixers = mixers_of(config)

    def latency(name: str) -> Latency:
        factors = [
            table.mixers[name].milliseconds
            / (1e3 * floor(config, mixers[name], peak, table.batch, table.seqlen))
            for table in tables
        ]
        return estimate(floor(config, mixers[name], peak, *shape_of(config)), factors)

    return shell.model_copy(update={"mixers": {name: latency(name) for name in mixers}})


def floor(config: LatencyConfig, mixer: Any, peak: Peak, batch: int, seqlen: int) -> float:
    dtype = SHORT[dtype_of(config)]
    decoding = config.direction == "decode"
    ops = mixer.workloads(batch=batch, seqlen=seqlen, dtype=dtype, decoding=decoding)
    return floor_of(ops, peak, config.direction)


def table_of(
    config: LatencyConfig, source: Any, device: str, versions: dict[str, str],
    mixers: dict[str, Latency],
) -> LatencyTable:  # fmt: skip
    batch, seqlen = shape_of(config)
    return LatencyTable(
        source=source, device=device, model=described(config.model), batch=batch, seqlen=seqlen,
        dtype=config.dtype or config.training.dtype, direction=config.direction,
        versions=versions, mixers=mixers,
    )  # fmt: skip


def shape_of(config: LatencyConfig) -> tuple[int, int]:
    return config.batch or config.training.batch_size, config.seqlen or config.data.length


def dtype_of(config: LatencyConfig) -> torch.dtype:
    return getattr(torch, config.dtype or config.training.dtype)


def mixers_of(config: LatencyConfig) -> dict[str, nn.Module]:
    """A layer's choices; weights are random, as no time depends on them."""
    torch.manual_seed(config.seed)
    hidden = config.model.hidden_size
    return {name: build_mixer(mixer, hidden) for name, mixer in config.model.mixers.items()}


def call_of(config: LatencyConfig, mixer: Any, device: torch.device) -> Callable[[], Any]:
    batch, seqlen = shape_of(config)
    x = torch.randn(batch, seqlen, config.model.hidden_size, device=device, dtype=dtype_of(config))
    if config.direction == "decode":
        return decoding_of(mixer, x)
    extra = extra_of(mixer, torch.arange(seqlen, device=device))
    if config.direction == "forward":
        return torch.no_grad()(lambda: mixer(x, **extra))
    above, leaves = torch.randn_like(x), [x.requires_grad_(), *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x, **extra), leaves, above)


@torch.no_grad()
def decoding_of(mixer: Any, x: Tensor) -> Callable[[], Any]:
    """The call of x's last token behind the others, (batch, seqlen, hidden_size).

    Each call overwrites the last keys and values, or goes on from the last states.
    """
    cache = Cache(1, x.shape[1])

    def follow(tokens: Tensor) -> Callable[[], Any]:
        extra = extra_of(mixer, cache.extend(tokens.shape[1], x.device).positions)
        return lambda: mixer(tokens, past_key_values=cache.layers[0], use_cache=True, **extra)

    for tokens in x[:, :-1].split(PROMPT, 1):
        follow(tokens)()
    return torch.no_grad()(follow(x[:, -1:]))


def extra_of(mixer: Any, positions: Tensor) -> dict[str, Any]:
    return mixer.preprocess(positions) if hasattr(mixer, "preprocess") else {}


def cost_of(table: LatencyTable, placement: Placement) -> float:
    """The same in any order of the layers."""
    return math.fsum(table.mixers[name].milliseconds for name in placement)


def read(path: Path, key: str) -> LatencyTable:
    try:
        return read_table(path)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def described(model: ModelConfig) -> dict[str, Any]:
    mixers = {name: mixer.model_dump(mode="json") for name, mixer in model.mixers.items()}
    return {"hidden_size": model.hidden_size, **mixers}


def check_model(table: LatencyTable, model: ModelConfig, where: str) -> None:
    """Raises ConfigError unless the table is of this model's mixers; it may hold others as well."""
    for name, wanted in described(model).items():
        if table.model.get(name) != wanted:
            raise ConfigError(
                f"{where} takes a table of {name} {wanted}, got {table.model.get(name)}"
            )
        if name != "hidden_size" and name not in table.mixers:
            raise ConfigError(f"{where} takes a latency of {name}, and lacks it")
