"""What both forms of Mamba-1 are made of: time steps, convolution, scan, and what they cost."""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.causal_conv1d import causal_conv1d
from ...kernels.causal_conv1d.ops import causal_conv1d_backward_into_op, causal_conv1d_into_op
from ...kernels.causal_conv1d_update import causal_conv1d_update
from ...kernels.selective_scan import selective_scan
from ...kernels.selective_state_update import selective_state_update
from ..widths import check_whole
from .cache import LayerCache, cache_of
from .packing import packing_of
from .products import products_of

if TYPE_CHECKING:
    from ...autotune.workloads import Workload
    from ..device_dispatch import Run

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
    """Holds the taps under their usual names and initialisation; the mixer applies them."""
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias, **where)


class ScanMixer(nn.Module):
    """What both forms of Mamba-1 do alike. Each adds projections, and how they come together."""

    left: int | None = None  # a scan has no window

    d_inner: int
    d_state: int
    conv1d: nn.Conv1d
    dt_proj: StepProjection
    A_log: nn.Parameter
    D: nn.Parameter

    @torch.no_grad()
    def init_states(self) -> None:
        """A of -1 … -d_state in every channel (Gu et al. 2022, S4D-Real), and D of ones."""
        for name, parameter in self.named_parameters():
            if name in MARKS:
                setattr(parameter, MARKS[name], True)
        self.A_log.copy_(torch.ones_like(self.A_log).cumsum(-1).log())  # sharded or not
        self.D.fill_(1)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as those that were made on the meta device have to be."""
        layers: Any = self.children()
        for layer in layers:
            layer.reset_parameters()
        self.init_states()

    def followed(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: object,
        use_cache: bool,
        packed: dict[str, Any],
    ) -> tuple[Tensor | None, LayerCache | None]:
        """The number of each token's sequence, and the states that the tokens follow."""
        cache = cache_of(self, past_key_values, use_cache, attention_mask, packed)
        packing = (
            cache.step if cache else packing_of(hidden_states, attention_mask, self.left, **packed)
        )
        return (packing.seq_idx if packing else None), cache

    def convolve(self, x: Tensor, seq_idx: Tensor | None, cache: LayerCache | None) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if cache is not None and cache.updates("conv"):
            return causal_conv1d_update(x, cache.states["conv"], weight, bias, activation="silu")
        out, state = causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            seq_idx=seq_idx,
            initial_state=cache.states.get("conv") if cache else None,
            return_final_state=True,
        )
        if cache is not None:
            cache.keep("conv", state)
        return out

    def convolve_into(self, run: "Run", out: Tensor, x: Tensor) -> None:
        taps = self.conv1d.weight.squeeze(1), self.conv1d.bias
        causal_conv1d_into_op(out, x, *taps, run.seq_idx, *run.tensors, "silu", run.impl)

    def convolve_backward(
        self, run: "Run", dx: Tensor, dout: Tensor, x: Tensor
    ) -> tuple[tuple[Tensor | None, Tensor], ...]:
        """Write dx. Returns the taps and their bias, each with its gradient."""
        conv = self.conv1d
        dtaps, dbias = causal_conv1d_backward_into_op(
            dx, dout, x, conv.weight.squeeze(1), conv.bias, run.seq_idx, *run.tensors, "silu",
            run.impl,
        )  # fmt: skip
        return (conv.weight, dtaps), (conv.bias, dbias)

    def rates(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, D and the step sizes' bias, as the scan takes them: in float32."""
        bias = self.dt_proj.bias
        return -self.A_log.float().exp(), self.D.float(), None if bias is None else bias.float()

    def scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        seq_idx: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        A, D, bias = self.rates()
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

    def flops_per_token(self, seqlen: int) -> float:
        """Forward FLOPs; the same at every length.

        Projections and taps as multiply-adds, of two FLOPs; nine for each state update, three for D
        and z. A state update multiplies delta A, takes its exponential, multiplies delta u by B,
        and does two multiply-adds, for the state and for the output.
        """
        layers = [module for module in self.children() if isinstance(module, nn.Linear | nn.Conv1d)]
        weights = sum(layer.weight.numel() for layer in layers)
        return 2 * weights + 9 * self.d_inner * self.d_state + 3 * self.d_inner

    def scan_workloads(
        self, groups: int, seqlen: int, decoding: bool, **shape: Any
    ) -> "list[Workload]":
        """groups: of B; where C has more, its bytes are left out of the floor."""
        from ...autotune.workloads import (
            CausalConv1d,
            CausalConv1dUpdate,
            SelectiveScan,
            SelectiveStateUpdate,
        )

        taps = {"dim": self.conv1d.in_channels, "width": self.conv1d.kernel_size[0], **shape}
        states = {"dim": self.d_inner, "state": self.d_state, "groups": groups, **shape}
        if decoding:
            ops = [CausalConv1dUpdate(**taps), SelectiveStateUpdate(**states)]
            return [*products_of(self, seqlen=1, **shape), *ops]
        ops = [CausalConv1d(seqlen=seqlen, **taps), SelectiveScan(seqlen=seqlen, **states)]
        return [*products_of(self, seqlen=seqlen, **shape), *ops]
