"""Which implementation runs: resolved here, and nowhere else."""

import importlib
import os
from types import ModuleType
from typing import Any, Literal, get_args

import torch

Backend = Literal["triton", "cpu", "reference"]
Impl = Literal["auto"] | Backend


def resolve_impl(impl: Impl, device: torch.device) -> Backend:
    """Name the implementation for tensors on `device`.

    `auto` is what `TOSSUP_IMPL` says, else Triton on CUDA and the CPU backend elsewhere. An
    explicit choice is returned as it is: it runs or raises, and never falls back.
    Raises ValueError where the argument or the variable names no implementation.
    """
    source, chosen = "impl", str(impl)
    if chosen == "auto":
        source, chosen = "TOSSUP_IMPL", os.environ.get("TOSSUP_IMPL") or "auto"
    if chosen == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    for backend in get_args(Backend):
        if chosen == backend:
            return backend
    raise ValueError(f"{source} must be auto, triton, cpu or reference, got {chosen!r}")


def resolve_for(impl: Impl, first: torch.Tensor, *others: torch.Tensor | None) -> Backend:
    """Name the implementation for an op's tensors.

    Raises ValueError where they are not all on one device: torch would take what only describes a
    result, as for meta tensors, and return memory that nobody wrote.
    """
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"all tensors must be on one device, got {first.device} and {tensor.device}"
            )
    return resolve_impl(impl, first.device)


def load_backend(package: str, impl: str) -> ModuleType:
    """The `cpu.py` or `kernel.py` of an op's folder, imported where it first runs.

    So numba and Triton stay out of `import tossup`.
    package: the op's `__package__`.
    """
    return importlib.import_module(f"{package}.{'kernel' if impl == 'triton' else impl}")


def backend_for(package: str, impl: str, device: torch.device) -> ModuleType:
    """`load_backend` of one that runs on the device.

    Raises ValueError for impl="triton" on the CPU where Triton does not interpret.
    """
    if impl == "triton" and device.type == "cpu":
        refuse_cpu_unless_interpreted()
    return load_backend(package, impl)


def call_backend(
    package: str,
    impl: str,
    function: str,
    first: torch.Tensor | list[torch.Tensor],
    *others: Any,
) -> Any:
    """Call a backend's function on the GPU that holds its first argument, a tensor or some.

    Triton launches on the current device, whichever its tensors are on. Raises ValueError for
    impl="triton" where tensors are on the CPU and Triton does not interpret.
    """
    tensor = first[0] if isinstance(first, list) else first
    backend = backend_for(package, impl, tensor.device)
    with torch.cuda.device_of(tensor):
        return getattr(backend, function)(first, *others)


def refuse_cpu_unless_interpreted() -> None:
    import triton

    if not triton.knobs.runtime.interpret:
        raise ValueError(
            "impl='triton' takes tensors on a GPU, or TRITON_INTERPRET=1 in the environment before "
            "Triton is imported, got tensors on the CPU"
        )
