"""Search: find the best placement under a budget of layers per mixer.

What touches the disk stays in modules of its own, `journal`, `result` and `run`: the models'
configuration holds a search's, and is to be had where no file can be locked.
"""

from .beam import beam_search, max_evaluations
from .config import SearchConfig
from .exhaustive import exhaustive_search
from .scoring import Objective, Score, Scored, ScoreFunction, SearchOutcome
from .space import Placement, SearchSpace, all_placements, layers_of

__all__ = [
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
    "search",
]


def search(config: SearchConfig, space: SearchSpace, score: ScoreFunction) -> SearchOutcome:
    """Search `space` with the method and the metric that `config` names.

    score: evaluates placements; wrap it in a `Journal` for a search that survives a kill.
    """
    objective = Objective(config.score_metric, config.higher_is_better)
    if config.method == "exhaustive":
        return exhaustive_search(
            score,
            space,
            objective,
            limit=config.exhaustive_limit,
            limit_key=config.key("exhaustive_limit"),
            keep=config.beam_width,
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
