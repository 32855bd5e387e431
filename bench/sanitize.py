"""Runs every Triton kernel once at a small odd size: what compute-sanitizer is let loose on.

compute-sanitizer --tool memcheck python bench/sanitize.py
"""

import torch

import tossup
from tossup.kernels import descriptors
from tossup.kernels.accumulate import accumulate_into
from tossup.kernels.adamw import Bucket, adamw_, gradient_norm, scale_gradients_
from tossup.kernels.adamw.bucket import CHUNK

BATCH, SEQLEN, HEADS, KV_HEADS, DIM, STATES = 3, 130, 4, 2, 72, 16


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def backward(*results: torch.Tensor) -> None:
    sum(result.float().sum() for result in results).backward()


def attention(route: tossup.Route) -> None:
    for head_dim, dtype in ((64, torch.bfloat16), (40, torch.float16), (128, torch.float32)):
        q = random(BATCH, SEQLEN, HEADS, head_dim, dtype=dtype)
        k, v = (random(BATCH, SEQLEN, KV_HEADS, head_dim, dtype=dtype) for _ in range(2))
        out, lse = tossup.flash_attention(q, k, v, causal=True, return_lse=True, route=route)
        rows = route.samples[: int(route.count)].long()
        backward(out[rows], lse[rows])
    numbers = torch.arange(SEQLEN, device="cuda").div(50, rounding_mode="floor")
    q, k, v = (random(BATCH, SEQLEN, HEADS, 64) for _ in range(3))
    in_rows = tossup.bounds_of(numbers.expand(BATCH, -1))
    for causal in (True, False):
        backward(tossup.flash_attention(q, k, v, causal=causal, bounds=in_rows))
    bounds = torch.tensor([0, 1, 70, SEQLEN], dtype=torch.int32, device="cuda")
    q, k, v = (random(SEQLEN, HEADS, 64) for _ in range(3))
    backward(tossup.flash_attention(q, k, v, window_size=(9, 5), cu_seqlens_q=bounds))
    slopes = torch.rand(HEADS, device="cuda")
    options = dict(softcap=5.0, alibi_slopes=slopes, dropout_p=0.2, cu_seqlens_q=bounds)
    backward(tossup.flash_attention(q, k, v, **options))


def mamba(route: tossup.Route) -> None:
    u, z, delta = (random(BATCH, SEQLEN, DIM) for _ in range(3))
    taps = random(DIM, 4, dtype=torch.float32)
    seq_idx = torch.arange(SEQLEN, device="cuda").div(50, rounding_mode="floor").int()
    seq_idx = seq_idx.expand(BATCH, -1)
    x, tail = tossup.causal_conv1d(
        u, taps, activation="silu", seq_idx=seq_idx, return_final_state=True, route=route
    )
    A = random(DIM, STATES, dtype=torch.float32)
    B, C = (random(BATCH, SEQLEN, 1, STATES) for _ in range(2))
    y, state = tossup.selective_scan(
        x, delta, -A.exp(), B, C, random(DIM, dtype=torch.float32), z,
        random(DIM, dtype=torch.float32), delta_softplus=True, seq_idx=seq_idx,
        return_final_state=True, route=route,
    )  # fmt: skip
    rows = route.samples[: int(route.count)].long()
    backward(y[rows], state[rows], tail[rows])


def positions(route: tossup.Route) -> None:
    angles = tossup.rotary_angles(torch.arange(SEQLEN, device="cuda"), 32)
    for interleaved in (False, True):
        x = random(BATCH, SEQLEN, HEADS, 40)
        out = tossup.rotary(x, *angles, interleaved=interleaved, route=route)
        backward(out[route.samples[: int(route.count)].long()])


def repetitions(route: tossup.Route) -> None:
    for group in (8, 9):
        out = tossup.repeat_groups(random(BATCH, SEQLEN, DIM), group, 3, route=route)
        backward(out[route.samples[: int(route.count)].long()])


def projections(route: tossup.Route) -> None:
    for dtype, of_weight in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x = random(BATCH, SEQLEN, DIM, dtype=dtype)
        weight, bias = (random(*shape, dtype=of_weight) for shape in ((200, DIM), (200,)))
        out = tossup.linear(x, weight, bias, route=route)
        backward(out[route.samples[: int(route.count)].long()])


def sums(route: tossup.Route) -> None:
    totals, gradients = ([random(*s).detach() for s in ((DIM, 3), (1100,))] for _ in range(2))
    accumulate_into(totals, gradients, written=route.count, route=route)


def optimize() -> None:
    """Whole chunks and a rest, and what lies anywhere, of two mixers of which one was used."""
    sizes = (CHUNK + 1500, 2 * CHUNK, 5)
    columns = [[random(size + 1).detach()[1:] for size in sizes] for _ in range(4)]
    params, gradients, exp_avgs, exp_avg_sqs = columns
    steps = [torch.zeros((), device="cuda") for _ in sizes]
    bucket = Bucket(params, [(0, 0), (0, 1), None], exp_avgs, exp_avg_sqs, steps)
    used = torch.tensor([[2, 0]], device="cuda")
    for inactive in ("skip", "decay"):
        norm = gradient_norm(bucket, gradients, used)
        scale_gradients_(bucket, gradients, 1 / norm, used)
        adamw_(bucket, gradients, used, inactive=inactive)


def decode(route: tossup.Route) -> None:
    q = random(BATCH, 1, HEADS, 64)
    k, v = (random(BATCH, 8 * SEQLEN, KV_HEADS, 64) for _ in range(2))  # several programs' keys
    with torch.no_grad():
        tossup.flash_attention(q, k, v, causal=True, route=route)
    x, dt, z = (random(BATCH, DIM) for _ in range(3))
    A, D = random(DIM, STATES, dtype=torch.float32), random(DIM, dtype=torch.float32)
    B, C = (random(BATCH, 1, STATES) for _ in range(2))
    state = torch.zeros(BATCH, DIM, STATES, device="cuda")
    tossup.selective_state_update(
        state, x, dt, -A.exp(), B, C, D, z, D, dt_softplus=True, route=route
    )
    taps, places = random(DIM, 4), torch.arange(BATCH, dtype=torch.int32, device="cuda")
    for cache_seqlens in (None, places):
        window = torch.zeros(BATCH, 5, DIM, dtype=x.dtype, device="cuda")
        tossup.causal_conv1d_update(x, window, taps, cache_seqlens=cache_seqlens, route=route)


def main() -> None:
    torch.manual_seed(0)
    strategy = tossup.Strategy(mixers=2, kind="full_layout", per_sample=True)
    table = tossup.draw(strategy, seed=0, step=0, layers=3, batch=BATCH, device="cuda")
    for op in (attention, mamba, positions, repetitions, projections, sums, decode):
        for mixer in range(2):
            op(table.route(1, mixer))
    optimize()
    descriptors.BRIEF = 0  # tiles by descriptors, which small sizes do without
    for op in (attention, projections):
        op(table.route(1, 0))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
