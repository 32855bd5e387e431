"""Layers behind torch.compile and torch.export."""

import pytest
import torch
from torch import nn

from tossup import Attention, Mamba, MixerTable, StochasticMixer


def a_layer(dispatch: str) -> StochasticMixer:
    torch.manual_seed(0)
    mixers = {"attention": Attention(16, 2), "mamba": Mamba(16)}
    return StochasticMixer(mixers, dispatch=dispatch)


class Ops:
    """A backend of torch.compile that runs graphs as they are, and keeps the names of their ops."""

    def __init__(self):
        self.names = set()

    def __call__(self, graph, inputs):
        self.names |= {str(node.target) for node in graph.graph.nodes}
        return graph


def test_device_dispatch_stays_out_of_graphs():
    """Inductor gets wrong what is written through views of bytes as other dtypes, as slots are."""
    layer, ops = a_layer("device"), Ops()
    compiled = torch.compile(lambda x, table: layer(2 * x, table=table), backend=ops)
    x, table = torch.randn(2, 5, 16), MixerTable.of(torch.tensor([[0, 1]]), 2, 2)
    results = []
    for function in (compiled, lambda x, table: layer(2 * x, table=table)):
        leaf = x.clone().requires_grad_()
        layer.forget_gradients()
        out = function(leaf, table)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert ops.names and not any("tossup" in name for name in ops.names)


@pytest.mark.parametrize("make", [
    lambda: StochasticMixer({"linear": nn.Linear(16, 16)}),
    lambda: a_layer("host"),
    lambda: a_layer("device"),
], ids=["linear", "host", "device"])  # fmt: skip
def test_a_layer_in_evaluation_is_exported_for_any_batch(make):
    layer = make().eval()
    batch = torch.export.Dim("batch", max=64)
    x = torch.randn(3, 20, 16)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (3, 5):
        x = torch.randn(size, 20, 16)
        torch.testing.assert_close(exported(x), layer(x))
