"""Which candidates are not worth a measurement: found out by compiling them, without a GPU."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from triton.runtime.errors import TritonError

from ..kernels import configs
from ..kernels.configs import Config
from .candidates import REGISTERS, THREADS
from .errors import said
from .offline import LOCAL_MEMORY, SHARED_MEMORY, Launch, compile_launches
from .on_meta import calls_on_meta, launching
from .workloads import Workload

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": what a thread's
# registers are rounded up to, the warps that every architecture can hold, and the shared memory
# that a program takes beside its own, in bytes.
ROUNDED_TO, WARPS, RESERVED = 8, 48, 1024

SCHEDULERS = 4  # of a multiprocessor: fewer warps leave one idle
SPILLS = 10  # that ptxas may leave around a loop, never within


@dataclass(frozen=True)
class Survey:
    """What a candidate takes where it is launched, at most.

    pruned: why it is not worth a measurement; None if it is. resident: programs that a
    multiprocessor holds at once, at least.
    """

    config: Config
    pruned: str | None
    registers: int = 0
    spills: int = 0
    shared: int = 0
    resident: int = 0


def survey_all(
    pool: Executor, arch: int, workload: Workload, direction: str, kernel: str,
    found: Sequence[Config],
) -> Iterator[Survey]:  # fmt: skip
    """A survey of each candidate, in their order. pool: of processes that have touched no GPU.

    Triton keeps what it compiles, so that a launch on such a GPU need not compile it again.
    """
    return pool.map(partial(survey, workload, direction, kernel, arch), found)


def survey(workload: Workload, direction: str, kernel: str, arch: int, config: Config) -> Survey:
    """Compile all launches of one call, in which `kernel` takes `config`."""
    call = calls_on_meta(workload)[direction]

    def launch() -> None:
        with launching():
            call()

    try:
        with configs.forced(kernel, config):
            compile_launches(launch, arch)  # of a backward pass, the first call is forward as well
            launches = compile_launches(launch, arch)
    except (TritonError, RuntimeError) as error:  # a pass that fails raises the latter
        return Survey(config, f"does not compile: {said(error, last=True)}")
    return judge(config, launches)


def judge(config: Config, launches: Sequence[Launch]) -> Survey:
    programs = config.get("programs", 1)
    return Survey(
        config,
        next((why for launch in launches if (why := reason(launch, programs))), None),
        max(launch.binary.registers for launch in launches),
        max(launch.binary.spills for launch in launches),
        max(launch.shared for launch in launches),
        min(map(resident, launches)),
    )


def reason(launch: Launch, programs: int) -> str | None:
    """Why a launch is not worth a measurement.

    programs: that its configuration wants to be resident at once.
    """
    binary = launch.binary
    if not launch.fits:
        return "shared memory"
    if launch.unordered_writes:
        return "unordered writes"
    if binary.spills > SPILLS or any(loop.count(*LOCAL_MEMORY) for loop in binary.loops):
        return "spills"
    if resident(launch) < programs or resident(launch) * launch.warps < SCHEDULERS:
        return "occupancy"
    return None


def resident(launch: Launch) -> int:
    """How many programs a multiprocessor holds at once."""
    registers = -(-launch.binary.registers // ROUNDED_TO) * ROUNDED_TO
    return min(
        REGISTERS // (registers * THREADS * launch.warps),
        (SHARED_MEMORY[launch.arch] + RESERVED) // (launch.shared + RESERVED),
        WARPS // launch.warps,
    )
