"""Data parallelism: processes that train one model together, each on samples of its own.

`torchrun` starts them and numbers them. Gradients are added up over the ranks once per step, before
clipping, and so is which mixers a step used; so the ranks' weights stay the same, bit for bit.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE = 2**26  # bytes: enough for the network's full rate, and little beside all gradients

T = TypeVar("T")
NumberT = TypeVar("NumberT", int, Tensor, int | Tensor)


class Ranks:
    """The processes of a run, one for each device: torchrun's, or this one alone.

    device: this process's. On CUDA they talk by NCCL, else by Gloo.
    """

    def __init__(self, device: torch.device):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = rank()
        if self.count > 1 and not dist.is_initialized():
            if device.type == "cuda":
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
                atexit.register(leave)  # or its threads abort a process whose Python ends first

    @property
    def first(self) -> bool:
        """Whether this process writes what all of them have in common."""
        return self.rank == 0

    def own(self, number: NumberT) -> NumberT:
        """This rank's number among those of all ranks, where each one has as many."""
        return number * self.count + self.rank

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the ranks, in place, small ones together in one message. Reads no tensor."""
        if self.count == 1:
            return
        for parts in messages(tensors):
            if len(parts) == 1 and parts[0].is_contiguous():
                dist.all_reduce(parts[0])
                continue
            message = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(message)
            sums = message.split([part.numel() for part in parts])
            for part, total in zip(parts, sums, strict=True):
                part.copy_(total.view_as(part))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on every rank."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()


def leave() -> None:
    """End this process's part in the group, if nobody has yet."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End the process, as sys.exit does, but for one rank of several on CPUs: without the
    destructors of C++, which after a good run abort it now and then, for a thread not joined."""
    if not dist.is_initialized() or dist.get_backend() != "gloo":
        sys.exit(code)
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def messages(tensors: Sequence[Tensor], size: int = MESSAGE) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and of `size` bytes at most, or one that is larger; in one order."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        parts: list[Tensor] = []
        taken = 0
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if parts and taken + tensor.nbytes > size:
                yield parts
                parts, taken = [], 0
            parts.append(tensor)
            taken += tensor.nbytes
        yield parts


def rank() -> int:
    """This process's number among torchrun's; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))
