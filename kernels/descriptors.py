"""Descriptors of tiles, which Hopper's Tensor Memory Accelerator (TMA) loads and stores.

One thread asks for a whole tile by the coordinates of its first number, so that addresses take no
registers. What lies outside the tensor is read as zeros, and is not written. (CUDA C++ Programming
Guide, "Tensor Memory Access"; cuTensorMapEncodeTiled has the conditions below.)
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16  # bytes: where a tensor begins, and between the numbers of all axes but the last
BRIEF = 2**30  # multiplications, 5 µs on an H200; the host takes about as long for two descriptors


def describable(*tensors: Tensor) -> bool:
    """Whether TMA takes these tensors, of 16 bits a number as kernels use it for."""
    return all(
        strides_of(x.shape, x.stride(), x.dtype) and x.data_ptr() % ALIGNED == 0 for x in tensors
    )


def pay(multiplications: int) -> bool:
    """Whether a launch of so many takes longer than its descriptors take the host."""
    return multiplications >= BRIEF


def describe(x: Tensor, *block: int) -> TensorDescriptor:
    """Of a describable tensor, in tiles of shape `block`."""
    return TensorDescriptor(x, x.shape, strides_of(x.shape, x.stride(), x.dtype), list(block))


@lru_cache(maxsize=4096)
def strides_of(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """As a descriptor has them; None where it can have none.

    A stride that no number needs may be any, and is replaced.
    """
    outer = [s if size > 1 else ALIGNED for size, s in zip(shape[:-1], strides[:-1], strict=True)]
    described = (
        dtype.itemsize == 2
        and shape.numel() > 0
        and strides[-1] == 1
        and all(s > 0 and s * dtype.itemsize % ALIGNED == 0 for s in outer)
    )
    return (*outer, 1) if described else None
