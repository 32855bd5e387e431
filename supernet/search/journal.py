"""The journal: scores on disk, so that a killed search goes on where it was.

A JSONL file that only grows. Each line is one placement's score under a key: the hash of the model,
the data, the settings and the placement, so a score is never taken for another model or other data.
Placements are scored in chunks, and a chunk reaches the disk before the next one starts. `more`
counts the lines of its chunk that follow; a chunk that a kill cut short is dropped and scored again
whole. A resumed search therefore evaluates the same chunks as one that was never killed.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import NonNegativeInt

from ...autotune.schema import Strict
from ..errors import ConfigError
from .scoring import Score, ScoreFunction, evaluate
from .space import Placement


@dataclass(frozen=True)
class Fingerprints:
    """What a score depends on besides the placement.

    model: a hash of the checkpoint. data: a hash of the evaluation batches.
    settings: of the metrics and the evaluation; any JSON values.
    """

    model: str
    data: str
    settings: Mapping[str, Any]

    def key(self, placement: Placement) -> str:
        """The name of this placement's score, sha256 in hexadecimal."""
        identity = {
            "model": self.model,
            "data": self.data,
            "settings": dict(self.settings),
            "placement": placement,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Record(Strict):
    """One line of the journal."""

    key: str
    placement: list[str]
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    more: NonNegativeInt


class Journal:
    """A score function that looks scores up, has the missing ones scored, and remembers them.

    path: the file; it is created, with its folder, if it is not there.
    score: evaluates placements, at most `chunk` at a time.
    fingerprints: of the model, the data and the settings that `score` evaluates with.
    chunk: placements per call of `score`.

    One process at a time may hold a journal open; use it in a `with` block. Raises ConfigError
    where another one does, where the file cannot be opened, and on a line that is not a record.
    """

    def __init__(
        self, path: Path | str, score: ScoreFunction, fingerprints: Fingerprints, chunk: int
    ):
        self.path = Path(path)
        self.reused = 0
        self.evaluated = 0
        self._score = score
        self._fingerprints = fingerprints
        self._chunk = chunk
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise ConfigError(f"cannot open the journal {self.path}: {error.strerror}") from error
        try:
            self._lock()
            self._known = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __call__(self, placements: Sequence[Placement]) -> list[Score]:
        """The placements' scores, in order; those that are missing are scored in that order."""
        keys = {placement: self._fingerprints.key(placement) for placement in placements}
        missing = [placement for placement, key in keys.items() if key not in self._known]
        self.reused += len(keys) - len(missing)
        for start in range(0, len(missing), self._chunk):
            self._append(missing[start : start + self._chunk], keys)
        return [self._known[keys[placement]] for placement in placements]

    def _append(self, chunk: list[Placement], keys: Mapping[Placement, str]) -> None:
        """Score a chunk and put it on the disk."""
        scores = evaluate(self._score, chunk)
        records = [
            Record(
                key=keys[placement],
                placement=list(placement),
                metrics=dict(score.metrics),
                standard_errors=dict(score.standard_errors),
                more=len(chunk) - 1 - index,
            )
            for index, (placement, score) in enumerate(zip(chunk, scores, strict=True))
        ]
        self._file.write(b"".join(_line(record) for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._known |= {record.key: _score_of(record) for record in records}
        self.evaluated += len(chunk)

    def _read(self) -> dict[str, Score]:
        """The scores of all complete chunks; what follows the last one is cut off."""
        known: dict[str, Score] = {}
        pending: list[Record] = []
        position = complete = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            record = self._parse(number, line)
            if pending and record.more != pending[-1].more - 1:
                raise ConfigError(
                    f"{self.path}, line {number}: lines are missing before this one; "
                    "remove the file to score everything again"
                )
            pending.append(record)
            position += len(line)
            if record.more == 0:
                known |= {each.key: _score_of(each) for each in pending}
                pending, complete = [], position
        self._file.truncate(complete)
        return known

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            return Record.model_validate(json.loads(line))
        except ValueError as error:
            raise ConfigError(
                f"{self.path}, line {number}: not a record of a score; "
                "remove the file to score everything again"
            ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{self.path} is in use by another search") from error


def _line(record: Record) -> bytes:
    return json.dumps(record.model_dump(), allow_nan=False).encode() + b"\n"


def _score_of(record: Record) -> Score:
    return Score(record.metrics, record.standard_errors)
