"""Which configuration a launch takes: tiles, warps and stages as they were measured, or by rule.

A launcher has a heuristic, and asks `choose` whether better is known of what it is about to launch.
What is known lies beside this module, in a file for each GPU that `tossup tune` was run on, such as
nvidia_h200.json; `file.py` describes it. An entry of the very key goes first, then the nearest one
of the same facts, at most REACH doublings away in every size; else the heuristic stays. So a GPU
without a file works as well, untuned.

The GPU is never asked anything, and the file is read once. What the contexts below set holds in all
threads, as autograd runs backward passes in threads of its own.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import log2
from pathlib import Path

import torch

from .file import Config, Entry, Fact, Key, read

__all__ = [
    "REACH",
    "Config",
    "Entry",
    "Fact",
    "Key",
    "asked",
    "choose",
    "entries_of",
    "forced",
    "of_gpu",
    "path_of",
    "slug",
]

REACH = 2  # doublings

_forced: dict[str, Config] = {}
_asked: list[tuple[Key, Config]] | None = None
_gpus: list[str | None] = []  # of the contexts of_gpu, the innermost last


def choose(
    kernel: str,
    facts: Mapping[str, Fact],
    sizes: Mapping[str, tuple[int, int]],
    heuristic: Config,
) -> Config:
    """The configuration of a launch, with the keys of `heuristic`, which is what it is untuned.

    kernel: as "flash_attention.forward". facts: what a configuration's worth depends on, and must
    be the same. sizes: what may be near, each with the most that it counts as: by then a GPU is
    full, and loops are long.
    Raises ValueError where a file is malformed, or holds other keys than the kernel takes.
    """
    gpu = current_gpu()
    if _asked is None and not _forced and not entries_of(gpu):
        return heuristic  # every launch on a GPU without a file ends here
    capped = ((name, min(size, most)) for name, (size, most) in sizes.items())
    key = Key(kernel, tuple(facts.items()), tuple(capped))
    if _asked is not None:
        _asked.append((key, heuristic))
    config = _forced.get(kernel) or known(gpu, key)
    if config is None:
        return heuristic
    if config.keys() != heuristic.keys():
        raise ValueError(
            f"a configuration of {kernel} takes {', '.join(heuristic)}, got {', '.join(config)}"
        )
    return config


@lru_cache(maxsize=4096)
def known(gpu: str | None, key: Key) -> Config | None:
    """What the GPU's file says of a launch, exactly or nearly; None is the heuristic."""
    sizes = {name: max(size, 1) for name, size in key.sizes}
    near: list[tuple[float, Entry]] = []
    for entry in entries_of(gpu):
        theirs = dict(entry.key.sizes)
        if (entry.key.kernel, dict(entry.key.facts)) != (key.kernel, dict(key.facts)):
            continue
        if theirs.keys() != sizes.keys():
            raise ValueError(
                f"{path_of(str(gpu))}: sizes of {key.kernel} are {', '.join(sizes)}, "
                f"got {', '.join(theirs)}"
            )
        doublings = [abs(log2(sizes[name] / theirs[name])) for name in sizes]
        if all(distance <= REACH for distance in doublings):
            near.append((sum(distance**2 for distance in doublings), entry))
    return min(near, key=lambda pair: pair[0])[1].config if near else None


@lru_cache
def entries_of(gpu: str | None) -> tuple[Entry, ...]:
    if gpu is None or not path_of(gpu).exists():
        return ()
    return tuple(read(path_of(gpu)))


def path_of(gpu: str) -> Path:
    """Where a GPU's file is, or would be: beside this module, or in the folder TOSSUP_CONFIGS."""
    return Path(os.environ.get("TOSSUP_CONFIGS") or Path(__file__).parent) / f"{gpu}.json"


def slug(name: str) -> str:
    """A GPU's name as a file has it: NVIDIA H100 80GB HBM3 is nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def current_gpu() -> str | None:
    """The GPU that launches are for, if any is there or was named."""
    if _gpus:
        return _gpus[-1]
    return slug_of(torch.cuda.current_device()) if torch.cuda.is_initialized() else None


@lru_cache
def slug_of(device: int) -> str:
    return slug(torch.cuda.get_device_name(device))


def forget() -> None:
    """Read the files anew: one was written."""
    entries_of.cache_clear()
    known.cache_clear()


@contextmanager
def of_gpu(gpu: str | None) -> Iterator[None]:
    """Within, launches are for the GPU of this file name, or for one that is unknown."""
    _gpus.append(gpu)
    try:
        yield
    finally:
        _gpus.pop()


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Within, a kernel takes this configuration, whatever the files say."""
    before = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextmanager
def asked() -> Iterator[list[tuple[Key, Config]]]:
    """The keys that launches within ask for, in order, each with its heuristic."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before
