"""Registration of ops where torch.library's own would take the host longer than a launch does.

Gradients and writes, as torch.library.custom_op has them, fill in default arguments at each call,
in a time that grows with the square of how many there are: 30 µs for 13. Ops here have no defaults.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import CustomOpDef

LIBRARY = torch.library.Library("tossup", "FRAGMENT")
MUTATING: dict[str, "MutatingOp"] = {}  # by qualified name


class MutatingOp:
    """An op that writes some of its arguments, which are tensors, lists of them or None.

    It is called by position, without gradients: what it writes is marked as changed, so that
    autograd refuses to use what it had saved of it.
    function: what it does, annotated as torch.library.custom_op wants it.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: tuple[str, ...]):
        signature = inspect.signature(function)
        self.name, self.function = f"tossup::{name}", function
        self.places = [list(signature.parameters).index(written) for written in mutates_args]
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # As custom_op does, lest dynamo trace what a compiled graph calls
        untraced = torch._disable_dynamo(function)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, untraced, key)
        self.overload = getattr(torch.ops.tossup, name).default
        if signature.return_annotation is None:
            self.register_fake(lambda *inputs: None)
        MUTATING[self.name] = self

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Of an op that returns something: the same without data."""
        torch.library.register_fake(self.name, fake, lib=LIBRARY)

    def __call__(self, *inputs: Any) -> Any:
        if not torch.compiler.is_compiling():  # which knows from the schema
            for place in self.places:
                if inputs[place] is not None:
                    increment_version(inputs[place])
        return self.overload(*inputs)


def mutating_op(name: str, mutates_args: tuple[str, ...]) -> Callable[..., MutatingOp]:
    """The decorator that makes a function a MutatingOp, tossup::name."""
    return lambda function: MutatingOp(name, function, mutates_args)


def differentiable(
    op: CustomOpDef, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an op gradients. Returns the op as eager mode had better call it, by position.

    setup_context, backward: as of torch.autograd.Function, which eager mode takes. torch.compile
    takes what is registered: it traces no such function that has one tensor as two of its inputs.
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
        if not wanted or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return op(*inputs)
        return function.apply(*inputs)

    return call
