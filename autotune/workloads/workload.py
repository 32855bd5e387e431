"""A workload: an op on one shape, with the inputs, the peers, the oracle and the floor of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.routing import Route
from ..peaks import Floor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = {dtype: name for name, dtype in DTYPES.items()}

# How many times what the reference loses in the same precision: sums in another order, which
# differs from CPU to CPU, lose up to 2.6 times as much.
ALLOWED = 3

Results = dict[str, Tensor]
Call = Callable[[], Results]
Calls = Mapping[str, Call]  # by direction
Index = tuple[slice, ...]


class MissingPeer(Exception):
    """A peer that cannot run here; the message says why."""


def size(
    default: int, about: str, least: int = 1, most: int | None = None, divides: str | None = None
) -> Any:
    """A key that is part of every name. divides: another key, whose divisor it is."""
    bounds = {"least": least, "most": most, "divides": divides}
    return field(default=default, metadata={"about": about, **bounds})


def option(default: Any, about: str, least: int = 0, divides: str | None = None) -> Any:
    """A key that a name holds where it differs from the default."""
    bounds = {"least": least, "divides": divides}
    return field(default=default, metadata={"about": about, **bounds, "option": True})


@dataclass(frozen=True)
class Expected:
    """A part of one result, by the float64 reference.

    result: its name. index: which part. value: float64. allowed: the largest error, absolute.
    """

    result: str
    index: Index
    value: Tensor
    allowed: float

    def error(self, results: Results) -> float:
        """The largest absolute error; NaN counts as infinite."""
        found = results[self.result][self.index].double()
        return (found - self.value).abs().nan_to_num(nan=float("inf")).max().item()


@dataclass(frozen=True)
class Prepared:
    """A workload with its inputs on a device.

    ours: the call of each direction. peers: makes those of each peer, or raises MissingPeer.
    expected: by the reference, computed when first called.
    """

    ours: Calls
    peers: Mapping[str, Callable[[], Calls]]
    expected: Callable[[], list[Expected]]

    def wrong(self, results: Results) -> str | None:
        """The first result that is further off than allowed, as a sentence; None if there is none.

        Parts of which `results` holds nothing are not compared, but one has to be.
        """
        known = {part.result for part in self.expected()}
        if not known & results.keys():
            return f"it gives {', '.join(results) or 'nothing'}, the reference {', '.join(known)}"
        for part in self.expected():
            if part.result in results and not part.error(results) <= part.allowed:
                return (
                    f"{part.result} is off by {part.error(results):.1e}, "
                    f"allowed are {part.allowed:.1e}"
                )
        return None


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """The keys are the op's sizes; `op`, `directions` and `per_sample` belong to the class.

    An op's class says how inputs are made and what ours and the peers do with them. Results of all
    of them are named alike, and lie as ours, by views that cost no copy.
    """

    op: ClassVar[str]
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward", "forward+backward")

    batch: int = size(1, "samples")
    dtype: str = field(default="bf16", metadata={"about": "of activations: bf16, fp16 or fp32"})
    active: int | None = option(
        None, "samples that a route takes, the first ones; 0: gated off; null: no route"
    )

    def __post_init__(self) -> None:
        for key in fields(self):
            value, least = getattr(self, key.name), key.metadata.get("least", 0)
            if key.name == "dtype":
                if value not in DTYPES:
                    raise ValueError(f"dtype takes {', '.join(DTYPES)}, got {value!r}")
            elif isinstance(key.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{key.name} takes true or false, got {value!r}")
            elif value is None and key.default is None:
                continue
            elif not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{key.name} takes a whole number from {least} on, got {value!r}")
            self._check_bounds(key)
        if self.active is not None and self.active > self.batch:
            raise ValueError(f"active takes at most the batch of {self.batch}, got {self.active}")

    def _check_bounds(self, key: Field) -> None:
        value, most, whole = (
            getattr(self, key.name), key.metadata.get("most"), key.metadata.get("divides"),
        )  # fmt: skip
        if most is not None and value > most:
            raise ValueError(f"{key.name} takes {key.metadata['least']} to {most}, got {value}")
        if whole is not None and getattr(self, whole) % value:
            raise ValueError(
                f"{key.name} takes a divisor of {whole} = {getattr(self, whole)}, got {value}"
            )

    @classmethod
    def keys(cls) -> tuple[Field, ...]:
        """The batch first, then the op's own, and last what all ops have."""
        batch, dtype, active, *own = fields(cls)
        return batch, *own, dtype, active

    @property
    def named(self) -> dict[str, Any]:
        """What its name holds: no option that is at its default, which revisions before that option
        need not know."""
        return {
            key.name: getattr(self, key.name)
            for key in self.keys()
            if not key.metadata.get("option") or getattr(self, key.name) != key.default
        }

    @property
    def name(self) -> str:
        """What one would type after `tossup bench` to get it."""
        words = (f"{key}={str(value).lower()}" for key, value in self.named.items())
        return " ".join((self.op, *words))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def samples(self) -> int:
        """How many of the batch there is work for."""
        return self.batch if self.active is None else self.active

    @property
    def tokens(self) -> int:
        """How many there is work for, of all samples together."""
        return self.samples

    def products(self, flops: float) -> dict[str, float]:
        """FLOPs of matrix products, as a floor counts them in this dtype."""
        return {"float32_flops" if self.dtype == "fp32" else "matrix_flops": flops}

    def prepare(self, device: torch.device | str, seed: int = 0) -> Prepared:
        """Make the inputs, and what runs on them. Peers of a routed workload get the samples that
        the route takes, so that they do the same work and find their inputs in one piece."""
        inputs = self.inputs(torch.Generator(device).manual_seed(seed))
        route = None
        if self.active is not None:
            samples = torch.arange(self.batch, dtype=torch.int32, device=device)
            route = Route(torch.tensor(self.active, dtype=torch.int32, device=device), samples)
        taken = {
            name: x[: self.samples] if name in self.per_sample else x for name, x in inputs.items()
        }
        oracle: list[Expected] = []

        def expected() -> list[Expected]:
            if not oracle and self.samples > 0:
                oracle.extend(self.expect(taken))
            return oracle

        peers = self.peers(taken) if self.samples > 0 else {}
        return Prepared(self.ours(inputs, route), peers, expected)

    def expect(self, inputs: dict[str, Tensor]) -> Iterator[Expected]:
        """What is allowed against the reference in float64: ALLOWED times the error of the
        reference in the workload's dtype, and as many roundings in that dtype. A gradient that is
        summed over all tokens, in float32 and in whatever order, is rounded log2 of them times at
        least; such errors add up as their root. Whole inputs may be too many for float64, so that
        an op chooses of which parts of its results to compute the reference."""
        summed = torch.finfo(torch.float32).eps * math.log2(max(2, self.tokens)) ** 0.5
        rounding = torch.finfo(self.torch_dtype).eps
        exactly = self.reference(inputs, lambda x: x.detach().double())
        roughly = self.reference(inputs, lambda x: x.detach())
        for (name, index, value), (_, _, rough) in zip(exactly, roughly, strict=True):
            error = (rough.double() - value).abs().max()
            with_batch = name == "out" or name.removeprefix("d") in self.per_sample
            band = rounding if with_batch else max(rounding, summed)
            yield Expected(name, index, value, ALLOWED * (error + band * value.abs().max()).item())

    per_sample: ClassVar[frozenset[str]]  # the inputs that have a batch

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """By name, on the generator's device; where there are gradients, `dout`, the output's."""

    @abstractmethod
    def ours(self, inputs: dict[str, Tensor], route: Route | None) -> Calls: ...

    @abstractmethod
    def peers(self, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Calls]]:
        """All that are meant to run on this device, whether they can or not."""

    @abstractmethod
    def reference(
        self, inputs: dict[str, Tensor], cast: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Index, Tensor]]:
        """Parts of all results, by our reference, from inputs that `cast` is to be called on."""

    @abstractmethod
    def floor(self, direction: str) -> Floor:
        """Of one direction, without a plus."""

    def flops(self, direction: str) -> float:
        """What TFLOP/s are counted by: the products of matrices that the mathematics needs."""
        return 0.0

    def parts(self, direction: str) -> list[Floor]:
        """The floors of a direction's passes, one after the other; nothing without a sample."""
        return [self.floor(part) if self.samples else Floor() for part in direction.split("+")]


