"""Routing without chance: the generator, the plan, routes, slices, arguments."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import every_impl, route_of
from tossup.kernels.routing import MixerTable, Strategy, draw, put, rows_of, take
from tossup.kernels.routing.cpu import philox_words
from tossup.kernels.routing.reference import philox4x32

ONES = 2**32 - 1
KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 10: counter, key, words
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (ONES, ONES, ONES, ONES),
        (ONES, ONES),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words
    low, high, layer, sample = counter
    first = philox_words(
        key[0] | key[1] << 32,
        low | high << 32,
        np.array([layer], np.uint64),
        np.array([sample], np.uint64),
    )
    assert first.tolist() == [[words[0]]]


def brute_force_plan(table: torch.Tensor, mixers: int) -> list[list[list[int]]]:
    return [[[b for b, m in enumerate(row) if m == k] for k in range(mixers)] for row in table]


@every_impl
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_plan_lists_every_sample_once(impl, per_sample, batch):
    strategy = Strategy(3, per_sample=per_sample)
    drawn = draw(strategy, 5, 0, 4, batch, impl=impl)
    assert drawn.table.shape == (4, batch if per_sample else 1)
    assert {t.dtype for t in (drawn.table, drawn.count, drawn.samples)} == {torch.int32}
    for layer, plan in enumerate(brute_force_plan(drawn.table.expand(4, batch).tolist(), 3)):
        for mixer, samples in enumerate(plan):
            route = drawn.route(layer, mixer)
            assert route.count.shape == () and route.samples.shape == (batch,)
            assert rows_of(route.count, route.samples).tolist() == samples


def test_plan_of_a_table_that_was_not_drawn():
    table = torch.tensor([[2, 0, 0, 2, 1], [1, 1, 1, 1, 1]])
    planned = MixerTable.of(table, mixers=4, batch=5)
    assert planned.count.tolist() == [[2, 1, 2, 0], [0, 5, 0, 0]]
    for layer, plan in enumerate(brute_force_plan(table.tolist(), 4)):
        for mixer, samples in enumerate(plan):
            assert planned.samples[layer, mixer, : len(samples)].tolist() == samples

    placement = MixerTable.of(torch.tensor([[1], [0]]), mixers=2, batch=3)
    assert placement.table.shape == (2, 1) and placement.count.tolist() == [[0, 3], [3, 0]]
    assert placement.samples[0, 1].tolist() == placement.samples[1, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"table must be .* with batch 3, got \(2, 5\)"):
        MixerTable.of(table, mixers=4, batch=3)


@pytest.mark.parametrize("layer, mixer", [(0, -1), (-1, 0), (3, 0), (0, 2)])
def test_a_route_of_no_layer_or_no_mixer_is_refused(layer, mixer):
    table = draw(Strategy(2), 0, 0, layers=3, batch=4)
    with pytest.raises(
        ValueError, match=r"route takes a layer of 3 and a mixer of 2, .* got layer"
    ):
        table.route(layer, mixer)


def test_routes_are_views_of_the_plan():
    drawn = draw(Strategy(2, per_sample=True), 0, 0, 3, 4)
    route = drawn.route(2, 1)
    drawn.count[2, 1], drawn.samples[2, 1, 0] = 1, 3
    assert rows_of(route.count, route.samples).tolist() == [3]


def test_take_and_put_move_the_rows_of_a_route():
    x, route = torch.arange(8.0).view(4, 2), route_of(1, 3, batch=4)
    assert torch.equal(take(route, x), x[[1, 3]]) and take(None, x) is x
    placed = put(route, take(route, x), 4)
    assert torch.equal(placed[[1, 3]], x[[1, 3]]) and placed[[0, 2]].isnan().all()


@every_impl
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "full_layout", "sandwich"])
def test_a_stage_draws_its_rows_of_the_whole_table(impl, per_sample, kind):
    """Pipeline ranks draw their own layers, and together the table that one rank would draw."""
    layouts = ((0, 1, 2, 3, 0, 1, 2), (3, 3, 3, 0, 0, 0, 0))
    strategy = Strategy(
        4, kind, None, layouts, (0.2, 0.3), main=3, cheapest=1, per_sample=per_sample
    )
    whole = draw(strategy, -1, 5, 7, 6, impl=impl)
    for first, last in [(0, 3), (3, 4), (4, 7)]:
        stage = draw(strategy, -1, 5, 7, 6, stage=range(first, last), impl=impl)
        assert torch.equal(stage.table, whole.table[first:last])
        assert torch.equal(stage.count, whole.count[first:last])


def test_another_process_draws_the_same_table():
    code = """
