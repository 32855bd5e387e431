"""torch.library registration: schema, shapes for tracing."""

from torch import Tensor

from ..backend import call_backend
from ..library import mutating_op


@mutating_op("accumulate_into", mutates_args=("totals",))
def accumulate_into_op(
    totals: list[Tensor],
    gradients: list[Tensor],
    written: Tensor | None,
    count: Tensor | None,
    impl: str,
) -> None:
    call_backend(__package__, impl, "accumulate_into", totals, gradients, written, count)
