"""Grouped-query attention with rotary positions (Ainslie et al. 2023; Su et al. 2021), as in
Mistral."""

import torch
from torch import Tensor, nn

from ...kernels.flash_attention import flash_attention
from ...kernels.rotary import rotary, rotary_angles
from .packing import packing_of, refuse_cache


class Attention(nn.Module):
    """Causal softmax attention.

    hidden_size: width of the tokens. heads, kv_heads (defaults to heads), head_dim (defaults to
    hidden_size / heads): its heads; kv_heads divides heads. window_size: how many tokens a query
    sees, itself included; None means all before it. rope_theta: base of the rotary angles; None
    means no positions. Tensors are named as in transformers' Mistral.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
    ):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or hidden_size // heads
        self.window_size, self.rope_theta = window_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden_size, bias=False)

    def preprocess(self, seqlen: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Rotary angles: the same in every layer, so computed once per forward.

        Rotary attention sees distances alone, so packed sequences need no positions of their own.
        """
        if self.rope_theta is None:
            return {}
        positions = torch.arange(seqlen, device=device)
        return {"angles": rotary_angles(positions, self.head_dim, self.rope_theta)}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        **_: object,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same; attention_mask is a padding mask."""
        refuse_cache(past_key_values, use_cache)
        batch, seqlen, _width = hidden_states.shape
        packing = packing_of(batch, seqlen, attention_mask, cu_seqlens)
        if angles is None:
            angles = self.preprocess(seqlen, hidden_states.device).get("angles")

        q = self.q_proj(hidden_states).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (self.kv_heads, self.head_dim))
        if angles is not None:
            q, k = rotary(q, *angles), rotary(k, *angles)
        window = (-1 if self.window_size is None else self.window_size - 1, -1)
        bounds = None
        if packing is not None:
            q, k, v = packing.pack(q), packing.pack(k), packing.pack(v)
            bounds = packing.cu_seqlens
        out = flash_attention(q, k, v, causal=True, window_size=window, cu_seqlens_q=bounds)
        assert isinstance(out, Tensor)
        if packing is not None:
            out = packing.unpack(out, batch, seqlen)
        return self.o_proj(out.flatten(-2))

    def flops_per_token(self, seqlen: int) -> float:
        """Forward FLOPs, two per multiply-add, averaged over the places of a sequence."""
        weights = sum(p.numel() for p in self.parameters())
        window = min(self.window_size or seqlen, seqlen)
        keys = window * (seqlen - window) + window * (window + 1) / 2  # summed over the queries
        return 2 * weights + 4 * self.heads * self.head_dim * keys / seqlen
