"""A step is captured in a CUDA graph and replayed, by torch's own CUDA code, without a GPU.

What is below torch is a stand-in: it launches nothing, and keeps CUDA's rules of captures. It needs
torch's CUDA build, which `make test-oldest` has. What kernels compute there, no test looks at.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stand_ins import cuda

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA build"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the stand-in is written in C"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.supernet.captures"],
        env=cuda.runtime(tmp_path_factory.mktemp("cuda")), cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_step_is_captured_whole(found):
    for name, step in found["steps"].items():
        capture, replay = step["capture"], step["replay"]
        assert capture["captured"] > 500, name
        assert capture["host_copies"] == 0, name
        # A mixer of each layer stays on the step's stream; forward and backward, two micro-batches
        assert (capture["joined"] > 0) == ("streams" in name), name
        # Outside of the graph a step sends its inputs, and launches the graph
        assert (replay["captured"], replay["waits"]) == (0, 0), name
        assert 1 < replay["launched"] < 15, name


def test_what_a_step_must_not_do_breaks_its_capture(found):
    assert found["outcomes"] == {
        "nothing": "captured",
        "item": "cudaStreamSynchronize",
        "a number of the host's": "refused by torch",
        "waiting for the device": "cudaDeviceSynchronize",
        "waiting for what was before": "cudaStreamWaitEvent",
        "a stream that stays away": "a stream that did not come back",
    }
