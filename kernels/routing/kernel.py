"""Triton kernel and launcher.

Floor: one launch. A table of 48 layers and 64 samples is 12 KB, so its time is latency. Each layer
is one program, which draws its row in registers and writes the row and every mixer's samples.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from . import strategy as ground
from .strategy import Strategy, thresholds
from .table import MixerTable

LAYOUT_LAYER = tl.constexpr(ground.LAYOUT_LAYER)


@triton.jit
def random_words(seed, step, layer, samples):
    """The first word of Philox4x32-10 for each sample. tl.philox gives Random123's bits."""
    words, _, _, _ = tl.philox(seed, step.to(tl.uint32), (step >> 32).to(tl.uint32), layer, samples)
    return words


@triton.jit
def uniform(words, choices):
    return tl.umulhi(words, tl.zeros_like(words) + choices).to(tl.int32)


@triton.jit
def weighted(words, thresholds_ptr, CHOICES: tl.constexpr):
    words = words.to(tl.int64)  # the last threshold may be 2³²
    picks = tl.zeros_like(words).to(tl.int32)
    for choice in range(CHOICES):
        picks += (words >= tl.load(thresholds_ptr + choice)).to(tl.int32)
    return picks


@triton.jit
def urn(words, seed, step, layer, samples, MIXERS: tl.constexpr):
    """Pólya's urn. All samples follow their tickets until each has arrived at a mixer."""
    tickets = uniform(words, MIXERS + layer)
    while tl.max(tickets, 0) >= MIXERS:
        earlier = tl.maximum(tickets - MIXERS, 0)
        next_tickets = uniform(random_words(seed, step, earlier, samples), MIXERS + earlier)
        tickets = tl.where(tickets < MIXERS, tickets, next_tickets)
    return tickets


@triton.jit(do_not_specialize=["seed", "first_layer", "main", "cheapest", "batch"])
def draw_kernel(
    table_ptr, count_ptr, samples_ptr, step_ptr, weights_ptr, layouts_ptr, probabilities_ptr,
    seed: tl.uint64, first_layer, main, cheapest, batch,
    MIXERS: tl.constexpr, LAYOUTS: tl.constexpr,
    KIND: tl.constexpr, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One layer per program: its row of the table, and its mixers' counts and samples."""
    row = tl.program_id(0)
    layer = first_layer + row
    step = tl.load(step_ptr)
    places = tl.arange(0, BLOCK)
    samples = places if PER_SAMPLE else tl.zeros_like(places)

    # [BLOCK]
    words = random_words(seed, step, layer, samples)
    if KIND == "weighted":
        mixers = weighted(words, weights_ptr, MIXERS)
    elif KIND == "full_layout":
        mixers = urn(words, seed, step, layer, samples, MIXERS)
    else:
        mixers = uniform(words, MIXERS)
    if KIND == "sandwich":
        phase = ((step.to(tl.uint64) % 3).to(tl.int32) + samples) % 3
        mixers = tl.where(phase == 0, main, tl.where(phase == 1, cheapest, mixers))
    if LAYOUTS > 0:
        words = random_words(seed, step, LAYOUT_LAYER, samples)
        layout = weighted(words, probabilities_ptr, LAYOUTS)
        predefined = layout < LAYOUTS
        of_layout = tl.load(layouts_ptr + layer * LAYOUTS + layout, mask=predefined, other=0)
        mixers = tl.where(predefined, of_layout, mixers)

    columns = batch if PER_SAMPLE else 1
    row = row.to(tl.int64)
    tl.store(table_ptr + row * columns + places, mixers, mask=places < columns)
    for mixer in range(MIXERS):
        mine = (mixers == mixer) & (places < batch)
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        plan = row * MIXERS + mixer
        count = tl.sum(mine.to(tl.int32), 0)
        tl.store(count_ptr + plan, count)
        tl.store(samples_ptr + plan * batch + rank, places, mask=mine)
        # Nobody reads the rest, but a copy of all: it holds no sample
        rest = (places >= count) & (places < batch)
        tl.store(samples_ptr + plan * batch + places, -1, mask=rest)


def block_of(batch: int) -> dict[str, int]:
    """One block covers the batch, with up to 16 warps so that it stays in registers to 4096."""
    block = next_power_of_2(batch)
    return {"BLOCK": block, "num_warps": min(max(block // 128, 1), 16)}


@functools.cache
def constants(strategy: Strategy, device: torch.device) -> tuple[Tensor | None, ...]:
    """What the kernel reads of a strategy, once per device, or None where it has none.

    The weights' thresholds, int64; the layouts, int32, [layers, layouts]; their thresholds, int64.
    """
    weights = layouts = probabilities = None
    if strategy.weights is not None:
        weights = torch.tensor(thresholds(strategy.weights), device=device)
    if strategy.layouts:
        layouts = torch.tensor(
            list(zip(*strategy.layouts, strict=True)), dtype=torch.int32, device=device
        )
        probabilities = torch.tensor(thresholds(strategy.layout_probabilities), device=device)
    return weights, layouts, probabilities


def draw(
    strategy: Strategy,
    seed: int,
    step: int | Tensor,
    stage: range,
    batch: int,
    device: torch.device,
) -> MixerTable:
    columns = batch if strategy.per_sample else 1
    table = torch.empty((len(stage), columns), dtype=torch.int32, device=device)
    count = torch.empty((len(stage), strategy.mixers), dtype=torch.int32, device=device)
    samples = torch.empty((*count.shape, batch), dtype=torch.int32, device=device)
    if not isinstance(step, Tensor):  # filled on the device: nothing is copied there
        step = torch.full((), (step + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    elif step.device != table.device:
        raise ValueError(f"step must be on the table's device, {table.device}, got {step.device}")
    with torch.cuda.device_of(table):  # Triton launches on the current device
        draw_kernel[(len(stage),)](
            table, count, samples, step, *constants(strategy, table.device),
            seed, stage.start, strategy.main, strategy.cheapest, batch,
            MIXERS=strategy.mixers, LAYOUTS=len(strategy.layouts),
            KIND=strategy.kind, PER_SAMPLE=strategy.per_sample,
            **block_of(batch),
        )  # fmt: skip
    return MixerTable(table, count, samples)