@dataclass(frozen=True, kw_only=True)
class SequenceWorkload(Workload):
    """An op on whole sequences, all of one length."""

    seqlen: int = size(4096, "tokens of a sample")

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen


class Advance:
    """A call of an op that overwrites a state: it goes on from where the last one left it.

    step: from the state, which it overwrites, to the output. state: what the first call begins
    with; it stays as it is.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], state: Tensor):
        self.step, self.beginning, self.state = step, state, state.clone()

    def __call__(self) -> Results:
        return {"out": self.step(self.state), "state": self.state}

    def anew(self) -> Results:
        self.state.copy_(self.beginning)
        return self()


def first_results(call: Call) -> Results:
    """What a call gives when it is the first, which is what the reference knows."""
    return call.anew() if isinstance(call, Advance) else call()


def differentiable(
    forward: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, tuple[int, ...]] | None = None,
) -> Calls:
    """The calls of a function that autograd differentiates.

    forward: takes the inputs by name, all but `dout`. axes: for each input of another layout, and
    `out`, the place in ours of each of its axes; those tensors are laid out anew here, and results
    are viewed as ours.
    The backward pass alone runs on a graph that its first call builds, on that call's stream.
    """
    axes = axes or {}
    dout = lay_out(inputs["dout"], axes.get("out"))
    leaves = {n: lay_out(x, axes.get(n)).requires_grad_() for n, x in inputs.items() if n != "dout"}
    kept: list[Tensor] = []

    def view(name: str, x: Tensor) -> Tensor:
        return x.permute(inverse(axes[name])) if name in axes else x

    def gradients(out: Tensor, again: bool) -> Results:
        found = torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=again)
        return {f"d{n}": view(n, x) for n, x in zip(leaves, found, strict=True)}

    def run_forward() -> Results:
        return {"out": view("out", forward(**leaves))}

    def run_backward() -> Results:
        if not kept:
            kept.append(forward(**leaves))
        return gradients(kept[0], again=True)

    def run_both() -> Results:
        out = forward(**leaves)
        return {"out": view("out", out), **gradients(out, again=False)}

    return {"forward": run_forward, "backward": run_backward, "forward+backward": run_both}


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A peer that torch compiles, for the one shape that it is called with."""
    # Every shape is compiled anew, and torch keeps only so many versions of one function
    torch._dynamo.reset()
    return torch.compile(forward, dynamic=False, fullgraph=True)


def by_torch(
    forward: Callable[..., Any], inputs: Mapping[str, Tensor]
) -> dict[str, Callable[[], Calls]]:
    """The peers that a function of torch's own ops is: as it stands, and on a GPU compiled."""
    peers: dict[str, Callable[[], Calls]] = {"torch": lambda: differentiable(forward, inputs)}
    if inputs["dout"].device.type == "cuda":
        peers["torch.compile"] = lambda: differentiable(compiled(forward), inputs)
    return peers


def lay_out(x: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """A tensor of its own, contiguous in the order of these axes."""
    x = x.detach()
    return x.clone() if axes is None else x.permute(axes).contiguous()


def inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float32: the same ones in every dtype, but for rounding."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)
