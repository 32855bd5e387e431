"""Sequence mixers: modules that map (batch, seqlen, hidden) to the same, along the sequence."""

from ..config import AttentionConfig, Mamba1Config, MambaConfig
from .attention import Attention
from .cache import Cache
from .grouped_mamba import GroupedMamba
from .mamba import Mamba

__all__ = ["Attention", "Cache", "GroupedMamba", "Mamba", "build_mixer"]


def build_mixer(
    config: AttentionConfig | MambaConfig | Mamba1Config, hidden_size: int
) -> Attention | GroupedMamba | Mamba:
    """The module that a plain mixer's configuration describes."""
    kinds: dict[str, type] = {"attention": Attention, "mamba": GroupedMamba, "mamba1": Mamba}
    return kinds[config.type](hidden_size, **config.model_dump(exclude={"type"}))
