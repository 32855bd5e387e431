"""Search: find the best placement under a budget of layers per mixer."""

from .beam import beam_search, max_evaluations
from .config import SearchConfig
from .exhaustive import exhaustive_search
from .journal import Fingerprints, Journal
from .result import pareto_set, result_of, write_result
from .scoring import Objective, Score, Scored, ScoreFunction, SearchOutcome
from .space import Placement, SearchSpace, all_placements, layers_of

__all__ = [
    "Fingerprints",
    "Journal",
    "Objective",
    "Placement",
    "Score",
    "ScoreFunction",
    "Scored",
    "SearchConfig",
    "SearchOutcome",
    "SearchSpace",
    "all_placements",
    "beam_search",
    "exhaustive_search",
    "layers_of",
    "max_evaluations",
    "pareto_set",
    "result_of",
    "search",
    "write_result",
]


def search(config: SearchConfig, space: SearchSpace, score: ScoreFunction) -> SearchOutcome:
    """Search `space` with the method and the metric that `config` names.

    score: evaluates placements; wrap it in a `Journal` for a search that survives a kill.
    """
    objective = Objective(config.score_metric, config.higher_is_better)
    if config.method == "exhaustive":
        return exhaustive_search(
            score, space, objective, limit=config.exhaustive_limit, keep=config.beam_width
        )
    return beam_search(
        score,
        space,
        objective,
        beam_width=config.beam_width,
        initial_beam_width=config.initial_beam_width,
        early_stop=config.early_stop,
        early_stop_threshold=config.early_stop_threshold,
    )
