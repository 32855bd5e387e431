"""Gates on what the shipped kernels take, compiled offline, with each Triton that torch may bring.

resources/<version>.json is what was committed for a version of Triton; `python -m
tests.autotune.test_inspection` writes it anew for the one installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tossup.autotune.resources import changes

ROOT = Path(__file__).parents[2]
RESOURCES = Path(__file__).parent / "resources"
OLDEST = ROOT / ".venv/triton-3.6"  # torch 2.11's, installed by make beside the newest
ARCHS = ("sm_90", "sm_80")


def inspect(path: Path | None) -> dict:
    """`tossup inspect` with the Triton in this folder, for sm_90, or with the one installed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path or "")
    archs = ARCHS[:1] if path else ARCHS
    inspected = subprocess.run(
        [sys.executable, "-m", "tossup.supernet", "inspect", "--json", "--arch", *archs],
        env=environment, cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert inspected.returncode == 0 and inspected.stderr == "", inspected.stderr
    return json.loads(inspected.stdout)


@pytest.fixture(scope="module", params=[None, OLDEST], ids=["triton", "triton-3.6"])
def inspected(request) -> dict:
    if request.param and not request.param.exists():
        pytest.fail(f"{request.param} is missing: `make test` installs it")
    return inspect(request.param)


def test_both_versions_of_triton_were_used(inspected, request):
    oldest = "triton-3.6" in request.node.name
    assert inspected["triton"] == ("3.6.0" if oldest else triton.__version__)


def test_nothing_spills_and_everything_fits(inspected):
    for name, report in inspected["launches"].items():
        assert report["spills"] == 0, name
        assert report["fits"], name


def test_a_program_without_a_sample_loads_nothing_but_the_count(inspected):
    routed = {n: r for n, r in inspected["launches"].items() if ", routed," in n}
    for name, report in routed.items():
        assert report["loads_before_exit"] == 1, name


def test_every_product_of_16_bit_tiles_runs_on_tensor_cores(inspected):
    reports = {n: r for n, r in inspected["launches"].items() if r["dots"] and "fp32" not in n}
    assert reports
    for name, report in reports.items():
        assert report["scalar_dots"] == 0, name


def test_no_warpgroup_writes_where_another_may_still_read(inspected):
    for name, report in inspected["launches"].items():
        assert report["unordered_writes"] == 0, name


def test_a_sweep_of_states_that_one_warp_holds_shuffles_nothing(inspected):
    sweeps = {
        name: report
        for name, report in inspected["launches"].items()
        if name.startswith("selective_scan") and ": forward_kernel" in name and report["warps"] == 1
    }
    assert sweeps
    for name, report in sweeps.items():
        assert [loop["shfl"] for loop in report["loops"]] == [0], name


def test_resources_are_as_committed(inspected):
    """Fewer are welcome, and committed as well, so that the next rise shows."""
    committed = RESOURCES / f"{inspected['triton']}.json"
    if not committed.exists():
        pytest.skip(f"no resources were committed for Triton {inspected['triton']}")
    found = changes(json.loads(committed.read_text()), inspected["launches"])
    assert not list(found), "see this module's docstring"


if __name__ == "__main__":
    for folder in (None, OLDEST):
        found = inspect(folder)
        lines = [f"{json.dumps(n)}: {json.dumps(r)}" for n, r in found["launches"].items()]
        path = RESOURCES / f"{found['triton']}.json"
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
