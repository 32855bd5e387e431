"""Every strategy against its exact distribution, by enumeration and χ². Seeds are fixed.

A right distribution passes at p > 0.001; the wrong ones are rejected at p < 1e-9, which is tested.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from tossup.kernels.routing import Strategy, draw

LAYERS, MIXERS = 4, 3
STRATEGIES = {
    "uniform": Strategy(MIXERS),
    "weighted": Strategy(MIXERS, "weighted", weights=(5, 0, 2)),
    "full_layout": Strategy(MIXERS, "full_layout"),
    "sandwich": Strategy(MIXERS, "sandwich", main=1, cheapest=2),
    "layouts over uniform": Strategy(
        MIXERS, "uniform", None, ((0, 1, 2, 0), (2, 2, 2, 2), (1, 1, 0, 0)), (0.1, 0.0, 0.25)
    ),
    "layouts over full_layout": Strategy(
        MIXERS, "full_layout", None, ((0, 1, 2, 0), (0, 0, 1, 1)), (0.3, 0.2)
    ),
    "layouts only": Strategy(MIXERS, "uniform", None, ((0, 1, 2, 0), (0, 0, 1, 1)), (0.7, 0.3)),
}
LAYOUTS = list(itertools.product(range(MIXERS), repeat=LAYERS))


def full_layout_probability(layout: tuple[int, ...]) -> float:
    """One of C(N+M−1, M−1) allocations, then one of its arrangements."""
    arrangements = math.factorial(len(layout))
    for count in Counter(layout).values():
        arrangements //= math.factorial(count)
    return 1 / math.comb(len(layout) + MIXERS - 1, MIXERS - 1) / arrangements


def exact_probability(strategy: Strategy, layout: tuple[int, ...]) -> float:
    uniform = MIXERS ** -len(layout)
    base = {
        "uniform": lambda: uniform,
        "weighted": lambda: math.prod((5 / 7, 0, 2 / 7)[mixer] for mixer in layout),
        "full_layout": lambda: full_layout_probability(layout),
        "sandwich": lambda: (
            ((set(layout) == {strategy.main}) + (set(layout) == {strategy.cheapest}) + uniform) / 3
        ),
    }[strategy.kind]()
    probability = (1 - sum(strategy.layout_probabilities)) * base
    for predefined, p in zip(strategy.layouts, strategy.layout_probabilities, strict=True):
        probability += p * (layout == predefined)
    return probability


def drawn_layouts(strategy: Strategy, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Layouts of consecutive samples of one step, or of consecutive steps."""
    if strategy.per_sample:
        return list(map(tuple, draw(strategy, seed, 11, LAYERS, draws).table.T.tolist()))
    return [
        tuple(draw(strategy, seed, step, LAYERS, 1).table[:, 0].tolist()) for step in range(draws)
    ]


def p_value(layouts: list[tuple[int, ...]], exact: list[float]) -> float:
    """χ² of observed layouts; what cannot happen must not have happened."""
    observed = Counter(layouts)
    if any(observed[layout] for layout, p in zip(LAYOUTS, exact, strict=True) if p < 1e-12):
        return 0.0
    possible = [(observed[layout], p) for layout, p in zip(LAYOUTS, exact, strict=True) if p > 1e-9]
    counts, probabilities = np.array(possible).T
    return stats.chisquare(counts, probabilities / probabilities.sum() * len(layouts)).pvalue


def with_per_sample(strategy: Strategy, per_sample: bool) -> Strategy:
    fields = {name: getattr(strategy, name) for name in strategy.__dataclass_fields__}
    return Strategy(**{**fields, "per_sample": per_sample})


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("per_sample, draws", [(False, 2400), (True, 30000)])
def test_layouts_follow_the_exact_distribution(name, per_sample, draws):
    layouts = drawn_layouts(with_per_sample(STRATEGIES[name], per_sample), draws, seed=2)
    for other, strategy in STRATEGIES.items():
        exact = [exact_probability(strategy, layout) for layout in LAYOUTS]
        assert sum(exact) == pytest.approx(1)
        p = p_value(layouts, exact)
        assert p > 1e-3 if other == name else p < 1e-9, (other, p)


@pytest.mark.parametrize("layers, mixers", [(3, 2), (6, 2), (4, 4), (12, 1)])
def test_full_layout_draws_every_allocation_equally_often(layers, mixers):
    strategy = Strategy(mixers, "full_layout", per_sample=True)
    table = draw(strategy, 4, 0, layers, 20000).table
    allocations = Counter(
        map(tuple, torch.stack([(table == m).sum(0) for m in range(mixers)], 1).tolist())
    )
    assert len(allocations) == math.comb(layers + mixers - 1, mixers - 1)
    assert mixers == 1 or stats.chisquare(list(allocations.values())).pvalue > 1e-3


@pytest.mark.parametrize("name", STRATEGIES)
def test_marginals_are_those_of_the_enumeration(name):
    strategy = STRATEGIES[name]
    expected = np.zeros((LAYERS, MIXERS))
    for layout in LAYOUTS:
        expected[range(LAYERS), layout] += exact_probability(strategy, layout)
    marginals = strategy.marginals(LAYERS)
    assert marginals.dtype == np.float64
    np.testing.assert_allclose(marginals, expected, rtol=0, atol=1e-14)


def test_marginals_refuse_another_length_than_the_layouts():
    with pytest.raises(ValueError, match="layers must be 4, the length of the layouts, got 5"):
        STRATEGIES["layouts only"].marginals(5)


def assert_independent(first: torch.Tensor, second: torch.Tensor, mixers: int):
    """Pairs of cells are uniform over all pairs of mixers."""
    pairs = np.bincount((first * mixers + second).flatten().numpy(), minlength=mixers**2)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_layers_steps_samples_and_seeds_are_independent():
    layers, batch, mixers = 6, 20000, 5
    strategy = Strategy(mixers, per_sample=True)
    table = draw(strategy, 1, 8, layers, batch).table
    for i, j in itertools.combinations(range(layers), 2):
        assert_independent(table[i], table[j], mixers)
    for distance in (1, 2, 64):
        assert_independent(table[0, :-distance], table[0, distance:], mixers)
    for seed, step in [(1, 9), (1, 8 + 2**32), (2, 8), (1 + 2**32, 8), (8, 1)]:
        assert_independent(table, draw(strategy, seed, step, layers, batch).table, mixers)


def test_whole_batch_tables_are_independent_over_steps_and_layers():
    strategy = Strategy(4)
    table = torch.stack([draw(strategy, 1, step, 2, 1).table[:, 0] for step in range(2000)])
    assert_independent(table[:-1], table[1:], 4)
    assert_independent(table[:, 0], table[:, 1], 4)
    assert_independent(table[:-1, 0], table[1:, 1], 4)
