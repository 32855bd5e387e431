"""Which candidates are pruned, and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tossup.autotune.offline import Binary, Launch, Loop
from tossup.autotune.pruning import judge, resident
from tossup.kernels.configs import Entry, Key
from tossup.kernels.configs.file import written

ROOT = Path(__file__).parents[2]
CONFIG = {"BLOCK": 64, "num_warps": 8}


def launch(
    registers=64, spills=0, shared=0, warps=8, local=0, arch=90, unordered=0
) -> Launch:  # fmt: skip
    loop = Loop(100, {"LDL": local}, 0)
    binary = Binary(registers, spills, 1, 1, 0, (loop,))
    return Launch("kernel", arch, (1, 1, 1), warps, 3, shared, 0, 0, unordered, {}, binary)


@pytest.mark.parametrize(
    "taken, expected",
    [
        (launch(registers=64), 4),  # 64 · 32 · 8 of 65536 registers
        (launch(registers=65), 3),  # 72, as eight at a time are given out
        (launch(registers=255, warps=4), 2),
        (launch(shared=110 * 1024), 2),  # of 227 KB, and 1 KB beside
        (launch(shared=115 * 1024), 1),
        (launch(shared=60 * 1024, arch=89), 1),  # of 99 KB
        (launch(registers=32, warps=8), 6),  # 48 warps
    ],
)
def test_programs_that_a_multiprocessor_holds(taken, expected):
    assert resident(taken) == expected


@pytest.mark.parametrize(
    "taken, programs, expected",
    [
        (launch(), 1, None),
        (launch(spills=10), 1, None),
        (launch(spills=11), 1, "spills"),
        (launch(spills=2, local=2), 1, "spills"),
        (launch(shared=232449), 1, "shared memory"),
        (launch(unordered=1), 1, "unordered writes"),
        (launch(shared=232448), 1, None),
        (launch(shared=115 * 1024), 2, "occupancy"),
        (launch(shared=115 * 1024, warps=2), 1, "occupancy"),  # two warps for four schedulers
    ],
)
def test_why_a_candidate_is_pruned(taken, programs, expected):
    survey = judge(CONFIG | {"programs": programs}, [launch(registers=32), taken])
    assert survey.pruned == expected
    assert survey.registers == taken.binary.registers and survey.shared == taken.shared


def linear(**other: int) -> dict[str, int]:
    return dict(rows=64, columns=128, inner=64, warps=4, stages=4, programs=2, described=0) | other


# Of one matrix product: what its compiled candidates come to
COMPILED = [
    (linear(), None),
    (linear(programs=3), "occupancy"),
    (linear(stages=5, inner=128), "shared memory"),
    (linear(rows=128, columns=256, warps=4), "spills"),
    (linear(inner=48), "does not compile: arange's range must be a power of 2"),
]


# What a weight gradient of 256 × 256 follows
FACTS = dict(
    left="torch.bfloat16",
    right="torch.bfloat16",
    vectors=True,
    busy=False,
    transposed=False,
    described=True,
)
SIZES = {"rows": 256, "columns": 256, "inner": 256}
TUNED = Entry(
    Key("linear.weight_gradient", tuple(FACTS.items()), tuple(SIZES.items())),
    linear(), "linear batch=1 seqlen=256 in_features=256 out_features=256 dtype=bf16 active=1",
    1.0, 2.0, 0.01, "2.13.0", "3.9.0", "2026-11-24",
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """In a process of its own, because the tests' interpreter replaces the compiler."""
    configs = [config for config, _ in COMPILED]
    program = f"""
import json
from tossup.autotune.cases import CASES
from tossup.autotune.inspection import inspect_case
from tossup.autotune.pruning import Survey, survey
from tossup.autotune.tune import list_survivors
from tossup.autotune.workloads import build
workload = build("linear", dict(batch=1, seqlen=256, in_features=256, out_features=256, active=1))
surveys = [survey(workload, "wgrad", "linear.weight_gradient", 90, c) for c in {configs}]
lines = []
def prune(workload, direction, kernel, found):
    return iter([Survey(found[0], None, 40, 0, 5, 2), Survey(found[1], "spills")])
list_survivors(workload, 90, prune, lines.append)
tuned = inspect_case(len(CASES), 90, "some_gpu")
print(json.dumps(dict(pruned=[s.pruned for s in surveys], lines=lines, tuned=tuned)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("configs")
    (folder / "some_gpu.json").write_text(written("Some GPU", [TUNED]))
    environment |= {"PYTHONPATH": str(ROOT), "TOSSUP_CONFIGS": str(folder)}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_compiled_candidates_are_judged_by_what_they_take(compiled):
    assert compiled["pruned"] == [expected for _, expected in COMPILED]


def test_a_list_has_every_kernel_of_a_workload_in_each_form(compiled):
    kernels = [line for line in compiled["lines"] if not line.startswith(" ")]
    names = ["linear.forward (forward)", "linear.forward (dgrad)", "linear.weight_gradient (wgrad)"]
    assert [line.partition(":")[0] for line in kernels] == names
    assert all(line.endswith("1 pruned (1 spills)") for line in kernels)
    last = compiled["lines"][1]
    assert last.endswith(": 40 registers, 5 bytes of shared memory, 2 programs at once")
    assert last.startswith("  rows=64 columns=64 inner=")


def test_inspection_follows_a_gpus_file_in_what_it_was_tuned_for(compiled):
    reports = compiled["tuned"]
    assert [name.rpartition(": ")[2] for name in reports] == [
        "linear_kernel", "linear_kernel (2)", "weight_gradient_kernel",
    ]  # fmt: skip
    name, report = [*reports.items()][-1]
    assert name.startswith(f"linear, {TUNED.workload}, sm_90: ")
    # 4 stages of a tile of each operand, (64 + 128) × 64 in 16 bits
    assert report["warps"] == 4 and report["shared"] == 4 * (64 + 128) * 64 * 2
    assert next(iter(reports.values()))["shared"] != report["shared"]
