"""Multi-query associative recall: Arora et al., "Zoology" (2023), arXiv:2312.04927, section 4.

A sequence opens with key-value pairs. Each key then comes once more, and the model must answer it
with its value:

    tokens   4  9  2  7 │ 0  0  2  0  4  0  0  0        keys 4 and 2, values 9 and 7
    labels   ·  ·  ·  · │ ·  ·  7  ·  9  ·  ·  ·        · is ignored

Behind the pairs, queries stand in slots of two positions; slot g = 1, 2, … has a probability in
proportion to g^(power_a - 1), and each slot takes one query at most. Tokens below vocab_size // 2
are keys (0 is none), those above are values, and no key or value occurs in two pairs.
"""

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ...autotune.schema import Strict
from .dataset import IGNORED, Dataset, Stream


class MQARConfig(Strict):
    """Multi-query associative recall, with the defaults of the paper's generator.

    Random tokens where there is neither a pair nor a query may be keys, but are not scored.
    """

    type: Literal["mqar"] = "mqar"
    vocab_size: int = Field(
        default=8192, ge=4, description="tokens; half of them are keys, half values"
    )
    length: int = Field(default=64, ge=4, description="tokens of a sample")
    pairs: int = Field(default=8, ge=1, description="of key and value in a sample")
    power_a: float = Field(
        default=0.01,
        gt=0,
        description="exponent of the gaps between a pair and its query; 1: uniform",
    )
    random_non_queries: bool = Field(True, description="other positions hold random tokens, not 0")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"length is {self.length}, but {self.pairs} pairs and their queries take "
                f"4 * pairs = {4 * self.pairs} positions or more"
            )
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but {self.pairs} distinct keys take "
                f"2 * (pairs + 1) = {2 * (self.pairs + 1)} tokens or more"
            )
        return self


class MQAR(Dataset):
    """Sequences made by the rule of MQARConfig; see the module's docstring."""

    def __init__(self, config: MQARConfig, seed: int) -> None:
        super().__init__(seed)
        self.config = config
        self.vocab_size = config.vocab_size
        self.length = config.length
        slots = np.arange(1, (config.length - 2 * config.pairs) // 2 + 1, dtype=np.float64)
        self._slot_weights = slots ** (config.power_a - 1)

    def _sequences(
        self, random: np.random.Generator, batch_size: int, stream: Stream
    ) -> tuple[np.ndarray, ...]:
        shape, prefix, half = (batch_size, self.length), 2 * self.config.pairs, self.vocab_size // 2
        drawn = (batch_size, self.config.pairs)
        keys = 1 + _distinct(random, drawn, half - 1)
        values = half + _distinct(random, drawn, self.vocab_size - half)
        queries = prefix + 2 * _distinct_weighted(random, drawn, self._slot_weights)

        if self.config.random_non_queries:
            tokens = random.integers(self.vocab_size, size=shape)
        else:
            tokens = np.zeros(shape, dtype=np.int64)
        tokens[:, 0:prefix:2] = keys
        tokens[:, 1:prefix:2] = values
        np.put_along_axis(tokens, queries, keys, axis=1)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        np.put_along_axis(labels, queries, values, axis=1)
        return tokens, labels

    def _identity(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def _distinct(random: np.random.Generator, shape: tuple[int, int], choices: int) -> np.ndarray:
    """Rows of distinct integers below `choices`, every arrangement equally likely.

    Floyd's sampling (Bentley and Floyd, CACM 1987): the work does not grow with `choices`.
    """
    drawn = np.empty(shape, dtype=np.int64)
    for column, newest in enumerate(range(choices - shape[1], choices)):
        pick = random.integers(newest + 1, size=shape[0])
        taken = (drawn[:, :column] == pick[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, newest, pick)
    return random.permuted(drawn, axis=1)


def _distinct_weighted(
    random: np.random.Generator, shape: tuple[int, int], weights: np.ndarray
) -> np.ndarray:
    """Rows of indices drawn one after another, in proportion to the weights that are left.

    Such draws are the order in which exponential clocks of these rates ring (Efraimidis and
    Spirakis 2006), so there is no loop over them.
    """
    rings = random.standard_exponential((shape[0], len(weights))) / weights
    return rings.argsort(axis=1)[:, : shape[1]]
