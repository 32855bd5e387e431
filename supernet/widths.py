"""What a mixer's widths have to be, as its constructor and its configuration ask alike.

Each raises ConfigError, a ValueError, which names the argument.
"""

import math
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

TAPS = 2, 4  # of the convolution, at least and at most


def check_whole(least: int = 1, most: int | None = None, **widths: Any) -> None:
    """Every width is a whole number of that size."""
    for name, width in widths.items():
        whole = isinstance(width, Integral) and not isinstance(width, bool)
        if not whole or width < least or (most is not None and width > most):
            takes = f"{least} or more" if most is None else f"{least} to {most}"
            raise ConfigError(f"{name} takes a whole number, {takes}, got {width!r}")


def check_heads(heads: int, kv_heads: int) -> None:
    """Query heads share the heads of keys and values evenly."""
    if heads % kv_heads:
        raise ConfigError(f"kv_heads must divide heads ({heads}), got {kv_heads}")


def head_dim_of(hidden_size: int, heads: int) -> int:
    """The channels of a head where nobody says how many."""
    if hidden_size % heads:
        raise ConfigError(
            f"heads must divide hidden_size ({hidden_size}) where head_dim is not given, "
            f"got {heads}"
        )
    return hidden_size // heads


def check_rotation(head_dim: int, rope_theta: float | None) -> None:
    """Rotary positions turn the channels of a head in pairs."""
    if rope_theta is None:
        return
    if not (isinstance(rope_theta, Real) and 0 < rope_theta < math.inf):
        raise ConfigError(f"rope_theta takes a positive number, or none, got {rope_theta!r}")
    if head_dim % 2:
        raise ConfigError(
            f"head_dim must be even where rope_theta is given, got {head_dim}; "
            "rope_theta of null, or None, means no positions"
        )


def check_groups(d_inner: int, d_xb: int, state_size: int) -> None:
    """Grouped Mamba's channels are groups of as many as states, each repeated evenly."""
    if d_xb % state_size:
        raise ConfigError(f"d_xb must be a multiple of state_size ({state_size}), got {d_xb}")
    if d_inner % d_xb:
        raise ConfigError(f"d_inner must be a multiple of d_xb ({d_xb}), got {d_inner}")
