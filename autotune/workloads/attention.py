"""Attention, against torch's own kernels and FlexAttention."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ...kernels.flash_attention import bounds_of, flash_attention
from ...kernels.flash_attention.reference import attend
from ...kernels.routing import Route
from ..peaks import Floor
from .workload import (
    Calls,
    Index,
    MissingPeer,
    SequenceWorkload,
    compiled,
    differentiable,
    normal,
    option,
    size,
)

BLOCK = 1024  # queries that the reference takes at a time

# torch's layout, (batch, heads, seqlen, head_dim)
TORCH_AXES = {name: (0, 2, 1, 3) for name in ("q", "k", "v", "out")}


@dataclass(frozen=True, kw_only=True)
class Attention(SequenceWorkload):
    op = "attention"
    per_sample = frozenset(("q", "k", "v", "dout"))

    heads: int = size(32, "query heads")
    kv_heads: int = size(8, "heads of keys and values; divides heads", divides="heads")
    head_dim: int = size(128, "channels of a head")
    causal: bool = option(True, "a query sees no later key")
    window: int | None = option(None, "keys before its own that a query sees; null: all")
    queries: int | None = option(None, "tokens that ask, the last ones; null: all", least=1)
    sequences: int = option(1, "in each sample, alike; divides seqlen", least=1, divides="seqlen")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and not self.causal:
            raise ValueError("window takes causal=true")
        if self.queries is not None and self.queries > self.seqlen:
            raise ValueError(f"queries takes at most seqlen = {self.seqlen}, got {self.queries}")
        if self.queries is not None and self.sequences > 1:
            raise ValueError("queries takes sequences=1")

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.seqlen // self.sequences

    @property
    def asking(self) -> int:
        """Queries of a sample."""
        return self.seqlen if self.queries is None else self.queries

    @property
    def sides(self) -> tuple[int, int]:
        """Keys to the left and to the right that a query sees, -1 for all."""
        return -1 if self.window is None else self.window, 0 if self.causal else -1

    @property
    def keys_seen(self) -> int:
        """Keys of a sample that some query sees."""
        if self.window is None:
            return self.seqlen
        return min(self.seqlen, self.asking + self.window)

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other, over all heads and samples with work."""
        n, asking = self.length, self.asking // self.sequences
        if not self.causal:
            seen = asking * n
        else:
            full = n if self.window is None else min(n, self.window + 1)  # the most that one sees
            first = min(n - asking + 1, full)  # what the first query sees; the next, one more
            seen = (full - first) * (full + first - 1) // 2 + (asking - full + first) * full
        return seen * self.heads * self.samples * self.sequences

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        of_q = self.batch, self.asking, self.heads, self.head_dim
        of_k = self.batch, self.seqlen, self.kv_heads, self.head_dim
        shapes = {"q": of_q, "k": of_k, "v": of_k, "dout": of_q}
        return {n: normal(generator, *s, dtype=self.torch_dtype) for n, s in shapes.items()}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        bounds = None
        if self.sequences > 1:
            numbers = torch.arange(self.seqlen, device=inputs["q"].device) // self.length
            bounds = bounds_of(numbers.expand(self.batch, -1))
        forward = partial(
            flash_attention, causal=self.causal, window_size=(self.sides[0], -1), bounds=bounds,
            route=route,
        )  # fmt: skip
        return differentiable(forward, inputs)

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        if inputs["q"].device.type != "cuda":
            return {"SDPA": partial(self.sdpa, inputs, None)}
        return {
            "SDPA cuDNN": partial(self.sdpa, inputs, SDPBackend.CUDNN_ATTENTION),
            "SDPA flash": partial(self.sdpa, inputs, SDPBackend.FLASH_ATTENTION),
            "FlexAttention": partial(self.flex, inputs),
            "torch varlen": partial(self.varlen, inputs),
        }

    def sdpa(self, inputs: dict[str, Tensor], backend: SDPBackend | None) -> Calls:
        if self.window is not None:
            raise MissingPeer("has no sliding window")
        if self.sequences > 1:
            raise MissingPeer("takes one sequence in a sample")
        grouped, causal = self.heads != self.kv_heads, self.causal and self.asking > 1
        mask = None
        if causal and self.asking < self.seqlen:  # is_causal would align the first queries
            causal, mask = False, causal_lower_right(self.asking, self.seqlen)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend else nullcontext():
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
                )

        return differentiable(forward, inputs, TORCH_AXES)

    def varlen(self, inputs: dict[str, Tensor]) -> Calls:
        """torch's flash attention of packed sequences, which it is told where to find."""
        from torch.nn.attention.varlen import varlen_attn

        if self.sequences == 1:
            raise MissingPeer("is for packed sequences")
        if self.heads != self.kv_heads:
            raise MissingPeer("is asked with as many heads of keys as of queries")
        total, device = self.samples * self.seqlen, inputs["q"].device
        places = torch.arange(0, total + 1, self.length, dtype=torch.int32, device=device)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = varlen_attn(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), places, places, self.length,
                self.length, window_size=self.sides,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out.view_as(q)

        return differentiable(forward, inputs)

    def flex(self, inputs: dict[str, Tensor]) -> Calls:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        (left, _), before = self.sides, self.seqlen - self.asking

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query = query + before
            seen = query // self.length == key // self.length
            seen = seen & (query >= key) if self.causal else seen
            return seen & (query - key <= left) if left >= 0 else seen

        mask = None
        if self.causal or self.sequences > 1:
            device = inputs["q"].device
            mask = create_block_mask(sees, None, None, self.asking, self.seqlen, device=device)
        attend_flexibly = compiled(flex_attention)
        grouped = self.heads != self.kv_heads

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_flexibly(q, k, v, block_mask=mask, enable_gqa=grouped)

        return differentiable(forward, inputs, TORCH_AXES)

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """The last sample's last head of keys and its queries, a block of queries at a time: where
        attention is causal, a block's last query sees the last key that the block is given."""
        group, last = self.heads // self.kv_heads, slice(self.samples - 1, self.samples)
        of_q: Index = (last, slice(None), slice(self.heads - group, None))
        of_k: Index = (last, slice(None), slice(self.kv_heads - 1, None))
        q, k, v = (
            cast(inputs[name][index]).requires_grad_()
            for name, index in (("q", of_q), ("k", of_k), ("v", of_k))
        )
        dout, outs = cast(inputs["dout"][of_q]), []
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
        for start, stop, seen in self.blocks():
            out, _ = attend(
                q[:, start:stop], k[:, seen], v[:, seen], *self.sides, self.head_dim**-0.5,
                0.0, None, 0.0, None, None, torch.zeros(1, dtype=torch.int64, device=q.device),
            )  # fmt: skip
            outs.append(out.detach())
            for total, grad in zip(
                sums, torch.autograd.grad(out, (q, k, v), dout[:, start:stop]), strict=True
            ):
                total += grad
        yield "out", of_q, torch.cat(outs, 1)
        for name, index, total in zip(("dq", "dk", "dv"), (of_q, of_k, of_k), sums, strict=True):
            yield name, index, total.to(q.dtype)

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """From which query to which, and the keys of their sequence, if causal up to the last."""
        asking = self.asking // self.sequences
        for first in range(0, self.asking, asking):
            for start in range(first, first + asking, BLOCK):
                stop = min(start + BLOCK, first + asking)
                behind = self.length - asking + stop if self.causal else first + self.length
                yield start, stop, slice(first, behind)

    def floor(self, direction: str) -> Floor:
        queries = self.samples * self.asking * self.heads
        of_q = queries * self.head_dim * self.itemsize
        of_k = self.samples * self.keys_seen * self.kv_heads * self.head_dim * self.itemsize
        of_lse = 4 * queries
        if direction == "forward":
            return Floor(
                bytes=2 * of_q + 2 * of_k + of_lse,
                mufu=self.pairs,
                instructions=7 * self.pairs,
                **self.products(4 * self.head_dim * self.pairs),
            )
        return Floor(
            bytes=4 * of_q + 4 * of_k + of_lse,
            mufu=2 * self.pairs,
            instructions=18 * self.pairs,
            **self.products(14 * self.head_dim * self.pairs),
        )

    def flops(self, direction: str) -> float:
        """Two products forward; five backward, of which a deterministic kernel repeats two."""
        products = {"forward": 2, "backward": 5}
        return 2 * self.head_dim * self.pairs * sum(products[p] for p in direction.split("+"))
