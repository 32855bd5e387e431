"""Loops that CPU backends compile with numba, and run on as many threads as torch does."""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which the low bits then hold
LOWEST, HIGHEST = np.float32(-87.6), np.float32(89.0)  # their exponentials are 0 and infinity
ONE = np.float32(1)
P2, P3, P4 = np.float32(0.5), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
P5, P6, P7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)


@numba.njit(fastmath={"contract"})
def exp_float32(x):
    """eˣ to 1.1 units in the last place, in instructions that vectorise; 0 below 2e-38.

    Cody and Waite's range reduction, and the polynomial of Cephes' expf.
    """
    x = LOWEST if x < LOWEST else x  # a NaN passes both comparisons
    x = HIGHEST if x > HIGHEST else x
    shifted = x * LOG2_E + ROUNDER
    power = shifted - ROUNDER
    r = x - power * LN2_HIGH - power * LN2_LOW
    p = ((((P7 * r + P6) * r + P5) * r + P4) * r + P3) * r + P2
    p = p * (r * r) + r + ONE
    scale = (np.float32(shifted).view(np.int32) + np.int32(126)) << np.int32(23)
    return (p + p) * np.int32(scale).view(np.float32)


def exp(x):
    return math.exp(x)


@overload(exp)
def choose_exp(x):
    return (lambda x: exp_float32(x)) if x == numba.float32 else (lambda x: math.exp(x))


class Sweep:
    """A loop over tasks, compiled for each kind of its arguments.

    function: of an int64 array of some tasks, and of arrays and integers; it returns nothing. What
    two tasks write may not overlap.
    layout: "A" takes arrays of any strides; "C" contiguous ones, whose last axis vectorises.
    fastmath: numba's. Contraction into fused multiply-adds keeps NaN and infinities as they are;
    reassoc lets a sum be vectorised.
    also: what else is compiled in, beside the function's file and this one.
    """

    def __init__(self, function: Callable[..., None], layout: str, fastmath: set[str], also: bytes):
        # numba's cache follows the function's file, under its name: that tells of the rest
        rest = hashlib.sha256(Path(__file__).read_bytes() + also).hexdigest()[:8]
        function.__qualname__ += f"_{rest}"
        self.function, self.layout, self.fastmath = function, layout, fastmath
        self.kernels: dict[Any, Callable[..., None]] = {}

    def __call__(self, tasks: int, *arguments: Tensor | int) -> None:
        """Run all tasks, 0 to tasks - 1. Tensors are on the CPU.

        The loops release the interpreter's lock, so plain threads serve. numba's own threading
        layers do not: one may not be entered by two threads, the other brings a second OpenMP
        beside torch's.
        """
        values = [a if isinstance(a, int) else a.detach().numpy() for a in arguments]
        kinds = tuple(None if isinstance(v, int) else (v.dtype, v.ndim) for v in values)
        kernel = self.kernels.get(kinds) or self.compile(kinds)
        threads = max(1, min(torch.get_num_threads(), tasks))
        shares = [np.arange(first, tasks, threads) for first in range(threads)]
        workers = pool(os.getpid(), threads)
        others = [workers.submit(kernel, share, *values) for share in shares[1:]]
        kernel(shares[0], *values)
        for other in others:
            other.result()

    def compile(self, kinds: tuple[tuple[np.dtype, int] | None, ...]) -> Callable[..., None]:
        """kinds: of each argument the dtype and the number of axes, None for an integer.

        Where numba may write to no folder, every process compiles anew, and is warned.
        """
        types = [numba.int64 if kind is None else self.array(*kind) for kind in kinds]
        kernel = numba.njit(nogil=True, error_model="numpy", fastmath=self.fastmath)(self.function)
        try:
            kernel.enable_caching()
        except RuntimeError as error:
            op = self.function.__module__.split(".")[-2]
            warnings.warn(
                f"{op} is compiled anew in every process: {error}; set NUMBA_CACHE_DIR to a folder"
                " that can be written",
                stacklevel=2,
            )
        kernel.compile(numba.void(numba.types.Array(numba.int64, 1, "A"), *types))
        kernel.disable_compile()  # arrays of another kind are an error, not one more signature
        self.kernels[kinds] = kernel
        return kernel

    def array(self, dtype: np.dtype, ndim: int) -> numba.types.Array:
        return numba.types.Array(numba.from_dtype(dtype), ndim, self.layout)


def sweep(
    layout: str = "A", fastmath: set[str] | None = None, also: bytes = b""
) -> Callable[[Callable[..., None]], Sweep]:
    """The decorator that makes a function a Sweep; contraction is the one liberty by default."""
    return lambda function: Sweep(function, layout, fastmath or {"contract"}, also)


@functools.cache
def pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of one process. A fork does not inherit them, so it makes its own."""
    return ThreadPoolExecutor(threads, "sweep")
