"""Compiles launches for a GPU that is not there, and reads what came out.

A Triton driver says on which device a kernel is launched. `OfflineDriver` names any NVIDIA
architecture, and where another driver would load and run a binary it only disassembles it. So a
launcher that runs on meta tensors compiles exactly what it would compile on that GPU, with the same
specialisations, and a report tells what a launch takes: registers, spills, shared memory, and the
instructions in each innermost loop. ptxas, cuobjdump and nvdisasm come with Triton.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from ..kernels import configs

# Shared memory that a program may take, in bytes (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# Multiprocessors of the largest GPU of an architecture that is sold
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}

# Programs that a grid may have along each axis (the same table)
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)

# Whether Triton makes one instruction of a product and a sum, by default
FUSION = "TRITON_DEFAULT_FP_FUSION"

TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA", "IMMA", "QGMMA")
GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")
LOCAL_MEMORY = ("LDL", "STL")

# One line of nvdisasm: /*0040*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
)
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"\.L_\w+")

# Lines of PTX
PTX_LABEL, PTX_BRANCH = re.compile(r"^(\$\w+):"), re.compile(r"\bbra\S*\s+(\$\w+)")
BARRIER = re.compile(r"\bbar(rier)?(\.cta)?\.sync")
SHARED_WRITE = re.compile(r"\b(st\.shared|stmatrix|cp\.async\.(c[ag]|bulk)\S*\.shared)")


class Instruction(NamedTuple):
    """predicate: its guard, or nothing. name: as LDG.E.128. operands: the rest of the line."""

    predicate: str
    name: str
    operands: str

    @property
    def mnemonic(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: the instructions of one turn, and how many have each mnemonic.

    wide_loads: those that load 128 bits from global memory, synchronously or not.
    """

    instructions: int
    mnemonics: dict[str, int]
    wide_loads: int

    def count(self, *mnemonics: str) -> int:
        return sum(self.mnemonics.get(mnemonic, 0) for mnemonic in mnemonics)


