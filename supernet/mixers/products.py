"""The matrix products of a mixer, as a roofline counts them."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ...autotune.workloads import Workload


def products_of(mixer: nn.Module, **shape: Any) -> "list[Workload]":
    """One for each of its linear layers. shape: batch, seqlen and dtype."""
    from ...autotune.workloads import Linear

    return [
        Linear(in_features=layer.in_features, out_features=layer.out_features, **shape)
        for layer in mixer.modules()
        if isinstance(layer, nn.Linear)
    ]
