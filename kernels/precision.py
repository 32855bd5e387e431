"""In which precision the ops compute: decided here for all of them."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, statistics and states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_float64(**tensors: torch.Tensor | None) -> None:
    """What every Triton launcher begins with. Raises ValueError, which names the tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 for impl='triton', got float64:"
                " float64 runs with impl='cpu' or 'reference'"
            )
