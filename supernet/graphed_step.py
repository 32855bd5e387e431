"""A whole training step as one CUDA graph: captured once, replayed for every mixer table."""

from collections.abc import Callable

import torch


class GraphedStep:
    """Runs a step eagerly at first, captures it, and from then on replays it.

    step: draw, forward, backward, clipping and optimizer, all on one CUDA device. It reads its
        inputs from tensors that stay where they are, which the caller fills before each call, and
        draws its table from a counter that it advances itself. It asks the device nothing.
    warmup: how many of the first calls run eagerly, at least 1: that compiles kernels and makes
        the memory that outlives a step. They are steps like any other.
    other_threads: whether threads that are not the step's may ask the device meanwhile.

    Raises ValueError where there is no CUDA. A step that cannot be captured raises torch's error.
    """

    def __init__(self, step: Callable[[], object], warmup: int = 3, *, other_threads: bool = False):
        if not torch.cuda.is_available():
            raise ValueError("a step is captured in a CUDA graph, but there is no CUDA device")
        if warmup < 1:
            raise ValueError(f"warmup takes at least 1, got {warmup}")
        self.step, self.warmup = step, warmup
        self.errors = "thread_local" if other_threads else "global"  # what breaks a capture
        self.stream = torch.cuda.Stream()  # nothing is captured on the default one
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.warmup > 0:
            self.warmup -= 1
            self._eagerly()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode=self.errors):
                self.step()
            self.graph = graph
        self.graph.replay()

    def _eagerly(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