from tossup.kernels.routing import Strategy, draw
print(draw(Strategy(5, "full_layout", per_sample=True), 3, 2**40, 6, 9, impl="cpu").table.tolist())
"""
    rank = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=True,
    )
    ours = draw(Strategy(5, "full_layout", per_sample=True), 3, 2**40, 6, 9, impl="cpu")
    assert json.loads(rank.stdout) == ours.table.tolist()


@every_impl
def test_seed_and_step_are_taken_modulo_64_bits(impl):
    strategy = Strategy(5, "sandwich", per_sample=True)
    for step in (2**40 + 7, 2**64 - 1, -3):
        expected = draw(strategy, -3, step, 4, 6, impl=impl)
        signed = (step + 2**63) % 2**64 - 2**63
        for seed, same in [(2**64 - 3, step), (-3, step + 2**64), (-3, torch.tensor(signed))]:
            assert torch.equal(draw(strategy, seed, same, 4, 6, impl=impl).table, expected.table)


@every_impl
def test_a_word_on_a_threshold_belongs_to_the_next_choice(impl):
    for counter, layouts in [((3, 0, 0, 0), ()), ((3, 0, 2**31, 0), ((0,), (1,)))]:
        word = philox4x32(counter, (5, 0))[0]
        for threshold, mixer in [(word, 1), (word + 1, 0)]:
            split = (threshold / 2**32, 1 - threshold / 2**32)
            strategy = (
                Strategy(2, layouts=layouts, layout_probabilities=split)
                if layouts
                else Strategy(2, "weighted", split)
            )
            assert draw(strategy, 5, 3, 1, 1, impl=impl).table.item() == mixer


@every_impl
def test_all_bits_of_seed_and_step_matter(impl):
    tables = [
        draw(Strategy(7), seed, step, 8, 1, impl=impl).table.flatten().tolist()
        for seed, step in [(0, 0), (1, 0), (2**32, 0), (2**63, 0), (0, 1), (0, 2**32), (0, 2**63)]
    ]
    assert len(set(map(tuple, tables))) == len(tables)


@every_impl
def test_sandwich_cycles_over_steps_and_samples(impl):
    strategy = Strategy(4, "sandwich", main=2, cheapest=3, per_sample=True)
    for step in (0, 1, 2, 2**63, -1):  # 2⁶³ is 2 modulo 3, and −1 is 2⁶⁴ − 1, which is 0
        table = draw(strategy, 9, step, 5, 8, impl=impl).table
        free = draw(Strategy(4, per_sample=True), 9, step, 5, 8, impl=impl).table
        for sample in range(8):
            phase = (step % 2**64 + sample) % 3
            expected = (torch.full((5,), 2), torch.full((5,), 3), free[:, sample])[phase]
            assert torch.equal(table[:, sample], expected.int())
    whole_batch = Strategy(4, "sandwich", main=2, cheapest=3)
    assert draw(whole_batch, 9, 6, 5, 8, impl=impl).table.unique().tolist() == [2]
    assert draw(whole_batch, 9, 7, 5, 8, impl=impl).table.unique().tolist() == [3]


def test_step_tensor_sets_the_device():
    drawn = draw(Strategy(2), 0, torch.tensor(3), 2, 2)
    assert torch.equal(drawn.table, draw(Strategy(2), 0, 3, 2, 2, device="cpu").table)
    assert draw(Strategy(2), 0, 3, 2, 2, device="meta").table.device.type == "meta"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixers": 0}, "mixers must be at least 1, got 0"),
        (
            {"kind": "even"},
            "kind must be one of uniform, weighted, full_layout, sandwich, got 'even'",
        ),
        ({"main": 3}, "main must be a mixer from 0 to 2, got 3"),
        ({"cheapest": -1}, "cheapest must be a mixer from 0 to 2, got -1"),
        (
            {"kind": "weighted"},
            "weights must be given with kind='weighted' and only with it, got kind='weighted'",
        ),
        ({"weights": (1, 1, 1)}, "only with it, got kind='uniform' and weights=(1, 1, 1)"),
        (
            {"kind": "weighted", "weights": (1, 1)},
            "weights must hold one number per mixer, got 2 for 3",
        ),
        (
            {"kind": "weighted", "weights": (1, -1, 1)},
            "weights must be finite, at least 0, and not all 0, got (1, -1, 1)",
        ),
        ({"kind": "weighted", "weights": (0, 0, 0)}, "not all 0, got (0, 0, 0)"),
        ({"kind": "weighted", "weights": (1, float("nan"), 1)}, "weights must be finite"),
        ({"kind": "weighted", "weights": (1, float("inf"), 1)}, "weights must be finite"),
        (
            {"layouts": ((0, 1),)},
            "layout_probabilities must hold one probability per layout, got 0 for 1",
        ),
        (
            {"layout_probabilities": (1.0,)},
            "layout_probabilities must hold one probability per layout, got 1 for 0",
        ),
        (
            {"layouts": ((0, 1), (0,)), "layout_probabilities": (0.1, 0.1)},
            "layouts must all have one mixer per layer of the model, got lengths 2 and 1",
        ),
        (
            {"layouts": ((0, 3),), "layout_probabilities": (0.1,)},
            "layouts must name mixers from 0 to 2, got (0, 3)",
        ),
        (
            {"layouts": ((0, 1),), "layout_probabilities": (-0.1,)},
            "layout_probabilities must lie in [0, 1], got (-0.1,)",
        ),
        (
            {"layouts": ((0, 1), (1, 1)), "layout_probabilities": (0.6, 0.5)},
            "layout_probabilities must sum to at most 1, got 1.1",
        ),
    ],
)
def test_strategies_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError) as refusal:
        Strategy(**{"mixers": 3, **fields})
    assert message in str(refusal.value)


def test_strategies_are_plain_equal_data():
    weighted = Strategy(2, "weighted", weights=[3, 1])
    assert weighted.weights == (0.75, 0.25)
    assert weighted == Strategy(2, "weighted", weights=(0.75, 0.25)) and hash(weighted)
    tenths = Strategy(2, layouts=[[0]] * 10, layout_probabilities=[0.1] * 10)
    assert tenths.layouts[0] == (0,) and hash(tenths)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"layers": 3}, "layers must be 2, the length of the layouts, got 3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        (
            {"stage": range(1, 3)},
            "stage must be a range of step 1 within 2 layers, got range(1, 3)",
        ),
        ({"stage": range(0, 0)}, "stage must be a range of step 1 within 2 layers"),
        ({"stage": range(0, 2, 2)}, "stage must be a range of step 1 within 2 layers"),
        (
            {"step": torch.zeros(1, dtype=torch.int64)},
            "an int64 tensor of shape (), got torch.int64 of shape (1,)",
        ),
        ({"step": torch.tensor(1, dtype=torch.int32)}, "got torch.int32 of shape ()"),
        ({"impl": "cuda"}, "impl must be auto, triton, cpu or reference, got 'cuda'"),
    ],
)
def test_draws_that_make_no_sense_are_refused(arguments, message):
    strategy = Strategy(2, layouts=((0, 1),), layout_probabilities=(0.5,))
    with pytest.raises(ValueError) as refusal:
        draw(**{"strategy": strategy, "seed": 0, "step": 0, "layers": 2, "batch": 1, **arguments})
    assert message in str(refusal.value)
