"""What it costs to begin: `import tossup`, and the first call of each op on the CPU backend.

Each is measured in a fresh interpreter, as a part of what `import torch` takes in the same one,
which makes it comparable between machines.
"""

import json
import subprocess
import sys

ROUNDS = 5

OPS = {
    "attention": {"heads": 2, "kv_heads": 2, "head_dim": 32},
    "selective_scan": {"dim": 64},
    "causal_conv1d": {"dim": 64},
    "linear": {"in_features": 64, "out_features": 64},
}
SCRIPT = """
import json, sys, time
def since(start): return time.perf_counter() - start
start = time.perf_counter(); import tossup; package = since(start)
start = time.perf_counter(); import torch; of_torch = since(start)
torch.set_num_threads(1)
from tossup.autotune.workloads import build
shares = {"import tossup": package / of_torch}
for op, sizes in json.loads(sys.argv[1]).items():
    values = sizes | {"batch": 1, "seqlen": 64, "dtype": "fp32"}
    ours = build(op, values).prepare("cpu").ours["forward"]
    start = time.perf_counter(); ours(); shares[f"first call of {op}"] = since(start) / of_torch
print(json.dumps(shares))
"""


def measure() -> dict[str, list[float]]:
    """For each beginning, its share of `import torch` in several interpreters. The first one, whose
    files are not in memory yet and whose code numba may have to compile, is not counted."""
    found: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(OPS)],
            text=True, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        if turn > 0:
            for name, share in json.loads(done.stdout).items():
                found.setdefault(name, []).append(share)
    return found
