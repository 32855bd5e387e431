"""Triton's launcher hands kernels what ours gave it, with each Triton that torch may bring.

The GPU's driver is a stand-in, libcuda.c; launches.py checks what it gets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST = ROOT / ".venv/triton-3.6"

KERNELS = {
    "accumulate_kernel",
    "adamw_kernel",
    "add_up_kernel",
    "backward_kernel",
    "carry_kernel",
    "count_kernel",
    "dkdv_kernel",
    "dq_kernel",
    "draw_kernel",
    "forward_kernel",
    "group_kernel",
    "join_kernel",
    "linear_kernel",
    "local_kernel",
    "norm_kernel",
    "repeat_kernel",
    "rotary_kernel",
    "scale_kernel",
    "sum_kernel",
    "update_kernel",
    "weight_gradient_kernel",
}


@pytest.mark.parametrize("path", [None, OLDEST], ids=["triton", "triton-3.6"])
def test_the_driver_gets_what_kernels_are_called_with(path, tmp_path):
    if path and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 is the one installed")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "libcuda.c"], check=True)
    library.with_suffix("").symlink_to(library)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "PYTHONPATH": f"{path or ''}:{ROOT}",
        "TOSSUP_IMPL": "triton",
    }
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.launches"],
        env=environment, cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.keys() == KERNELS | {"descriptors"}
    assert found["descriptors"] > 20
