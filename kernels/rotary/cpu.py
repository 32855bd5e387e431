"""CPU backend: a compiled loop over the active samples' tokens, in float32 or x's wider dtype.

Floor: bytes. x is read once, and the result written once; half precision is widened before.
"""

import torch
from torch import Tensor

from ..precision import wide
from ..routing import place, rows_of
from ..sweeps import sweep


@sweep(layout="C")
def turn(tasks, interleaved, x, cos, sin, out):
    """Turn all pairs of channels of the tokens in `tasks`.

    x, out: (batch, seqlen, heads, head_dim). cos, sin: (batch or 1, seqlen, pairs).
    """
    seqlen, heads, head_dim = x.shape[1:]
    pairs = cos.shape[2]
    for task in tasks:
        s, t = task // seqlen, task % seqlen
        of = s % cos.shape[0]
        for h in range(heads):
            if interleaved:
                for i in range(pairs):
                    a, b = x[s, t, h, 2 * i], x[s, t, h, 2 * i + 1]
                    out[s, t, h, 2 * i] = a * cos[of, t, i] - b * sin[of, t, i]
                    out[s, t, h, 2 * i + 1] = b * cos[of, t, i] + a * sin[of, t, i]
            else:
                for i in range(pairs):
                    a, b = x[s, t, h, i], x[s, t, h, pairs + i]
                    out[s, t, h, i] = a * cos[of, t, i] - b * sin[of, t, i]
                    out[s, t, h, pairs + i] = b * cos[of, t, i] + a * sin[of, t, i]
            for i in range(2 * pairs, head_dim):
                out[s, t, h, i] = x[s, t, h, i]


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    count: Tensor | None,
    samples: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """out may be x itself."""
    rows = rows_of(count, samples)
    chosen = x[rows].to(wide(x.dtype)).contiguous()
    cos, sin = (
        (t[rows] if t.ndim == 3 else t.unsqueeze(0)).to(chosen.dtype).contiguous()
        for t in (cos, sin)
    )
    turned = torch.empty_like(chosen)
    batch, seqlen = chosen.shape[:2]
    turn(batch * seqlen, int(interleaved), chosen, cos, sin, turned)
    return place(rows, turned, len(x), x.dtype, into=out)
