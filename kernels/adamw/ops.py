"""torch.library registration: schema, shapes for tracing."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import mutating_op
from ..precision import wide

STATE = ("exp_avgs", "exp_avg_sqs", "steps")


@mutating_op("adamw", mutates_args=("params", *STATE, "host", "table"))
def adamw_op(
    params: list[Tensor],
    gradients: list[Tensor],
    places: list[int],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
    lr: Tensor | None,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decays: bool,
    impl: str,
) -> None:
    """places: whose gradients these are, in the list of parameters. lr: or None, then rate is."""
    call_backend(
        __package__, impl, "adamw_",
        params, gradients, places, exp_avgs, exp_avg_sqs, steps, host, table, owner, used,
        lr, rate, beta1, beta2, eps, weight_decay, decays,
    )  # fmt: skip


@torch.library.custom_op("tossup::gradient_norm", mutates_args=())
def gradient_norm_op(
    params: list[Tensor],
    gradients: list[Tensor],
    places: list[int],
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
    impl: str,
) -> Tensor:
    return call_backend(
        __package__, impl, "gradient_norm", params, gradients, places, host, table, owner, used
    )


@gradient_norm_op.register_fake
def _(params, *others):
    return params[0].new_empty((), dtype=wide(params[0].dtype))


@mutating_op("scale_gradients", mutates_args=("gradients",))
def scale_gradients_op(
    gradients: list[Tensor],
    places: list[int],
    factor: Tensor,
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
    impl: str,
) -> None:
    call_backend(
        __package__, impl, "scale_gradients_", gradients, places, factor, host, table, owner, used
    )
