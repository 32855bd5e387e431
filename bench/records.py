"""Records of races: bench/results/<device>/<time>.json, one for each run, never rewritten."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tossup.autotune.machine import describe
from tossup.kernels.configs import slug
from tossup.supernet.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"


def new_record(device: torch.device, races: list[dict[str, Any]]) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"time": now.isoformat(timespec="seconds"), **describe(device), "races": races}


def write_record(record: dict[str, Any], results: Path = RESULTS) -> Path:
    """Seconds are written with four digits."""
    time = datetime.fromisoformat(record["time"])
    path = results / slug(record["device"]) / f"{time:%Y%m%dT%H%M%S}.json"
    write_atomically(path, json.dumps(rounded(record), indent=1) + "\n")
    return path


def newest(folder: Path) -> dict[str, Any]:
    """The last record of one device, with the cases that it lacks from others of the same commit
    and packages: a device run writes one for each of its parts.

    FileNotFoundError where there is none.
    """
    records = newest_first(folder)
    record = next(records, None)
    if record is None:
        raise FileNotFoundError(f"{folder} holds no record")
    made_of = record.get("commit"), record["packages"]
    races = {case_of(race): race for race in record["races"]}
    for other in records:
        if made_of[0] and (other.get("commit"), other["packages"]) == made_of:
            for race in other["races"]:
                if "failed" in races.get(case_of(race), {"failed": None}):
                    races[case_of(race)] = race
    return record | {"races": [*races.values()]}


def case_of(race: dict[str, Any]) -> tuple[str, str]:
    return race["workload"], race["direction"]


def newest_first(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json"), reverse=True):
        yield json.loads(path.read_text("utf-8"))


def rounded(value: Any) -> Any:
    """With numbers of four digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value
