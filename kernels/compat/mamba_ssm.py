"""mamba-ssm's functions for Mamba-1, and its one-step update for Mamba-1 and Mamba-2.

Layouts are upstream's, (batch, dim, seqlen). They are transposed as views, so that nothing is
copied in either layout; results lie in memory with channels last, whatever the inputs do. Upstream
makes a channel-last xz contiguous first; nothing here needs that.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d import causal_conv1d
from ..precision import wide
from ..selective_scan import selective_scan
from ..selective_state_update import selective_state_update as update_op

__all__ = ["mamba_inner_fn", "selective_scan_fn", "selective_state_update"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, as `tossup.selective_scan`.

    u, delta, z: (batch, dim, seqlen), any strides. A: (dim, state), real. D, delta_bias: (dim,).
    B, C: each constant, (dim, state), or variable, (batch, state, seqlen) or (batch, groups,
        state, seqlen).
    delta_softplus: pass delta + delta_bias through softplus.
    return_last_state: return (out, last_state) instead of out, last_state (batch, dim, state) in
        float32 (float64 where u is float64). No gradient flows from it, as upstream.

    Returns out, (batch, dim, seqlen) in u's dtype. Raises NotImplementedError where A is complex,
    and ValueError where a shape or a dtype is not as above.
    """
    refuse_complex(A)
    result = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        time_first(B),
        time_first(C),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus=delta_softplus,
        return_final_state=return_last_state,
    )
    if not isinstance(result, tuple):
        return result.transpose(1, 2)
    out, last_state = result
    return out.transpose(1, 2), last_state.detach()


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba-1 block between its input projection and its residual.

    xz: (batch, 2 dim, seqlen), the input and the gate. conv1d_weight: (dim, 1, width).
    conv1d_bias, D, delta_bias: (dim,). x_proj_weight: (rank + state for each of B and C that is
    None, dim), in the order delta, B, C. delta_proj_weight: (dim, rank). out_proj_weight: (hidden,
    dim). out_proj_bias: (hidden,). A: (dim, state), real.
    B, C: as in `selective_scan_fn`; None projects them from the convolved x.
    B_proj_bias, C_proj_bias: (state,), added to a projected B or C.
    b_rms_weight, c_rms_weight, dt_rms_weight: (state,), (state,) and (dim,): RMS norms of B, C and
        delta before the scan, with b_c_dt_rms_eps, in float32. Upstream leaves the norms out of
        its backward; here they are differentiated, and their weights have gradients.
    checkpoint_lvl: 0 or 1. Upstream recomputes the convolved x and delta in backward at level 1;
        our ops keep both at either level.

    Returns (batch, seqlen, hidden). All tensors have gradients. Raises NotImplementedError where A
    is complex, and ValueError where a shape or an option is not as above.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    refuse_complex(A)
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x = cast(Tensor, causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu"))
    projected = F.linear(x, x_proj_weight)  # (batch, seqlen, rank + state + state)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if B is None:
        B = shifted(projected[..., rank : rank + state], B_proj_bias).unsqueeze(2)
    else:
        B = time_first(B)
    if C is None:
        C = shifted(projected[..., -state:], C_proj_bias).unsqueeze(2)
    else:
        C = time_first(C)
    for name, coefficient, weight in (("B", B, b_rms_weight), ("C", C, c_rms_weight)):
        if weight is not None and coefficient.ndim == 2:
            raise ValueError(
                f"{name.lower()}_rms_weight must be None for a constant {name}, got a weight"
            )
    y = selective_scan(
        x,
        normed(delta, dt_rms_weight, b_c_dt_rms_eps),
        A,
        normed(B, b_rms_weight, b_c_dt_rms_eps),
        normed(C, c_rms_weight, b_c_dt_rms_eps),
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
    )
    if out_proj_bias is not None:  # transformers hands it over in float32 whatever the weight is
        out_proj_bias = out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(cast(Tensor, y), out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan on a state that is updated in place.

    state: (batch, dim, state) or (batch, nheads, dim, state).
    x, dt, z: (batch, dim) or (batch, nheads, dim). D, dt_bias: (dim,) or (nheads, dim).
    A: (dim, state) or (nheads, dim, state). B, C: (batch, state) or (batch, ngroups, state),
        ngroups dividing nheads.
    state_batch_indices: integers (batch,): the entry of state that each sample has, distinct; a
        negative one is padding, whose output is zero. With it the entries are gathered, updated and
        scattered.

    Returns out, like x. Without gradients. A state whose heads and channels do not lie evenly in
    memory is copied, updated and copied back. Raises ValueError where a shape is not as above.
    """
    shape = x.shape
    if state.ndim == 4:
        x, dt, A = x.flatten(1), dt.flatten(1), A.flatten(0, 1)
        D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
        z = None if z is None else z.flatten(1)
        rows = state.flatten(1, 2)
    else:
        rows = state
    B, C = (t.unsqueeze(1) if t.ndim == 2 else t for t in (B, C))

    if state_batch_indices is None:
        out = update_op(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
    else:
        valid, entries = state_batch_indices >= 0, state_batch_indices.clamp(min=0).long()
        before = rows.index_select(0, entries)
        after = before.clone()
        out = update_op(after, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
        out = out.masked_fill(~valid.unsqueeze(1), 0)
        after = torch.where(valid[:, None, None], after, before)
        # Padding writes once more what the first sample writes that is none, so that it needs no
        # place of its own. The host never learns which one that is.
        first = valid.int().argmax()
        source = torch.where(valid, torch.arange(len(valid), device=valid.device), first)
        rows.index_copy_(0, entries[source], after[source])
    if rows.data_ptr() != state.data_ptr():  # the two could not be one view
        state.copy_(rows.view(state.shape))
    return out.view(shape)


def refuse_complex(A: Tensor) -> None:
    if A.is_complex():
        raise NotImplementedError(
            f"A must be real, got {A.dtype}: the complex scan of S4D is not implemented"
        )


def time_first(coefficient: Tensor) -> Tensor:
    """B or C from upstream's layouts to (batch, seqlen, groups, state), or as it is if constant."""
    if coefficient.ndim == 3:
        coefficient = coefficient.unsqueeze(1)
    return coefficient if coefficient.ndim == 2 else coefficient.movedim(-1, 1)


def shifted(projected: Tensor, bias: Tensor | None) -> Tensor:
    return projected if bias is None else projected + bias.to(projected.dtype)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x over its root mean square along the last dim, times weight."""
    if weight is None:
        return x
    precise = x.to(wide(x.dtype))
    scale = (precise.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (precise * scale * weight).to(x.dtype)
