"""The device that a configuration names."""

import torch

from ..kernels.backend import resolve_impl
from .errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device that `training.device` names.

    Raises ConfigError where this machine has no such device, or the mixers have no backend for it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices can be named, and hold no data
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"training.device takes a device of this machine, such as cpu, got {name!r}"
        ) from error
    try:
        backend = resolve_impl("auto", device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if backend != "reference" and (backend, device.type) != ("cpu", "cpu"):
        raise ConfigError(
            f"training.device: the mixers have no {backend} backend that runs on {name!r}; "
            "take cpu, or set TOSSUP_IMPL=reference"
        )
    return device
