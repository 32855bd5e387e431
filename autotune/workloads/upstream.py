"""Packages as peers: their Python without CUDA, and their CUDA alone."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from .workload import MissingPeer


@contextmanager
def stand_in(module: str) -> Iterator[None]:
    """An empty module in place of one that is not installed, while another is imported."""
    if find_spec(module):
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]


def mamba_ssm(module: str) -> ModuleType:
    """A module of mamba_ssm.ops: Python that needs no extension, but the package imports one."""
    name = f"mamba_ssm.ops.{module}"
    try:
        if name in sys.modules:
            return sys.modules[name]
        with stand_in("selective_scan_cuda"):
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(f"cannot be imported: {error}") from error


def transformers_scan() -> Callable:
    """The function behind the decorator that would put mamba-ssm's in its place. It is there since
    transformers 5; before, it stood inside a module."""
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError as error:
        raise MissingPeer(f"cannot be imported: {error}") from error
    return inspect.unwrap(mamba_selective_scan)


def extension(name: str) -> ModuleType:
    """A CUDA extension by itself, as bench/peers.py builds it from a source distribution."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(f"not built: {error}") from error
