"""Registration of ops where torch.library's own would take the host longer than a launch does.

Gradients and writes, as torch.library.custom_op has them, fill in default arguments at each call,
in a time that grows with the square of how many there are: 30 µs for 13. Ops here have no defaults.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
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
    op: CustomOpDef,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    twice: bool = False,
) -> Callable[..., Any]:
    """Give an op gradients. Returns the op as eager mode had better call it, by position.

    setup_context, backward: as of torch.autograd.Function, which eager mode takes. torch.compile
    takes what is registered: it traces no such function that has one tensor as two of its inputs.
    twice: whether the gradient is differentiable itself.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    name = backward.__module__.split(".")[-2]  # what a graph's nodes are called
    gradient = {"backward": backward if twice else once_differentiable(backward)}
    eager = function_of(name, forward=forward, **gradient)
    # torch.func wants the context made apart, for which torch takes half as long again
    in_transforms = function_of(
        name, forward=lambda *inputs: op(*inputs), setup_context=setup_context, **gradient
    )
    in_transforms.generate_vmap_rule = True  # of the ops, which torch calls for one after the other

    def call(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(name, inputs)
        wanted = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        )
        if not wanted or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return op(*inputs)
        transformed = torch._C._are_functorch_transforms_active()
        return (in_transforms if transformed else eager).apply(*inputs)

    return call


def function_of(name: str, **members: Callable[..., Any]) -> Any:
    """A torch.autograd.Function."""
    static = {member: staticmethod(function) for member, function in members.items()}
    return type(name, (torch.autograd.Function,), static)


def refuse_tangents(name: str, inputs: Sequence[Any]) -> None:
    """Raises NotImplementedError in place of what torch has for a custom op: zeros.

    inputs: of an op, of which some may be dual, as forward-mode differentiation makes them.
    """
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative: use reverse mode")
