"""Mixers of any kind in one CUDA graph: each is the body of an IF node, which a flag turns on.

torch has captured such nodes since 2.13 (`CUDAGraph.begin_capture_to_if_node`). What is in a body
keeps its memory whether it runs or not, so a layer holds the sum over its mixers. On a CPU branches
stand for the nodes; these have not run yet, so compare the first replay with an eager step.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

AVAILABLE = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")


def follow(mixers: Iterable[nn.Module], x: Tensor, used: Tensor) -> Tensor:
    """The output of the one mixer that is used, on x.

    used: bool, (mixers,), on x's device. Parameters have gradients already, dense and for as long
    as the graph lives: a backward stores into those of the mixer that was used, and adds nothing.
    """
    out = torch.empty_like(x)
    for mixer, flag in zip(mixers, used.unbind(), strict=True):
        out = _Conditional.apply(x, out, flag, mixer)
    return out


def when(flag: Tensor, run: Callable[[], None]) -> None:
    """Run it where the flag, bool and (), holds: in a capture decided at each replay, else now."""
    if flag.is_cuda and torch.cuda.is_current_stream_capturing():
        graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()  # type: ignore[attr-defined]
        graph.begin_capture_to_if_node(flag)
        try:
            # The body's own stream ends with it, but backward goes where forward was recorded
            body, side = torch.cuda.current_stream(), side_stream(flag.device)
            side.wait_stream(body)
            with torch.cuda.stream(side):
                run()
            body.wait_stream(side)
        finally:
            graph.end_capture_to_conditional_node()
    elif flag.item():
        run()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Conditional(torch.autograd.Function):
    """Writes the mixer's output over `out`, if its flag holds; otherwise passes `out` on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, flag: Tensor, mixer: nn.Module) -> Tensor:
        ctx.flag, ctx.mixer, ctx.x = flag, mixer, x.detach().requires_grad_()
        ctx.mark_dirty(out)

        def run() -> None:
            with torch.enable_grad():
                ctx.out = mixer(ctx.x)
            out.copy_(ctx.out)

        when(flag, run)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Exactly one mixer stores its part; the sum of zeros and that one is dx
        dx = torch.zeros_like(ctx.x)

        def run() -> None:
            parameters = [p for p in ctx.mixer.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(ctx.out, [ctx.x, *parameters], dout)
            targets = [dx, *(p.grad for p in parameters)]
            for target, gradient in zip(targets, gradients, strict=True):
                target.copy_(gradient)

        when(ctx.flag, run)
        return dx, dout, None, None
