"""Exhaustive search: score every placement that fills the budgets exactly. For few layers."""

from ..errors import ConfigError
from .scoring import Objective, Scoreboard, ScoreFunction, SearchOutcome
from .space import SearchSpace


def exhaustive_search(
    score: ScoreFunction,
    space: SearchSpace,
    objective: Objective,
    *,
    limit: int = 4096,
    limit_key: str = "exhaustive_limit",
    keep: int = 12,
) -> SearchOutcome:
    """Find the best placement in `space` for certain, in one call of `score`.

    limit: the most placements to score. ConfigError when the budgets allow more, which says that
        limit_key raises it.
    keep: how many of the best the outcome lists.
    """
    if space.size > limit:
        raise ConfigError(
            f"budgets {space.budgets} over {space.layers} layers allow {space.size} placements; "
            f"an exhaustive search takes at most {limit}: use method: beam, or raise {limit_key}"
        )
    board = Scoreboard(score, space, objective)
    ranking = board.rank(space)
    return SearchOutcome("exhaustive", ranking[0], ranking[:keep], [], board)
