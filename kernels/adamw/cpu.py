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
    for place, gate in enumerate(host[:, GATE].tolist()):
        if not is_used(gate, used):
            taken.pop(place, None)
        if decays and gate[0] >= 0 and place not in taken:
            taken[place] = torch.zeros_like(params[place])
    if not taken:
        return
    columns = ([column[place] for place in taken] for column in (exp_avgs, exp_avg_sqs))
    counts = [steps[place] for place in taken]
    torch._foreach_add_(counts, 1)  # the fused call only reads them
    torch._fused_adamw_(
        [params[place] for place in taken], list(taken.values()), *columns, [], counts,
        lr=rate if lr is None else lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


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
    gates = host[:, GATE].tolist()
    pairs = zip(gradients, places, strict=True)
    return [gradient for gradient, place in pairs if is_used(gates[place], used)]


def is_used(gate: list[int], used: Tensor | None) -> bool:
    """A parameter that is shared always is: its gate is negative."""
    return used is None or gate[0] < 0 or bool(used[tuple(gate)] > 0)
