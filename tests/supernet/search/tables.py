"""Searches on tables of scores: what the tests of search share."""

import random
import zlib
from itertools import product

from tossup.supernet.search import (
    Objective,
    Score,
    SearchConfig,
    SearchSpace,
    layers_of,
)
from tossup.supernet.search.journal import Fingerprints

QUALITY = Objective("accuracy", higher_is_better=True)
FINGERPRINTS = Fingerprints(model="m", data="d", settings={"batches": 2})


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


def space_of(layers, budgets, mixers=("attention", "window", "mamba")):
    return SearchSpace.from_budgets(layers, mixers[: len(budgets) + 1], budgets)


def config_of(tmp_path, budgets, **changes):
    settings = {"score_metric": "accuracy", "output_path": tmp_path / "search.json"}
    return SearchConfig(budgets=budgets, **(settings | changes))


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


def pair_trap(placement):
    """Attention in layer 0 is the best single choice; layers 2 and 3 are worth it only together."""
    chosen = set(layers_of(placement, "attention"))
    return 1.0 * (0 in chosen) + 10.0 * ({2, 3} <= chosen)


def peaked(placement):
    """The first layer helps much, the second hardly, the third harms."""
    return [0.0, 1.0, 1.0005, 0.5][placement.count("attention")]
