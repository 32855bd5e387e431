"""The device that a configuration names."""

import os

import torch

from ..autotune.errors import said
from ..kernels.backend import resolve_impl
from .errors import ConfigError


def device_of(name: str, key: str = "training.device") -> torch.device:
    """The device that a key names, made the current one; of several GPUs the first, or under
    torchrun the rank's own.

    Raises ConfigError where this machine has no such device, or the mixers have no backend for it.
    """
    takes = f"{key} takes a device of this machine, such as cpu or cuda, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:  # which lists all devices that torch has ever known
        raise ConfigError(takes) from error
    try:
        if device.type == "cuda":
            own = int(os.environ.get("LOCAL_RANK", "0"))
            device = torch.device("cuda", own if device.index is None else device.index)
        torch.zeros(1, device=device).item()  # some devices can be named, and hold no data
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"{takes}: {said(error)}") from error
    try:
        backend = resolve_impl("auto", device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    runs_on = {"cpu": "cpu", "triton": "cpu" if interprets() else "cuda"}.get(backend, device.type)
    if device.type != runs_on:
        raise ConfigError(
            f"{key}: the {backend} backend runs on {runs_on}, got {name!r}; "
            f"take {runs_on}, or set TOSSUP_IMPL"
        )
    return device


def interprets() -> bool:
    """Whether Triton interprets its kernels, on the CPU: for tests, and by far too slow else."""
    return os.environ.get("TRITON_INTERPRET") == "1"
