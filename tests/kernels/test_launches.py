"""Triton's launcher hands kernels what ours gave it, with each Triton that torch may bring.

The GPU's driver is a stand-in; launches.py checks what it gets.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.stand_ins import cuda

ROOT = Path(__file__).parents[2]
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
    environment = cuda.driver(tmp_path)
    environment |= {"PYTHONPATH": f"{path or ''}:{ROOT}", "TOSSUP_IMPL": "triton"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.launches"],
        env=environment, cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.keys() == KERNELS | {"descriptors"}
    assert found["descriptors"] > 20
