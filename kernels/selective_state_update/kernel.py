"""Triton kernel and launcher: a program advances a tile of one sample's channels.

Floor: bytes. Per channel and state, the state is read and written, 8 bytes in float32, and A read
once per batch, 4 bytes, from L2. One exp2 and 4 other instructions go with each: neither comes near
the 4.8 TB/s of an H200 (at 8 bytes an SM gets 2.5 states per cycle, and has 16 exp2). Below some
1000 channels · samples a launch's latency is all there is. How near the kernel comes: not measured.
"""

import torch
import triton.language as tl
from torch import Tensor

from .. import configs
from ..exponentials import in_base_2, silu, softplus
from ..launch import cdiv, next_power_of_2, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..routing.gate import active_sample, routed_jit


@routed_jit()
def update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, count_ptr, samples_ptr,
    out_ptr,
    dim, groups_b, groups_c,
    stride_state, stride_x, stride_dt, stride_a, stride_b, stride_c, stride_d, stride_z,
    stride_bias,
    SOFTPLUS: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """stride_state: (batch, dim, state). stride_b, stride_c: (batch, group, state)."""
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    channels = tl.program_id(0).to(tl.int64) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = channels < dim
    n = tl.arange(0, STATES).to(tl.int64)
    held = inside[:, None] & (n < STATE)[None, :]

    # [BLOCK_DIM]
    ptrs = x_ptr + sample * stride_x[0] + channels * stride_x[1]
    x = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    ptrs = dt_ptr + sample * stride_dt[0] + channels * stride_dt[1]
    step = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        step += tl.load(bias_ptr + channels * stride_bias, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    # [BLOCK_DIM, STATES]
    ptrs = A_ptr + channels[:, None] * stride_a[0] + n[None, :] * stride_a[1]
    A = in_base_2(tl.load(ptrs, mask=held, other=0.0).to(tl.float32))
    group = channels // (dim // groups_b)
    ptrs = B_ptr + sample * stride_b[0] + group[:, None] * stride_b[1] + n[None, :] * stride_b[2]
    b = tl.load(ptrs, mask=held, other=0.0).to(tl.float32)
    group = channels // (dim // groups_c)
    ptrs = C_ptr + sample * stride_c[0] + group[:, None] * stride_c[1] + n[None, :] * stride_c[2]
    c = tl.load(ptrs, mask=held, other=0.0).to(tl.float32)
    ptrs = state_ptr + sample * stride_state[0] + channels[:, None] * stride_state[1]
    ptrs += n[None, :] * stride_state[2]
    h = tl.load(ptrs, mask=held, other=0.0).to(tl.float32)

    h = tl.exp2(step[:, None] * A) * h + (step * x)[:, None] * b
    tl.store(ptrs, h.to(state_ptr.dtype.element_ty), mask=held)
    out = tl.sum(h * c, 1)
    if D_ptr is not None:
        out += x * tl.load(D_ptr + channels * stride_d, mask=inside, other=0.0).to(tl.float32)
    if z_ptr is not None:
        ptrs = z_ptr + sample * stride_z[0] + channels * stride_z[1]
        z = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        out *= silu(z)
    tl.store(out_ptr + sample * dim + channels, out.to(out_ptr.dtype.element_ty), mask=inside)


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, count, samples) -> Tensor:
    refuse_float64(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    refuse_more_samples_than_programs(len(x))
    batch, dim, n = state.shape
    states = next_power_of_2(n)
    options = configure(x, states, state.dtype)
    out = x.new_empty((batch, dim))
    update_kernel[(cdiv(dim, options["BLOCK_DIM"]), batch)](
        state, x, dt, A, B, C, D, z, dt_bias, count, samples, out,
        dim, B.shape[1], C.shape[1],
        state.stride(), x.stride(), dt.stride(), A.stride(), B.stride(), C.stride(),
        *strides(D, 1), strides(z, 2), *strides(dt_bias, 1),
        SOFTPLUS=dt_softplus, STATE=n, STATES=states, **options,
    )  # fmt: skip
    return out


def configure(x: Tensor, states: int, of_state: torch.dtype) -> configs.Config:
    """A tile's channels and its warps; untuned, tiles of 2048 states."""
    batch, dim = x.shape
    facts = {"dtype": str(x.dtype), "state": str(of_state), "states": states}
    sizes = {"samples": (batch, 1024), "channels": (dim, 16384)}
    heuristic = {"BLOCK_DIM": max(1, 2048 // states), "num_warps": 4}
    return configs.choose("selective_state_update.update", facts, sizes, heuristic)
