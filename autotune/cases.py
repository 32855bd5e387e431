"""Launches that stand for what is shipped: each op in the shapes that choose its configurations.

Tensors are on the meta device, so nothing is allocated and nothing runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .workloads.workload import SHORT

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """op: the folder in kernels/. name: dtype, shape, options. launch: calls the op's launchers."""

    op: str
    name: str
    launch: Callable[[], Any]


def kernels_of(op: str) -> ModuleType:
    return import_module(f"...kernels.{op}.kernel", __name__)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def route_over(batch: int) -> tuple[Tensor, Tensor]:
    """A route's count and samples."""
    return meta(dtype=torch.int32), meta(batch, dtype=torch.int32)


def draws() -> Iterator[Case]:
    from ..kernels.routing import Strategy

    for kind in ("uniform", "weighted", "full_layout", "sandwich"):
        for layouts, batch in (((), 8), (((0, 1) * 12,), 200)):
            weights = (1, 2, 3, 4, 5) if kind == "weighted" else None
            strategy = Strategy(5, kind, weights, layouts, (0.5,) * len(layouts), 1, 0, True)

            def launch(strategy: Strategy = strategy, batch: int = batch) -> None:
                step = meta(dtype=torch.int64)
                kernels_of("routing").draw(strategy, 0, step, range(24), batch, step.device)

            yield Case("routing", f"{kind}, {len(layouts)} layouts, batch {batch}", launch)


def scans() -> Iterator[Case]:
    """(batch, seqlen, dim, state, groups) of Mamba-1, Apriel's, and what takes another path."""
    shapes = {
        "8×4096×4096, state 16": (8, 4096, 4096, 16, 1),
        "8×4096×4096, state 16, 256 groups": (8, 4096, 4096, 16, 256),
        "2×2048×2048, state 64": (2, 2048, 2048, 64, 1),
        "2×2048×2048, state 128": (2, 2048, 2048, 128, 1),
        "2×2048×2048, state 256": (2, 2048, 2048, 256, 1),
        "1×32768×1024, state 16": (1, 32768, 1024, 16, 1),  # too few channels to fill a GPU
    }
    for name, shape in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            launch = partial(scan, shape, dtype)
            yield Case("selective_scan", f"routed, {SHORT[dtype]}, {name}", launch)
    for name, shape in {
        "16×4096×8192, state 16": (16, 4096, 8192, 16, 1),  # enough for two channels to a lane
        "8×4096×4096, state 8": (8, 4096, 4096, 8, 1),
        "8×4095×4100, state 16": (8, 4095, 4100, 16, 1),  # lanes without a channel, or a token
    }.items():
        yield Case("selective_scan", f"routed, bf16, {name}", partial(scan, shape, torch.bfloat16))
    launch = partial(scan, (2, 2048, 1536, 5, 512), torch.bfloat16, packed=True)
    yield Case("selective_scan", "routed, bf16, 2×2048×1536, state 5, 512 groups, packed", launch)
    launch = partial(scan, shapes["8×4096×4096, state 16"], torch.bfloat16, constant=True)
    name = "routed, bf16, 8×4096×4096, state 16, constant B and C"
    yield Case("selective_scan", name, launch)


def scan(shape: Shape, dtype: torch.dtype, packed: bool = False, constant: bool = False) -> None:
    batch, seqlen, dim, states, groups = shape
    u = meta(batch, seqlen, dim, dtype=dtype)
    A, D = meta(dim, states, dtype=torch.float32), meta(dim, dtype=torch.float32)
    B = A if constant else meta(batch, seqlen, groups, states, dtype=dtype)
    state = meta(batch, dim, states, dtype=torch.float32) if packed else None
    seq_idx = meta(batch, seqlen, dtype=torch.int32) if packed else None
    inputs = u, u, A, B, B, D, u, D, state, seq_idx, *route_over(batch), True
    kernels = kernels_of("selective_scan")
    _, final_state, kept = kernels.forward(*inputs)
    kernels.backward(u, final_state if packed else None, kept, *inputs)


