"""Search on tables of scores, where the best placement is known by brute force."""

import json
import math
import random
import signal
import subprocess
import sys
import zlib
from itertools import combinations, product
from pathlib import Path

import pytest
from pydantic import ValidationError

from tossup.supernet.errors import ConfigError
from tossup.supernet.search import (
    Objective,
    Score,
    SearchConfig,
    SearchSpace,
    all_placements,
    beam_search,
    exhaustive_search,
    layers_of,
    max_evaluations,
    search,
)
from tossup.supernet.search.journal import Fingerprints, Journal
from tossup.supernet.search.result import Cost, pareto_set, result_of, write_result

QUALITY = Objective("accuracy", higher_is_better=True)
FINGERPRINTS = Fingerprints(model="m", data="d", settings={"batches": 2})
WIDE = 10_000
ROOT = Path(__file__).parents[2]


class Table:
    """A score function over a fixed table that remembers how it was called."""

    def __init__(self, quality):
        self.quality = quality
        self.calls = []

    def __call__(self, placements):
        self.calls.append(list(placements))
        return [
            Score({"accuracy": q, "loss": -q}, {"accuracy": 0.25})
            for q in (self.quality(placement) for placement in placements)
        ]

    @property
    def seen(self):
        return [placement for call in self.calls for placement in call]


def random_quality(seed):
    """An arbitrary number for each placement, the same in every process."""

    def quality(placement):
        return random.Random(zlib.crc32(f"{seed} {placement}".encode())).uniform(-1, 1)

    return quality


def additive_quality(seed):
    def quality(placement):
        return sum(
            random.Random(zlib.crc32(f"{seed} {layer} {mixer}".encode())).uniform(-1, 1)
            for layer, mixer in enumerate(placement)
        )

    return quality


def space_of(layers, budgets, mixers=("attention", "window", "mamba")):
    return SearchSpace.from_budgets(layers, mixers[: len(budgets) + 1], budgets)


def brute_force(space, quality):
    """The best placement that has exactly the budgets, found among all products."""
    return max(
        (
            placement
            for placement in product(space.mixers, repeat=space.layers)
            if all(placement.count(mixer) == count for mixer, count in space.budgets.items())
        ),
        key=quality,
    )


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


def config_of(tmp_path, budgets, **changes):
    settings = {"score_metric": "accuracy", "output_path": tmp_path / "search.json"}
    return SearchConfig(budgets=budgets, **(settings | changes))


# Beam search


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


def pair_trap(placement):
    """Attention in layer 0 is the best single choice; layers 2 and 3 are worth it only together."""
    chosen = set(layers_of(placement, "attention"))
    return 1.0 * (0 in chosen) + 10.0 * ({2, 3} <= chosen)


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


def peaked(placement):
    """The first layer helps much, the second hardly, the third harms."""
    return [0.0, 1.0, 1.0005, 0.5][placement.count("attention")]


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
    space = SearchSpace.from_budgets(5, ["mamba", "window", "attention"], {"attention": 2})
    assert space.order == ("attention", "mamba")
    config = config_of(tmp_path, {"attention": 2})
    found = result_of(config, search(config, space, Table(random_quality(0))), FINGERPRINTS)
    assert found["phases"][0]["mixer_index"] == 2
    assert found["config"]["budgets_by_mixer"] == {"attention": 2}
    assert found["final_configuration"]["summary"]["mixer[1]"] == ()
    assert len(found["final_configuration"]["summary"]["mixer[2]"]) == 2


# Exhaustive search


@pytest.mark.parametrize("budgets", [[1], [2, 2], [5], [1, 4]])
def test_exhaustive_search_sees_each_placement_once(budgets):
    space, table = space_of(5, budgets), Table(random_quality(7))
    outcome = exhaustive_search(table, space, QUALITY, keep=3)
    filled = [
        placement
        for placement in product(space.mixers, repeat=5)
        if all(placement.count(mixer) == count for mixer, count in space.budgets.items())
    ]
    assert len(table.calls) == 1
    assert sorted(table.seen) == sorted(filled)
    assert space.size == len(filled)
    assert outcome.winner.placement == brute_force(space, table.quality)
    best = sorted(map(table.quality, filled), reverse=True)[:3]
    assert [scored.quality for scored in outcome.beam] == best


