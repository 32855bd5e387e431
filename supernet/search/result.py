"""The result file: what a search found, as JSON.

It holds every key of the file that Fast-LLM's pull request 373 writes, with the same meaning, and
more. It depends on the scores and on what placements cost alone, and holds no times of its own and
no paths, so that a search that was killed and resumed leaves the same bytes as one that was not.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_atomically
from .config import SearchConfig
from .journal import Fingerprints
from .scoring import Phase, Scored, SearchOutcome
from .space import Placement, layers_of


class Cost(NamedTuple):
    """of: a placement's cost; lower is better. unit: what that is, in words."""

    of: Callable[[Placement], float]
    unit: str


def write_result(
    path: Path,
    config: SearchConfig,
    outcome: SearchOutcome,
    fingerprints: Fingerprints,
    *,
    cost: Cost | None = None,
    exhaustive: SearchOutcome | None = None,
) -> dict[str, Any]:
    """Write the result to `path`, and return it. The other arguments as in `result_of`."""
    result = result_of(config, outcome, fingerprints, cost=cost, exhaustive=exhaustive)
    write_atomically(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def result_of(
    config: SearchConfig,
    outcome: SearchOutcome,
    fingerprints: Fingerprints,
    *,
    cost: Cost | None = None,
    exhaustive: SearchOutcome | None = None,
) -> dict[str, Any]:
    """The result as JSON values.

    cost: of a placement, such as FLOPs per token. Without it, the Pareto set weighs quality against
        the layers of each budgeted mixer.
    exhaustive: an exhaustive search of the same space by the same scores; gives the regret, how
        much better than the winner its winner is.
    """
    space = outcome.board.space
    known = outcome if outcome.method == "exhaustive" else exhaustive

    def entry(scored: Scored) -> dict[str, Any]:
        value = outcome.board.objective.value(scored.score)
        priced = {} if cost is None else {"cost": cost.of(scored.placement)}
        counts = {mixer: scored.placement.count(mixer) for mixer in space.mixers}
        return {"placement": scored.placement, "score": value, "counts": counts, **priced}

    return {
        "config": {
            "num_layers": space.layers,
            "num_mixers": len(space.mixers),
            "mixers": space.mixers,
            "method": outcome.method,
            "budgets": list(space.budgets.values()),
            "budgets_by_mixer": space.budgets,
            "beam_width": config.beam_width,
            "initial_beam_width": config.initial_beam_width,
            "early_stop": config.early_stop,
            "early_stop_threshold": config.early_stop_threshold,
            "score_metric": config.score_metric,
            "higher_is_better": config.higher_is_better,
            "cost_unit": None if cost is None else cost.unit,
        },
        "fingerprints": {
            "model": fingerprints.model,
            "data": fingerprints.data,
            "settings": dict(fingerprints.settings),
        },
        "phases": [_phase_entry(phase, outcome) for phase in outcome.phases],
        "final_configuration": {
            "layer_assignments": {
                str(layer): space.mixers.index(mixer)
                for layer, mixer in enumerate(outcome.winner.placement)
            },
            "summary": {
                f"mixer[{index}]": layers_of(outcome.winner.placement, mixer)
                for index, mixer in enumerate(space.mixers)
            },
            **entry(outcome.winner),
            "under_filled": space.is_under_filled(outcome.winner.placement),
            "metrics": dict(sorted(outcome.winner.score.metrics.items())),
            "standard_errors": dict(sorted(outcome.winner.score.standard_errors.items())),
        },
        "evaluations": len(outcome.board.scored),
        "regret": None if known is None else known.winner.quality - outcome.winner.quality,
        "beam": [entry(scored) for scored in outcome.beam],
        "pareto": [entry(scored) for scored in pareto_set(outcome, cost)],
    }


def pareto_set(outcome: SearchOutcome, cost: Cost | None = None) -> list[Scored]:
    """The scored placements that no other one beats, cheapest first.

    One beats another when it has at least its quality for no more cost, and is better in one of the
    two. Without `cost`, a placement costs its count of each budgeted mixer. Of equals, the first by
    the space's key stays.
    """
    space = outcome.board.space

    def costs(scored: Scored) -> tuple[float, ...]:
        if cost is not None:
            return (cost.of(scored.placement),)
        return tuple(scored.placement.count(mixer) for mixer in space.budgets)

    priced = [(costs(scored), scored) for scored in outcome.board.scored.values()]
    priced.sort(key=lambda pair: (pair[0], -pair[1].quality, space.key(pair[1].placement)))
    front: list[tuple[tuple[float, ...], Scored]] = []
    for price, scored in priced:  # whatever beats this one comes before it
        if not any(other.quality >= scored.quality and _fits(p, price) for p, other in front):
            front.append((price, scored))
    return [scored for _, scored in front]


def _fits(price: Iterable[float], limit: Iterable[float]) -> bool:
    return all(mine <= theirs for mine, theirs in zip(price, limit, strict=True))


def _phase_entry(phase: Phase, outcome: SearchOutcome) -> dict[str, Any]:
    objective, best = outcome.board.objective, phase.beam[0]
    return {
        "mixer_index": outcome.board.space.mixers.index(phase.mixer),
        "mixer": phase.mixer,
        "budget": phase.budget,
        "best_layers": layers_of(best.placement, phase.mixer),
        "best_score": objective.value(best.score),
        "pre_scoring": [
            {
                "layer": layers_of(scored.placement, phase.mixer)[0],
                "score": objective.value(scored.score),
            }
            for scored in phase.pre_scoring
        ],
    }
