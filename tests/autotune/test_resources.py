"""Committed resources against what a launch takes now, for planted changes of either kind."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from tossup.autotune.resources import changes

ROOT = Path(__file__).parents[2]
LOOP = {"instructions": 90, "wide_loads": 4, "tensor": 8, "tma": 0, "mufu": 2, "shfl": 0}
LOOP |= {"bar": 1, "local": 0}
BEFORE = {
    "a launch": {
        "registers": 96, "spills": 0, "shared": 1024, "fits": True, "warps": 4, "dots": 2,
        "scalar_dots": 0, "unordered_writes": 0, "loads_before_exit": 1, "loops": [LOOP],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "worse"),
    [
        (("registers",), 97, True),
        (("registers",), 95, False),
        (("spills",), 2, True),
        (("shared",), 2048, True),
        (("fits",), False, True),
        (("warps",), 8, False),
        (("scalar_dots",), 1, True),
        (("unordered_writes",), 1, True),
        (("loads_before_exit",), 2, True),
        (("loops", 0, "instructions"), 91, True),
        (("loops", 0, "instructions"), 89, False),
        (("loops", 0, "mufu"), 3, True),
        (("loops", 0, "local"), 1, True),
        (("loops", 0, "wide_loads"), 3, True),
        (("loops", 0, "wide_loads"), 5, False),
        (("loops",), [], True),
    ],
)
def test_more_of_anything_is_worse(path, value, worse):
    now = deepcopy(BEFORE)
    inner = now["a launch"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    ((found, sentence),) = changes(BEFORE, now)
    assert found is worse and "→" in sentence and str(path[-1]) in sentence
    assert not list(changes(BEFORE, BEFORE))


def test_launches_that_come_or_go_are_worse_until_committed():
    assert list(changes(BEFORE, {})) == [(True, "a launch: is gone")]
    assert list(changes({}, BEFORE)) == [(True, "a launch: is new")]


COMPILE = """
import json
from tossup.autotune import inspection
from tossup.kernels.causal_conv1d import kernel
place = next(i for i, case in enumerate(inspection.CASES) if case.op == "causal_conv1d")
shipped, configure = inspection.inspect_case(place, 90), kernel.configure
kernel.configure = lambda *launch: configure(*launch) | {"num_warps": 1}
print(json.dumps([shipped, inspection.inspect_case(place, 90)]))
"""


def test_a_kernel_that_was_slowed_down_shows():
    """On a quarter of its warps, a thread of the convolution has four times the work."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    shipped, slowed = json.loads(done.stdout)
    found = list(changes(shipped, slowed))
    assert len(found) == len(shipped) and all(worse for worse, _ in found)
