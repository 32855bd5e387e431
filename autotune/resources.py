"""What kernels took when it was last committed, against what they take now."""

from collections.abc import Iterator
from typing import Any

from .inspection import COUNTED

MORE_IS_WORSE = (
    "registers", "spills", "shared", "scalar_dots", "unordered_writes", "loads_before_exit",
)  # fmt: skip
COUNTS = ("instructions", *COUNTED)
Reports = dict[str, dict[str, Any]]  # of autotune/inspection.py


def changes(before: Reports, now: Reports) -> Iterator[tuple[bool, str]]:
    """One sentence for each launch that is not as it was, and whether it is worse.

    A launch that takes less of everything is better; one that takes more of anything, or is no
    longer there, or was not before, is worse until it is committed.
    """
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield True, f"{name}: is gone"
        elif name not in before:
            yield True, f"{name}: is new"
        elif before[name] != now[name]:
            yield compare(name, before[name], now[name])


def compare(name: str, before: dict[str, Any], now: dict[str, Any]) -> tuple[bool, str]:
    pairs = {key: (before[key], now[key]) for key in before if key != "loops"}
    worse = any(pairs[key][1] > pairs[key][0] for key in MORE_IS_WORSE)
    worse |= before["fits"] and not now["fits"]
    if len(before["loops"]) != len(now["loops"]):
        pairs["loops"] = len(before["loops"]), len(now["loops"])
        worse = True
    else:
        for place, (old, new) in enumerate(zip(before["loops"], now["loops"], strict=True)):
            pairs |= {f"loop {place} {key}": (old[key], new[key]) for key in old}
            worse |= (
                any(new[key] > old[key] for key in COUNTS) or new["wide_loads"] < old["wide_loads"]
            )
    parts = (f"{key} {old} → {new}" for key, (old, new) in pairs.items() if old != new)
    return worse, f"{name}: {', '.join(parts)}"