def test_exhaustive_search_refuses_too_many_and_says_how_many():
    table = Table(random_quality(0))
    with pytest.raises(ConfigError, match=r"allow 2704156 placements.* at most 4096"):
        exhaustive_search(table, space_of(24, [12]), QUALITY)
    assert not table.calls


def test_all_placements_are_the_product():
    placements = all_placements(3, ["a", "b", "c"])
    assert len(placements) == len(set(placements)) == 27
    assert placements[0] == ("a", "a", "a")


# Result


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "cost", [None, Cost(lambda p: 3.0 * p.count("attention") + p.count("window"), "")]
)
def test_the_pareto_set_is_what_nothing_dominates(seed, cost):
    outcome = beam_search(Table(random_quality(seed)), space_of(6, [2, 2]), QUALITY)

    def coordinates(scored):
        p = scored.placement
        prices = (p.count("attention"), p.count("window")) if cost is None else (cost.of(p),)
        return (scored.quality, *(-price for price in prices))

    scored = outcome.board.scored.values()
    expected = {
        one.placement
        for one in scored
        if not any(dominates(coordinates(other), coordinates(one)) for other in scored)
    }
    front = pareto_set(outcome, cost)
    assert {one.placement for one in front} == expected
    assert len(front) == len(expected)


def test_of_equals_the_pareto_set_keeps_the_first():
    outcome = exhaustive_search(Table(lambda placement: 0.0), space_of(4, [1]), QUALITY)
    assert [one.placement[0] for one in pareto_set(outcome)] == ["attention"]


def test_the_result_file_says_everything(tmp_path):
    space = space_of(5, [2])
    narrow = config_of(tmp_path, [2], beam_width=1, initial_beam_width=1)
    beam = search(narrow, space, Table(pair_trap))
    exact = search(config_of(tmp_path, [2], method="exhaustive"), space, Table(pair_trap))
    returned = write_result(
        narrow.output_path,
        narrow,
        beam,
        FINGERPRINTS,
        cost=Cost(lambda p: p.count("attention"), "attention layers"),
        exhaustive=exact,
    )
    found = json.loads(narrow.output_path.read_text())
    assert found == json.loads(json.dumps(returned))
    assert found["regret"] == 9
    assert found["config"]["method"] == "beam"
    assert found["config"]["mixers"] == ["attention", "window"]
    assert found["config"]["early_stop_threshold"] == 0.001
    assert found["fingerprints"] == {"model": "m", "data": "d", "settings": {"batches": 2}}
    assert found["evaluations"] == 9  # five alone, and four more beside layer 0
    assert [entry["score"] for entry in found["beam"]] == [1.0]
    final = found["final_configuration"]
    assert final["placement"] == ["attention", "attention", "window", "window", "window"]
    assert final["counts"] == {"attention": 2, "window": 3}
    assert final["metrics"] == {"loss": -1.0, "accuracy": 1.0}
    assert final["standard_errors"] == {"accuracy": 0.25}
    assert (final["cost"], found["config"]["cost_unit"]) == (2, "attention layers")
    assert final["under_filled"] is False
    exact_result = result_of(narrow, exact, FINGERPRINTS)
    assert (exact_result["regret"], exact_result["phases"]) == (0, [])
    costless = result_of(narrow, beam, FINGERPRINTS)
    assert costless["regret"] is None and costless["config"]["cost_unit"] is None


def test_an_under_filled_budget_is_marked(tmp_path):
    config = config_of(tmp_path, [3], early_stop=True)
    found = result_of(config, search(config, space_of(5, [3]), Table(peaked)), FINGERPRINTS)
    assert found["final_configuration"]["under_filled"] is True


# Journal


def beam_with_journal(tmp_path, table, fingerprints=FINGERPRINTS, chunk=4):
    """Search, write the result, and return its bytes and the journal's counts."""
    config = config_of(tmp_path, [3, 1])
    with Journal(config.journal(tmp_path), table, fingerprints, chunk) as journal:
        outcome = search(config, space_of(6, [3, 1]), journal)
    write_result(config.output_path, config, outcome, fingerprints)
    return config.output_path.read_bytes(), journal.reused, journal.evaluated


