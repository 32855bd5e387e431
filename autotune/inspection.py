"""What every shipped kernel takes, without a GPU: `tossup inspect`.

Each case runs an op's launchers on meta tensors, in the configuration that they choose for that
shape, so a report covers exactly what is shipped.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import yaml

from ..kernels.configs import entries_of
from .cases import CASES, Case
from .offline import LOCAL_MEMORY, SHARED_MEMORY, TENSOR_CORES, Launch, Loop, compile_launches
from .on_meta import calls_on_meta, launching
from .workloads import build

ARCHS = tuple(SHARED_MEMORY)
OPS = sorted({case.op for case in CASES})

# What a turn of an innermost loop is made of, by mnemonic.
COUNTED = {
    "tensor": TENSOR_CORES,
    "tma": ("UTMALDG", "UTMASTG", "UBLKCP"),
    "mufu": ("MUFU",),
    "shfl": ("SHFL",),
    "bar": ("BAR",),
    "local": LOCAL_MEMORY,
}


def inspect(
    archs: Sequence[int],
    ops: Sequence[str] = (),
    jobs: int | None = None,
    gpu: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Compile every case, and report each of its launches.

    archs: compute capabilities, of ARCHS. ops: some of OPS; none means all. jobs: processes; by
    default one for each core. gpu: whose file in kernels/configs/ launches follow, in the cases and
    in every workload that it was tuned for; by default none, which is untuned.
    Returns for each "op, case, sm_90: kernel" its registers, spills, bytes of shared memory and
    whether they fit, products of tiles and those without tensor cores, global loads before the
    first exit, and for each innermost loop its instructions and those that matter.
    """
    work = [
        (place, arch, gpu)
        for arch in archs
        for place, case in enumerate(cases_with(gpu))
        if not ops or case.op in ops
    ]
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn")) as pool:
        reports = pool.map(inspect_case, *zip(*work, strict=True))
        return {name: report for part in reports for name, report in part.items()}


@lru_cache
def cases_with(gpu: str | None) -> tuple[Case, ...]:
    """What is shipped untuned, and for what a GPU was tuned."""
    tuned = dict.fromkeys((e.workload, e.key.kernel.partition(".")[0]) for e in entries_of(gpu))
    return *CASES, *(Case(op, words, partial(launch_all, words)) for words, op in tuned)


def launch_all(words: str) -> None:
    """All kernels of a workload. words: as one types them after `tossup tune`."""
    op, *pairs = words.split()
    values = dict(pair.split("=") for pair in pairs)
    workload = build(op, {key: yaml.safe_load(value) for key, value in values.items()})
    calls = calls_on_meta(workload)
    with launching():
        for direction in workload.directions:
            if "+" not in direction:
                calls[direction]()


def inspect_case(place: int, arch: int, gpu: str | None = None) -> dict[str, dict[str, Any]]:
    """A kernel that is launched in several forms is numbered from its second form on."""
    case = cases_with(gpu)[place]
    reports: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for launch in compile_launches(case.launch, arch, gpu):
        seen[launch.kernel] += 1
        number = f" ({seen[launch.kernel]})" if seen[launch.kernel] > 1 else ""
        reports[f"{case.op}, {case.name}, sm_{arch}: {launch.kernel}{number}"] = summary(launch)
    return reports


def summary(launch: Launch) -> dict[str, Any]:
    binary = launch.binary
    return {
        "registers": binary.registers,
        "spills": binary.spills,
        "shared": launch.shared,
        "fits": launch.fits,
        "warps": launch.warps,
        "dots": launch.dots,
        "scalar_dots": launch.scalar_dots,
        "unordered_writes": launch.unordered_writes,
        "loads_before_exit": binary.loads_before_exit,
        "loops": [loop_summary(loop) for loop in binary.loops],
    }


def loop_summary(loop: Loop) -> dict[str, int]:
    counts = {name: loop.count(*mnemonics) for name, mnemonics in COUNTED.items()}
    return {"instructions": loop.instructions, "wide_loads": loop.wide_loads} | counts


def table(reports: dict[str, dict[str, Any]]) -> str:
    """The reports for people: a line for each launch, and one below it for each innermost loop."""
    lines = []
    for name, report in reports.items():
        lines.append(name)
        fits = "" if report["fits"] else " (too much)"
        lines.append(
            f"    {report['registers']} registers, {report['spills']} spills, "
            f"{report['shared']} bytes of shared memory{fits}, {report['warps']} warps, "
            f"{report['dots'] - report['scalar_dots']} of {report['dots']} dots on tensor cores"
        )
        for loop in report["loops"]:
            parts = (f"{count} {what}" for what, count in loop.items() if count)
            lines.append(f"    loop: {', '.join(parts)}")
    return "\n".join(lines)
