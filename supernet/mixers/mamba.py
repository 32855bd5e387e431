"""Mamba-1 (Gu and Dao 2023, arXiv:2312.00752), with the arguments and the state_dict of
mamba_ssm.Mamba."""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.precision import wide
from ...kernels.selective_scan.ops import (
    CHUNKS,
    selective_scan_backward_into_op,
    selective_scan_into_op,
)
from ..widths import TAPS, check_whole
from .cache import single_layer
from .scan_mixer import ScanMixer, StepProjection, StepSizes, depthwise_conv, expanded, rank_of

if TYPE_CHECKING:
    from ...autotune.workloads import Workload
    from ..device_dispatch import Layout, Run


class Mamba(ScanMixer):
    """Mamba-1, a drop-in for mamba_ssm.Mamba: same arguments, defaults, initialisation and tensors.

    d_model: width of the tokens. d_state: states per channel, at most 256 on a GPU. d_conv: taps of
    the convolution, 2 to 4. expand: channels per d_model, rounded down where it is no whole number.
    dt_rank: rank of the time step's projection; auto is d_model / 16, rounded up. dt_min, dt_max,
    dt_init ("random" or "constant"), dt_scale, dt_init_floor: initial time steps, between the first
    two. use_fast_path is taken and has no effect: there is one path. layer_idx: under which number
    `inference_params` holds the states.
    Raises ValueError where a width is not as above, or below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(d_model=d_model, d_state=d_state)
        check_whole(*TAPS, d_conv=d_conv)
        d_inner = expanded(d_model, expand)
        self.d_model, self.d_conv, self.expand = d_model, d_conv, expand
        self.d_inner, self.d_state = d_inner, d_state
        self.dt_rank = rank_of(dt_rank, d_model)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        self.conv1d = depthwise_conv(self.d_inner, d_conv, conv_bias, **where)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
        steps = StepSizes(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.dt_proj = StepProjection(self.dt_rank, self.d_inner, True, steps, **where)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        self.init_states()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        *,
        inference_params: Any = None,
        **packed: Any,
    ) -> Tensor:
        """(batch, seqlen, d_model) to the same.

        attention_mask, packed: padding and packed sequences, as `packing_of` takes them, which
        passes over what else a model hands to its attention. past_key_values: a LayerCache, whose
        tokens these follow.
        inference_params: mamba_ssm's, which holds this layer's states under its layer_idx.
        """
        if inference_params is not None:
            return self._with_inference_params(hidden_states, inference_params)
        seq_idx, cache = self.followed(
            hidden_states, attention_mask, past_key_values, use_cache, packed
        )

        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.convolve(x, seq_idx, cache)
        dt, B, C = self.split(self.x_proj(x))
        dt = F.linear(dt, self.dt_proj.weight)
        y = self.scan(x, dt, B.unsqueeze(2), C.unsqueeze(2), z, seq_idx, cache)
        return self.out_proj(y)

    def slot_layout(self, seqlen: int, dtype: torch.dtype, impl: str) -> "Layout":
        chunks = math.ceil(seqlen / CHUNKS[impl])
        return {
            "xz": ((seqlen, 2 * self.d_inner), dtype),
            "conv": ((seqlen, self.d_inner), dtype),
            "projected": ((seqlen, self.dt_rank + 2 * self.d_state), dtype),
            "dt": ((seqlen, self.d_inner), dtype),
            "y": ((seqlen, self.d_inner), dtype),
            "kept": ((chunks, self.d_state, self.d_inner), wide(dtype)),
        }

    def routed_forward(self, run: "Run", x: Tensor, out: Tensor) -> None:
        slot = run.slot
        run.linear(slot["xz"], x, self.in_proj.weight, self.in_proj.bias)
        self.convolve_into(run, slot["conv"], slot["xz"][..., : self.d_inner])
        run.linear(slot["projected"], slot["conv"], self.x_proj.weight)
        dt, _, _ = self.split(slot["projected"])
        run.linear(slot["dt"], dt, self.dt_proj.weight)
        selective_scan_into_op(slot["y"], slot["kept"], *self.scanned(run), True, run.impl)
        run.linear(out, slot["y"], self.out_proj.weight, self.out_proj.bias)

    def routed_backward(self, run: "Run", dout: Tensor, x: Tensor, dx: Tensor) -> None:
        slot = run.slot
        dy, dxz, dprojected = (run.fresh(name) for name in ("y", "xz", "projected"))
        run.linear_backward(dout, slot["y"], dy, self.out_proj.weight, self.out_proj.bias)
        ddt_low, dB, dC = self.split(dprojected)
        scanned = self.scanned(run)
        dconv, ddt, dA, dD, ddt_bias = selective_scan_backward_into_op(
            dB.unsqueeze(2), dC.unsqueeze(2), dxz[..., self.d_inner :], dy, slot["kept"],
            *scanned, True, run.impl,
        )  # fmt: skip
        dt, _, _ = self.split(slot["projected"])
        run.linear_backward(ddt, dt, ddt_low, self.dt_proj.weight)
        run.linear_backward(dprojected, slot["conv"], dconv, self.x_proj.weight, add=True)
        of_x = slice(self.d_inner)
        of_conv = self.convolve_backward(run, dxz[..., of_x], dconv, slot["xz"][..., of_x])
        run.add_gradients(
            (self.A_log, dA * scanned[2]),  # A = -exp(A_log) is its own derivative
            (self.D, dD),
            (self.dt_proj.bias, ddt_bias),
            *of_conv,
        )
        run.linear_backward(dxz, x, dx, self.in_proj.weight, self.in_proj.bias)

    def routed_parameters(self) -> tuple[Tensor | None, ...]:
        return (
            self.in_proj.weight, self.in_proj.bias, *self.conv1d.parameters(), self.x_proj.weight,
            self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight,
            self.out_proj.bias,
        )  # fmt: skip

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """The low-rank time step, B and C."""
        return projected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)

    def scanned(self, run: "Run") -> tuple[Any, ...]:
        """What the scan takes, from u to the route."""
        slot = run.slot
        _, B, C = self.split(slot["projected"])
        A, D, bias = self.rates()
        z = slot["xz"][..., self.d_inner :]
        return (
            slot["conv"], slot["dt"], A, B.unsqueeze(2), C.unsqueeze(2), D, z, bias,
            run.seq_idx, *run.tensors,
        )  # fmt: skip

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: object
    ) -> tuple[Tensor, Tensor]:
        """mamba_ssm's states, zeros: the convolution's (batch, d_inner, d_conv), the last inputs,
        and the scan's (batch, d_inner, d_state)."""
        conv, dt = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, conv.shape[-1], dtype=dtype),
            dt.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mamba_ssm's step: one token (batch, 1, d_model) after the states, updated in place."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token at a time, got {hidden_states.shape[1]}")
        layer = single_layer(hidden_states)
        layer.states = {"conv": conv_state.transpose(1, 2), "ssm": ssm_state}
        return self(hidden_states, past_key_values=layer), conv_state, ssm_state

    def _with_inference_params(self, hidden_states: Tensor, params: Any) -> Tensor:
        if self.layer_idx is None:
            raise ValueError("inference_params goes with a mixer made with layer_idx=")
        states = params.key_value_memory_dict
        if self.layer_idx not in states:
            batch = len(hidden_states)
            states[self.layer_idx] = self.allocate_inference_cache(batch, params.max_seqlen)
        conv_state, ssm_state = states[self.layer_idx]
        if params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        layer = single_layer(hidden_states)
        out = self(hidden_states, past_key_values=layer)
        conv_state[:, :, 1:] = layer.states["conv"].transpose(1, 2)
        ssm_state.copy_(layer.states["ssm"])
        return out

    def workloads(self, *, seqlen: int, decoding: bool = False, **shape: Any) -> "list[Workload]":
        """What a forward pass runs, or the last token's step. shape: batch and dtype."""
        return self.scan_workloads(1, seqlen, decoding, **shape)
