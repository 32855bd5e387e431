"""Grouped-query attention with rotary positions (Ainslie et al. 2023; Su et al. 2021), as in
Mistral."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.flash_attention import flash_attention
from ...kernels.flash_attention.ops import flash_attention_backward_op, flash_attention_into_op
from ...kernels.precision import wide
from ...kernels.rotary import rotary, rotary_angles
from ...kernels.rotary.ops import rotary_in_place_op
from ..widths import check_heads, check_rotation, check_whole, head_dim_of
from .cache import LayerCache, cache_of
from .packing import packing_of
from .products import products_of

if TYPE_CHECKING:
    from ...autotune.workloads import Workload
    from ..device_dispatch import Layout, Run


class Attention(nn.Module):
    """Causal softmax attention.

    hidden_size: width of the tokens. heads, kv_heads (defaults to heads), head_dim (defaults to
    hidden_size / heads): its heads; kv_heads divides heads, and heads divides hidden_size unless
    head_dim is given, which is even where there are positions, and at most 256 on a GPU.
    window_size: how many tokens a query sees, itself included, 1 or more; None means all before it.
    rope_theta: base of the rotary angles; None means no positions. device, dtype: of the
    parameters, which are named as in transformers' Mistral.
    Raises ValueError where a width is not as above.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_whole(hidden_size=hidden_size, heads=heads, kv_heads=kv_heads)
        check_heads(heads, kv_heads)
        head_dim = head_dim_of(hidden_size, heads) if head_dim is None else head_dim
        check_whole(head_dim=head_dim)
        check_rotation(head_dim, rope_theta)
        if window_size is not None:
            check_whole(window_size=window_size)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window_size, self.rope_theta = window_size, rope_theta
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.q_proj = linear(hidden_size, self.heads * self.head_dim)
        self.k_proj = linear(hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = linear(hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, hidden_size)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as those that were made on the meta device have to be."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            layer.reset_parameters()

    def preprocess(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Rotary angles: the same in every layer, so computed once per forward.

        positions: (seqlen,) or (batch, seqlen). Rotary attention sees distances alone, so packed
        sequences need no positions of their own.
        """
        if self.rope_theta is None:
            return {}
        return {"angles": rotary_angles(positions, self.head_dim, self.rope_theta)}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        **packed: Any,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same.

        attention_mask, packed: padding and packed sequences, as `packing_of` takes them, which
        passes over what else a model hands to its attention. past_key_values: a LayerCache, whose
        tokens these follow.
        """
        cache = cache_of(self, past_key_values, use_cache, attention_mask, packed)
        packing = None if cache else packing_of(hidden_states, attention_mask, self.left, **packed)
        if angles is None:
            places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            angles = self.preprocess(cache.step.positions if cache else places).get("angles")

        q = self.q_proj(hidden_states).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (self.kv_heads, self.head_dim))
        if angles is not None:
            q, k = rotary(q, *angles), rotary(k, *angles)
        if cache is not None:
            out = self.attend_behind(cache, q, k, v)
        else:
            out = self.attend(q, k, v, bounds=packing.bounds if packing else None)
        return self.o_proj(out.flatten(-2))

    @property
    def left(self) -> int:
        """How many tokens before its own a query sees; -1 is all."""
        return -1 if self.window_size is None else self.window_size - 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **packed: Any) -> Tensor:
        out = flash_attention(q, k, v, causal=True, window_size=(self.left, -1), **packed)
        assert isinstance(out, Tensor)
        return out

    def attend_behind(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a step's queries to its own keys and to those in the cache."""
        step = cache.step
        k, v = cache.append("k", k), cache.append("v", v)
        if step.cu_seqlens_q is None:
            return self.attend(q, k[:, : step.length], v[:, : step.length])
        out = self.attend(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            cu_seqlens_q=step.cu_seqlens_q,
            cu_seqlens_k=step.cu_seqlens_k,
            max_seqlen_q=q.shape[1],
            max_seqlen_k=step.length,
        ).view_as(q)
        if step.seq_idx is None:
            return out
        return out.masked_fill(step.seq_idx[..., None, None] == 0, 0)  # what padding sees is noise

    def slot_layout(self, seqlen: int, dtype: torch.dtype, impl: str) -> "Layout":
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": ((seqlen, queries), dtype),
            "k": ((seqlen, keys), dtype),
            "v": ((seqlen, keys), dtype),
            "out": ((seqlen, queries), dtype),
            "lse": ((self.heads, seqlen), wide(dtype)),
        }

    def routed_forward(self, run: "Run", x: Tensor, out: Tensor) -> None:
        slot = run.slot
        for name, layer in self.projections():
            run.linear(slot[name], x, layer.weight)
        q, k, v, attended = self.heads_of(slot["q"], slot["k"], slot["v"], slot["out"])
        self.rotate(run, q, k)
        flash_attention_into_op(
            attended, slot["lse"], q, k, v, self.left, 0, self.head_dim**-0.5, run.bounds,
            *run.tensors, run.impl,
        )  # fmt: skip
        run.linear(out, slot["out"], self.o_proj.weight)

    def routed_backward(self, run: "Run", dout: Tensor, x: Tensor, dx: Tensor) -> None:
        slot = run.slot
        dattended = run.fresh("out")
        run.linear_backward(dout, slot["out"], dattended, self.o_proj.weight)
        q, k, v, attended, d = self.heads_of(
            slot["q"], slot["k"], slot["v"], slot["out"], dattended
        )
        dq, dk, dv = flash_attention_backward_op(
            d, None, q, k, v, attended, slot["lse"], self.left, 0, self.head_dim**-0.5,
            0.0, None, 0.0, None, None, None, None, None, run.bounds, *run.tensors, run.impl,
        )  # fmt: skip
        self.rotate(run, dq, dk, back=True)
        gradients = dq.flatten(-2), dk.flatten(-2), dv.flatten(-2)
        for (name, layer), gradient in zip(self.projections(), gradients, strict=True):
            run.linear_backward(gradient, x, dx, layer.weight, add=name != "q")

    def routed_parameters(self) -> tuple[Tensor, ...]:
        layers = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return tuple(layer.weight for layer in layers)

    def projections(self) -> tuple[tuple[str, nn.Linear], ...]:
        return ("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj)

    def heads_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.unflatten(-1, (-1, self.head_dim)) for tensor in tensors)

    def rotate(self, run: "Run", *tensors: Tensor, back: bool = False) -> None:
        """Turn queries and keys in place; back is by the opposite angles."""
        if self.rope_theta is not None:
            cos, sin = run.extra["angles"]
            sin = -sin if back else sin
            for tensor in tensors:
                rotary_in_place_op(tensor, cos, sin, False, *run.tensors, run.impl)

    def workloads(self, *, seqlen: int, decoding: bool = False, **shape: Any) -> "list[Workload]":
        """What a forward pass runs, or the last token's step. shape: batch and dtype."""
        from ...autotune.workloads import Attention as Attend
        from ...autotune.workloads import Rotary

        attend = Attend(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, seqlen=seqlen,
            window=None if self.window_size is None else self.left,
            queries=1 if decoding else None, **shape,
        )  # fmt: skip
        shape["seqlen"] = 1 if decoding else seqlen
        turned = () if self.rope_theta is None else (self.heads, self.kv_heads)
        rotations = [Rotary(heads=heads, head_dim=self.head_dim, **shape) for heads in turned]
        return [*products_of(self, **shape), *rotations, attend]

    def flops_per_token(self, seqlen: int) -> float:
        """Forward FLOPs, two per multiply-add, averaged over the places of a sequence."""
        weights = sum(p.numel() for p in self.parameters())
        window = min(self.window_size or seqlen, seqlen)
        keys = window * (seqlen - window) + window * (window + 1) / 2  # summed over the queries
        return 2 * weights + 4 * self.heads * self.head_dim * keys / seqlen
