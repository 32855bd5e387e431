"""In which precision the ops compute: decided here for all of them."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, statistics and states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to autocast's dtype, as torch does for products and attention; float64 is left alone."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def refuse_float64(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError, which names the tensor: every Triton launcher begins with this."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 for impl='triton', got float64:"
                " float64 runs with impl='cpu' or 'reference'"
            )
