"""mamba-ssm's functions for Mamba-1, its one-step update for Mamba-1 and Mamba-2, and its `Mamba`.

Layouts are upstream's, (batch, dim, seqlen). They are transposed as views, so that nothing is
copied in either layout; results lie in memory with channels last, whatever the inputs do. Upstream
makes a channel-last xz contiguous first; nothing here needs that.
"""

import importlib
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Impl
from ..causal_conv1d import causal_conv1d
from ..checks import check_shapes, check_taps
from ..precision import wide
from ..selective_scan import selective_scan
from ..selective_state_update import selective_state_update as update_op
from .causal_conv1d import check_sequences

__all__ = ["mamba_inner_fn", "selective_scan_fn", "selective_scan_ref", "selective_state_update"]


def __getattr__(name: str) -> Any:
    """`Mamba`, the module, stands floors above and is brought from there when it is asked for."""
    if name != "Mamba":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(__name__.partition(".")[0]).Mamba


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
    result = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return result if isinstance(result, Tensor) else (result[0], result[1].detach())


def selective_scan_ref(
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
    """`selective_scan_fn` by its textbook loop, on any device, as slow as upstream's of this name.

    As there, gradients flow from last_state too. Arithmetic is in float64 where u is float64.
    """
    return scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, impl="reference"
    )


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    refuse_complex(A)
    check_scan(u, delta, A, B, C, z)
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
        impl=impl,
    )
    if not isinstance(result, tuple):
        return result.transpose(1, 2)
    out, last_state = result
    return out.transpose(1, 2), last_state


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
    check_inner(
        xz, conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C
    )
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
    check_update(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
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


def check_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> None:
    """In upstream's layout, as all checks here: the op's own would speak of another."""
    check_sequences("u", u)
    batch, dim, seqlen = u.shape
    check_shapes(delta=(delta, u.shape), z=(z, u.shape), A=(A, (dim, *A.shape[-1:])))
    for name, coefficient in (("B", B), ("C", C)):
        check_coefficient(name, coefficient, A, batch, seqlen)


def check_coefficient(name: str, coefficient: Tensor, A: Tensor, batch: int, seqlen: int) -> None:
    """B or C, constant or variable."""
    (dim, state), shape = A.shape, coefficient.shape
    variable = shape in ((batch, state, seqlen), (batch, *shape[1:2], state, seqlen))
    divides = len(shape) < 4 or (shape[1] > 0 and dim % shape[1] == 0)
    if shape != A.shape and not (variable and divides):
        raise ValueError(
            f"{name} must be (dim, state) = ({dim}, {state}), (batch, state, seqlen) = "
            f"({batch}, {state}, {seqlen}), or (batch, groups, state, seqlen) with groups dividing "
            f"dim, got {tuple(shape)}"
        )


def check_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
) -> None:
    check_sequences("xz", xz)
    batch, both, seqlen = xz.shape
    if both % 2:
        raise ValueError(f"xz must be (batch, 2 dim, seqlen), got {tuple(xz.shape)}")
    dim = both // 2
    check_shapes(conv1d_weight=(conv1d_weight, (dim, 1, *conv1d_weight.shape[-1:])))
    check_taps(conv1d_weight.squeeze(1), dim)
    check_shapes(
        A=(A, (dim, *A.shape[-1:])),
        delta_proj_weight=(delta_proj_weight, (dim, *delta_proj_weight.shape[-1:])),
        out_proj_weight=(out_proj_weight, (*out_proj_weight.shape[:1], dim)),
        out_proj_bias=(out_proj_bias, (*out_proj_weight.shape[:1],)),
    )
    projected = delta_proj_weight.shape[1] + A.shape[1] * ((B is None) + (C is None))
    check_shapes(x_proj_weight=(x_proj_weight, (projected, dim)))
    for name, coefficient in (("B", B), ("C", C)):
        if coefficient is not None:
            check_coefficient(name, coefficient, A, batch, seqlen)


def check_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> None:
    if state.ndim not in (3, 4) or 0 in state.shape[1:]:
        raise ValueError(
            "state must be (batch, dim, state) or (batch, nheads, dim, state), "
            f"got {tuple(state.shape)}"
        )
    channels, states = state.shape[1:-1], state.shape[-1]
    batch = len(state) if state_batch_indices is None else len(state_batch_indices)
    tokens = batch, *channels
    check_shapes(
        x=(x, tokens),
        dt=(dt, tokens),
        A=(A, (*channels, states)),
        D=(D, channels),
        z=(z, tokens),
        dt_bias=(dt_bias, channels),
    )
    for name, coefficient in (("B", B), ("C", C)):
        shape = coefficient.shape
        groups = shape[1] if len(shape) == 3 else 1
        fits = shape in ((batch, states), (batch, groups, states))
        if not fits or groups == 0 or channels[0] % groups:
            raise ValueError(
                f"{name} must be (batch, state) = ({batch}, {states}), or (batch, ngroups, state) "
                f"with ngroups dividing {channels[0]}, got {tuple(shape)}"
            )


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
