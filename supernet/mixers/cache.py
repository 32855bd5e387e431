"""What a model keeps of the tokens so far, so that the next ones cost one step.

Attention keeps its keys and values, Mamba the state of its scan and the last inputs of its
convolution. Sequences of different lengths grow together, padded on the left: a row's padding is
there in its keys and values, and nothing looks at it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import PACKED_KWARGS


@dataclass(frozen=True)
class Step:
    """The tokens of one forward, past … length - 1 of every row, as the mixers' ops take them.

    positions: (seqlen,) or (batch, seqlen), counted from a row's first token; 0 in its padding.
    seq_idx: (batch, seqlen) int32, 0 in padding and 1 after it; None where there is no padding
    among these tokens.
    cu_seqlens_q, cu_seqlens_k: int32 (2 · batch + 1,), where the queries (batch, seqlen) and the
    keys (batch, max_length), laid flat, begin and end; None where no row has padding. Rows take
    turns with what lies between them, so that the bounds are sums and nothing is moved.
    """

    past: int
    length: int
    positions: Tensor
    seq_idx: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class Cache:
    """The memory of a model's layers, for a batch of sequences that grow together.

    layers: how many. max_length: how many tokens a row has room for, padding included.
    attention_mask: (batch, seqlen), of the tokens to come first; zeros, on the left, are padding.
    Call `extend` before each forward. A model does so for its own.
    Raises ValueError where the mask pads anything but the left, or a whole row.
    """

    def __init__(self, layers: int, max_length: int, attention_mask: Tensor | None = None):
        self.max_length = max_length
        self.layers = [LayerCache(self) for _ in range(layers)]
        self.padding: Tensor | None = None  # (batch,), how many tokens of each row
        self.longest_padding = 0
        self._step: Step | None = None
        if attention_mask is not None:
            mask = attention_mask.bool()
            if mask.ndim != 2 or not mask[:, -1:].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
                raise ValueError(
                    "attention_mask must be (batch, seqlen), in each row zeros and then at least "
                    "one 1: prompts are padded on the left"
                )
            self.padding = (~mask).sum(1)
            self.longest_padding = int(self.padding.max())
            if self.longest_padding == 0:
                self.padding = None

    @property
    def length(self) -> int:
        """How many tokens each row has, padding included."""
        return self._step.length if self._step else 0

    @property
    def step(self) -> Step:
        if self._step is None:
            raise ValueError("a cache takes extend(seqlen, device) before a mixer takes the cache")
        return self._step

    def extend(self, seqlen: int, device: torch.device) -> Step:
        """Describe the next `seqlen` tokens of every row.

        Nothing is read back from the device. Raises ValueError where there is no room for them, or
        gradients are wanted: a cache is overwritten in place.
        """
        past, length = self.length, self.length + seqlen
        if length > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, got {length}")
        if torch.is_grad_enabled():
            raise ValueError("a cache goes without gradients: call the model under torch.no_grad()")
        places = torch.arange(past, length, device=device)
        if self.padding is None:
            self._step = Step(past, length, places)
            return self._step
        positions = places - self.padding[:, None]
        rows = torch.arange(len(self.padding), device=device)
        self._step = Step(
            past,
            length,
            positions.clamp(min=0),
            (positions >= 0).int() if past < self.longest_padding else None,
            bounds(rows * seqlen + (self.padding - past).clamp(0, seqlen), (rows + 1) * seqlen),
            bounds(
                rows * self.max_length + self.padding.clamp(max=length),
                rows * self.max_length + length,
            ),
        )
        return self._step


class LayerCache:
    """One layer's share of a cache. It belongs to the first mixer that takes it."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.owner: nn.Module | None = None
        self.states: dict[str, Tensor] = {}

    @property
    def step(self) -> Step:
        return self.cache.step

    def append(self, name: str, x: Tensor) -> Tensor:
        """Put x (batch, seqlen, …) after what there is. Returns all, (batch, max_length, …)."""
        if name not in self.states:
            self.states[name] = x.new_empty((len(x), self.cache.max_length, *x.shape[2:]))
        self.states[name][:, self.step.past : self.step.length] = x
        return self.states[name]

    def keep(self, name: str, state: Tensor) -> None:
        """Keep a state (batch, …) after the step; rows that are padding so far keep zeros."""
        if self.step.seq_idx is not None:
            padded = self.step.seq_idx[:, -1] == 0
            state = state.masked_fill(padded.view(-1, *[1] * (state.ndim - 1)), 0)
        self.states[name] = state

    def updates(self, name: str) -> bool:
        """Whether the step is one token after a kept state, which an update takes in place."""
        one = self.step.length - self.step.past == 1
        return one and self.step.seq_idx is None and name in self.states


def bounds(begins: Tensor, ends: Tensor) -> Tensor:
    return F.pad(torch.stack((begins, ends), 1).flatten(), (1, 0)).int()


def single_layer(x: Tensor) -> LayerCache:
    """A cache of one layer for one forward of x (batch, seqlen, …)."""
    cache = Cache(1, x.shape[1])
    cache.extend(x.shape[1], x.device)
    return cache.layers[0]


def cache_of(
    mixer: nn.Module,
    past_key_values: object,
    use_cache: bool,
    attention_mask: Tensor | None,
    packed: Mapping[str, Any],
) -> LayerCache | None:
    """The cache that a mixer's forward was given. Raises where it cannot be this mixer's."""
    if past_key_values is None and not use_cache:
        return None
    if not isinstance(past_key_values, LayerCache):
        got = "use_cache=True" if past_key_values is None else type(past_key_values).__name__
        raise NotImplementedError(
            f"this mixer keeps no cache but tossup's own, of SupernetModel.generate, got {got}; "
            "call it with use_cache=False and past_key_values=None"
        )
    told = [name for name in PACKED_KWARGS if packed.get(name) is not None]
    if attention_mask is not None or told:
        name = told[0] if told else "attention_mask"
        raise ValueError(f"a cache knows its padding, and takes no packed sequences: got {name}")
    if past_key_values.owner not in (None, mixer):
        raise ValueError("a layer's cache belongs to one mixer, got another mixer's")
    past_key_values.owner = mixer
    return past_key_values
