"""Mamba-1 mixers (Gu and Dao 2023, arXiv:2312.00752).

`Mamba` takes the arguments and the state_dict of mamba_ssm.Mamba. `GroupedMamba` is Apriel's form
(Wang et al. 2024, "The Mamba in the Llama", arXiv:2408.15237): x and B have as few heads as the
keys and values of grouped-query attention, and the time step has a projection of its own.
"""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.causal_conv1d import causal_conv1d
from ...kernels.causal_conv1d.ops import causal_conv1d_backward_into_op, causal_conv1d_into_op
from ...kernels.causal_conv1d_update import causal_conv1d_update
from ...kernels.precision import wide
from ...kernels.repeat_groups import repeat_groups
from ...kernels.repeat_groups.ops import repeat_groups_into_op, sum_groups_into_op
from ...kernels.selective_scan import selective_scan
from ...kernels.selective_scan.ops import (
    CHUNKS,
    selective_scan_backward_into_op,
    selective_scan_into_op,
)
from ...kernels.selective_state_update import selective_state_update
from ..widths import TAPS, check_groups, check_whole
from .cache import LayerCache, cache_of, single_layer
from .packing import packing_of
from .products import products_of

if TYPE_CHECKING:
    from ...autotune.workloads import Workload
    from ..device_dispatch import Layout, Run


# What mamba_ssm tells optimizers and initialisers that are not its own
MARKS = {"A_log": "_no_weight_decay", "D": "_no_weight_decay", "dt_proj.bias": "_no_reinit"}


class StepSizes(NamedTuple):
    """How step sizes begin. init: of the weights, "random" or "constant"; scale: a factor on them.

    softplus(bias) is log-uniform from least to most, and at least floor.
    """

    least: float
    most: float
    init: str
    scale: float
    floor: float


class StepProjection(nn.Linear):
    """The projection to step sizes, a Linear that begins in its own way."""

    def __init__(self, rank: int, channels: int, bias: bool, steps: StepSizes, **where: Any):
        if steps.init not in ("random", "constant"):
            raise ValueError(f"dt_init takes random or constant, got {steps.init!r}")
        if not 0 < steps.least <= steps.most:
            raise ValueError(
                f"dt_min takes a positive number, dt_max ({steps.most}) at most, got {steps.least}"
            )
        self.steps = steps  # which Linear's constructor asks for, by reset_parameters
        super().__init__(rank, channels, bias=bias, **where)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A weight that keeps variance, and a bias whose softplus is as StepSizes has it."""
        least, most, init, scale, floor = self.steps
        std = self.in_features**-0.5 * scale
        if init == "constant":
            nn.init.constant_(self.weight, std)
        else:
            nn.init.uniform_(self.weight, -std, std)
        if self.bias is not None:
            low, high = math.log(least), math.log(most)
            dt = torch.empty_like(self.bias, dtype=torch.float32).uniform_(low, high)
            dt = dt.exp().clamp(min=floor)
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus, inverted


class Mamba(nn.Module):
    """Mamba-1, a drop-in for mamba_ssm.Mamba: same arguments, defaults, initialisation and tensors.

    d_model: width of the tokens. d_state: states per channel, at most 256 on a GPU. d_conv: taps of
    the convolution, 2 to 4. expand: channels per d_model, rounded down where it is no whole number.
    dt_rank: rank of the time step's projection; auto is d_model / 16, rounded up. dt_min, dt_max,
    dt_init ("random" or "constant"), dt_scale, dt_init_floor: initial time steps, between the first
    two. use_fast_path is taken and has no effect: there is one path. layer_idx: under which number
    `inference_params` holds the states.
    Raises ValueError where a width is not as above, or below 1.
    """

    left: int | None = None  # a scan has no window

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
        init_states(self)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as those that were made on the meta device have to be."""
        reset_parameters(self)

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
        cache = cache_of(self, past_key_values, use_cache, attention_mask, packed)
        packing = (
            cache.step if cache else packing_of(hidden_states, attention_mask, self.left, **packed)
        )
        seq_idx = packing.seq_idx if packing else None

        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = convolve(self.conv1d, x, seq_idx, cache)
        dt, B, C = self.split(self.x_proj(x))
        dt = F.linear(dt, self.dt_proj.weight)
        y = scan(self, x, dt, B.unsqueeze(2), C.unsqueeze(2), z, seq_idx, cache)
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
        convolve_into(self.conv1d, run, slot["conv"], slot["xz"][..., : self.d_inner])
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
        of_conv = convolve_backward(self.conv1d, run, dxz[..., of_x], dconv, slot["xz"][..., of_x])
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
        A, D, bias = rates_of(self)
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
        return scan_mixer_workloads(self, 1, seqlen, decoding, **shape)

    def flops_per_token(self, seqlen: int) -> float:
        """Forward FLOPs, two per multiply-add; the same at every length."""
        return scan_mixer_flops(self, (self.in_proj, self.x_proj, self.dt_proj, self.out_proj))


