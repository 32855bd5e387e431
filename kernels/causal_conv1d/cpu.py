"""CPU backend: one pass of torch over the sequence for each tap.

torch's own conv1d wants channels before time, so it would transpose twice, and it knows no resets.

Floor: bytes. Each of at most four taps reads x and the output once and writes the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from ..routing import place, rows_of


def operands(x, weight, initial_state, seq_idx, rows):
    """The inputs with those before them, the taps (width, dim), and which taps to leave out.

    The last is a list with a mask (batch, seqlen, 1) for each tap, and one more (batch, width - 1,
    1) for the final state: true where the input is of another sequence. None without seq_idx.
    """
    batch, seqlen, dim = x[rows].shape
    width = weight.shape[1]
    inputs = x.new_empty((batch, width - 1 + seqlen, dim), dtype=wide(x.dtype))
    inputs[:, : width - 1] = 0.0 if initial_state is None else initial_state[rows]
    inputs[:, width - 1 :] = x[rows]
    taps = weight.to(inputs.dtype).T.contiguous()
    if seq_idx is None:
        return inputs, taps, None
    sequence = torch.zeros(batch, width - 1 + seqlen, dtype=torch.int64)
    sequence[:, width:] = (seq_idx[rows].diff(dim=1) != 0).cumsum(1)
    own = sequence[:, width - 1 :]
    foreign = [(sequence[:, k : k + seqlen] != own).unsqueeze(-1) for k in range(width)]
    return inputs, taps, [*foreign, (sequence[:, seqlen:] != own[:, -1:]).unsqueeze(-1)]


def convolve(inputs: Tensor, taps: Tensor, bias: Tensor | None, foreign: list[Tensor] | None):
    seqlen = inputs.shape[1] - len(taps) + 1
    out = inputs[:, len(taps) - 1 :] * taps[-1]
    for k, tap in enumerate(taps[:-1]):
        window = inputs[:, k : k + seqlen]
        out.addcmul_(window if foreign is None else window.masked_fill(foreign[k], 0.0), tap)
    return out if bias is None else out.add_(bias.to(out.dtype))


def forward(x, weight, bias, initial_state, seq_idx, count, samples, activation, out=None):
    rows = rows_of(count, samples)
    inputs, taps, foreign = operands(x, weight, initial_state, seq_idx, rows)
    y = convolve(inputs, taps, bias, foreign)
    if activation == "silu":
        y = F.silu(y, inplace=True)
    final_state = inputs[:, x.shape[1] :]
    if foreign is not None:
        final_state = final_state.masked_fill(foreign[-1], 0.0)
    return (
        place(rows, y, len(x), x.dtype, into=out),
        place(rows, final_state, len(x), x.dtype, copy=True),
    )


def backward(
    dout, dfinal_state, x, weight, bias, initial_state, seq_idx, count, samples, activation, dx=None
):
    rows = rows_of(count, samples)
    inputs, taps, foreign = operands(x, weight, initial_state, seq_idx, rows)
    seqlen = x.shape[1]
    dy = dout[rows].to(inputs.dtype)
    if activation == "silu":
        dy = torch.ops.aten.silu_backward(dy, convolve(inputs, taps, bias, foreign))
    dinputs, dtaps = torch.zeros_like(inputs), torch.empty_like(taps)
    for k, tap in enumerate(taps):
        dwindow = dy if foreign is None else dy.masked_fill(foreign[k], 0.0)
        dinputs[:, k : k + seqlen].addcmul_(dwindow, tap)
        dtaps[k] = (dwindow * inputs[:, k : k + seqlen]).sum((0, 1))
    if dfinal_state is not None:
        last = dfinal_state[rows].to(dy.dtype)
        dinputs[:, seqlen:] += last if foreign is None else last.masked_fill(foreign[-1], 0.0)

    past = len(taps) - 1
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = place(rows, dinputs[:, :past], len(x), initial_state.dtype, copy=True)
    return (
        place(rows, dinputs[:, past:], len(x), x.dtype, copy=True, into=dx),
        dtaps.T.contiguous().to(weight.dtype),
        None if bias is None else dy.sum((0, 1)).to(bias.dtype),
        dinitial_state,
    )
