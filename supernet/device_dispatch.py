"""Device dispatch: all mixers of a layer are launched, and the kernels follow the mixer table.

A layer is one step of autograd. Its mixers write their forward and backward passes out, over memory
that is given to them, so that each sample has one writer: the mixer it is routed to writes its rows
of the output, of dx, and its slot. Nothing is summed or selected afterwards, and the host never
learns who ran.

A slot holds what the mixer keeps of one sample for the backward pass. All mixers lay their tensors
out in the same slots, which are as large as the largest mixer needs, not as all of them together.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.accumulate import accumulate_into
from ..kernels.backend import Backend, resolve_impl
from ..kernels.linear import linear_into, weight_gradient_into
from ..kernels.routing import Route
from .mixers.scan_mixer import StepProjection
from .ownership import refuse_exchanged

ALIGNMENT = 128  # bytes: a cache line, and more than any vector load or copy engine asks for

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@runtime_checkable
class RoutedMixer(Protocol):
    """A mixer that device dispatch can launch: its passes write into given memory, by a route.

    left: how many tokens before its own it sees, -1 for all; None is a scan.
    """

    @property
    def left(self) -> int | None: ...

    def slot_layout(self, seqlen: int, dtype: torch.dtype, impl: str) -> Layout:
        """Shape and dtype, for one sample, of every tensor that forward keeps for backward."""

    def routed_forward(self, run: "Run", x: Tensor, out: Tensor) -> None:
        """Write the route's samples of the output, and their slots."""

    def routed_backward(self, run: "Run", dout: Tensor, x: Tensor, dx: Tensor) -> None:
        """Write the route's samples of dx, and add to the gradients of the parameters."""

    def routed_parameters(self) -> Iterable[Tensor | None]:
        """The parameters that the passes read, None where it was made without one: all it has."""


# Modules whose tensors the passes read, without calling them
PLAIN = {nn.Linear, nn.Conv1d, StepProjection}


def check_routed(name: str, mixer: nn.Module) -> None:
    """Raise ValueError unless device dispatch computes all that calling the mixer would.

    name: what messages call it.
    """
    kind = type(mixer)
    if not isinstance(mixer, RoutedMixer):
        raise ValueError(
            "dispatch='device' takes mixers that follow a route, those of tossup.supernet.mixers, "
            f"got {kind.__name__} for {name}"
        )
    if "routed_forward" not in vars(kind):  # nor what a subclass changed besides
        raise ValueError(
            f"dispatch='device' takes classes with a routed_forward of their own, got "
            f"{kind.__name__} for {name}"
        )
    for path, module in mixer.named_modules(prefix=name):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"dispatch='device' calls no module, so none may be hooked or patched: {path} is"
            )
        if module is not mixer and type(module) not in PLAIN:
            raise ValueError(
                "dispatch='device' takes mixers made of Linear and Conv1d as they come from torch,"
                f" got {type(module).__name__} for {path}"
            )
    known = {id(parameter) for parameter in mixer.routed_parameters()}
    for path, parameter in mixer.named_parameters(prefix=name):
        if id(parameter) not in known:
            raise ValueError(f"dispatch='device' would ignore {path}: {kind.__name__} has no such")


@dataclass(frozen=True)
class Run:
    """One mixer's part in one pass of a layer.

    route: its samples. slot: its tensors by name, (batch, …), each sample's within the sample's
    slot. written: int32, (), on the device: 0 where the gradients of its parameters hold nothing
    yet. extra: what was computed for it ahead, such as rotary angles. seq_idx, bounds: sequences in
    the rows, as scans and as attention take them, all made before mixers part on streams.
    """

    route: Route
    slot: Mapping[str, Tensor]
    written: Tensor
    impl: Backend
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The route as ops take it."""
        return self.route.count, self.route.samples

    @property
    def seq_idx(self) -> Tensor | None:
        return self.extra.get("seq_idx")

    @property
    def bounds(self) -> Tensor | None:
        return self.extra.get("bounds")

    def fresh(self, name: str) -> Tensor:
        """Memory like a tensor of the slot that nobody wrote, one sample after the other."""
        return torch.empty_like(self.slot[name], memory_format=torch.contiguous_format)

    def linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        linear_into(out, x, weight, bias, route=self.route, impl=self.impl)

    def linear_backward(
        self,
        dout: Tensor,
        x: Tensor,
        dx: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        add: bool = False,
    ) -> None:
        """Write dx, or add to it, and the gradients of weight and bias."""
        linear_into(dx, dout, weight.t(), accumulate=add, route=self.route, impl=self.impl)
        bias_grad = gradient_of(bias) if bias is not None and bias.requires_grad else None
        if not weight.requires_grad and bias_grad is None:
            return
        weight_gradient_into(
            gradient_of(weight) if weight.requires_grad else torch.empty_like(weight),
            dout,
            x,
            bias_grad=bias_grad,
            written=self.written,
            route=self.route,
            impl=self.impl,
        )

    def add_gradients(self, *pairs: tuple[Tensor | None, Tensor]) -> None:
        """Small parameters, and what their ops returned as gradients: summed over the samples."""
        trained = [(gradient_of(p), g) for p, g in pairs if p is not None and p.requires_grad]
        accumulate_into(
            [total for total, _ in trained],
            [gradient for _, gradient in trained],
            written=self.written,
            route=self.route,
            impl=self.impl,
        )


def gradient_of(parameter: Tensor) -> Tensor:
    """The memory of its gradient; zeros where there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return parameter.grad


