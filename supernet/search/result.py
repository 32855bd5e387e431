"""The result file: what a search found, as JSON.

It holds every key of the file that Fast-LLM's pull request 373 writes, with the same meaning, and
more. It depends on the scores and on what placements cost alone, and holds no times of its own and
no paths, so that a search that was killed and resumed leaves the same bytes as one that was not.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import read_json
from ..errors import ConfigError
from ..files import write_atomically
from ..run_folder import differences
from .config import SearchConfig
from .journal import Fingerprints
from .scoring import Phase, Scored, SearchOutcome
from .space import Placement, SearchSpace, layers_of

BATCHES = "batches", "batch_size"  # of a search's settings, those that its scores depend on


class Cost(NamedTuple):
    """of: a placement's cost; lower is better. unit: what that is, in words. table: a digest of the
    figures that it is made of, if they come from a file."""

    of: Callable[[Placement], float]
    unit: str
    table: str | None = None


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
        "config": {**searched(config, space, cost), "method": outcome.method},
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


def searched(config: SearchConfig, space: SearchSpace, cost: Cost | None) -> dict[str, Any]:
    """What was searched, and how: the result's `config`."""
    return {
        "num_layers": space.layers,
        "num_mixers": len(space.mixers),
        "mixers": list(space.mixers),
        "method": config.method,
        "budgets": list(space.budgets.values()),
        "budgets_by_mixer": space.budgets,
        "filler": space.filler,
        "beam_width": config.beam_width,
        "initial_beam_width": config.initial_beam_width,
        "early_stop": config.early_stop,
        "early_stop_threshold": config.early_stop_threshold,
        "score_metric": config.score_metric,
        "higher_is_better": config.higher_is_better,
        "cost_unit": None if cost is None else cost.unit,
        "cost_table": None if cost is None else cost.table,
    }


def refuse_another(
    path: Path,
    config: SearchConfig,
    space: SearchSpace,
    fingerprints: Fingerprints,
    cost: Cost | None,
) -> None:
    """Raises ConfigError where `path` holds anything but an earlier result of the same search.

    The same search may be of a model that was trained on, but not of other data or of other
    batches of them.
    """
    if not path.exists():
        return
    key = config.key("output_path")
    now = decisive(searched(config, space, cost), fingerprints.settings, fingerprints.data)
    found = read_json(path)
    try:
        theirs = found["fingerprints"]
        was = decisive(found["config"], theirs["settings"], theirs["data"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{key} takes a new file or a result of this search, and {path} is neither"
        ) from error
    for name, had, have in differences(was, now):
        raise ConfigError(
            f"{path} holds a search whose {name} is {had}, not {have}: give another {key}, or "
            "remove the file"
        )


def decisive(config: Mapping[str, Any], settings: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What makes a search another one, of a result's parts, as one would say it."""
    budgets = ", ".join(f"{name}: {count}" for name, count in config["budgets_by_mixer"].items())
    others = {key: value for key, value in config.items() if key != "budgets_by_mixer"}
    batches = {name: settings[name] for name in BATCHES}
    return {**others, "budgets": budgets, **batches, "data": data}


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
