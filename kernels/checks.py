"""What the ops ask of their arguments alike. Each raises ValueError, which names the argument."""

import torch
from torch import Tensor

Shape = tuple[int, ...]


def check_shapes(**tensors: tuple[Tensor | None, Shape]) -> None:
    """Every tensor that is given has the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_floating(**tensors: Tensor | None) -> None:
    """Every tensor that is given holds floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating, got {tensor.dtype}")


def check_taps(weight: Tensor, dim: int) -> None:
    """Of a convolution: (dim, width), 2 to 4 taps for each channel."""
    if weight.ndim != 2 or weight.shape[0] != dim or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"weight must be (dim, width) = ({dim}, 2 to 4), got {tuple(weight.shape)}"
        )


def check_seq_idx(seq_idx: Tensor | None, *shape: int) -> None:
    """The number of each token's sequence: integers (batch, seqlen), of any width."""
    check_shapes(seq_idx=(seq_idx, shape))
    if seq_idx is not None:
        kind = seq_idx.dtype
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise ValueError(f"seq_idx must hold integers, got {kind}")


def check_written(written: Tensor | None) -> None:
    """How often memory was written before, a counter on the device: int32 of shape ()."""
    if written is not None and (written.dtype != torch.int32 or written.ndim):
        raise ValueError(
            f"written must be int32 of shape (), got {written.dtype} of {tuple(written.shape)}"
        )
