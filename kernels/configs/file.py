"""A GPU's file of launch configurations: JSON, with an entry on each line.

    {
     "gpu": "NVIDIA H200",
     "entries": [
      {"kernel": "causal_conv1d.forward", "facts": {…}, "sizes": {…}, "config": {"BLOCK_T": 32, …},
       "workload": "causal_conv1d batch=8 …", "milliseconds": 0.21, "heuristic": 0.25,
       "noise": 0.01, "torch": "2.13.0", "triton": "3.9.0", "date": "2026-11-24"}
     ]
    }

A config of null says that nothing was found faster than the heuristic.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

Fact = str | int | bool
Config = Mapping[str, int]


class Key(NamedTuple):
    """What a launch is, as far as its configuration depends on it: hashable, in pairs.

    kernel: as "flash_attention.forward". facts: what must be the same. sizes: what may be near.
    """

    kernel: str
    facts: tuple[tuple[str, Fact], ...]
    sizes: tuple[tuple[str, int], ...]

    @property
    def same(self) -> tuple[Any, ...]:
        """Equal for keys that differ in the order of their pairs alone."""
        return self.kernel, frozenset(self.facts), frozenset(self.sizes)


@dataclass(frozen=True)
class Entry:
    """What was measured of one key.

    config: the fastest; None is the heuristic. workload: the words that `tossup tune` was given.
    milliseconds, heuristic: medians of the fastest and of the heuristic's, in one run. noise: half
    the distance between the quartiles of the heuristic's, as a part of its median.
    torch, triton: versions. date: ISO.
    """

    key: Key
    config: Config | None
    workload: str
    milliseconds: float
    heuristic: float
    noise: float
    torch: str
    triton: str
    date: str


# What a file has of an entry, and the types that JSON may give it
NUMBER = (int, float)
MEMBERS: dict[str, Any] = {
    "kernel": str,
    "facts": dict,
    "sizes": dict,
    "config": (dict, type(None)),
    "workload": str,
    "milliseconds": NUMBER,
    "heuristic": NUMBER,
    "noise": NUMBER,
    "torch": str,
    "triton": str,
    "date": str,
}
assert [*MEMBERS][3:] == [field.name for field in fields(Entry)][1:]


def read(path: Path) -> Iterator[Entry]:
    """A file's entries. Raises ValueError, which names file and entry, where it is wrong."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f"{path} takes a mapping with a list of entries")
    for place, values in enumerate(content["entries"]):
        yield entry_of(values, f"{path}, entry {place}")


def entry_of(values: Any, where: str) -> Entry:
    if not isinstance(values, dict) or values.keys() != MEMBERS.keys():
        got = ", ".join(values) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{where} takes {', '.join(MEMBERS)}, got {got}")
    for name, kind in MEMBERS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{where}: {name} is of another kind, got {values[name]!r}")
    for name, least in (("sizes", 1), ("config", 0)):
        for what, number in (values[name] or {}).items():
            if type(number) is not int or number < least:
                raise ValueError(
                    f"{where}: {name} takes whole numbers from {least} on,"
                    f" got {number!r} for {what}"
                )
    for what, fact in values["facts"].items():
        if not isinstance(fact, Fact):
            raise ValueError(
                f"{where}: facts takes text, whole numbers and truth values, got {fact} for {what}"
            )
    facts, sizes = (tuple(values[name].items()) for name in ("facts", "sizes"))
    key = Key(values["kernel"], facts, sizes)
    return Entry(key, **{name: values[name] for name in [*MEMBERS][3:]})


def written(gpu: str, entries: Iterable[Entry]) -> str:
    """The text of a file. gpu: the name that the driver gives it."""
    lines = ",\n".join(f"  {json.dumps(values_of(entry))}" for entry in entries)
    return f'{{\n "gpu": {json.dumps(gpu)},\n "entries": [\n{lines}\n ]\n}}\n'


def values_of(entry: Entry) -> dict[str, Any]:
    kernel, facts, sizes = entry.key
    values = asdict(entry)
    del values["key"]
    return {"kernel": kernel, "facts": dict(facts), "sizes": dict(sizes), **values}
