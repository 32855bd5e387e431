"""CPU backend: all cells at once, in numpy's unsigned integers."""

import numpy as np
import torch
from torch import Tensor

from ..philox import LOW, philox
from .strategy import LAYOUT_LAYER, Strategy, thresholds
from .table import MixerTable


def philox_words(seed: int, step: int, layers: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The first word of Philox4x32-10 for every layer and sample: uint64, [layers, samples]."""
    layer, sample = (torch.from_numpy(x.astype(np.int64)) for x in (layers, samples))
    counter = (step & LOW, step >> 32, layer[:, None], sample[None, :])
    return philox((seed & LOW, seed >> 32), counter).numpy().astype(np.uint64)


def uniform(words: np.ndarray, choices: np.ndarray | int) -> np.ndarray:
    return (words * np.asarray(choices, np.uint64) >> np.uint64(32)).astype(np.int64)


def weighted(words: np.ndarray, probabilities: tuple[float, ...]) -> np.ndarray:
    return np.searchsorted(np.array(thresholds(probabilities), np.uint64), words, side="right")


def urn(words: np.ndarray, mixers: int) -> np.ndarray:
    """Pólya's urn over all layers, [layers, samples]; each layer copies from those above it."""
    layers, samples = words.shape
    tickets = uniform(words, mixers + np.arange(layers)[:, None])
    drawn = np.concatenate([np.tile(np.arange(mixers)[:, None], samples), tickets])
    for layer in range(layers):
        drawn[mixers + layer] = np.take_along_axis(drawn, tickets[layer, None], 0)[0]
    return drawn[mixers:]


def draw(
    strategy: Strategy,
    seed: int,
    step: int | Tensor,
    stage: range,
    batch: int,
    device: torch.device,
) -> MixerTable:
    step = int(step) % 2**64
    first = 0 if strategy.kind == "full_layout" else stage.start
    rows = np.arange(first, stage.stop, dtype=np.uint64)
    samples = np.arange(batch if strategy.per_sample else 1, dtype=np.uint64)
    words = philox_words(seed, step, rows, samples)

    if strategy.weights is not None:
        table = weighted(words, strategy.weights)
    elif strategy.kind == "full_layout":
        table = urn(words, strategy.mixers)[stage.start :]
    else:
        table = uniform(words, strategy.mixers)
    if strategy.kind == "sandwich":
        phase = (step % 3 + samples) % 3
        table = np.select([phase == 0, phase == 1], [strategy.main, strategy.cheapest], table)
    if strategy.layouts:
        word = philox_words(seed, step, np.array([LAYOUT_LAYER], np.uint64), samples)[0]
        layout = weighted(word, strategy.layout_probabilities)
        layouts = np.array(strategy.layouts).T[stage.start : stage.stop]  # [layers, layouts]
        predefined = np.concatenate([layouts, np.zeros_like(layouts[:, :1])], 1)[:, layout]
        table = np.where(layout < len(strategy.layouts), predefined, table)

    return MixerTable.of(torch.from_numpy(table).to(device), strategy.mixers, batch)
