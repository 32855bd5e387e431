"""In which precision the ops compute: decided here for all of them."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, statistics and states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
