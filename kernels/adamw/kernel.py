"""Triton kernels and launchers: one launch goes over all tensors of a bucket.

A program has one chunk of one tensor. It finds it in a table of addresses, so that no launch holds
more arguments for more tensors, and returns after a few loads if the mixer was not used.

Floor of a step, for each used parameter in float32: 28 bytes (parameter and moments read and
written, the gradient read), 4 for the norm, and 8 where gradients are scaled; nothing for those
that are not used, whose gradients torch's norm and product would read and write. Memory is the
limit: of an H200's bandwidth a multiprocessor's part is some 18 bytes a cycle, so that 28 bytes
take 1.5, and the 28 instructions of an element 0.22. How near the kernels come: not measured.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..launch import cdiv
from ..precision import wide
from ..transfer import send
from .bucket import CHUNK, COLUMNS

# Elements that a program has at once, of CHUNK: 2 × 16 bytes of a tensor to a lane
HEURISTIC = {"BLOCK": 1024, "num_warps": 4}
COUNTED = 256  # step counts that a program has

SIZE, FIRST, LAYER, MIXER, PARAM, EXP_AVG, EXP_AVG_SQ, STEP = map(tl.constexpr, range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))

# By torch's names, as an address in a table has no dtype
DTYPES = {
    dtype: getattr(tl, str(dtype).removeprefix("torch."))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@triton.jit
def place_of_chunk(table_ptr, owner_ptr, CHUNK: tl.constexpr):
    """Whose chunk the program has: its place, its row of the table, and where the chunk begins."""
    place = tl.load(owner_ptr + tl.program_id(0)).to(tl.int64)
    row = table_ptr + place * WIDTH
    return place, row, (tl.program_id(0) - tl.load(row + FIRST)) * CHUNK


@triton.jit
def was_used(row, used_ptr, stride_layer, stride_mixer):
    """Whether some sample took the mixer of this row's parameter; if it is shared, it was."""
    used = tl.load(row + LAYER) < 0
    if used_ptr is not None:
        if not used:
            at = tl.load(row + LAYER) * stride_layer + tl.load(row + MIXER) * stride_mixer
            used = tl.load(used_ptr + at) > 0
    return used


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To elements at this address; loads are wide where it is known to be a multiple of 16."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def all_of(BLOCK: tl.constexpr):
    """The mask of a whole block. One made of a length, which nobody knows, keeps loads narrow."""
    return tl.full((BLOCK,), True, tl.int1)


@triton.jit
def square(gradient, at, mask, WIDE: tl.constexpr):
    # (BLOCK,)
    g = tl.load(gradient + at, mask=mask, other=0.0).to(WIDE)
    return g * g