def convolutions() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, packed, channels_last in (
            ("8×4096×4096, width 4", False, True),
            ("8×4096×4096, width 4, packed", True, True),
            ("8×4096×4096, width 4, time contiguous", False, False),
        ):
            yield Case(
                "causal_conv1d",
                f"routed, {SHORT[dtype]}, {name}",
                partial(convolve, dtype, packed, channels_last),
            )
    launch = partial(convolve, torch.bfloat16, False, True, (1, 2**20, 256))
    yield Case("causal_conv1d", "routed, bf16, 1×1048576×256, width 4", launch)


def convolve(
    dtype: torch.dtype,
    packed: bool,
    channels_last: bool,
    shape: tuple[int, int, int] = (8, 4096, 4096),
) -> None:
    batch, seqlen, dim = shape
    width = 4
    x = meta(batch, seqlen, dim, dtype=dtype)
    if not channels_last:
        x = meta(batch, dim, seqlen, dtype=dtype).transpose(1, 2)
    weight, bias = meta(dim, width, dtype=torch.float32), meta(dim, dtype=torch.float32)
    state = meta(batch, width - 1, dim, dtype=dtype) if packed else None
    seq_idx = meta(batch, seqlen, dtype=torch.int32) if packed else None
    inputs = x, weight, bias, state, seq_idx, *route_over(batch), "silu"
    kernels = kernels_of("causal_conv1d")
    out, final_state = kernels.forward(*inputs)
    kernels.backward(out, final_state if packed else None, *inputs)


def rotations() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for interleaved in (False, True):
            pairing = "neighbours" if interleaved else "halves"
            yield Case(
                "rotary",
                f"routed, {SHORT[dtype]}, 8×4096×32×128, {pairing}",
                partial(rotate, dtype, interleaved),
            )


