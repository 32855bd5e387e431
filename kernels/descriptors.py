"""Descriptors of tiles, which Hopper's Tensor Memory Accelerator (TMA) loads and stores.

One thread asks for a whole tile by the coordinates of its first number, so that addresses take no
registers. What lies outside the tensor is read as zeros, and is not written. (CUDA C++ Programming
Guide, "Tensor Memory Access"; cuTensorMapEncodeTiled has the conditions below.)
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LEAST_ARCH = 90  # the compute capability from which on there is TMA
ALIGNED = 16  # bytes: where a tensor begins, and between the numbers of all axes but the last
BRIEF = 2**30  # multiplications: 2 µs at an H200's peak, as the host takes for one descriptor


def describable(*tensors: Tensor) -> bool:
    """Whether TMA can address all these tensors: of 16 bits a number, as kernels use it for."""
    return all(
        strides_of(x.shape, x.stride(), x.dtype) and x.data_ptr() % ALIGNED == 0 for x in tensors
    )


def pay(multiplications: int) -> bool:
    """Whether a launch of so many is long beside what its descriptors take the host."""
    return multiplications >= BRIEF


def describe(x: Tensor, *block: int) -> TensorDescriptor:
    """The descriptor of a tensor, which must be `describable`, for tiles of shape `block`."""
    return TensorDescriptor(x, x.shape, strides_of(x.shape, x.stride(), x.dtype), list(block))


@lru_cache(maxsize=4096)
def strides_of(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """The strides of a descriptor, or None if the tensor cannot have one.

    An axis of size 1 may have any stride, and gets that of a contiguous tensor.
    """
    if dtype.itemsize != 2 or shape.numel() == 0 or max(shape) >= 2**31 or strides[-1] != 1:
        return None
    vector, extent, found = ALIGNED // dtype.itemsize, shape[-1], [1]
    for size, stride in zip(shape[-2::-1], strides[-2::-1], strict=True):
        if size == 1:
            stride = -(-extent // vector) * vector
        if stride <= 0 or stride % vector != 0:
            return None
        found.append(stride)
        extent = size * stride
    return tuple(found[::-1])
