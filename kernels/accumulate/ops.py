"""torch.library registration: schema, shapes for tracing."""

import torch
from torch import Tensor

from ..backend import load_backend


@torch.library.custom_op("tossup::accumulate_into", mutates_args=("totals",))
def accumulate_into_op(
    totals: list[Tensor],
    gradients: list[Tensor],
    written: Tensor | None,
    count: Tensor | None,
    impl: str,
) -> None:
    with torch.cuda.device_of(totals[0]):
        backend = load_backend(__package__, impl)
        backend.accumulate_into(totals, gradients, written, count)


@accumulate_into_op.register_fake
def _(totals, *others):
    return None
