"""Numbers on the device that ops follow without reading them on the host."""

import torch
from torch import Tensor


def check_written(written: Tensor | None) -> None:
    """How often memory was written before. Raises ValueError unless it is int32 of shape ()."""
    if written is not None and (written.dtype != torch.int32 or written.ndim):
        raise ValueError(
            f"written must be int32 of shape (), got {written.dtype} of {tuple(written.shape)}"
        )
