"""Routing: draws mixer tables, and hands each layer's mixers their samples.

A table is a pure function of (strategy, seed, step, layer, sample): a counter-based generator,
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), gives every cell
its own 32-bit word, and integer arithmetic turns the word into a mixer. So all implementations
return the same bits, and all ranks and the host the same table without talking.

    key      (seed low, seed high)
    counter  (step low, step high, layer, sample); sample is 0 where whole batches are routed
    word     the first of the four; layer 2³¹ is no layer and picks the predefined layout

A pick among K is the high half of word · K. A weighted pick, of a mixer or of a predefined layout,
counts the cumulative 32-bit thresholds that are not above the word. Both are within K · 2⁻³² of
their probabilities.

The full layout is Pólya's urn: layer n draws one of M + n tickets, one for each of the M mixers and
one for each earlier layer, and a layer's ticket stands for the mixer that this layer took. Then
layer n takes mixer m, of which n_m layers were drawn before, with probability
(1 + n_m) / (M + n). The product of these over N layers is (M−1)! ∏ N_m! / (N+M−1)!, the
Dirichlet-multinomial with α = 1: each arrangement of an allocation (N_1, …, N_M) has the same
probability, and times their number, N! / ∏ N_m!, it is 1 / C(N+M−1, M−1) for every allocation.
As a ticket points only to earlier layers, whose words can be computed anew, any layer can be drawn
alone.
"""

import torch
from torch import Tensor

from ..backend import Impl, backend_for, resolve_impl
from .route import Route, place, put, rows_of, snapshot, take, tensors_of
from .strategy import Kind, Strategy
from .table import MixerTable

__all__ = [
    "Kind",
    "MixerTable",
    "Route",
    "Strategy",
    "draw",
    "place",
    "put",
    "rows_of",
    "snapshot",
    "take",
    "tensors_of",
]


def draw(
    strategy: Strategy,
    seed: int,
    step: int | Tensor,
    layers: int,
    batch: int,
    *,
    stage: range | None = None,
    device: torch.device | str | None = None,
    impl: Impl = "auto",
) -> MixerTable:
    """Draw the mixer table of one step, and its plan.

    seed: taken modulo 2⁶⁴.
    step: taken modulo 2⁶⁴, or an int64 tensor of shape () on `device`, which impl="triton" never
        reads on the host. A step of several micro-batches passes a number of its own for each.
    layers: how many the whole model has.
    batch: samples in the batch.
    stage: the layers of a pipeline stage, to draw only their rows of the whole table. None is all.
    device: where the table goes; by default the step's, or torch's default for an int.
    Deterministic: all implementations give the same table. With impl="triton", a strategy's first
    draw on a device copies its constants there, so it must come before a graph capture.
    Raises ValueError where layers, batch, stage or step are not as above.
    """
    strategy.check_layers(layers)
    stage = range(layers) if stage is None else stage
    if stage.step != 1 or not 0 <= stage.start < stage.stop <= layers:
        raise ValueError(f"stage must be a range of step 1 within {layers} layers, got {stage}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if isinstance(step, Tensor) and (step.dtype != torch.int64 or step.ndim):
        raise ValueError(
            "step must be an int or an int64 tensor of shape (),"
            f" got {step.dtype} of shape {tuple(step.shape)}"
        )
    if device is None:
        device = step.device if isinstance(step, Tensor) else torch.get_default_device()
    device = torch.device(device)
    backend = backend_for(__package__, resolve_impl(impl, device), device)
    return backend.draw(strategy, seed % 2**64, step, stage, batch, device)
