"""AdamW, and clipping before it, that leave out the parameters that a step did not use.

AdamW is Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019, algorithm 2). A
zero gradient is not the same as no update: momentum goes on moving the weights, decay goes on
shrinking them, and the bias correction goes on counting. So a parameter has a gate, and what was
used is a tensor on the device, which the kernels follow without the host.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..backend import Backend, Impl, resolve_for
from .bucket import Bucket, Gate
from .reference import (
    adamw_reference_,
    gradient_norm_reference,
    scale_gradients_reference_,
)

__all__ = ["Bucket", "Gate", "adamw_", "gradient_norm", "scale_gradients_"]

Gradients = Sequence[Tensor | None]


@torch.no_grad()
def adamw_(
    bucket: Bucket,
    gradients: Gradients,
    used: Tensor | None = None,
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    inactive: Literal["skip", "decay"] = "skip",
    impl: Impl = "auto",
) -> None:
    """Take one step, in place: parameters, moments and step counts.

    bucket: the parameters and their state, any floating dtype.
    gradients: each like its parameter, or None: that parameter stays as it is.
    used: (layers, mixers), any real dtype, on the parameters' device; above zero where a mixer was
        used. Needed where there are gates.
    lr: a float, or a tensor of shape () on the device, any floating dtype.
    betas, eps, weight_decay: with torch's defaults.
    inactive: what becomes of parameters whose mixer was not used, be their gradients NaN. `skip`:
        they and their state stay bit for bit as they are. `decay`: their gradients count as zero,
        as do those that are None of parameters that have a gate.
    Arithmetic is in float32, in float64 for float64. Raises ValueError for what does not fit.
    """
    if inactive not in ("skip", "decay"):
        raise ValueError(f"inactive takes skip or decay, got {inactive!r}")
    chosen = resolve(bucket, gradients, used, impl)
    if len(bucket.steps) != len(bucket.params):
        raise ValueError("the bucket has no state: exp_avgs, exp_avg_sqs and steps are needed")
    rate, on_device = (math.nan, lr) if isinstance(lr, Tensor) else (float(lr), None)
    if on_device is not None:
        check_number(bucket, lr=on_device)
    decays = inactive == "decay"
    if chosen == "reference":
        adamw_reference_(bucket, gradients, used, lr, betas, eps, weight_decay, decays)
        return
    from .ops import adamw_op

    adamw_op(
        bucket.params, *present(gradients), bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps,
        bucket.host, bucket.table, bucket.owner, used,
        on_device, rate, *map(float, betas), float(eps), float(weight_decay), decays, chosen,
    )  # fmt: skip


@torch.no_grad()
def gradient_norm(
    bucket: Bucket, gradients: Gradients, used: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """The L2 norm of all gradients that are there, and used: float32, or float64, of shape ().

    The arguments are those of `adamw_`. Sums are in the dtype of the result, and deterministic.
    """
    chosen = resolve(bucket, gradients, used, impl)
    if chosen == "reference":
        return gradient_norm_reference(bucket, gradients, used)
    from .ops import gradient_norm_op

    return gradient_norm_op(
        bucket.params, *present(gradients), bucket.host, bucket.table, bucket.owner, used, chosen
    )


@torch.no_grad()
def scale_gradients_(
    bucket: Bucket,
    gradients: Gradients,
    factor: Tensor,
    used: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Multiply all gradients that are there, and used, in place; where it is 1, touch none.

    factor: any floating dtype, shape (), on the device. The rest is as in `adamw_`.
    """
    chosen = resolve(bucket, gradients, used, impl)
    check_number(bucket, factor=factor)
    if chosen == "reference":
        scale_gradients_reference_(bucket, gradients, factor, used)
        return
    from .ops import scale_gradients_op

    there, places = present(gradients)
    if there:
        scale_gradients_op(
            there, places, factor, bucket.host, bucket.table, bucket.owner, used, chosen
        )


def present(gradients: Gradients) -> tuple[list[Tensor], list[int]]:
    """Those that are there, and their places."""
    places = [place for place, gradient in enumerate(gradients) if gradient is not None]
    return [gradient for gradient in gradients if gradient is not None], places


def check_number(bucket: Bucket, **number: Tensor) -> None:
    for name, x in number.items():
        if not x.is_floating_point() or x.ndim or x.device != bucket.device:
            raise ValueError(
                f"{name} must be floating of shape () on {bucket.device}, got {x.dtype} of "
                f"{tuple(x.shape)} on {x.device}"
            )


def resolve(bucket: Bucket, gradients: Gradients, used: Tensor | None, impl: Impl) -> Backend:
    bucket.check_gradients(gradients)
    bucket.check_used(used)
    chosen = resolve_for(impl, bucket.params[0])
    if chosen == "triton" and not bucket.dense:
        raise ValueError("params must fill their memory without gaps for impl='triton'")
    return chosen