def test_a_second_search_evaluates_nothing_and_agrees(tmp_path):
    table = Table(random_quality(0))
    first, reused, evaluated = beam_with_journal(tmp_path, table)
    assert (reused, evaluated) == (0, len(table.seen))
    assert max(map(len, table.calls)) == 4
    again = Table(random_quality(0))
    assert beam_with_journal(tmp_path, again) == (first, evaluated, 0)
    assert not again.calls


def test_scores_from_the_journal_are_the_same_numbers(tmp_path):
    values = [0.1 + 0.2, 1e-300, -1 / 3, 123456789.123456789]
    placements = [(str(index),) for index in range(len(values))]
    table = Table(lambda placement: values[int(placement[0])])
    for _ in range(2):
        with Journal(tmp_path / "j", table, FINGERPRINTS, 3) as journal:
            scores = journal([*placements, placements[0]])
        assert [score.metrics["accuracy"] for score in scores] == [*values, values[0]]
        assert scores[0].standard_errors == {"accuracy": 0.25}
    assert [len(call) for call in table.calls] == [3, 1]


@pytest.mark.parametrize(
    "other",
    [
        Fingerprints("other", "d", {"batches": 2}),
        Fingerprints("m", "other", {"batches": 2}),
        Fingerprints("m", "d", {"batches": 3}),
    ],
)
def test_another_model_data_or_setting_reuses_nothing(tmp_path, other):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    changed = Table(random_quality(1))
    _, reused, evaluated = beam_with_journal(tmp_path, changed, other)
    assert (reused, evaluated) == (0, len(changed.seen))
    _, reused, evaluated = beam_with_journal(tmp_path, Table(random_quality(0)))
    assert reused > 0 and evaluated == 0  # the first one's scores are still there


@pytest.mark.parametrize("seed", range(8))
def test_a_journal_cut_anywhere_resumes_to_the_same_bytes_in_the_same_chunks(tmp_path, seed):
    whole = Table(random_quality(0))
    result, _, _ = beam_with_journal(tmp_path, whole)
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    journal = path.read_bytes()
    path.write_bytes(journal[: random.Random(seed).randrange(len(journal))])
    resumed = Table(random_quality(0))
    assert beam_with_journal(tmp_path, resumed)[0] == result
    assert path.read_bytes() == journal
    assert resumed.calls == whole.calls[len(whole.calls) - len(resumed.calls) :]


SEARCH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tests.supernet.test_search import Table, beam_with_journal, random_quality

folder, die_at, keep = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
calls, size, fsync = 0, 0, os.fsync

def dying(descriptor):
    '''Die at one of the writes to the journal, of which a part has reached the file.'''
    global calls, size
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
        calls += 1
        grown = os.fstat(descriptor).st_size
        if calls == die_at:
            os.ftruncate(descriptor, size + int(keep * (grown - size)))
            os.kill(os.getpid(), signal.SIGKILL)
        size = grown
    fsync(descriptor)

