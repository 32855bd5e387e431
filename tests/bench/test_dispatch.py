"""The ways of bench/dispatch.py that a CPU runs follow one table to the same step."""

import torch
from torch import Tensor

import tossup
from bench.dispatch import Stack

LAYERS, HIDDEN, KEPT = 3, 16, 7.0


def stack(way: str) -> Stack:
    torch.manual_seed(0)
    return Stack(LAYERS, HIDDEN, way, [])


def results(stack: Stack, x: Tensor, table: tossup.MixerTable) -> tuple[list, list]:
    """The output with the gradients of what is shared, and those of each (layer, mixer)."""
    x = x.clone().requires_grad_()
    out = stack(x, table, None)
    out.square().sum().backward()
    mixers = [mixer for layer in stack.mixers for mixer in layer.mixers.values()]
    gated = [[p.grad for p in mixer.parameters()] for mixer in mixers]
    return [out, x.grad, *(p.grad for p in stack.norms.parameters())], gated


def test_conditional_nodes_run_the_mixers_that_branches_run():
    x = torch.randn(2, 5, HIDDEN)
    for step in range(4):
        table = tossup.draw(tossup.Strategy(2), 0, step, LAYERS, 2)
        branches, conditional = stack("host"), stack("conditional")
        for parameter in conditional.mixers.parameters():
            parameter.grad = torch.full_like(parameter, KEPT)
        (expected, of_branches), (ours, gated) = (
            results(each, x, table) for each in (branches, conditional)
        )
        torch.testing.assert_close(ours, expected)
        for used, theirs, mine in zip(table.count.flatten() > 0, of_branches, gated, strict=True):
            if used:
                torch.testing.assert_close(mine, theirs)
            else:
                assert all((gradient == KEPT).all() for gradient in mine)
