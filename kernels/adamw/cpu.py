"""CPU backend: torch's fused AdamW and norms, of those that a branch on the host picks."""

import torch
from torch import Tensor

from ..precision import wide
from .bucket import COLUMNS

GATE = slice(COLUMNS.index("layer"), COLUMNS.index("mixer") + 1)


def adamw_(
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
) -> None:
    taken = dict(zip(places, gradients, strict=True))
    for place, (gated, was_used) in enumerate(gates_of(host, used)):
        if not was_used:
            taken.pop(place, None)
        if decays and gated and place not in taken:
            taken[place] = torch.zeros_like(params[place])
    if not taken:
        return
    written = [[column[place] for place in taken] for column in (params, exp_avgs, exp_avg_sqs)]
    # The fused call walks through memory, gaps and all; what belongs together is laid out alike
    dense = [*map(torch.ops.aten.is_non_overlapping_and_dense, written[0])]
    filled = [
        [x if whole else x.contiguous() for x, whole in zip(column, dense, strict=True)]
        for column in (*written, taken.values())
    ]
    counts = [steps[place] for place in taken]
    torch._foreach_add_(counts, 1)  # the fused call only reads them
    torch._fused_adamw_(
        filled[0], filled[3], *filled[1:3], [], counts,
        lr=rate if lr is None else lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for column, copies in zip(written, filled, strict=False):
        for x, copy in zip(column, copies, strict=True):
            if copy is not x:
                x.copy_(copy)


def gradient_norm(
    params: list[Tensor],
    gradients: list[Tensor],
    places: list[int],
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
) -> Tensor:
    dtype, taken = wide(params[0].dtype), those_used(gradients, places, host, used)
    norms = torch._foreach_norm(taken, 2, dtype=dtype) if taken else table.new_zeros(1, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(tuple(norms)))


def scale_gradients_(
    gradients: list[Tensor],
    places: list[int],
    factor: Tensor,
    host: Tensor,
    table: Tensor,
    owner: Tensor,
    used: Tensor | None,
) -> None:
    taken = those_used(gradients, places, host, used)
    if taken and factor != 1:
        torch._foreach_mul_(taken, factor.item())  # a tensor would be rounded to their dtype


def those_used(
    gradients: list[Tensor], places: list[int], host: Tensor, used: Tensor | None
) -> list[Tensor]:
    gates = gates_of(host, used)
    pairs = zip(gradients, places, strict=True)
    return [gradient for gradient, place in pairs if gates[place][1]]


def gates_of(host: Tensor, used: Tensor | None) -> list[tuple[bool, bool]]:
    """Of each parameter, whether it has a gate, and whether it was used; one that is shared was."""
    rows = None if used is None else used.tolist()
    return [
        (layer >= 0, layer < 0 or rows is None or rows[layer][mixer] > 0)
        for layer, mixer in host[:, GATE].tolist()
    ]
