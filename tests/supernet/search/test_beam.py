"""Beam search on tables of scores, where the best placement is known by brute force."""

import json
import math
import random
import zlib
from itertools import combinations

import pytest

from tests.supernet.search.tables import (
    FINGERPRINTS,
    QUALITY,
    Table,
    brute_force,
    config_of,
    pair_trap,
    peaked,
    random_quality,
    space_of,
)
from tossup.supernet.search import (
    SearchSpace,
    beam_search,
    exhaustive_search,
    layers_of,
    max_evaluations,
    search,
)
from tossup.supernet.search.result import result_of

WIDE = 10_000


def additive_quality(seed):
    def quality(placement):
        return sum(
            random.Random(zlib.crc32(f"{seed} {layer} {mixer}".encode())).uniform(-1, 1)
            for layer, mixer in enumerate(placement)
        )

    return quality


def seed_search(score, layers, mixers, budgets, beam_width, initial_width, threshold):
    """The seed's search and its JSON, stepped by hand: the second oracle. Higher is better."""
    assigned, phases = {}, []
    for i, budget in enumerate(budgets):
        free = [layer for layer in range(layers) if layer not in assigned]

        def value(chosen, i=i, assigned=assigned):
            names = [
                assigned.get(layer, i if layer in chosen else i + 1) for layer in range(layers)
            ]
            return score(tuple(mixers[name] for name in names))

        scored = sorted(
            ((value((layer,)), (layer,)) for layer in free), key=lambda s: (-s[0], s[1])
        )
        pre_scoring = [{"layer": chosen[0], "score": s} for s, chosen in scored]
        beam = scored[:initial_width]
        for _ in range(budget - 1):
            best = beam[0][0]
            candidates = set()
            for _, chosen in beam:
                for layer in free:
                    if layer not in chosen:
                        candidates.add(tuple(sorted([*chosen, layer])))
            scored = sorted(((value(c), c) for c in candidates), key=lambda s: (-s[0], s[1]))
            beam = scored[:beam_width]
            if beam[0][0] - best < threshold:
                break
        best_score, best_layers = beam[0]
        assigned |= dict.fromkeys(best_layers, i)
        phases.append(
            {
                "mixer_index": i,
                "budget": budget,
                "best_layers": list(best_layers),
                "best_score": best_score,
                "pre_scoring": pre_scoring,
            }
        )
    final = {layer: assigned.get(layer, len(budgets)) for layer in range(layers)}
    return {
        "config": {
            "num_layers": layers,
            "num_mixers": len(mixers),
            "budgets": list(budgets),
            "beam_width": beam_width,
            "initial_beam_width": initial_width,
        },
        "phases": phases,
        "final_configuration": {
            "layer_assignments": {str(layer): mixer for layer, mixer in final.items()},
            "score": score(tuple(mixers[final[layer]] for layer in range(layers))),
            "summary": {
                f"mixer[{i}]": [layer for layer in range(layers) if final[layer] == i]
                for i in range(len(mixers))
            },
        },
    }