os.fsync = dying
beam_with_journal(folder, Table(random_quality(0)))
"""


@pytest.mark.parametrize(
    ("die_at", "keep"), [(1, 0.0), (1, 0.9), (3, 0.3), (5, 0.5), (7, 0.99), (9, 1.0)]
)
def test_a_search_killed_while_it_writes_resumes_to_the_same_bytes(tmp_path, die_at, keep):
    whole = Table(random_quality(0))
    expected, _, _ = beam_with_journal(tmp_path / "whole", whole)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SEARCH_AND_DIE, str(killed), str(die_at), str(keep)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert not (killed / "search.json").exists()
    resumed = Table(random_quality(0))
    result, reused, _ = beam_with_journal(killed, resumed)
    assert result == expected
    done = die_at - (keep < 1)
    assert resumed.calls == whole.calls[done:]
    assert reused == sum(map(len, whole.calls[:done]))
    journals = [folder / "search.journal.jsonl" for folder in (killed, tmp_path / "whole")]
    assert journals[0].read_bytes() == journals[1].read_bytes()


@pytest.mark.parametrize(
    "damage", [b"{}\n", b"not json\n", b'{"key": 1}\n', b"\n", b"\xff\xfe\n", b"[]\n"]
)
@pytest.mark.parametrize("line", [0, 5])
def test_a_corrupt_line_is_one_clear_error(tmp_path, damage, line):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = damage
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=rf"line {line + 1}: not a record"):
        beam_with_journal(tmp_path, Table(random_quality(0)))
    assert path.read_bytes() == b"".join(lines)  # nothing was thrown away


def test_missing_lines_are_an_error(tmp_path):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(ConfigError, match="line 2: lines are missing"):
        beam_with_journal(tmp_path, Table(random_quality(0)))


def test_a_journal_has_one_user_at_a_time(tmp_path):
    table = Table(random_quality(0))
    with Journal(tmp_path / "j", table, FINGERPRINTS, 1):
        with pytest.raises(ConfigError, match="in use by another search"):
            Journal(tmp_path / "j", table, FINGERPRINTS, 1)
    Journal(tmp_path / "j", table, FINGERPRINTS, 1).__exit__(None, None, None)


# Validation


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "has 0 entries; 3 mixers take 1 to 2"),
        ([1, 1, 1], "has 3 entries; 3 mixers take 1 to 2"),
        ([0], "gives 'a' 0 layers; it must be at least 1"),
        ([1, -2], "gives 'b' -2 layers; it must be at least 1"),
        ([2, 3], r"asks for 2 \+ 3 = 5 layers; the model has 4"),
        ({"x": 1}, r"names 'x'; the mixers are \['a', 'b', 'c'\]"),
        ({"c": 5}, "asks for 5 = 5 layers"),
    ],
)
def test_budgets_that_the_model_cannot_meet_are_named(budgets, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_budgets(4, ["a", "b", "c"], budgets)


def test_mixers_need_different_names():
    with pytest.raises(ConfigError, match="different names"):
        SearchSpace.from_budgets(4, ["a", "a"], [1])


def test_a_journal_that_cannot_be_opened_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "j"):
        with pytest.raises(ConfigError, match=f"cannot open the journal {path}: "):
            Journal(path, Table(peaked), FINGERPRINTS, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_and_not_recorded(tmp_path, value):
    def quality(placement):
        return value if placement[3] == "attention" else 0.0

    with pytest.raises(ConfigError, match="accuracy of placement window/window/window/attention"):
        beam_search(Table(quality), space_of(4, [1]), QUALITY)
    path = tmp_path / "j"
    with Journal(path, Table(quality), FINGERPRINTS, 2) as journal:
        with pytest.raises(ConfigError, match="a search needs finite scores"):
            beam_search(journal, space_of(4, [1]), QUALITY)
    assert len(path.read_bytes().splitlines()) == 2  # the first chunk, which was sound


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'perplexity'; .* reports \['accuracy', 'loss'\]"):
        beam_search(Table(peaked), space_of(4, [1]), Objective("perplexity", True))


def test_a_score_function_must_answer_for_every_placement():
    with pytest.raises(ValueError, match="3 scores for 4 placements"):
        beam_search(lambda p: Table(peaked)(p)[1:], space_of(4, [1]), QUALITY)


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_width": 0},
        {"initial_beam_width": -1},
        {"early_stop_threshold": -0.1},
        {"method": "evolution"},
        {"candidates_per_forward": 0},
        {"budgets": [True]},
        {"budget": [1]},
        {"score_metric": "acuracy"},
        {"early_stop_threshold": math.inf},
    ],
)
def test_the_configuration_refuses_what_it_does_not_know(tmp_path, changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        config_of(tmp_path, **({"budgets": [1]} | changes))


def test_the_configuration_has_the_seeds_defaults(tmp_path):
    config = config_of(tmp_path, [1])
    assert (config.beam_width, config.initial_beam_width) == (12, 12)
    assert (config.early_stop, config.early_stop_threshold) == (False, 0.001)
    assert config.higher_is_better is True
    assert config.output_checkpoint_path is None
    assert config.journal(tmp_path) == tmp_path / "search.journal.jsonl"


@pytest.mark.parametrize("metric, higher", [("loss", True), ("accuracy", False)])
def test_the_direction_has_to_fit_the_metric(tmp_path, metric, higher):
    with pytest.raises(ValidationError, match=f"got {higher} with {metric}"):
        config_of(tmp_path, [1], score_metric=metric, higher_is_better=higher)
    config_of(tmp_path, [1], score_metric=metric, higher_is_better=not higher)


def test_standard_errors_need_two_samples(tmp_path):
    with pytest.raises(ValidationError, match="two samples or more in all, got 1 of 1"):
        config_of(tmp_path, [1], batches=1, batch_size=1)
    assert config_of(tmp_path, [1], batches=2, batch_size=1).batches == 2
