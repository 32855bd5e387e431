"""CPU backend: torch's own products, of the active samples only.

What is added to numbers that are there already is computed in float32, and rounded once with them.
"""

import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from ..routing import place, rows_of


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
) -> Tensor:
    rows = rows_of(count, samples)
    bias = None if bias is None else bias.to(x.dtype)
    return place(rows, F.linear(x[rows], weight.to(x.dtype), bias), len(x), x.dtype)


def forward_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    accumulate: bool,
    count: Tensor | None,
    samples: Tensor | None,
) -> None:
    rows = rows_of(count, samples)
    real = wide(x.dtype) if accumulate or out.dtype != x.dtype else x.dtype
    weight, bias = (t if t is None else t.to(x.dtype).to(real) for t in (weight, bias))
    values = F.linear(x[rows].to(real), weight, bias)
    if accumulate:
        values += out[rows]
    out[rows] = values.to(out.dtype)


def weight_gradient_into(
    grad: Tensor,
    dout: Tensor,
    x: Tensor,
    bias_grad: Tensor | None,
    written: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
) -> None:
    rows = rows_of(count, samples)
    dout, x = dout[rows], x[rows]
    if x.shape[0] * x.shape[1] == 0:
        return
    dout, x = (t.to(wide(t.dtype)).flatten(0, 1) for t in (dout, x))
    add = written is not None and int(written) > 0
    put_sum(grad, dout.t() @ x, add)
    if bias_grad is not None:
        put_sum(bias_grad, dout.sum(0), add)


def put_sum(target: Tensor, value: Tensor, add: bool) -> None:
    target.copy_(value + target if add else value)
