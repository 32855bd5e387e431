"""Mamba-1 in Apriel's form (Wang et al. 2024, "The Mamba in the Llama", arXiv:2408.15237).

x and B have as few heads as the keys and values of grouped-query attention, and the time step has a
projection of its own.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.precision import wide
from ...kernels.repeat_groups import repeat_groups
from ...kernels.repeat_groups.ops import repeat_groups_into_op, sum_groups_into_op
from ...kernels.selective_scan.ops import (
    CHUNKS,
    selective_scan_backward_into_op,
    selective_scan_into_op,
)
from ..widths import TAPS, check_groups, check_whole
from .scan_mixer import ScanMixer, StepProjection, StepSizes, depthwise_conv, rank_of

if TYPE_CHECKING:
    from ...autotune.workloads import Workload
    from ..device_dispatch import Layout, Run


class GroupedMamba(ScanMixer):
    """Mamba in Apriel's grouped form; tensors are named as in its checkpoints.

    hidden_size: width of the tokens. d_inner: channels of z and C. d_xb: channels of x and B
    (defaults to d_inner), repeated to d_inner in groups of state_size channels: d_inner is a
    multiple of d_xb, and that of state_size. state_size: states per channel, and channels per
    group. repeat_kv_before_conv: x is repeated before its convolution, which then has d_inner
    channels, or after it, when it has d_xb. The other arguments, and the errors, are Mamba's.

    Apriel adds the bias of dt_proj twice, in the projection and in the scan; so does this class,
    and checkpoints depend on it.
    """

    def __init__(
        self,
        hidden_size: int,
        d_inner: int,
        d_xb: int | None = None,
        state_size: int = 16,
        dt_rank: int | str = "auto",
        d_conv: int = 4,
        repeat_kv_before_conv: bool = True,
        conv_bias: bool = True,
        dt_proj_bias: bool = True,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_xb = d_inner if d_xb is None else d_xb
        check_whole(hidden_size=hidden_size, d_inner=d_inner, d_xb=d_xb, state_size=state_size)
        check_whole(*TAPS, d_conv=d_conv)
        check_groups(d_inner, d_xb, state_size)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_inner, self.d_xb, self.d_state = d_inner, d_xb, state_size
        self.dt_rank = rank_of(dt_rank, hidden_size)
        self.repeat_kv_before_conv = repeat_kv_before_conv
        widths = 2 * self.d_inner + 2 * self.d_xb
        self.in_proj = nn.Linear(hidden_size, widths, bias=bias, **where)
        self.dt_in_proj = nn.Linear(hidden_size, self.dt_rank, bias=bias, **where)
        steps = StepSizes(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.dt_proj = StepProjection(self.dt_rank, d_inner, dt_proj_bias, steps, **where)
        channels = self.d_inner if repeat_kv_before_conv else self.d_xb
        self.conv1d = depthwise_conv(channels, d_conv, conv_bias, **where)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, state_size, device=device))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, hidden_size, bias=bias, **where)
        self.init_states()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        **packed: Any,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same; the arguments are those of Mamba."""
        seq_idx, cache = self.followed(
            hidden_states, attention_mask, past_key_values, use_cache, packed
        )

        z, x, B, C = self.split(self.in_proj(hidden_states))
        dt = self.dt_proj(self.dt_in_proj(hidden_states))
        repeats = self.d_inner // self.d_xb
        if self.repeat_kv_before_conv:
            x = self.convolve(repeat_groups(x, self.d_state, repeats), seq_idx, cache)
        else:
            x = repeat_groups(self.convolve(x, seq_idx, cache), self.d_state, repeats)
        return self.out_proj(self.scan(x, dt, B, C, z, seq_idx, cache))

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, x, B and C; of the last two a group of states each.

        The scan reads group d · groups / d_inner for channel d, so B needs no repeating.
        """
        widths = (self.d_inner, self.d_xb, self.d_xb, self.d_inner)
        z, x, B, C = projected.split(widths, dim=-1)
        return z, x, B.unflatten(-1, (-1, self.d_state)), C.unflatten(-1, (-1, self.d_state))

    def slot_layout(self, seqlen: int, dtype: torch.dtype, impl: str) -> "Layout":
        """Repeated channels are not kept: the backward pass repeats them again."""
        chunks = math.ceil(seqlen / CHUNKS[impl])
        return {
            "projected": ((seqlen, self.in_proj.out_features), dtype),
            "low": ((seqlen, self.dt_rank), dtype),
            "dt": ((seqlen, self.d_inner), dtype),
            "conv": ((seqlen, self.conv1d.out_channels), dtype),
            "y": ((seqlen, self.d_inner), dtype),
            "kept": ((chunks, self.d_state, self.d_inner), wide(dtype)),
        }

    def routed_forward(self, run: "Run", x: Tensor, out: Tensor) -> None:
        slot = run.slot
        run.linear(slot["projected"], x, self.in_proj.weight, self.in_proj.bias)
        run.linear(slot["low"], x, self.dt_in_proj.weight, self.dt_in_proj.bias)
        run.linear(slot["dt"], slot["low"], self.dt_proj.weight, self.dt_proj.bias)
        self.convolve_into(run, slot["conv"], self.convolved(run))
        selective_scan_into_op(slot["y"], slot["kept"], *self.scanned(run), True, run.impl)
        run.linear(out, slot["y"], self.out_proj.weight, self.out_proj.bias)

    def routed_backward(self, run: "Run", dout: Tensor, x: Tensor, dx: Tensor) -> None:
        slot = run.slot
        dy, dprojected, dlow = (run.fresh(name) for name in ("y", "projected", "low"))
        dz, dx_heads, dB, dC = self.split(dprojected)
        run.linear_backward(dout, slot["y"], dy, self.out_proj.weight, self.out_proj.bias)
        scanned = self.scanned(run)
        du, ddt, dA, dD, dbias = selective_scan_backward_into_op(
            dB, dC, dz, dy, slot["kept"], *scanned, True, run.impl
        )
        run.linear_backward(ddt, slot["low"], dlow, self.dt_proj.weight)
        if self.repeat_kv_before_conv:
            drepeated = dy  # which is no longer needed
            of_conv = self.convolve_backward(run, drepeated, du, self.convolved(run))
            sum_groups_into_op(dx_heads, drepeated, self.d_state, *run.tensors, run.impl)
        else:
            dconv = run.fresh("conv")
            sum_groups_into_op(dconv, du, self.d_state, *run.tensors, run.impl)
            of_conv = self.convolve_backward(run, dx_heads, dconv, self.convolved(run))
        run.add_gradients(
            (self.A_log, dA * scanned[2]),  # A = -exp(A_log) is its own derivative
            (self.D, dD),
            (self.dt_proj.bias, 2 * dbias),  # the scan's, and dt_proj's, which is the same
            *of_conv,
        )
        run.linear_backward(dprojected, x, dx, self.in_proj.weight, self.in_proj.bias)
        run.linear_backward(dlow, x, dx, self.dt_in_proj.weight, self.dt_in_proj.bias, add=True)

    def routed_parameters(self) -> tuple[Tensor | None, ...]:
        return (
            self.in_proj.weight, self.in_proj.bias, self.dt_in_proj.weight, self.dt_in_proj.bias,
            *self.conv1d.parameters(), self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D,
            self.out_proj.weight, self.out_proj.bias,
        )  # fmt: skip

    def convolved(self, run: "Run") -> Tensor:
        """What the convolution takes."""
        _, x, _, _ = self.split(run.slot["projected"])
        return self.repeated(run, x) if self.repeat_kv_before_conv else x

    def scanned(self, run: "Run") -> tuple[Any, ...]:
        """What the scan takes, from u to the route."""
        slot = run.slot
        z, _, B, C = self.split(slot["projected"])
        u = slot["conv"] if self.repeat_kv_before_conv else self.repeated(run, slot["conv"])
        A, D, bias = self.rates()
        return u, slot["dt"], A, B, C, D, z, bias, run.seq_idx, *run.tensors

    def repeated(self, run: "Run", x: Tensor) -> Tensor:
        out = run.fresh("y")
        repeat_groups_into_op(out, x, self.d_state, *run.tensors, run.impl)
        return out

    def workloads(self, *, seqlen: int, decoding: bool = False, **shape: Any) -> "list[Workload]":
        """What a forward pass runs, or the last token's step. shape: batch and dtype."""
        from ...autotune.workloads import RepeatGroups

        others = self.scan_workloads(self.d_xb // self.d_state, seqlen, decoding, **shape)
        repeats, tokens = self.d_inner // self.d_xb, 1 if decoding else seqlen
        return [
            *others,
            RepeatGroups(
                dim=self.d_xb, group=self.d_state, repeats=repeats, seqlen=tokens, **shape
            ),
        ]
