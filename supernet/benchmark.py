"""`tossup bench`: a race on a shape of the user's, from the registry of all benchmarks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..autotune.machine import describe
from ..autotune.races import race, table
from ..autotune.workloads import ALIASES, OPS, Workload, build, import_workloads, keys
from .devices import device_of
from .errors import ConfigError
from .loader import apply_override, in_yaml

SECONDS = {"cpu": 10.0, "cuda": 1.0}  # of one race


def benchmark(words: Sequence[str], device: str, as_json: bool, modules: Sequence[str] = ()) -> str:
    """What to print. words: OP key=value … modules: that add ops to those known.

    Raises ConfigError where a word is wrong, and WrongResult where ours is, and has no time.
    """
    add_ops(modules)
    workload, directions = parse(words)
    where = device_of(device, "--device")
    if where.type == "cpu":
        torch.set_num_threads(1)  # as records are made
    races = race(workload, where, directions, SECONDS[where.type])
    about = describe(where)
    if as_json:
        return json.dumps(about | {"races": races}, indent=1)
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    commit = f"; commit {about['commit']}" if "commit" in about else ""
    return f"{about['device']}; {versions}{commit}\n{table(races)}"


def add_ops(modules: Sequence[str]) -> None:
    """Those of a user's modules. Raises ConfigError where one cannot be imported."""
    try:
        import_workloads(modules)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parse(words: Sequence[str]) -> tuple[Workload, list[str]]:
    """The workload, and the one direction that is wanted; none stands for all."""
    if not words:
        raise ConfigError(f"OP is required, one of {', '.join(OPS)}")
    op, *overrides = words
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    direction = values.pop("direction", None)
    try:
        workload = build(op, values, others=("direction",))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if direction not in (None, *workload.directions):
        choices = ", ".join(workload.directions)
        raise ConfigError(f"direction takes {choices}, got {direction!r}")
    return workload, [direction] if direction else []


def describe_ops(directed: bool) -> Iterator[str]:
    """One line for each op and for each key that it takes, with its default and meaning.

    directed: whether a direction is a key.
    """
    for op, kind in OPS.items():
        yield ", or ".join([op, *(name for name, other in ALIASES.items() if other == op)])
        for key, (default, about) in keys(op).items():
            yield f"  {key}: {in_yaml(default)}  ({about})"
        if directed:
            yield f"  direction: null  ({' | '.join(kind.directions)}; null: one after the other)"
