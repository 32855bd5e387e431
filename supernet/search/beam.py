"""Hierarchical beam search over placements.

One phase per budgeted mixer, in order. While mixer i is placed, earlier phases stay as they are and
every layer that is still free takes mixer i + 1. A phase scores each free layer alone, keeps the
best `initial_beam_width`, and lets every set of layers in the beam grow by every free layer, one at
a time, keeping the best `beam_width` sets, until the budget is spent. The best set is then fixed.
This is the search of Fast-LLM's pull request 373, except that a phase falls short of its budget
only where `early_stop` allows it, and then never for something worse.
"""

from itertools import pairwise
from math import comb

from .scoring import Objective, Phase, Scoreboard, Scored, ScoreFunction, SearchOutcome
from .space import Placement, SearchSpace, layers_of


def beam_search(
    score: ScoreFunction,
    space: SearchSpace,
    objective: Objective,
    *,
    beam_width: int = 12,
    initial_beam_width: int = 12,
    early_stop: bool = False,
    early_stop_threshold: float = 0.001,
) -> SearchOutcome:
    """Search `space` for the best placement. Every level of growth is one call of `score`.

    beam_width, initial_beam_width: how many sets of layers survive a level, and the first one.
    early_stop: whether a phase may end, with its best set so far, as soon as one more layer
        improves the metric by less than `early_stop_threshold`.
    """
    board = Scoreboard(score, space, objective)
    fixed: dict[int, str] = {}
    phases: list[Phase] = []
    for mixer, other in pairwise(space.order):
        budget = space.budgets[mixer]
        pre_scoring = _grow(board, fixed, [()], mixer, other)
        beam = pre_scoring[:initial_beam_width]
        for _ in range(1, budget):
            sets = [layers_of(scored.placement, mixer) for scored in beam]
            grown = _grow(board, fixed, sets, mixer, other)[:beam_width]
            gain = grown[0].quality - beam[0].quality
            stop = early_stop and gain < early_stop_threshold
            if not stop or gain > 0:
                beam = grown
            if stop:
                break
        phases.append(Phase(mixer, budget, pre_scoring, beam))
        fixed |= dict.fromkeys(layers_of(beam[0].placement, mixer), mixer)
    return SearchOutcome("beam", beam[0], beam, phases, board)


def max_evaluations(
    space: SearchSpace, beam_width: int, initial_beam_width: int, early_stop: bool = False
) -> int:
    """The most placements that `beam_search` can score, for progress and planning."""
    total, placed = 0, 0
    for budget in space.budgets.values():
        free = space.layers - placed
        width = initial_beam_width
        total += free
        for size in range(1, budget):
            total += min(width * (free - size), comb(free, size + 1))
            width = beam_width
        placed += 1 if early_stop else budget  # a phase that stops early leaves more free
    return total


def _grow(
    board: Scoreboard,
    fixed: dict[int, str],
    sets: list[tuple[int, ...]],
    mixer: str,
    other: str,
) -> list[Scored]:
    """Rank every set with one more free layer; sets that become equal count once."""
    free = [layer for layer in range(board.space.layers) if layer not in fixed]
    grown = {tuple(sorted((*layers, new))) for layers in sets for new in free if new not in layers}

    def placement(layers: tuple[int, ...]) -> Placement:
        chosen = fixed | dict.fromkeys(layers, mixer)
        return tuple(chosen.get(layer, other) for layer in range(board.space.layers))

    return board.rank(placement(layers) for layers in sorted(grown))