def rotate(dtype: torch.dtype, interleaved: bool) -> None:
    batch, seqlen, heads, head_dim = 8, 4096, 32, 128
    x = meta(batch, seqlen, heads, head_dim, dtype=dtype)
    angles = meta(seqlen, head_dim // 2, dtype=torch.float32)
    kernels_of("rotary").forward(x, angles, angles, interleaved, *route_over(batch))


def repetitions() -> Iterator[Case]:
    """(channels, group, repeats) of Apriel's Mamba, and groups that fill no vector."""
    shapes = {
        "8×4096×1024, 4 × groups of 16": (torch.bfloat16, 1024, 16, 4),
        "8×4096×510, 3 × groups of 5": (torch.float32, 510, 5, 3),
    }
    for name, (dtype, *shape) in shapes.items():
        launch = partial(repeat, dtype, *shape)
        yield Case("repeat_groups", f"routed, {SHORT[dtype]}, {name}", launch)


def repeat(dtype: torch.dtype, dim: int, group: int, repeats: int) -> None:
    """Forward, and the sum over the copies that is its gradient."""
    x, out = (meta(8, 4096, width, dtype=dtype) for width in (dim, dim * repeats))
    kernels = kernels_of("repeat_groups")
    kernels.repeat(out, x, group, *route_over(8))
    kernels.add_up(x, out, group, *route_over(8))


def attentions() -> Iterator[Case]:
    """(dtype, head_dim): every table of tiles, and head dims that fill no tile."""
    half = [(torch.bfloat16, head_dim) for head_dim in (16, 64, 80, 128, 256)]
    single = [(torch.float32, head_dim) for head_dim in (64, 128, 256)]
    for dtype, head_dim in (*half, *single):
        name = f"routed, {SHORT[dtype]}, 4×4096×32×{head_dim}"
        yield Case("flash_attention", name, partial(attend, dtype, head_dim))
        name += ", window, softcap, ALiBi, dropout"
        yield Case("flash_attention", name, partial(attend, dtype, head_dim, busy=True))
    for head_dim in (40, 200):  # 16 does not divide them, nor strides
        name = f"routed, bf16, 4×4096×32×{head_dim}"
        yield Case("flash_attention", name, partial(attend, torch.bfloat16, head_dim))
    for head_dim in (64, 128, 256):
        name = f"routed, bf16, 4×1×32×{head_dim} of 8192 keys"
        yield Case("flash_attention", name, partial(decode, head_dim))
    name = "routed, fp16, 4×4096×32×128, packed, window"
    yield Case("flash_attention", name, partial(attend, torch.float16, 128, packed=True))
    for causal in (True, False):
        name = f"routed, bf16, 4×4096×32×128, sequences in rows{', causal' if causal else ''}"
        launch = partial(attend, torch.bfloat16, 128, in_rows=True, causal=causal)
        yield Case("flash_attention", name, launch)


def attend(
    dtype: torch.dtype,
    head_dim: int,
    packed: bool = False,
    busy: bool = False,
    in_rows: bool = False,
    causal: bool = True,
) -> None:
    batch, seqlen, heads, kv_heads = 4, 4096, 32, 8
    samples = (batch * seqlen,) if packed else (batch, seqlen)
    q = meta(*samples, heads, head_dim, dtype=dtype)
    k = meta(*samples, kv_heads, head_dim, dtype=dtype)
    left, right = 1023 if packed or busy else -1, 0 if causal else -1
    softcap, slopes, dropout_p, seed = 0.0, None, 0.0, None
    if busy:
        softcap, dropout_p = 30.0, 0.1
        slopes, seed = meta(heads, dtype=torch.float32), meta(dtype=torch.int64)
    cu_seqlens = meta(batch + 1, dtype=torch.int32) if packed else None
    bounds = meta(2, batch, seqlen, dtype=torch.int32) if in_rows else None
    scoring = left, right, head_dim**-0.5, softcap, slopes, dropout_p, seed
    options = *scoring, cu_seqlens, cu_seqlens, None, None, bounds, *route_over(batch)
    kernels = kernels_of("flash_attention")
    out, lse = kernels.forward(q, k, k, *options)
    kernels.backward(out, lse if busy else None, q, k, k, out, lse, *options)


def decode(head_dim: int) -> None:
    """One query of each sample, whose keys several programs share out."""
    q, k = (meta(4, *of, head_dim, dtype=torch.bfloat16) for of in ((1, 32), (8192, 8)))
    scoring = -1, 0, head_dim**-0.5, 0.0, None, 0.0, None
    packing = None, None, None, None, None
    kernels_of("flash_attention").forward(q, k, k, *scoring, *packing, *route_over(4))


def updates() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for state in (16, 128):
            name = f"routed, {SHORT[dtype]}, 64×4096, state {state}"
            yield Case("selective_state_update", name, partial(update_state, dtype, state))
        for ring in (False, True):
            name = f"routed, {SHORT[dtype]}, 64×4096, width 4{', ring' if ring else ''}"
            yield Case("causal_conv1d_update", name, partial(update_window, dtype, ring))
    for ring in (False, True):
        name = f"routed, bf16, 64×4096, width 4, fp32 taps{', ring' if ring else ''}"
        launch = partial(update_window, torch.bfloat16, ring, torch.float32)
        yield Case("causal_conv1d_update", name, launch)


def update_state(dtype: torch.dtype, states: int) -> None:
    batch, dim, groups = 64, 4096, 1
    x, state = meta(batch, dim, dtype=dtype), meta(batch, dim, states, dtype=torch.float32)
    A, D = meta(dim, states, dtype=torch.float32), meta(dim, dtype=torch.float32)
    B = meta(batch, groups, states, dtype=dtype)
    kernels_of("selective_state_update").update(
        state, x, x, A, B, B, D, x, D, True, *route_over(batch)
    )


def update_window(dtype: torch.dtype, ring: bool, of_taps: torch.dtype | None = None) -> None:
    batch, dim, width = 64, 4096, 4
    x, state = meta(batch, 1, dim, dtype=dtype), meta(batch, width, dim, dtype=dtype)
    weight, bias = (meta(*shape, dtype=of_taps or dtype) for shape in ((dim, width), (dim,)))
    places = meta(batch, dtype=torch.int32) if ring else None
    kernels_of("causal_conv1d_update").update(
        x, state, weight, bias, "silu", places, places, *route_over(batch)
    )


def linears() -> Iterator[Case]:
    """(in_features, out_features) of Mamba's and attention's projections, and other dtypes."""
    shapes = ((2048, 2048), (2048, 8192), (4096, 160))
    cases = [("bf16", shape, torch.bfloat16, torch.bfloat16, False) for shape in shapes]
    cases += [
        ("fp32", (2048, 2048), torch.float32, torch.float32, False),
        ("bf16, fp32 weights", (2048, 2048), torch.bfloat16, torch.float32, False),
        ("bf16, bias", (2048, 2560), torch.bfloat16, torch.bfloat16, True),
    ]
    for name, shape, dtype, of_weight, bias in cases:
        launch = partial(multiply, shape, dtype, of_weight, bias)
        yield Case("linear", f"routed, {name}, 4×4096×{shape[0]}→{shape[1]}", launch)


def multiply(
    shape: tuple[int, int], dtype: torch.dtype, of_weight: torch.dtype, biased: bool
) -> None:
    """Forward, the data gradient added to another, and the weight gradient in float32."""
    in_features, out_features = shape
    x = meta(4, 4096, in_features, dtype=dtype)
    weight = meta(out_features, in_features, dtype=of_weight)
    bias, bias_grad = (
        meta(out_features, dtype=d) if biased else None for d in (dtype, torch.float32)
    )
    grad = meta(out_features, in_features, dtype=torch.float32)
    written = meta(dtype=torch.int32)
    kernels = kernels_of("linear")
    out = kernels.forward(x, weight, bias, *route_over(4))
    kernels.forward_into(x, out, weight.t(), None, True, *route_over(4))
    kernels.weight_gradient_into(grad, out, x, bias_grad, written, *route_over(4))


def accumulations() -> Iterator[Case]:
    """Of a Mamba mixer's A_log, D, biases and taps."""

    def launch() -> None:
        shapes = (4096, 16), (4096,), (4096, 4), (4096,), (4096,)
        totals, gradients = (
            [meta(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2)
        )
        count, written = meta(dtype=torch.int32), meta(dtype=torch.int32)
        kernels_of("accumulate").accumulate_into(totals, gradients, written, count)

    yield Case("accumulate", "routed, fp32, 4096 channels, 16 states", launch)


def optimizer_steps() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for decays in (False, True):
            name = f"gated, {SHORT[dtype]}, 48 × 2048×2048{', decays' if decays else ''}"
            yield Case("adamw", name, partial(step, dtype, decays))


def step(dtype: torch.dtype, decays: bool) -> None:
    """The norm of all gradients, their scaling, and the update of 24 layers of two mixers."""
    from ..kernels.adamw import Bucket

    columns = [[meta(2048, 2048, dtype=dtype) for _ in range(48)] for _ in range(4)]
    params, gradients, exp_avgs, exp_avg_sqs = columns
    steps = [meta(dtype=torch.float32) for _ in params]
    gates = [(layer, mixer) for layer in range(24) for mixer in range(2)]
    bucket = Bucket(params, gates, exp_avgs, exp_avg_sqs, steps)
    number, used = meta(dtype=torch.float32), meta(24, 2, dtype=torch.int32)
    given = gradients, list(range(len(gradients)))
    tables = bucket.host, bucket.table, bucket.owner, used
    kernels = kernels_of("adamw")
    kernels.gradient_norm(params, *given, *tables)
    kernels.scale_gradients_(*given, number, *tables)
    options = number, 0.0, 0.9, 0.95, 1e-8, 0.1, decays
    kernels.adamw_(params, *given, exp_avgs, exp_avg_sqs, steps, *tables, *options)


CASES: tuple[Case, ...] = (
    *draws(),
    *attentions(),
    *scans(),
    *convolutions(),
    *rotations(),
    *repetitions(),
    *updates(),
    *linears(),
    *accumulations(),
    *optimizer_steps(),
)
