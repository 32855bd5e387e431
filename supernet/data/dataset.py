"""A data set whose every batch is a pure function of (seed, step), so that resuming needs no state.

The randomness is Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with the seed and the stream as its key and the step in the highest word of its counter. Two steps,
or training and evaluation, can therefore never draw from the same stretch of it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a position that is not scored, cross_entropy's default ignore_index

Stream = Literal["training", "evaluation"]
# Tokens and labels, and the number of each token's sequence where rows hold several
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def generator(seed: int, step: int, stream: Stream) -> np.random.Generator:
    """The random numbers of one batch. seed is taken modulo 2**64; step is in [0, 2**64)."""
    key = [seed % 2**64, ("training", "evaluation").index(stream)]
    return np.random.Generator(
        np.random.Philox(
            key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64)
        )
    )


class Dataset(ABC):
    """Token sequences and, for every position, the token to predict there.

    vocab_size: tokens are in [0, vocab_size). length: tokens per sequence.
    """

    vocab_size: int
    length: int

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._fingerprint: str | None = None  # until it is asked for, as much may have to be read

    def batch(self, step: int, batch_size: int) -> Batch:
        """The training batch of a step.

        Returns (tokens, labels), int64, (batch_size, length), on the CPU. labels[:, t] is what
        position t must predict (the shift is done already), or IGNORED. Where rows hold several
        sequences, a third tensor, seq_idx, like them, numbers these from 0.
        """
        return self._draw(step, batch_size, "training")

    def evaluation(self, batches: int, batch_size: int) -> list[Batch]:
        """Held-out batches, the same in every call, from a stream that training never draws."""
        return [self._draw(index, batch_size, "evaluation") for index in range(batches)]

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal of all that defines the batches: a key for cached scores."""
        if self._fingerprint is None:
            identity = {"seed": self.seed, **self._identity()}
            whole = json.dumps(identity, sort_keys=True).encode()
            self._fingerprint = hashlib.sha256(whole).hexdigest()
        return self._fingerprint

    def _draw(self, step: int, batch_size: int, stream: Stream) -> Batch:
        arrays = self._sequences(generator(self.seed, step, stream), batch_size, stream)
        tokens, labels, *packed = map(torch.from_numpy, arrays)
        return (tokens, labels, packed[0]) if packed else (tokens, labels)

    @abstractmethod
    def _sequences(
        self, random: np.random.Generator, batch_size: int, stream: Stream
    ) -> tuple[np.ndarray, ...]:
        """Tokens and labels of a batch, and perhaps seq_idx, int64, drawn with `random` alone."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What defines the batches beside the seed, as JSON values."""
