"""The textbook draw: Python integers, one cell at a time."""

import torch
from torch import Tensor

from .strategy import LAYOUT_LAYER, Strategy, thresholds
from .table import MixerTable


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10: ten rounds of multiply and cross (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def mixer_of(strategy: Strategy, seed: int, step: int, layer: int, sample: int) -> int:
    """The mixer of one cell of the table."""

    def word(layer: int) -> int:
        counter = (step % 2**32, step >> 32, layer, sample)
        return philox4x32(counter, (seed % 2**32, seed >> 32))[0]

    def uniform(choices: int, layer: int) -> int:
        return word(layer) * choices >> 32

    def weighted(probabilities: tuple[float, ...], layer: int) -> int:
        return sum(threshold <= word(layer) for threshold in thresholds(probabilities))

    def urn(layer: int) -> int:
        ticket = uniform(strategy.mixers + layer, layer)
        return ticket if ticket < strategy.mixers else urn(ticket - strategy.mixers)

    layout = weighted(strategy.layout_probabilities, LAYOUT_LAYER)
    if layout < len(strategy.layouts):
        return strategy.layouts[layout][layer]
    if strategy.weights is not None:
        return weighted(strategy.weights, layer)
    if strategy.kind == "full_layout":
        return urn(layer)
    phase = (step + sample) % 3
    if strategy.kind == "sandwich" and phase < 2:
        return (strategy.main, strategy.cheapest)[phase]
    return uniform(strategy.mixers, layer)


def draw(
    strategy: Strategy,
    seed: int,
    step: int | Tensor,
    stage: range,
    batch: int,
    device: torch.device,
) -> MixerTable:
    columns = range(batch if strategy.per_sample else 1)
    table = [
        [mixer_of(strategy, seed, int(step) % 2**64, layer, sample) for sample in columns]
        for layer in stage
    ]
    count = torch.zeros(len(stage), strategy.mixers, dtype=torch.int32)
    samples = torch.full((len(stage), strategy.mixers, batch), -1, dtype=torch.int32)
    for layer, row in enumerate(table):
        for sample, mixer in enumerate(row if strategy.per_sample else row * batch):
            samples[layer, mixer, count[layer, mixer]] = sample
            count[layer, mixer] += 1
    return MixerTable(
        torch.tensor(table, dtype=torch.int32, device=device), count.to(device), samples.to(device)
    )