class GroupedMamba(nn.Module):
    """Mamba in Apriel's grouped form; tensors are named as in its checkpoints.

    hidden_size: width of the tokens. d_inner: channels of z and C. d_xb: channels of x and B
    (defaults to d_inner), repeated to d_inner in groups of state_size channels: d_inner is a
    multiple of d_xb, and that of state_size. state_size: states per channel, and channels per
    group. repeat_kv_before_conv: x is repeated before its convolution, which then has d_inner
    channels, or after it, when it has d_xb. The other arguments, and the errors, are Mamba's.

    Apriel adds the bias of dt_proj twice, in the projection and in the scan; so does this class,
    and checkpoints depend on it.
    """

    left: int | None = None  # a scan has no window

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
        init_states(self)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as those that were made on the meta device have to be."""
        reset_parameters(self)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        **packed: Any,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same; the arguments are those of Mamba."""
        cache = cache_of(self, past_key_values, use_cache, attention_mask, packed)
        packing = (
            cache.step if cache else packing_of(hidden_states, attention_mask, self.left, **packed)
        )
        seq_idx = packing.seq_idx if packing else None

        z, x, B, C = self.split(self.in_proj(hidden_states))
        dt = self.dt_proj(self.dt_in_proj(hidden_states))
        repeats = self.d_inner // self.d_xb
        if self.repeat_kv_before_conv:
            x = convolve(self.conv1d, repeat_groups(x, self.d_state, repeats), seq_idx, cache)
        else:
            x = repeat_groups(convolve(self.conv1d, x, seq_idx, cache), self.d_state, repeats)
        return self.out_proj(scan(self, x, dt, B, C, z, seq_idx, cache))

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
        convolve_into(self.conv1d, run, slot["conv"], self.convolved(run))
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
            of_conv = convolve_backward(self.conv1d, run, drepeated, du, self.convolved(run))
            sum_groups_into_op(dx_heads, drepeated, self.d_state, *run.tensors, run.impl)
        else:
            dconv = run.fresh("conv")
            sum_groups_into_op(dconv, du, self.d_state, *run.tensors, run.impl)
            of_conv = convolve_backward(self.conv1d, run, dx_heads, dconv, self.convolved(run))
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
        A, D, bias = rates_of(self)
        return u, slot["dt"], A, B, C, D, z, bias, run.seq_idx, *run.tensors

    def repeated(self, run: "Run", x: Tensor) -> Tensor:
        out = run.fresh("y")
        repeat_groups_into_op(out, x, self.d_state, *run.tensors, run.impl)
        return out

    def workloads(self, *, seqlen: int, decoding: bool = False, **shape: Any) -> "list[Workload]":
        """What a forward pass runs, or the last token's step. shape: batch and dtype."""
        from ...autotune.workloads import RepeatGroups

        others = scan_mixer_workloads(self, self.d_xb // self.d_state, seqlen, decoding, **shape)
        repeats, tokens = self.d_inner // self.d_xb, 1 if decoding else seqlen
        return [
            *others,
            RepeatGroups(
                dim=self.d_xb, group=self.d_state, repeats=repeats, seqlen=tokens, **shape
            ),
        ]

    def flops_per_token(self, seqlen: int) -> float:
        """Forward FLOPs, two per multiply-add; the same at every length."""
        projections = (self.in_proj, self.dt_in_proj, self.dt_proj, self.out_proj)
        return scan_mixer_flops(self, projections)


def expanded(d_model: int, expand: float) -> int:
    """The channels of the scan. Raises ValueError where there would be none."""
    if not isinstance(expand, Real) or not 1 <= expand * d_model < math.inf:
        raise ValueError(f"expand takes a number that leaves a channel or more, got {expand!r}")
    return int(expand * d_model)


def rank_of(dt_rank: int | str, d_model: int) -> int:
    """Raises ValueError where dt_rank is neither "auto" nor a whole number, 1 or more."""
    if dt_rank == "auto":
        return math.ceil(d_model / 16)
    if isinstance(dt_rank, str):
        raise ValueError(f"dt_rank takes auto or a whole number, got {dt_rank!r}")
    check_whole(dt_rank=dt_rank)
    return dt_rank


def depthwise_conv(channels: int, taps: int, bias: bool, **where: Any) -> nn.Conv1d:
    """Holds the taps under their usual names and initialisation; `convolve` applies them."""
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias, **where)


