"""Offline compilation: what it reports about kernels whose code is known.

In a process of its own, because the tests' interpreter replaces the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tossup.autotune.offline import (
    FUSION,
    SHARED_MEMORY,
    Instruction,
    compile_launches,
    innermost_loops,
    offline,
    parse,
    unordered_writes,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    compiler = subprocess.run(
        [sys.executable, "-m", "tests.autotune.sample_kernels"],
        env=environment, cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert compiler.returncode == 0, compiler.stderr
    return json.loads(compiler.stdout)


def test_a_launch_is_specialised_as_on_the_gpu(reports):
    report = reports["add float32"]
    assert report["kernel"] == "add_kernel" and report["arch"] == 90
    assert report["grid"] == [3, 1, 1] and report["warps"] == 4
    assert report["constants"] == {"BLOCK": 1024, "y_ptr": None}
    assert report["binary"]["registers"] > 0 and report["binary"]["exits"] > 0
    assert report["binary"]["spills"] == 0 and report["binary"]["loops"] == []


def test_wide_loads_show_that_alignment_was_seen(reports):
    """Meta tensors lie at 0, so that a size that 16 divides allows loads of 128 bits."""
    aligned, odd = (reports[f"sum {name}"]["binary"]["loops"] for name in ("aligned", "odd"))
    assert len(aligned) == len(odd) == 1
    assert aligned[0]["wide_loads"] > 0 and odd[0]["wide_loads"] == 0


def test_products_on_tensor_cores_and_elsewhere(reports):
    half, full = reports["multiply float16"], reports["multiply float32"]
    assert half["dots"] == full["dots"] == 1
    assert half["scalar_dots"] == 0 and half["binary"]["tensor_cores"] > 0
    assert full["scalar_dots"] == 1 and full["binary"]["tensor_cores"] == 0
    assert half["shared"] > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_too_few_registers_spill(reports, arch):
    assert reports[f"squeezed {arch}"]["binary"]["spills"] > 0
    assert reports[f"at ease {arch}"]["binary"]["spills"] == 0
    assert reports[f"at ease {arch}"]["arch"] == arch


def test_loads_before_an_exit_are_counted(reports):
    gated, late = (reports[f"gate {name}"]["binary"] for name in ("first", "late"))
    assert gated["loads_before_exit"] == 1 < late["loads_before_exit"]


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P2 BRA `(.L_x_2) ;
        /*0050*/              @!P3 EXIT ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4) ;
"""


def test_loops_are_jumps_back_without_another_within():
    code, labels = parse(LISTING)
    assert code[2] == Instruction("@!P0 ", "LDG.E.128", " R4, desc[UR4][R2.64] ")
    assert len(code) == 9 and labels[".L_x_3"] == 7
    assert innermost_loops(code, labels) == [(2, 4)]


def test_what_is_said_of_fusion_holds_and_else_it_is_on(monkeypatch):
    monkeypatch.delenv(FUSION, raising=False)
    with offline(90):
        assert os.environ[FUSION] == "1"
    assert FUSION not in os.environ
    monkeypatch.setenv(FUSION, "0")
    with offline(90):
        assert os.environ[FUSION] == "0"
    assert os.environ[FUSION] == "0"


def test_an_unknown_architecture_and_the_interpreter_are_refused(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"arch must be one of 80, .* got 75"):
        compile_launches(lambda: None, 75)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        compile_launches(lambda: None, next(iter(SHARED_MEMORY)))


PIPELINE = """
$L__BB0_1:
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r3}, %rd2, %rd3, 1, 1, 1, 0, 1;
	wgmma.wait_group.sync.aligned 0;
	bar.sync 0;
	@%p1 bra $L__BB0_1;
	st.shared.v4.b32 [ %r1 + 0 ], { %r3, %r4, %r5, %r6 };
"""


def test_a_write_after_a_wait_takes_a_barrier_between():
    assert unordered_writes(PIPELINE) == 0
    unguarded = PIPELINE.replace("\tbar.sync 0;\n", "")
    assert unordered_writes(unguarded) == 2  # the copy of the next turn, and the store behind
    assert unordered_writes(unguarded.replace("\tst.", "\tbarrier.cta.sync 0;\n\tst.")) == 1
    assert unordered_writes(unguarded.replace("@%p1 bra", "@%p1 bra.uni")) == 2
    assert unordered_writes(PIPELINE.replace("bar.sync", "mbarrier.arrive.sync")) == 2