@triton.jit
def norm_kernel(
    partial_ptr,
    gradients_ptr,
    table_ptr,
    owner_ptr,
    used_ptr,
    stride_layer,
    stride_mixer,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk, 0 of one that does not count."""
    place, row, begin = place_of_chunk(table_ptr, owner_ptr, CHUNK)
    address = tl.load(gradients_ptr + place)
    total = tl.zeros((BLOCK,), WIDE)
    if (address != 0) & was_used(row, used_ptr, stride_layer, stride_mixer):
        gradient = pointer_to(address, DTYPE, ALIGNED)
        end = tl.minimum(begin + CHUNK, tl.load(row + SIZE))
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            if start + BLOCK <= end:
                total += square(gradient, at, all_of(BLOCK), WIDE)
            else:
                total += square(gradient, at, at < end, WIDE)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def multiply(gradient, at, mask, factor, WIDE: tl.constexpr):
    # (BLOCK,)
    g = tl.load(gradient + at, mask=mask).to(WIDE) * factor
    tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    gradients_ptr,
    factor_ptr,
    table_ptr,
    owner_ptr,
    used_ptr,
    stride_layer,
    stride_mixer,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk times the factor."""
    factor = tl.load(factor_ptr).to(WIDE)
    if factor == 1:
        return
    place, row, begin = place_of_chunk(table_ptr, owner_ptr, CHUNK)
    address = tl.load(gradients_ptr + place)
    if address == 0:
        return
    if not was_used(row, used_ptr, stride_layer, stride_mixer):
        return
    gradient = pointer_to(address, DTYPE, ALIGNED)
    end = tl.minimum(begin + CHUNK, tl.load(row + SIZE))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= end:
            multiply(gradient, at, all_of(BLOCK), factor, WIDE)
        else:
            multiply(gradient, at, at < end, factor, WIDE)


@triton.jit
def count_kernel(
    gradients_ptr,
    table_ptr,
    used_ptr,
    stride_layer,
    stride_mixer,
    parameters,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add 1 to the step counts of all that the step updates."""
    # (BLOCK,), one parameter each
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < parameters
    row = table_ptr + place.to(tl.int64) * WIDTH
    layer = tl.load(row + LAYER, mask=there, other=-1)
    updated = tl.load(gradients_ptr + place, mask=there, other=0) != 0
    if used_ptr is not None:
        gated = layer >= 0
        at = layer * stride_layer + tl.load(row + MIXER, mask=gated, other=0) * stride_mixer
        used = tl.load(used_ptr + at, mask=gated, other=0) > 0
        updated = (updated & (used | (layer < 0))) | (gated & DECAYS)
    step = tl.load(row + STEP, mask=updated, other=0).to(tl.pointer_type(tl.float32))
    tl.store(step, tl.load(step, mask=updated, other=0.0) + 1, mask=updated)


@triton.jit
def update(param, gradient, exp_avg, exp_avg_sq, at, mask, known, hyper, WIDE: tl.constexpr):
    """Algorithm 2 of Loshchilov and Hutter, lines 6 to 12, with the corrections in two scalars."""
    decay, rate, correction, beta1, rest1, beta2, rest2, eps = hyper
    DTYPE: tl.constexpr = param.dtype.element_ty
    # All (BLOCK,)
    p = tl.load(param + at, mask=mask).to(WIDE)
    g = tl.where(known, tl.load(gradient + at, mask=mask).to(WIDE), 0)
    m = tl.load(exp_avg + at, mask=mask).to(WIDE)
    v = tl.load(exp_avg_sq + at, mask=mask).to(WIDE)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p * decay - rate * m / (tl.sqrt(v) * correction + eps)
    tl.store(param + at, p.to(DTYPE), mask=mask)
    tl.store(exp_avg + at, m.to(DTYPE), mask=mask)
    tl.store(exp_avg_sq + at, v.to(DTYPE), mask=mask)


@triton.jit
def adamw_kernel(
    gradients_ptr,
    table_ptr,
    owner_ptr,
    used_ptr,
    stride_layer,
    stride_mixer,
    lr_ptr,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    DECAYS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one parameter and its moments."""
    place, row, begin = place_of_chunk(table_ptr, owner_ptr, CHUNK)
    address = tl.load(gradients_ptr + place)
    known = (address != 0) & was_used(row, used_ptr, stride_layer, stride_mixer)
    if not (known | (DECAYS & (tl.load(row + LAYER) >= 0))):
        return
    param = pointer_to(tl.load(row + PARAM), DTYPE, ALIGNED)
    exp_avg = pointer_to(tl.load(row + EXP_AVG), DTYPE, ALIGNED)
    # Where there is no gradient, something that can be read as well
    gradient = tl.where(known, pointer_to(address, DTYPE, ALIGNED), exp_avg)
    exp_avg_sq = pointer_to(tl.load(row + EXP_AVG_SQ), DTYPE, ALIGNED)
    # Once for a chunk, in float64: betas and their powers are near 1, from which they are taken
    count = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    hyper = (
        tl.full((), 1 - lr * weight_decay, WIDE),
        tl.full((), lr / (1 - tl.exp2(count * log2_beta1)), WIDE),
        tl.full((), 1 / tl.sqrt(1 - tl.exp2(count * log2_beta2)), WIDE),
        tl.full((), beta1, WIDE),
        tl.full((), 1 - beta1, WIDE),
        tl.full((), beta2, WIDE),
        tl.full((), 1 - beta2, WIDE),
        tl.full((), eps, WIDE),
    )
    end = tl.minimum(begin + CHUNK, tl.load(row + SIZE))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= end:
            update(param, gradient, exp_avg, exp_avg_sq, at, all_of(BLOCK), known, hyper, WIDE)
        else:
            update(param, gradient, exp_avg, exp_avg_sq, at, at < end, known, hyper, WIDE)


def adamw_(
    params: list[Tensor],
    gradients: list[Tensor],
    places: list[int],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
    lr: Tensor | None,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decays: bool,
) -> None:
    describe(host, table, params, exp_avgs, exp_avg_sqs, steps)
    addresses = addresses_of(gradients, places, table)
    gates = gates_of(used)
    count_kernel[(cdiv(len(params), COUNTED),)](
        addresses, table, *gates, len(params), DECAYS=decays, BLOCK=COUNTED
    )
    if len(owner):
        adamw_kernel[(len(owner),)](
            addresses, table, owner, *gates, lr, rate, beta1, beta2, log2(beta1), log2(beta2), eps,
            weight_decay, DECAYS=decays,
            **elements_of("step", owner, params, gradients, exp_avgs, exp_avg_sqs),
        )  # fmt: skip


def gradient_norm(
    params: list[Tensor],
    gradients: list[Tensor],
    places: list[int],
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
) -> Tensor:
    partial = table.new_empty(len(owner), dtype=wide(params[0].dtype))
    if len(owner):
        norm_kernel[(len(owner),)](
            partial, addresses_of(gradients, places, table), table, owner, *gates_of(used),
            **elements_of("norm", owner, params[:1], gradients),
        )  # fmt: skip
    return partial.sum().sqrt()


def scale_gradients_(
    gradients: list[Tensor],
    places: list[int],
    factor: Tensor,
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
) -> None:
    if len(owner):
        scale_kernel[(len(owner),)](
            addresses_of(gradients, places, table), factor, table, owner, *gates_of(used),
            **elements_of("scale", owner, gradients),
        )  # fmt: skip


def describe(host: Tensor, table: Tensor, *columns: list[Tensor]) -> None:
    """Bring the table's addresses up to date; where it is, nothing is sent."""
    found = torch.tensor([[x.data_ptr() for x in column] for column in columns], device="cpu").t()
    known = host[:, -len(columns) :]
    if not torch.equal(known, found):
        table[:, -len(columns) :] = send(found, table.device)
        known.copy_(found)


def addresses_of(gradients: list[Tensor], places: list[int], table: Tensor) -> Tensor:
    """Where the gradients lie, 0 where there is none, and 1 where there is one without elements:
    int64, one for each row of the table.

    They change from step to step, and in a captured one are known only then. So they go as numbers
    of torch's launches, a hundred at a time, and not by host memory, which a graph had to keep.
    """
    addresses = table.new_zeros(len(table))
    if gradients:
        views = addresses.unbind()
        where = [gradient.data_ptr() or 1 for gradient in gradients]
        torch._foreach_add_([views[place] for place in places], where)
    return addresses


def gates_of(used: Tensor | None) -> tuple[Tensor | None, int, int]:
    """What was used, as kernels take it: Triton's load of a bool is none of a byte."""
    if used is None:
        return None, 0, 0
    return used.view(torch.uint8) if used.dtype == torch.bool else used, *used.stride()


def elements_of(kernel: str, owner: Tensor, *lists: list[Tensor]) -> dict[str, Any]:
    """The constants of a kernel that goes over these tensors, all of one dtype."""
    dtype = lists[0][0].dtype
    aligned = all(x.data_ptr() % 16 == 0 for column in lists for x in column)
    facts = {"dtype": str(dtype), "aligned": aligned}
    sizes = {"chunks": (len(owner), 4096)}
    return {
        "DTYPE": DTYPES[dtype],
        "WIDE": DTYPES[wide(dtype)],
        "ALIGNED": aligned,
        "CHUNK": CHUNK,
        **configs.choose(f"adamw.{kernel}", facts, sizes, HEURISTIC),
    }


def log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf
