"""Kernels whose resources are known, compiled offline: prints their reports as JSON."""

import dataclasses
import json

import torch
import triton
import triton.language as tl

from tossup.autotune.offline import compile_launches
from tossup.kernels.dot import dot
from tossup.kernels.routing.gate import active_sample


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < size)
    if y_ptr is not None:
        x += tl.load(y_ptr + places, mask=places < size)
    tl.store(out_ptr + places, x, mask=places < size)


@triton.jit
def sum_kernel(x_ptr, out_ptr, rows, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(rows, num_stages=1, loop_unroll_factor=1):
        total += tl.load(x_ptr + row * size + places, mask=places < size, other=0.0)
    tl.store(out_ptr + places, total)


@triton.jit
def multiply_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = dot(tl.load(a_ptr + rows * SIZE + columns), tl.load(b_ptr + rows * SIZE + columns))
    tl.store(out_ptr + rows * SIZE + columns, product)


@triton.jit
def gated_kernel(x_ptr, out_ptr, count_ptr, samples_ptr, FIRST: tl.constexpr):
    place = tl.program_id(0)
    if FIRST:
        sample = active_sample(count_ptr, samples_ptr, place)
        if sample < 0:
            return
        x = tl.load(x_ptr + sample)
    else:
        x = tl.load(x_ptr + place) + tl.load(out_ptr + place)
        if x > 0:
            return
        sample = active_sample(count_ptr, samples_ptr, place)
    tl.store(out_ptr + sample, x)


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def report(launch, arch: int = 90) -> dict:
    (only,) = compile_launches(launch, arch)
    return dataclasses.asdict(only)


def multiply(dtype: torch.dtype, **options) -> None:
    a = meta(64, 64, dtype=dtype)
    multiply_kernel[(1,)](a, a, meta(64, 64), SIZE=64, **options)


def gate(first: bool) -> None:
    route = meta(dtype=torch.int32), meta(4, dtype=torch.int32)
    gated_kernel[(4,)](meta(4), meta(4), *route, FIRST=first)


def reports() -> dict[str, dict]:
    many = meta(4, 4096)
    found = {
        "add float32": report(lambda: add_kernel[(3,)](many, None, many, 3000, BLOCK=1024)),
        "sum aligned": report(lambda: sum_kernel[(1,)](many, many, 4, 2048, BLOCK=2048)),
        "sum odd": report(lambda: sum_kernel[(1,)](many, many, 4, 2047, BLOCK=2048)),
        "multiply float16": report(lambda: multiply(torch.float16)),
        "multiply float32": report(lambda: multiply(torch.float32)),
        "gate first": report(lambda: gate(True)),
        "gate late": report(lambda: gate(False)),
    }
    for arch in (80, 90, 100):
        found[f"squeezed {arch}"] = report(lambda: multiply(torch.float32, maxnreg=32), arch)
        found[f"at ease {arch}"] = report(lambda: multiply(torch.float16), arch)
    return found


if __name__ == "__main__":
    print(json.dumps(reports()))
