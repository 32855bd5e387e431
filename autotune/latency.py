"""Tables of how long each mixer takes: what a search weighs quality against, beside FLOPs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from .schema import Strict
from .timing import Stopwatch, rounds_within, take_turns

Direction = Literal["forward", "forward+backward", "decode"]
Positive = Annotated[float, Field(gt=0)]
SECONDS = 2.0  # of all mixers' runs together
ROUNDS = 5, 200  # fewest and most


class Latency(Strict):
    """milliseconds: of one mixer in one layer, over the whole batch. error: as a part of it; None
    where it is not known. about: where both come from."""

    milliseconds: Positive
    error: Annotated[float, Field(ge=0)] | None
    about: str


class LatencyTable(Strict):
    """Every mixer of a model, by name, at one shape on one device.

    source: measured, or a roofline. model: what the mixers are, hidden_size and their
    configurations. batch: samples, all of which take the mixer. dtype: of weights and activations.
    direction: decode is one token of each sample, behind seqlen - 1 others. versions: of what was
    measured.
    """

    unit: Literal["milliseconds"] = "milliseconds"
    source: Literal["measured", "roofline"]
    device: str
    model: dict[str, Any]
    batch: int
    seqlen: int
    dtype: str
    direction: Direction
    versions: dict[str, str]
    mixers: dict[str, Latency]

    @property
    def setting(self) -> str:
        """Everything but the shape that must be alike where tables are compared."""
        return f"{self.device}, {self.dtype}, {self.direction}"

    @property
    def meaning(self) -> str:
        """What a placement's sum of latencies is, with its unit."""
        return (
            f"{self.unit} that a placement's mixers take, {self.source}: {self.setting}, "
            f"batch {self.batch}, {self.seqlen} tokens"
        )

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_table(path: Path) -> LatencyTable:
    """Raises ValueError, one sentence that names the file, where it holds no table."""
    try:
        return LatencyTable.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{path} is no latency table: {where}: {first['msg']}") from error


def measure(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch) -> dict[str, Latency]:
    """Time the mixers' calls in turns."""
    with stopwatch.here():
        runs = {name: stopwatch.prepare(call) for name, call in calls.items()}
        timings = take_turns(runs, rounds_within(SECONDS, runs, *ROUNDS))
    return {
        name: Latency(
            milliseconds=1e3 * timing.median,
            error=timing.spread,
            about=f"median of {len(timing.seconds)} runs, by {runs[name].method}; "
            "the error is half the distance between the quartiles",
        )
        for name, timing in timings.items()
    }
