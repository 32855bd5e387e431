"""Gradients of ops: as torch.library has them, and in eager mode for half the host's time.

What torch.library registers fills in default arguments at each call, in a time that grows with the
square of their number: for the 17 of flash attention as long as all that its launch takes the host.
Ops here have none to fill in, so that a plain autograd.Function does. torch.compile goes on with
what is registered, as it traces no such function that takes one tensor as two of its inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def differentiable(
    op: CustomOpDef, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an op gradients. Returns the op as eager mode had better call it, by position.

    setup_context, backward: as of torch.autograd.Function.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    name = backward.__module__.split(".")[-2]  # what a graph's nodes are called
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        )
        if not wanted or torch.compiler.is_compiling():
            return op(*inputs)
        return function.apply(*inputs)

    return call
