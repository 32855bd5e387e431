"""Who writes a gradient under device dispatch: one mixer of one layer, for each parameter.

Its backward pass writes into the memory of `.grad`, over what a step left there or added to it, and
returns nothing to autograd that could be summed. So no other module may train the same parameter,
and the parameter has to be the same tensor from the forward pass to the backward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


class Layer(Protocol):
    """A StochasticMixer."""

    layer: int
    mixers: nn.ModuleDict


def refuse_shared_within(mixers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where mixers of a layer, by name, share a parameter that trains."""
    owners: dict[Tensor, str] = {}
    for name, mixer in mixers.items():
        for path, parameter in mixer.named_parameters(name, remove_duplicate=False):
            if parameter.requires_grad and owners.setdefault(parameter, path) != path:
                raise ValueError(
                    "dispatch='device' writes each parameter's gradient once, but "
                    f"{owners[parameter]} and {path} are the same"
                )


def refuse_shared_beyond(layers: Sequence[tuple[str, Layer]], model: nn.Module) -> None:
    """Raise ValueError where a layer under device dispatch shares a parameter that trains with
    another one, or with anything else in the model.

    layers: all of them, with their paths in the model.
    """
    owners: dict[Tensor, Layer] = {}
    for path, layer in layers:
        for parameter in layer.mixers.parameters():
            if owners.setdefault(parameter, layer) is not layer and parameter.requires_grad:
                raise shared(owners[parameter], path)
    inside = tuple(f"{path}." if path else "" for path, _ in layers)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in owners and parameter.requires_grad and not path.startswith(inside):
            raise shared(owners[parameter], path)


def shared(owner: Layer, path: str) -> ValueError:
    return ValueError(
        "dispatch='device' takes mixers that share no parameter that trains, but one of layer "
        f"{owner.layer} is also in {path}"
    )


def refuse_exchanged(mixers: Sequence[nn.Module], saved: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless the mixers' parameters are those that autograd has saved. Gradient
    checkpointing hands out others in their place, whose gradients would still go to them."""
    known = {id(parameter) for parameter in saved}
    others = [own for mixer in mixers for own in mixer.parameters() if id(own) not in known]
    if not others:
        return
    heirs = {id(heir_of(parameter)) for parameter in saved if parameter.requires_grad}
    frozen = {parameter.data_ptr() for parameter in saved if not parameter.requires_grad}
    if any(id(p) not in heirs if p.requires_grad else p.data_ptr() not in frozen for p in others):
        raise RuntimeError(
            "a mixer's parameter was exchanged between its forward and its backward pass, as "
            "torch.func.functional_call does: dispatch='device' takes none"
        )


def heir_of(leaf: Tensor) -> Tensor | None:
    """The tensor that autograd adds a leaf's gradients to."""
    return getattr(get_gradient_edge(leaf).node, "variable", None)