def slot_bytes(layout: Layout) -> int:
    return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in layout.values())


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def carve(slots: Tensor, layout: Layout) -> dict[str, Tensor]:
    """A mixer's tensors (batch, …), one after the other in each sample's slot.

    slots: (batch, bytes), uint8.
    """
    tensors, start = {}, 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        tensors[name] = slots[:, start : start + size].view(dtype).unflatten(1, shape)
        start += aligned(size)
    return tensors


class DeviceDispatch(torch.autograd.Function):
    """A layer's mixers on their samples: (batch, seqlen, hidden) to the same.

    count: (mixers,), samples: (mixers, batch): the layer's part of the plan. written: (mixers,),
    as in Run. extras: each mixer's. streams: whether each mixer is launched on a stream of its own.
    parameters: the mixers' own, so that autograd knows of them; their gradients are written in the
    backward pass, not returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mixers: Sequence[RoutedMixer],
        count: Tensor,
        samples: Tensor,
        written: Tensor,
        extras: Sequence[Mapping[str, Any]],
        streams: bool,
        *parameters: Tensor,
    ) -> Tensor:
        impl = resolve_impl("auto", x.device)
        if impl == "reference":
            raise ValueError("TOSSUP_IMPL must be auto, triton or cpu for dispatch='device'")
        layouts = [mixer.slot_layout(x.shape[1], x.dtype, impl) for mixer in mixers]
        size = max(slot_bytes(layout) for layout in layouts)
        slots = torch.empty((len(x), size), dtype=torch.uint8, device=x.device)
        ctx.mixers, ctx.layouts, ctx.extras = mixers, layouts, extras
        ctx.written, ctx.impl, ctx.streams = written, impl, streams
        out = x.new_empty(x.shape)
        for mixer, run in runs(ctx, slots, count, samples):
            mixer.routed_forward(run, x, out)
        # the parameters too, so that autograd finds out who changes them before the backward pass
        ctx.save_for_backward(x, slots, count, samples, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, slots, count, samples, *parameters = ctx.saved_tensors
        refuse_exchanged(ctx.mixers, parameters)
        dx = x.new_empty(x.shape)
        for mixer, run in runs(ctx, slots, count, samples):
            mixer.routed_backward(run, dout, x, dx)
        torch.maximum(ctx.written, count, out=ctx.written)
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def runs(
    ctx: Any, slots: Tensor, count: Tensor, samples: Tensor
) -> Iterator[tuple[RoutedMixer, Run]]:
    """Each mixer and its part, one after the other, or side by side on streams of their own."""
    fork = Fork(slots.device, len(ctx.mixers)) if ctx.streams and slots.is_cuda else None
    for index, mixer in enumerate(ctx.mixers):
        route = Route(count[index], samples[index])
        slot = carve(slots, ctx.layouts[index])
        with fork.branch(index) if fork else nullcontext():
            yield mixer, Run(route, slot, ctx.written[index], ctx.impl, ctx.extras[index])
    if fork:
        fork.join()


class Fork:
    """Branches of work on a GPU that may overlap: the first on the current stream, the others on
    side streams, which begin after what was launched before the fork.

    Memory that a branch allocates is its stream's. What outlives the branch is used after the join
    alone, and what is allocated in a later branch of that stream comes after the next fork, so no
    memory is taken up again while it is read.
    """

    def __init__(self, device: torch.device, branches: int):
        self.main = torch.cuda.current_stream(device)
        self.start = self.main.record_event()
        self.sides = side_streams(device, branches - 1)

    def branch(self, index: int) -> AbstractContextManager:
        if index == 0:
            return nullcontext()
        side = self.sides[index - 1]
        side.wait_event(self.start)
        return torch.cuda.stream(side)

    def join(self) -> None:
        for side in self.sides:
            self.main.wait_stream(side)


@cache
def side_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """The same ones for all layers, which follow each other."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))
