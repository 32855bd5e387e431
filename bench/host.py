"""What a call takes the host on its way to a GPU, which need not be there.

Ops are called through their Triton launchers, on a driver that compiles for sm_90 and then drops
what is launched. A call is told in launches of a kernel that does nothing, on the same driver: that
is Triton's own share, and makes the rest comparable between machines. Memory comes from the CPU.

    python -m bench.host       one round, as JSON
"""

import json
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
import triton

from tossup.autotune.offline import OfflineDriver
from tossup.autotune.workloads import build
from tossup.kernels import backend

ROUNDS = 5
BATCHES, CALLS = 300, 5  # the fastest batch counts: others had company

OPS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 2, "kv_heads": 2, "head_dim": 64},
    "selective_scan": {"dim": 64},
    "causal_conv1d": {"dim": 64},
    "linear": {"in_features": 64, "out_features": 64},
    "rotary": {"heads": 2, "head_dim": 64},
    "selective_state_update": {"dim": 64},
    "causal_conv1d_update": {"dim": 64},
}


@triton.jit
def nothing():
    return


class Idle(OfflineDriver):
    """Takes launches, and drops them."""

    def __init__(self) -> None:
        super().__init__(90)
        self.utils.load_binary = lambda *binary: ("module", "function", 0, 0, 1024)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *launch: None


def measure() -> dict[str, list[float]]:
    """For each call, how many idle launches it takes as long as, in several interpreters."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        command = [sys.executable, "-W", "ignore", "-m", "bench.host"]
        done = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, check=True
        )
        for name, share in json.loads(done.stdout).items():
            found.setdefault(name, []).append(share)
    return found


def one_round() -> dict[str, float]:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Idle())
    backend.refuse_cpu_unless_interpreted = lambda: None  # type: ignore[assignment]
    os.environ["TOSSUP_IMPL"] = "triton"
    shares = {}
    for op, sizes in OPS.items():
        seqlen = {} if "update" in op else {"seqlen": 16}
        calls = build(op, {"batch": 1, "dtype": "bf16"} | seqlen | sizes).prepare("cpu").ours
        for direction, call in calls.items():
            if "+" not in direction:
                shares[f"{op}, {direction}"] = fastest(call) / fastest(nothing[(1,)])
    return shares


def fastest(call: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call that compiles no more."""
    call()
    return min(timeit.repeat(call, timer=timer, number=CALLS, repeat=BATCHES)) / CALLS


if __name__ == "__main__":
    print(json.dumps(one_round(), indent=1))
