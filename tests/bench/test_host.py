"""What a call takes the host: the launchers run, and their launches are dropped."""

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest

from bench import host

FEW = """
import json
from bench import host
host.OPS, host.BATCHES = {op: host.OPS[op] for op in ("linear", "selective_state_update")}, 3
print(json.dumps(host.one_round()))
"""


def test_every_direction_of_an_op_is_told_in_idle_launches():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FEW],
        env=environment, text=True, stdout=subprocess.PIPE, check=True,
        cwd=Path(host.__file__).parents[1],
    )  # fmt: skip
    shares = json.loads(done.stdout)
    calls = ["linear, forward", "linear, dgrad", "linear, wgrad", "selective_state_update, forward"]
    assert list(shares) == calls
    assert all(share > 1 for share in shares.values())  # each holds a launch at least


def test_the_fastest_batch_counts():
    now, takes = [0.0], cycle([0.5, 0.25, 1.0])

    def call():
        now[0] += next(takes)

    assert host.fastest(call, lambda: now[0]) == pytest.approx((0.5 + 0.25 + 1.0 + 0.5 + 0.25) / 5)
