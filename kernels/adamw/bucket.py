"""Many tensors that one launch goes over: which part of which tensor each program has."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..transfer import send

Gate = tuple[int, int]

CHUNK = 1 << 14  # elements of a tensor that one program has

# What a launch knows of each tensor: elements, its first chunk among all, its gate or -1, and where
# it and its state lie. The addresses are filled in by the launch that follows them.
COLUMNS = ("size", "first", "layer", "mixer", "param", "exp_avg", "exp_avg_sq", "step")


class Bucket:
    """Parameters of one device and dtype, any shapes, with their state.

    gates: for each the (layer, mixer) that it belongs to, or None: it is shared; by default all.
    exp_avgs, exp_avg_sqs: laid out like the parameters. steps: float32, shape (). A bucket without
        state is one for norms.
    table: int64, (parameters, COLUMNS), on their device, and host, the same on the CPU.
    owner: int32, (chunks,), the place of the parameter that a chunk is of.
    dense: whether each parameter fills its memory: what is laid out alike then matches in order.

    Raises ValueError where dtypes, devices or lengths differ.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        gates: Sequence[Gate | None] | None = None,
        exp_avgs: Sequence[Tensor] = (),
        exp_avg_sqs: Sequence[Tensor] = (),
        steps: Sequence[Tensor] = (),
    ) -> None:
        self.params, self.gates = list(params), list(gates or [None] * len(params))
        self.exp_avgs, self.exp_avg_sqs, self.steps = list(exp_avgs), list(exp_avg_sqs), list(steps)
        self._check()
        self.dense = all(map(torch.ops.aten.is_non_overlapping_and_dense, self.params))
        table = np.zeros((len(self.params), len(COLUMNS)), np.int64)
        size, first, layer, mixer = table.T[:4]
        size[:] = [param.numel() for param in self.params]
        chunks = -(-size // CHUNK)
        first[:] = chunks.cumsum() - chunks
        layer[:], mixer[:] = zip(*(gate or (-1, -1) for gate in self.gates), strict=True)
        owner = np.arange(len(table), dtype=np.int32).repeat(chunks)
        self.host = torch.from_numpy(table)
        self.table = send(self.host, self.device).clone()
        self.owner = send(torch.from_numpy(owner), self.device)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def gated(self) -> bool:
        return any(gate is not None for gate in self.gates)

    def check_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises ValueError unless each is None or like its parameter."""
        if len(gradients) != len(self.params):
            raise ValueError(
                f"gradients must be as many as parameters, got {len(gradients)} and "
                f"{len(self.params)}"
            )
        for gradient, param in zip(gradients, self.params, strict=True):
            if gradient is not None:
                _check_like("gradients", gradient, param)

    def check_used(self, used: Tensor | None) -> None:
        """Raises ValueError unless it tells of every gate, on the parameters' device."""
        if not self.gated:
            return
        if used is None:
            raise ValueError(
                "used is None, but parameters have gates; pass a (layers, mixers) tensor"
            )
        layers, mixers = (1 + max(gate[axis] for gate in self.gates if gate) for axis in (0, 1))
        if used.dim() != 2 or used.shape[0] < layers or used.shape[1] < mixers:
            raise ValueError(
                f"used has shape {tuple(used.shape)}, but the gates need ({layers}, {mixers}) or "
                "more"
            )
        if used.device != self.device:
            raise ValueError(f"used is on {used.device}, but gated parameters are on {self.device}")

    def _check(self) -> None:
        if not self.params:
            raise ValueError("params must be at least one, got none")
        for name in ("gates", "exp_avgs", "exp_avg_sqs", "steps"):
            count = len(getattr(self, name))
            if count not in (0, len(self.params)):
                raise ValueError(
                    f"{name} must be as many as parameters, got {count} and {len(self.params)}"
                )
        for param in self.params:
            if (param.dtype, param.device) != (self.dtype, self.device):
                raise ValueError(
                    f"params must be of one dtype on one device, got {self.dtype} on {self.device} "
                    f"and {param.dtype} on {param.device}"
                )
        for name, column in (("exp_avgs", self.exp_avgs), ("exp_avg_sqs", self.exp_avg_sqs)):
            for tensor, param in zip(column, self.params, strict=False):
                _check_like(name, tensor, param)
        for step in self.steps:
            if step.dtype != torch.float32 or step.ndim or step.device != self.device:
                raise ValueError(
                    f"steps must be float32 of shape () on {self.device}, got {step.dtype} of "
                    f"{tuple(step.shape)} on {step.device}"
                )


def _check_like(name: str, tensor: Tensor, param: Tensor) -> None:
    kind = tensor.dtype, tensor.device, tensor.shape, tensor.stride()
    if kind != (param.dtype, param.device, param.shape, param.stride()):
        raise ValueError(
            f"{name} must be like their parameters, got {tensor.dtype} of {tuple(tensor.shape)} "
            f"with strides {tensor.stride()} on {tensor.device} for {param.dtype} of "
            f"{tuple(param.shape)} with strides {param.stride()} on {param.device}"
        )
