"""Scores: what an evaluation gives a search, and how a search ranks by them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError
from .space import Placement, SearchSpace


@dataclass(frozen=True)
class Score:
    """What one placement's evaluation measured; all numbers finite.

    metrics: value by name, such as {"loss": 1.5, "accuracy": 0.75}.
    standard_errors: of those metrics that have one, by the same names.
    """

    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)


# Scores many placements at once: one Score each, in order. A score must not depend on the company.
ScoreFunction = Callable[[Sequence[Placement]], list[Score]]


def evaluate(score: ScoreFunction, placements: Sequence[Placement]) -> list[Score]:
    """Call `score` and check what comes back. ConfigError on a number that is not finite."""
    scores = score(placements)
    if len(scores) != len(placements):
        raise ValueError(f"score returned {len(scores)} scores for {len(placements)} placements")
    for placement, result in zip(placements, scores, strict=True):
        for name, value in (*result.metrics.items(), *result.standard_errors.items()):
            if not math.isfinite(value):
                raise ConfigError(
                    f"{name} of placement {'/'.join(placement)} is {value}; "
                    "a search needs finite scores"
                )
    return scores


@dataclass(frozen=True)
class Objective:
    """The metric to rank by, and its direction."""

    metric: str
    higher_is_better: bool

    def value(self, score: Score) -> float:
        """The metric. ConfigError when the evaluation does not report it."""
        if self.metric not in score.metrics:
            raise ConfigError(
                f"score_metric is {self.metric!r}; the evaluation reports {sorted(score.metrics)}"
            )
        return score.metrics[self.metric]

    def quality(self, score: Score) -> float:
        """The metric with the sign that makes higher better."""
        return self.value(score) if self.higher_is_better else -self.value(score)


@dataclass(frozen=True)
class Scored:
    """A placement, its score, and its quality (higher is better)."""

    placement: Placement
    score: Score
    quality: float


class Scoreboard:
    """Scores each placement once and ranks: best first, ties by the space's key."""

    def __init__(self, score: ScoreFunction, space: SearchSpace, objective: Objective):
        self.space = space
        self.objective = objective
        self.scored: dict[Placement, Scored] = {}
        self._score = score

    def rank(self, placements: Iterable[Placement]) -> list[Scored]:
        """The placements, each once, best first. All that are new share one call of `score`."""
        distinct = list(dict.fromkeys(placements))
        new = [placement for placement in distinct if placement not in self.scored]
        if new:
            for placement, score in zip(new, evaluate(self._score, new), strict=True):
                quality = self.objective.quality(score)
                self.scored[placement] = Scored(placement, score, quality)
        return sorted((self.scored[placement] for placement in distinct), key=self._rank_key)

    def _rank_key(self, scored: Scored) -> tuple[float, tuple[tuple[int, ...], ...]]:
        return -scored.quality, self.space.key(scored.placement)


@dataclass(frozen=True)
class Phase:
    """One mixer's turn in the beam search.

    mixer: the mixer that was placed.
    budget: the layers it was allowed.
    pre_scoring: every free layer alone, best first.
    beam: the best sets of layers, best first; the first one was fixed.
    """

    mixer: str
    budget: int
    pre_scoring: list[Scored]
    beam: list[Scored]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    method: "beam" or "exhaustive".
    winner: the best placement.
    beam: the best placements at the end, best first, the winner included.
    phases: of the beam search; none in an exhaustive one.
    board: everything that was scored, and the space and the objective.
    """

    method: str
    winner: Scored
    beam: list[Scored]
    phases: list[Phase]
    board: Scoreboard
