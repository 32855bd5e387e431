"""Selective scan, against mamba-ssm: its reference on a CPU, its CUDA kernel on a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.routing import Route
from ...kernels.selective_scan import selective_scan
from ...kernels.selective_scan.ops import CHUNKS
from ...kernels.selective_scan.reference import selective_scan_reference
from ..peaks import Floor
from .upstream import extension, mamba_ssm, transformers_scan
from .workload import (
    Calls,
    Index,
    MissingPeer,
    Results,
    SequenceWorkload,
    differentiable,
    inverse,
    lay_out,
    normal,
    size,
)

STEPS = 256  # tokens between the states that the reference keeps for its backward pass
CHANNELS = 16  # of which sums over all samples are compared

# mamba-ssm's layout: channels, or groups and states, before the tokens
AXES: dict[str, tuple[int, ...]] = {name: (0, 2, 1) for name in ("u", "delta", "z", "out")} | {
    name: (0, 2, 3, 1) for name in ("B", "C")
}


@dataclass(frozen=True, kw_only=True)
class SelectiveScan(SequenceWorkload):
    op = "selective_scan"
    per_sample = frozenset(("u", "delta", "B", "C", "z", "dout"))

    dim: int = size(4096, "channels")
    state: int = size(16, "states of a channel")
    groups: int = size(1, "groups of B and C; divides dim", divides="dim")

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """With a gate, a skip and softplus, and numbers as Mamba begins with: A is -1, -2, …, and
        steps are around 0.01. A, D and the bias are float32."""
        of_token = self.batch, self.seqlen, self.dim
        of_group = self.batch, self.seqlen, self.groups, self.state
        shapes: dict[str, tuple[int, ...]] = {
            "u": of_token,
            "delta": of_token,
            "z": of_token,
            "dout": of_token,
        }
        shapes |= {"B": of_group, "C": of_group}
        made = {n: normal(generator, *s, dtype=self.torch_dtype) for n, s in shapes.items()}
        D, bias = (normal(generator, self.dim, dtype=torch.float32) for _ in range(2))
        A = -torch.arange(1.0, self.state + 1, device=D.device).repeat(self.dim, 1)
        return made | {"A": A, "D": D, "delta_bias": bias - 5}

    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls:
        return differentiable(partial(selective_scan, delta_softplus=True, route=route), inputs)

    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        if inputs["u"].device.type != "cuda":
            return {
                "mamba_ssm reference": partial(upstream_reference, inputs),
                "transformers slow path": partial(transformers_slow_path, inputs),
            }
        return {
            "mamba_ssm CUDA": partial(upstream_cuda, inputs, transposes=False),
            "mamba_ssm CUDA, transposes": partial(upstream_cuda, inputs, transposes=True),
        }

    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """What has a batch: the last sample, all channels of the last group. What has none, sums
        over all samples: a few channels."""
        every, of_group = slice(None), self.dim // self.groups
        last = slice(self.samples - 1, self.samples)
        for samples, channels, names in (
            (last, of_group, ("out", "du", "ddelta", "dB", "dC", "dz")),
            (slice(0, self.samples), min(CHANNELS, of_group), ("dA", "dD", "ddelta_bias")),
        ):
            some = slice(self.dim - channels, None)
            index: dict[str, Index] = dict.fromkeys(
                ("u", "delta", "z", "out"), (samples, every, some)
            )
            index |= dict.fromkeys(("B", "C"), (samples, every, slice(self.groups - 1, None)))
            index |= dict.fromkeys(("A", "D", "delta_bias"), (some,))
            parts = {n: cast(x[index[n]]) for n, x in inputs.items() if n != "dout"}
            on_gpu = parts["u"].device.type == "cuda"
            scan = scan_on_cpu if on_gpu else scan_in_steps
            results = scan(parts, cast(inputs["dout"][index["out"]]))
            for name in names:
                yield name, index[name if name == "out" else name[1:]], results[name]

    def floor(self, direction: str) -> Floor:
        channels = self.tokens * self.dim
        states = channels * self.state
        kept = 4 * states / CHUNKS["triton"]
        of_group = self.tokens * self.groups * self.state * self.itemsize
        if direction == "forward":
            return Floor(
                bytes=4 * channels * self.itemsize + kept + 2 * of_group,
                mufu=states,
                instructions=4 * states,
            )
        return Floor(
            bytes=7 * channels * self.itemsize + kept + 4 * of_group,
            mufu=2 * states,
            instructions=14 * states,
        )


def scan_on_cpu(inputs: dict[str, Tensor], dout: Tensor) -> Results:
    """The same by the CPU backend, which tests hold to the reference: a GPU would take minutes to
    launch a loop over tokens."""
    calls = differentiable(
        partial(selective_scan, delta_softplus=True, impl="cpu"),
        {name: x.cpu() for name, x in inputs.items()} | {"dout": dout.cpu()},
    )
    with every_core():
        results = calls["forward+backward"]()
    return {name: x.detach().to(dout.device) for name, x in results.items()}


@contextmanager
def every_core() -> Iterator[None]:
    """Where nothing is timed: 2²⁸ states in float64 take one core 15 s and more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scan_in_steps(inputs: dict[str, Tensor], dout: Tensor) -> Results:
    """Our reference and its gradients, some tokens at a time, as its graph keeps every state."""
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}

    def step(start: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        u, delta, B, C, z = (
            leaves[n][:, start : start + STEPS] for n in ("u", "delta", "B", "C", "z")
        )
        return selective_scan_reference(
            u, delta, leaves["A"], B, C, leaves["D"], z, leaves["delta_bias"], True, state, None
        )

    outs, state = [], None
    for start in range(0, dout.shape[1], STEPS):
        out, state = checkpoint(step, start, state, use_reentrant=False)
        outs.append(out)
    out = torch.cat(outs, 1)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)}