@dataclass(frozen=True)
class Binary:
    """What ptxas made of a kernel.

    registers: per thread. spills: loads from and stores to local memory in the code. exits: how
    many EXIT instructions. loads_before_exit: global loads before the first of them. loops: the
    innermost ones, in the order of the code.
    """

    registers: int
    spills: int
    exits: int
    loads_before_exit: int
    tensor_cores: int
    loops: tuple[Loop, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, its constants and what it takes.

    constants: the kernel's constexpr arguments. shared: bytes of shared memory per program.
    dots, scalar_dots: products of tiles in the kernel, and those that no tensor core computes.
    unordered_writes: see that function.
    """

    kernel: str
    arch: int
    grid: tuple[int, ...]
    warps: int
    stages: int
    shared: int
    dots: int
    scalar_dots: int
    unordered_writes: int
    constants: dict[str, Any]
    binary: Binary

    @property
    def fits(self) -> bool:
        programs = all(n <= most for n, most in zip(self.grid, MOST_PROGRAMS, strict=True))
        return programs and self.shared <= SHARED_MEMORY[self.arch]


def compile_launches(launch: Callable[[], Any], arch: int, gpu: str | None = None) -> list[Launch]:
    """Every launch that `launch` makes, compiled for compute capability `arch` (90: sm_90).

    launch: calls launchers with meta tensors. gpu: whose file of configurations they follow, by its
    name in kernels/configs/; by default none, which is untuned.
    Raises ValueError for an architecture that is not in SHARED_MEMORY, and RuntimeError where
    Triton was imported to interpret kernels, which then cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be set where kernels are compiled")
    with offline(arch) as launches, configs.of_gpu(gpu):
        launch()
    return launches


@contextmanager
def offline(arch: int) -> Iterator[list[Launch]]:
    """Within this context, launches are compiled for `arch` and listed instead of being run."""
    driver = OfflineDriver(arch)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with fusing():
            yield driver.launches
    finally:
        triton.runtime.driver.set_active(active)


@contextmanager
def fusing() -> Iterator[None]:
    """Within, products are fused with sums, unless the environment says otherwise.

    So they are by default up to Triton 3.9, which warns where nothing is said, as 3.10 will not.
    Triton keeps what it compiles by what is said, so whoever wants to find it again says the same.
    """
    said = FUSION in os.environ
    os.environ.setdefault(FUSION, "1")
    try:
        yield
    finally:
        if not said:
            del os.environ[FUSION]


class OfflineDriver(DriverBase):
    """Stands for a GPU of one architecture. Its device's number is the architecture's, as Triton
    keeps compiled kernels by device."""

    def __init__(self, arch: int):
        if arch not in SHARED_MEMORY:
            raise ValueError(
                f"arch must be one of {', '.join(map(str, SHARED_MEMORY))}, got {arch}"
            )
        super().__init__()
        self.arch = arch
        self.launches: list[Launch] = []
        self.utils = SimpleNamespace(load_binary=load_binary, get_device_properties=self.properties)

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher is compiled offline")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs offline")

    def get_active_torch_device(self):
        raise NotImplementedError("no device is there offline")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def properties(self, device: int) -> dict[str, int]:
        # Too much shared memory is reported, not refused
        return {"max_shared_mem": 2**31 - 1, "multiprocessor_count": PROCESSORS[self.arch]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        dots, scalar_dots = dots_of(metadata)
        of_warpgroups = metadata.num_warps > 4
        unordered = unordered_writes(stage_of(metadata, "ptx")) if of_warpgroups else 0

        def launch(x: int, y: int, z: int, stream: int, binary: Binary, *_: Any) -> None:
            self.launches.append(
                Launch(
                    kernel=metadata.name,
                    arch=self.arch,
                    grid=(x, y, z),
                    warps=metadata.num_warps,
                    stages=metadata.num_stages,
                    shared=metadata.shared,
                    dots=dots,
                    scalar_dots=scalar_dots,
                    unordered_writes=unordered,
                    constants=constants,
                    binary=binary,
                )
            )

        return launch


def load_binary(
    name: str, cubin: bytes, shared: int, device: int
) -> tuple[None, Binary, int, int, int]:
    """In place of CUDA's: the function's handle is what the disassembly shows.

    Returns the module, the function, its registers, its spills and its most threads.
    """
    binary = disassemble(cubin)
    return None, binary, binary.registers, binary.spills, 1024


def dots_of(metadata: Any) -> tuple[int, int]:
    """Products of tiles in the kernel as written, and those left without tensor cores."""
    written, lowered = (stage_of(metadata, stage) for stage in ("ttir", "ttgir"))
    blocked = re.findall(r"= tt\.dot .*-> tensor<[^>]*#blocked\d*>", lowered)
    return len(re.findall(r"= tt\.dot ", written)), len(blocked)


def stage_of(metadata: Any, stage: str) -> str:
    """A kernel on its way through the compiler, as text: ttir, ttgir or ptx."""
    files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
    return Path(files[f"{metadata.name}.{stage}"]).read_text()


def unordered_writes(ptx: str) -> int:
    """Writes to shared memory between the wait for a warpgroup's products and the next barrier.

    Another warpgroup may still be reading there, for products of its own. Triton before 3.9 puts no
    barrier there for that reason (triton-lang/triton#11047), so one has to be there for another.
    Lines are taken in their order, and those of a loop twice.
    """
    lines, labels, order = ptx.splitlines(), {}, []
    for place, line in enumerate(map(str.strip, lines)):
        order.append(place)
        if label := PTX_LABEL.match(line):
            labels[label[1]] = place
        elif (branch := PTX_BRANCH.search(line)) and branch[1] in labels:
            order += range(labels[branch[1]], place)
    found, waited = set(), False
    for place in order:
        if "wgmma.wait_group" in lines[place]:
            waited = True
        elif BARRIER.search(lines[place]):
            waited = False
        elif waited and SHARED_WRITE.search(lines[place]):
            found.add(place)
    return len(found)


def disassemble(cubin: bytes) -> Binary:
    """Registers by cuobjdump; all else from the instructions that nvdisasm lists."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run(
                [tools / tool, flag, file.name], check=True, text=True, capture_output=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    code, labels = parse(listing)
    counts = Counter(instruction.mnemonic for instruction in code)
    before_exit = takewhile(lambda instruction: instruction.mnemonic != "EXIT", code)
    return Binary(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spills=sum(counts[mnemonic] for mnemonic in LOCAL_MEMORY),
        exits=counts["EXIT"],
        loads_before_exit=sum(instruction.mnemonic in GLOBAL_LOADS for instruction in before_exit),
        tensor_cores=sum(counts[mnemonic] for mnemonic in TENSOR_CORES),
        loops=tuple(loop_of(code[start:stop]) for start, stop in innermost_loops(code, labels)),
    )


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and where each label points among them."""
    code: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.search(line):
            code.append(Instruction(*instruction.groups(default="")))
    return code, labels


def innermost_loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Where code jumps back, from the target to past the jump, if no other jump back is within.

    A jump to itself, the padding past a kernel's end, is no loop. Nor is the way back from code
    that stands past that end: an unconditional exit lies between.
    """
    ends = [
        place
        for place, instruction in enumerate(code)
        if instruction.mnemonic in ("EXIT", "RET") and not instruction.predicate
    ]
    loops = set()
    for place, instruction in enumerate(code):
        target = TARGET.search(instruction.operands) if instruction.mnemonic == "BRA" else None
        start = labels[target[0]] if target else place
        if start < place and not any(start <= end < place for end in ends):
            loops.add((start, place + 1))
    return [
        (start, stop)
        for start, stop in sorted(loops)
        if not any((start, stop) != (a, b) and start <= a and b <= stop for a, b in loops)
    ]


def loop_of(code: list[Instruction]) -> Loop:
    counts = Counter(instruction.mnemonic for instruction in code)
    wide = sum(
        instruction.mnemonic in ("LDG", "LDGSTS") and "128" in instruction.name.split(".")
        for instruction in code
    )
    return Loop(len(code), dict(sorted(counts.items())), wide)
