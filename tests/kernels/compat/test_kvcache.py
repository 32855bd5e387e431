"""flash_attn_with_kvcache against attention written out, over combinations of what it takes."""

import math
import random

import pytest
import torch
from torch import Tensor

from tossup.kernels import compat
from tossup.kernels.flash_attention import flash_attention
from tossup.kernels.rotary import rotary_angles

BATCH, NEW, HEADS, KV_HEADS, DIM, ROOM, ENTRIES = 3, 2, 4, 2, 8, 16, 5
LENGTHS = {"alike": torch.full((BATCH,), 7), "each its own": torch.tensor([5, 9, 12])}


def turned(x: Tensor, places: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """The first channels of x (tokens, heads, dim) as complex numbers, times the angles'."""
    cos, sin = (t[places][:, None].double() for t in angles)
    half = cos.shape[-1]
    a = x[..., 0 : 2 * half : 2] if interleaved else x[..., :half]
    b = x[..., 1 : 2 * half : 2] if interleaved else x[..., half : 2 * half]
    number = torch.complex(a, b) * torch.complex(cos, sin)
    pair = number.real, number.imag
    head = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((head, x[..., 2 * half :]), -1)


def attended(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], slopes: Tensor | None,
    scale: float | None, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sample's output (queries, heads, dim), and its log-sum-exp (heads, queries)."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or DIM**-0.5)
    scores = cap * (scores / cap).tanh() if cap else scores
    left, right = window[0], 0 if causal else window[1]
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    scores = scores.masked_fill(hidden, -math.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), v)
    lse = scores.logsumexp(-1)
    return out, lse.masked_fill(lse == -math.inf, math.inf)  # as flash-attn has it


def drawn(seed: int) -> dict:
    """One combination of everything that the function takes."""
    choice = random.Random(seed).choice
    new = choice([True, False])
    rotary = new and choice([True, False])
    return {
        "new": new, "rotary": rotary, "interleaved": rotary and choice([True, False]),
        "entries": choice([True, False]), "leftpad": choice([True, False]),
        "causal": choice([True, False]), "window": choice([(-1, -1), (4, 0), (3, 2)]),
        "slopes": choice([None, (HEADS,), (BATCH, HEADS)]),
        "lengths": choice(list(LENGTHS)), "strided": choice([True, False]),
        "scale": choice([None, 0.2]), "cap": choice([0.0, 1.5]),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(96))
def test_a_step_behind_a_cache(seed):
    options, numbers = drawn(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64)

    entries = torch.tensor([4, 0, 2], dtype=torch.int32) if options["entries"] else None
    memory = normal(2, BATCH if entries is None else ENTRIES, ROOM + 4, KV_HEADS, DIM)[:, :, :ROOM]
    keys, values = (memory if options["strided"] else memory.contiguous()).unbind()
    q = normal(BATCH, NEW, HEADS, DIM)
    k, v = normal(2, BATCH, NEW, KV_HEADS, DIM).unbind() if options["new"] else (None, None)
    angles = rotary_angles(torch.arange(ROOM), 4) if options["rotary"] else None
    lengths = LENGTHS[options["lengths"]]
    leftpad = torch.tensor([0, 3, 1], dtype=torch.int32) if options["leftpad"] else None
    slopes = options["slopes"] and normal(*options["slopes"]).abs()
    causal, window, interleaved = (options[name] for name in ("causal", "window", "interleaved"))

    kept = keys.clone(), values.clone()
    rows = []
    for sample in range(BATCH):
        entry = sample if entries is None else int(entries[sample])
        query, length = q[sample], int(lengths[sample])
        if options["new"]:
            key, places = k[sample], torch.arange(length, length + NEW)
            if angles is not None:
                key = turned(key, places, angles, interleaved)
                local = causal or window != (-1, -1)  # else all queries stand where the first does
                stand = places if local else torch.full((NEW,), length)
                query = turned(query, stand, angles, interleaved)
            fresh = slice(length, length + NEW)
            kept[0][entry, fresh], kept[1][entry, fresh] = key, v[sample]
            length += NEW
        seen = slice(0 if leftpad is None else int(leftpad[sample]), length)
        slope = slopes if slopes is None or slopes.ndim == 1 else slopes[sample]
        rows.append(
            attended(
                query,
                kept[0][entry, seen],
                kept[1][entry, seen],
                causal,
                window,
                slope,
                options["scale"],
                options["cap"],
            )
        )

    out, lse = compat.flash_attn_with_kvcache(
        q, keys, values, k, v, *(angles or (None, None)),
        cache_seqlens=7 if options["lengths"] == "alike" else lengths.int(),
        cache_batch_idx=entries, cache_leftpad=leftpad, causal=causal, window_size=window,
        rotary_interleaved=interleaved, alibi_slopes=slopes, return_softmax_lse=True,
        softmax_scale=options["scale"], softcap=options["cap"],
    )  # fmt: skip
    outs, lses = (torch.stack(column) for column in zip(*rows, strict=True))
    for ours, theirs in ((out, outs), (lse, lses), (keys, kept[0]), (values, kept[1])):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "filled, window_size", [(1, (2, 1)), (3, (0, 1)), (4, (9, 16)), (2, (1, 15))]
)
def test_a_window_is_measured_by_the_whole_cache_wherever_its_filling_is_known(filled, window_size):
    """flash-attn makes a tensor of a number, and lifts windows as wide as the cache."""
    q, cache = torch.randn(2, 6, HEADS, DIM), torch.randn(2, ROOM, HEADS, DIM)
    outs = [
        compat.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, window_size=window_size
        )
        for lengths in (filled, torch.full((2,), filled, dtype=torch.int32))
    ]
    torch.testing.assert_close(*outs)
    lifted = -1 if window_size[1] >= ROOM else window_size[1]
    keys = cache[:, :filled]
    expected = flash_attention(q, keys, keys, window_size=(window_size[0], lifted))
    torch.testing.assert_close(outs[0], expected)
