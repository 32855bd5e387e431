"""The file of a search: its Pareto set, its costs, what it says of the search."""

import json

import pytest

from tests.supernet.search.tables import (
    FINGERPRINTS,
    QUALITY,
    Table,
    config_of,
    pair_trap,
    peaked,
    random_quality,
    space_of,
)
from tossup.supernet.search import (
    beam_search,
    exhaustive_search,
    search,
)
from tossup.supernet.search.result import Cost, pareto_set, result_of, write_result


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