def assert_contains(found, expected):
    """Every key and value of `expected` is in `found`, at any depth."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_contains(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_contains(mine, theirs)
    else:
        assert found == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("layers", "budgets"), [(1, [1]), (5, [1]), (6, [3]), (3, [3])])
def test_a_wide_beam_over_one_budget_reaches_every_set(seed, layers, budgets):
    space, quality = space_of(layers, budgets), random_quality(seed)
    outcome = beam_search(Table(quality), space, QUALITY, beam_width=WIDE, initial_beam_width=WIDE)
    assert outcome.winner.placement == brute_force(space, quality)
    assert outcome.winner.quality == quality(outcome.winner.placement)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budgets", [[1], [2], [4], [7]])
@pytest.mark.parametrize("width", [1, 3])
def test_additive_scores_need_no_width(seed, budgets, width):
    space, quality = space_of(7, budgets), additive_quality(seed)
    outcome = beam_search(
        Table(quality), space, QUALITY, beam_width=width, initial_beam_width=width
    )
    assert outcome.winner.placement == brute_force(space, quality)


def test_a_pair_trap_catches_a_narrow_beam_and_no_exhaustive_search():
    space = space_of(5, [2])
    narrow = beam_search(Table(pair_trap), space, QUALITY, beam_width=1, initial_beam_width=1)
    exact = exhaustive_search(Table(pair_trap), space, QUALITY)
    assert layers_of(narrow.winner.placement, "attention") == (0, 1)
    assert layers_of(exact.winner.placement, "attention") == (2, 3)
    assert exact.winner.quality - narrow.winner.quality == 9


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("widths", [(1, 1), (2, 4), (4, 2), (12, 12)])
@pytest.mark.parametrize(("layers", "budgets"), [(5, [3]), (6, [2, 2]), (6, [3, 3]), (4, [1])])
def test_it_is_the_seeds_search_wherever_the_seed_fills_its_budgets(
    tmp_path, seed, widths, layers, budgets
):
    space, quality = space_of(layers, budgets), random_quality(seed)
    config = config_of(tmp_path, budgets, beam_width=widths[0], initial_beam_width=widths[1])
    found = result_of(config, search(config, space, Table(quality)), FINGERPRINTS)
    expected = seed_search(quality, layers, space.mixers, budgets, *widths, -math.inf)
    assert_contains(json.loads(json.dumps(found)), expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("early_stop", [False, True])
def test_the_winner_is_the_best_of_the_last_level_it_kept(seed, early_stop):
    space = space_of(6, [4])
    outcome = beam_search(Table(random_quality(seed)), space, QUALITY, early_stop=early_stop)
    size = outcome.winner.placement.count("attention")
    scored = outcome.board.scored.values()
    level = [each for each in scored if each.placement.count("attention") == size]
    assert outcome.winner.quality == max(each.quality for each in level)
    if early_stop:
        assert outcome.winner.quality == max(each.quality for each in scored)
    else:
        assert size == 4 and not space.is_under_filled(outcome.winner.placement)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_direction_of_the_metric_changes_the_sign_and_nothing_else(tmp_path, higher_is_better):
    metric = "accuracy" if higher_is_better else "loss"
    config = config_of(
        tmp_path, [2, 1], score_metric=metric, higher_is_better=higher_is_better, early_stop=True
    )
    table = Table(random_quality(3))
    outcome = search(config, space_of(6, [2, 1]), table)
    reference = beam_search(table, space_of(6, [2, 1]), QUALITY, early_stop=True)
    assert outcome.winner.placement == reference.winner.placement
    sign = 1 if higher_is_better else -1
    final = result_of(config, outcome, FINGERPRINTS)["final_configuration"]
    assert final["score"] == sign * reference.winner.quality


def test_without_early_stop_the_budget_is_filled_even_where_it_harms():
    outcome = beam_search(Table(peaked), space_of(5, [3]), QUALITY)
    assert outcome.winner.placement.count("attention") == 3
    assert outcome.winner.quality == 0.5


def test_early_stop_keeps_a_small_gain_and_looks_no_further():
    table = Table(peaked)
    outcome = beam_search(table, space_of(5, [3]), QUALITY, early_stop=True)
    assert outcome.winner.quality == 1.0005
    assert max(placement.count("attention") for placement in table.seen) == 2


def test_early_stop_never_keeps_what_is_worse_where_the_seed_does():
    space, quality = space_of(5, [3]), peaked
    outcome = beam_search(Table(quality), space, QUALITY, early_stop=True, early_stop_threshold=0.0)
    assert outcome.winner.quality == 1.0005
    assert space.is_under_filled(outcome.winner.placement)
    expected = seed_search(quality, 5, space.mixers, [3], 12, 12, 0.0)
    assert expected["final_configuration"]["score"] == 0.5


def test_early_stop_goes_on_while_every_layer_brings_the_threshold():
    outcome = beam_search(
        Table(lambda placement: 0.25 * placement.count("attention")),
        space_of(5, [3]),
        QUALITY,
        early_stop=True,
        early_stop_threshold=0.25,
    )
    assert outcome.winner.placement.count("attention") == 3


def test_ties_go_to_the_first_layers():
    space = space_of(5, [2, 1])
    table = Table(lambda placement: 0.0)
    expected = ("attention", "attention", "window", "mamba", "mamba")
    assert beam_search(table, space, QUALITY).winner.placement == expected
    assert exhaustive_search(table, space, QUALITY).winner.placement == expected
    alone = beam_search(table, space, QUALITY).phases[0].pre_scoring
    assert [scored.placement.index("attention") for scored in alone] == [0, 1, 2, 3, 4]


def test_each_level_is_one_call_without_repeats():
    table = Table(random_quality(0))
    beam_search(table, space_of(6, [3]), QUALITY, beam_width=WIDE, initial_beam_width=WIDE)
    sets = [[layers_of(placement, "attention") for placement in call] for call in table.calls]
    assert sets == [list(combinations(range(6), size)) for size in (1, 2, 3)]


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("budgets", [[1], [4], [2, 3], [4, 4], [1, 6]])
@pytest.mark.parametrize("widths", [(1, 1), (3, 2), (12, 12)])
def test_evaluations_stay_within_their_bound(early_stop, budgets, widths):
    space, table = space_of(8, budgets), Table(random_quality(1))
    outcome = beam_search(
        table,
        space,
        QUALITY,
        beam_width=widths[0],
        initial_beam_width=widths[1],
        early_stop=early_stop,
    )
    assert len(table.seen) == len(set(table.seen)) == len(outcome.board.scored)
    assert len(table.seen) <= max_evaluations(space, *widths, early_stop)


def test_the_bound_is_the_published_one():
    space = space_of(48, [12])
    expected = 48 + sum(12 * (48 - size) for size in range(1, 12))
    assert max_evaluations(space, 12, 12) == expected


def test_phases_place_one_mixer_each_and_the_filler_takes_the_rest():
    table = Table(random_quality(2))
    outcome = beam_search(table, space_of(6, [2, 1]), QUALITY)
    first, second = outcome.phases
    assert (first.mixer, second.mixer) == ("attention", "window")
    placed = layers_of(first.beam[0].placement, "attention")
    assert set(first.beam[0].placement) == {"attention", "window"}  # the next mixer fills in
    assert layers_of(outcome.winner.placement, "attention") == placed
    assert len(second.pre_scoring) == 4
    counts = [outcome.winner.placement.count(mixer) for mixer in ("attention", "window", "mamba")]
    assert counts == [2, 1, 3]


def test_budgets_by_name_set_the_order_and_the_filler(tmp_path):
    space = SearchSpace.from_budgets(5, ["mamba", "window", "attention"], {"attention": 2}, "mamba")
    assert space.order == ("attention", "mamba")
    config = config_of(tmp_path, {"attention": 2})
    found = result_of(config, search(config, space, Table(random_quality(0))), FINGERPRINTS)
    assert found["phases"][0]["mixer_index"] == 2
    assert found["config"]["budgets_by_mixer"] == {"attention": 2}
    assert found["config"]["filler"] == "mamba"
    assert found["final_configuration"]["summary"]["mixer[1]"] == ()
    assert len(found["final_configuration"]["summary"]["mixer[2]"]) == 2