@torch.no_grad()
def init_states(mixer: Mamba | GroupedMamba) -> None:
    """A of -1 … -d_state in every channel (Gu et al. 2022, S4D-Real), and D of ones."""
    for name, parameter in mixer.named_parameters():
        if name in MARKS:
            setattr(parameter, MARKS[name], True)
    mixer.A_log.copy_(torch.ones_like(mixer.A_log).cumsum(-1).log())  # sharded or not
    mixer.D.fill_(1)


def reset_parameters(mixer: Mamba | GroupedMamba) -> None:
    layers: Any = mixer.children()
    for layer in layers:
        layer.reset_parameters()
    init_states(mixer)


def convolve(
    conv: nn.Conv1d, x: Tensor, seq_idx: Tensor | None, cache: LayerCache | None
) -> Tensor:
    weight = conv.weight.squeeze(1)
    if cache is not None and cache.updates("conv"):
        return causal_conv1d_update(x, cache.states["conv"], weight, conv.bias, activation="silu")
    out, state = causal_conv1d(
        x,
        weight,
        conv.bias,
        activation="silu",
        seq_idx=seq_idx,
        initial_state=cache.states.get("conv") if cache else None,
        return_final_state=True,
    )
    if cache is not None:
        cache.keep("conv", state)
    return out


def convolve_into(conv: nn.Conv1d, run: "Run", out: Tensor, x: Tensor) -> None:
    taps = conv.weight.squeeze(1)
    causal_conv1d_into_op(out, x, taps, conv.bias, run.seq_idx, *run.tensors, "silu", run.impl)


def convolve_backward(
    conv: nn.Conv1d, run: "Run", dx: Tensor, dout: Tensor, x: Tensor
) -> tuple[tuple[Tensor | None, Tensor], ...]:
    """Write dx. Returns the taps and their bias, each with its gradient."""
    taps = conv.weight.squeeze(1)
    dtaps, dbias = causal_conv1d_backward_into_op(
        dx, dout, x, taps, conv.bias, run.seq_idx, *run.tensors, "silu", run.impl
    )
    return (conv.weight, dtaps), (conv.bias, dbias)


def rates_of(mixer: Mamba | GroupedMamba) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, D and the step sizes' bias, as the scan takes them: in float32."""
    bias = mixer.dt_proj.bias
    return -mixer.A_log.float().exp(), mixer.D.float(), None if bias is None else bias.float()


def scan(
    mixer: Mamba | GroupedMamba,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    seq_idx: Tensor | None,
    cache: LayerCache | None,
) -> Tensor:
    A, D, bias = rates_of(mixer)
    if cache is not None and cache.updates("ssm"):
        x, dt, B, C, z = (token.squeeze(1) for token in (x, dt, B, C, z))
        return selective_state_update(
            cache.states["ssm"], x, dt, A, B, C, D, z, bias, dt_softplus=True
        ).unsqueeze(1)
    out, state = selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        z=z,
        delta_bias=bias,
        delta_softplus=True,
        initial_state=cache.states.get("ssm") if cache else None,
        seq_idx=seq_idx,
        return_final_state=True,
    )
    if cache is not None:
        cache.keep("ssm", state)
    return out


def scan_mixer_flops(mixer: Mamba | GroupedMamba, projections: tuple[nn.Linear, ...]) -> float:
    """Projections and taps as multiply-adds; nine FLOPs for each state update, three for D and z.

    A state update multiplies delta A, takes its exponential, multiplies delta u by B, and does two
    multiply-adds, for the state and for the output.
    """
    weights = sum(linear.weight.numel() for linear in projections) + mixer.conv1d.weight.numel()
    return 2 * weights + 9 * mixer.d_inner * mixer.d_state + 3 * mixer.d_inner


def scan_mixer_workloads(
    mixer: Mamba | GroupedMamba, groups: int, seqlen: int, decoding: bool, **shape: Any
) -> "list[Workload]":
    """groups: of B; where C has more, its bytes are left out of the floor."""
    from ...autotune.workloads import (
        CausalConv1d,
        CausalConv1dUpdate,
        SelectiveScan,
        SelectiveStateUpdate,
    )

    taps = {"dim": mixer.conv1d.in_channels, "width": mixer.conv1d.kernel_size[0], **shape}
    states = {"dim": mixer.d_inner, "state": mixer.d_state, "groups": groups, **shape}
    if decoding:
        ops = [CausalConv1dUpdate(**taps), SelectiveStateUpdate(**states)]
        return [*products_of(mixer, seqlen=1, **shape), *ops]
    ops = [CausalConv1d(seqlen=seqlen, **taps), SelectiveScan(seqlen=seqlen, **states)]
    return [*products_of(mixer, seqlen=seqlen, **shape), *ops]
