"""Data sets: every batch is a pure function of (seed, step)."""

from typing import Annotated

from pydantic import Field

from .dataset import IGNORED, Batch, Dataset
from .mqar import MQAR, MQARConfig
from .text import Text, TextConfig

DataConfig = Annotated[MQARConfig | TextConfig, Field(discriminator="type")]


def build_data(config: MQARConfig | TextConfig, seed: int) -> Dataset:
    """The data set that a configuration describes. The same two arguments give the same batches."""
    return MQAR(config, seed) if isinstance(config, MQARConfig) else Text(config, seed)


__all__ = [
    "IGNORED",
    "MQAR",
    "Batch",
    "DataConfig",
    "Dataset",
    "MQARConfig",
    "Text",
    "TextConfig",
    "build_data",
]
