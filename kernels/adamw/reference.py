"""The textbook update, one parameter after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import wide
from .bucket import Bucket, Gate


def adamw_reference_(
    bucket: Bucket,
    gradients: Sequence[Tensor | None],
    used: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decays: bool,
) -> None:
    """Loshchilov and Hutter, algorithm 2, with the learning rate as the schedule multiplier."""
    state = bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps
    of_each = zip(bucket.params, gradients, bucket.gates, *state, strict=True)
    for param, gradient, gate, exp_avg, exp_avg_sq, step in of_each:
        if not is_used(gate, used):
            gradient = None
        if gradient is None and gate is not None and decays:
            gradient = torch.zeros_like(param)
        if gradient is None:
            continue
        step += 1
        theta, g, m, v = (x.to(wide(x.dtype)) for x in (param, gradient, exp_avg, exp_avg_sq))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat = m / (1 - betas[0] ** step.double())
        v_hat = v / (1 - betas[1] ** step.double())
        theta = theta - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * theta)
        param.copy_(theta)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def gradient_norm_reference(
    bucket: Bucket, gradients: Sequence[Tensor | None], used: Tensor | None
) -> Tensor:
    total = torch.zeros((), dtype=wide(bucket.dtype), device=bucket.device)
    for gradient, gate in zip(gradients, bucket.gates, strict=True):
        if gradient is not None and is_used(gate, used):
            total += gradient.to(total.dtype).square().sum()
    return total.sqrt()


def scale_gradients_reference_(
    bucket: Bucket, gradients: Sequence[Tensor | None], factor: Tensor, used: Tensor | None
) -> None:
    for gradient, gate in zip(gradients, bucket.gates, strict=True):
        if gradient is not None and is_used(gate, used):
            gradient.copy_(gradient.to(wide(gradient.dtype)) * factor)


def is_used(gate: Gate | None, used: Tensor | None) -> bool:
    return gate is None or used is None or bool(used[gate] > 0)
