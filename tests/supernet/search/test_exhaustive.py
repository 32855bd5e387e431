"""Exhaustive search on tables of scores."""

from itertools import product

import pytest

from tests.supernet.search.tables import (
    QUALITY,
    Table,
    brute_force,
    random_quality,
    space_of,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.search import (
    all_placements,
    exhaustive_search,
)


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
