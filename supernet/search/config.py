"""Configuration of a search."""

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    StrictInt,
    model_validator,
)

from ...autotune.schema import Strict


class SearchConfig(Strict):
    """What to search for, how, and on how much data.

    Budgets are checked against the model's layers and mixers by `SearchSpace.from_budgets`.
    """

    training_config: Path | None = Field(None, description="the run whose model is searched")
    budgets: list[StrictInt] | dict[str, StrictInt] = Field(
        description="how many layers each mixer gets, but for one that takes all others: by name, "
        "{attention: 2}, or of the first ones in declared order, [2]"
    )
    filler: str | None = Field(
        None, description="the mixer of all other layers, if several have no budget"
    )
    method: Literal["beam", "exhaustive"] = Field(
        "beam", description="exhaustive scores every placement that fills the budgets"
    )
    beam_width: PositiveInt = Field(12, description="placements that go on to the next layer")
    initial_beam_width: PositiveInt = Field(12, description="the same after the first layer")
    early_stop: bool = Field(False, description="whether a budget may be left under-filled")
    early_stop_threshold: NonNegativeFloat = Field(
        0.001, description="the least improvement that one more layer has to bring, if early_stop"
    )
    exhaustive_limit: PositiveInt = Field(4096, description="placements; more are refused")
    score_metric: Literal["loss", "accuracy"] = Field(description="the metric to rank by")
    higher_is_better: bool = Field(True, description="false for loss")
    batches: PositiveInt = Field(8, description="evaluation batches, the same for all placements")
    batch_size: PositiveInt = Field(16, description="samples in an evaluation batch")
    candidates_per_forward: PositiveInt = Field(
        8, description="placements that are evaluated together"
    )
    cost: Literal["flops", "latency"] = Field(
        "flops", description="what the Pareto set weighs quality against, as search.json says"
    )
    latency_table: Path | None = Field(
        None, description="for cost latency: a file that tossup latency wrote"
    )
    output_path: Path | None = Field(
        None,
        description="the result, a JSON file; none means search.json in the run's folder; that of "
        "another search is not overwritten",
    )
    journal_path: Path | None = Field(
        None, description="scores so far; none means output_path with the suffix .journal.jsonl"
    )
    output_checkpoint_path: Path | None = Field(
        None, description="where to write a checkpoint of the best placement; none writes none"
    )
    output_checkpoint_format: Literal["tossup", "apriel_hybrid_ssm", "mistral", "llama"] = "tossup"

    @model_validator(mode="after")
    def direction_fits(self) -> "SearchConfig":
        if self.higher_is_better is not (self.score_metric == "accuracy"):
            raise ValueError(
                "higher_is_better takes false with score_metric loss, and true (its default) with "
                f"accuracy, got {self.higher_is_better} with {self.score_metric}"
            )
        return self

    @model_validator(mode="after")
    def latencies_are_known(self) -> "SearchConfig":
        if self.cost == "latency" and self.latency_table is None:
            raise ValueError("cost latency takes a latency_table, which tossup latency writes")
        if self.cost != "latency" and self.latency_table is not None:
            raise ValueError(f"latency_table goes with cost latency, got cost {self.cost}")
        return self

    @model_validator(mode="after")
    def errors_are_defined(self) -> "SearchConfig":
        check_samples(self.batches, self.batch_size)
        return self

    def key(self, name: str) -> str:
        """What its file calls a key: the search of a file's own run stands under `search`."""
        return name if self.training_config else f"search.{name}"

    def result_path(self, run: Path) -> Path:
        """Where the result goes, given the run's folder."""
        return self.output_path or run / "search.json"

    def journal(self, run: Path) -> Path:
        """Where the scores are kept, given the run's folder."""
        return self.journal_path or self.result_path(run).with_suffix(".journal.jsonl")


def check_samples(batches: int, batch_size: int) -> None:
    """Raises ValueError unless there are samples enough for a standard error."""
    if batches * batch_size < 2:
        raise ValueError(
            "standard errors take evaluation batches of two samples or more in all, "
            f"got {batches} of {batch_size}"
        )
