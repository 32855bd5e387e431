"""Ops on Triton's own launcher, over a stand-in for libcuda: what test_launches.py runs.

What the driver is given has to be what a kernel was called with, in its order and its widths, and
descriptors what cuTensorMapEncodeTiled takes. Prints how often each kernel was launched, and how
many descriptors there were. LD_LIBRARY_PATH names the folder of the stand-in, libcuda.so.1.
"""

import ctypes
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from tossup import Strategy, draw, flash_attention
from tossup.autotune.offline import stage_of
from tossup.autotune.workloads import build
from tossup.kernels import backend, configs, descriptors
from tossup.kernels.accumulate import accumulate_into
from tossup.kernels.linear import kernel as linear

# An op, and a shape for each of the ways that its launchers take
SHAPES = [
    ("attention", dict(heads=4, kv_heads=2, head_dim=64, seqlen=80)),
    ("attention", dict(heads=4, kv_heads=2, head_dim=64, seqlen=1024, queries=1)),
    ("attention", dict(heads=4, kv_heads=2, head_dim=64, seqlen=80, sequences=4)),
    ("selective_scan", dict(dim=64, seqlen=40)),
    ("selective_scan", dict(dim=64, seqlen=2048)),
    ("causal_conv1d", dict(dim=64, seqlen=40)),
    ("linear", dict(in_features=64, out_features=136, seqlen=40)),
    ("linear", dict(in_features=64, out_features=64, seqlen=2048)),
    ("rotary", dict(heads=2, head_dim=64, seqlen=40)),
    ("repeat_groups", dict(dim=64, seqlen=40)),
    ("selective_state_update", dict(dim=64)),
    ("causal_conv1d_update", dict(dim=64)),
    ("adamw", dict(parameters=3, elements=40, dtype="fp32")),
]

WIDTHS = {"b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8, "f64": 8}
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)[^\n]*_param_\d+(\[128\])?")


class Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("type", "rank", "address")]
    _fields_ += [("sizes", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4)]
    _fields_ += [("box", ctypes.c_uint64 * 5)]


library = ctypes.CDLL("libcuda.so.1")
arguments = (ctypes.c_uint64 * 256).in_dll(library, "arguments")
widths = (ctypes.c_uint * 256).in_dll(library, "widths")
launched = (ctypes.c_uint * 7).in_dll(library, "launched")
encoded = (Map * 64).in_dll(library, "encoded")
count, launches, maps = (
    ctypes.c_uint.in_dll(library, name) for name in ("count", "launches", "maps")
)
found: Counter[str] = Counter()


class Launcher(nvidia.CudaLauncher):
    def __init__(self, source: Any, metadata: Any):
        super().__init__(source, metadata)
        self.signature, self.metadata = tuple(source.signature.values()), metadata
        head = stage_of(metadata, "ptx").partition(".entry")[2].partition(")")[0]
        self.parameters = [WIDTHS.get(kind, 8) for kind, _ in PARAMETER.findall(head)]

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        values = [*leaves(self.signature, rest[4:])]
        assert len(self.parameters) == len(values) + 2, "and two of Triton's own"
        count.value = len(values)
        widths[: len(values)] = self.parameters[:-2]
        before = launches.value
        super().__call__(x, y, z, stream, function, *rest)
        assert launches.value == before + 1
        for place, (kind, value) in enumerate(values):
            self.check(kind, value, arguments[place], f"{self.metadata.name}, argument {place}")
        grid_and_block = x, y, z, 32 * self.metadata.num_warps, 1, 1, self.metadata.shared
        assert tuple(launched) == grid_and_block, self.metadata.name
        found[self.metadata.name] += 1

    def check(self, kind: str, value: Any, given: int, where: str) -> None:
        if isinstance(value, TensorDescriptor):
            check_map(value, encoded[given % 64])
            found["descriptors"] += 1
            return
        if kind[0] == "*":
            wanted = 0 if value is None else value.data_ptr()
        elif kind in ("fp32", "f32"):
            (wanted,) = struct.unpack("I", struct.pack("f", value))
        elif kind in ("fp64", "f64"):
            (wanted,) = struct.unpack("Q", struct.pack("d", value))
        else:
            wanted = value % 2 ** int(kind[1:])
        assert given == wanted, (where, kind, given, wanted)


def leaves(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Each kernel parameter that an argument becomes, with its type."""
    if isinstance(kind, tuple):
        for of, part in zip(kind, value, strict=True):
            yield from leaves(of, part)
    elif isinstance(value, TensorDescriptor):
        yield "map", value
        yield from (("i32", size) for size in value.shape)
        yield from (("i64", stride) for stride in value.strides)
    elif kind != "constexpr":
        yield kind, value


def check_map(wanted: TensorDescriptor, got: Map) -> None:
    """A map's first axis is the tensor's last, and its strides are in bytes."""
    rank = got.rank
    assert got.address == wanted.base.data_ptr() and rank == len(wanted.shape)
    assert [*got.sizes][:rank][::-1] == [*wanted.shape]
    strides = [stride * wanted.base.element_size() for stride in wanted.strides[:-1]]
    assert [*got.strides][: rank - 1][::-1] == strides
    assert [*got.box][1:rank][::-1] == wanted.block_shape[:-1]


class Driver(nvidia.CudaDriver):
    """An H100 whose kernels do nothing."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher
        self.get_current_stream = lambda device: 7
        self.get_current_device = lambda: 0
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch_all() -> None:
    for op, sizes in SHAPES:
        calls = build(op, {"batch": 2, "dtype": "bf16", "active": 1} | sizes).prepare("cpu").ours
        for call in calls.values():
            call()
    q = torch.randn(1, 32, 2, 64, dtype=torch.bfloat16).requires_grad_()
    options = dict(softcap=5.0, alibi_slopes=torch.rand(2), dropout_p=0.3, window_size=(9, 3))
    flash_attention(q, q, q, **options, impl="triton").sum().backward()
    totals, gradients = ([torch.zeros(5), torch.zeros(1)] for _ in range(2))
    accumulate_into(totals, gradients, written=torch.zeros((), dtype=torch.int32), impl="triton")
    for seed in (0, 2**63 + 5, 2**64 - 1):
        strategy = Strategy(2, "weighted", (1, 2.0), ((0, 1),), (0.5,), per_sample=True)
        draw(strategy, seed, torch.tensor(-3), 2, 3, impl="triton")


def launch_described() -> None:
    """Some tiles that linear layers load by descriptors, and heads that fill no tile."""
    descriptors.BRIEF = 0
    x, weight = (torch.randn(*shape).bfloat16() for shape in ((4, 96, 136), (264, 136)))
    for tile in linear.DESCRIBED[::3]:
        config = tile._asdict()
        with (
            configs.forced("linear.forward", config),
            configs.forced("linear.weight_gradient", config),
        ):
            out = linear.forward(x, weight, None, None, None)
            linear.forward_into(x, out, weight.t(), None, True, None, None)
            linear.weight_gradient_into(weight, out, x, None, None, None, None)
    q, k = (torch.randn(2, 90, heads, 72).half().requires_grad_() for heads in (4, 2))
    flash_attention(q, k, k, causal=True, impl="triton").sum().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    backend.refuse_cpu_unless_interpreted = lambda: None
    launch_all()
    launch_described()
    print(json.dumps(found))