def upstream_reference(inputs: dict[str, Tensor]) -> Calls:
    scan = mamba_ssm("selective_scan_interface").selective_scan_ref
    return differentiable(partial(scan, delta_softplus=True), inputs, AXES)


def transformers_slow_path(inputs: dict[str, Tensor]) -> Calls:
    """The scan of transformers' Mamba where no kernel is installed; it knows one group."""
    scan = transformers_scan()
    if inputs["B"].shape[2] != 1:
        raise MissingPeer("knows one group of B and C only")

    def forward(B: Tensor, C: Tensor, **others: Tensor) -> Tensor:
        return scan(
            hidden_states=others.pop("u"), dt=others.pop("delta"), B=B.squeeze(1), C=C.squeeze(1),
            delta_softplus=True, **others,
        )  # fmt: skip

    return differentiable(forward, inputs, AXES)


def upstream_cuda(inputs: dict[str, Tensor], transposes: bool) -> Calls:
    """mamba-ssm's two kernels, called as its autograd function calls them, without autograd.

    transposes: whether to time those that a model of (batch, seqlen, dim) tensors needs, in and
        out; otherwise all tensors lie as the kernels want them.
    """
    kernels = extension("selective_scan_cuda")
    moved = {
        name: x if name not in AXES else lay_out(x, AXES[name])
        for name, x in inputs.items()
        if name != "dout"
    }
    dout = lay_out(inputs["dout"], AXES["out"])
    kept: list[tuple[Tensor, ...]] = []

    def theirs(name: str) -> Tensor:
        if transposes and name in AXES:
            return lay_out(inputs[name], AXES[name])
        return moved[name]

    def ours(name: str, x: Tensor) -> Tensor:
        axes = AXES.get(name)
        if axes is None:
            return x
        x = x.permute(inverse(axes))
        return x.contiguous() if transposes else x

    def forward() -> tuple[tuple[Tensor, ...], Tensor]:
        u, delta, A, B, C, D, z, bias = (
            theirs(n) for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        )
        ungated, states, out = kernels.fwd(u, delta, A, B, C, D, z, bias, True)
        return (u, delta, A, B, C, D, z, bias, states, ungated), out

    def backward(saved: tuple[Tensor, ...]) -> Results:
        *tensors, states, ungated = saved
        above = lay_out(inputs["dout"], AXES["out"]) if transposes else dout
        du, ddelta, dA, dB, dC, dD, dbias, dz = kernels.bwd(
            *tensors, above, states, ungated, None, True, False
        )
        found = {"u": du, "delta": ddelta, "A": dA, "B": dB, "C": dC, "D": dD, "z": dz}
        found["delta_bias"] = dbias
        return {f"d{name}": ours(name, x) for name, x in found.items()}

    def run_forward() -> Results:
        return {"out": ours("out", forward()[1])}

    def run_backward() -> Results:
        if not kept:
            kept.append(forward()[0])
        return backward(kept[0])

    def run_both() -> Results:
        saved, out = forward()
        return {"out": ours("out", out), **backward(saved)}

    return {"forward": run_forward, "backward": run_backward, "forward+backward": run_both}
