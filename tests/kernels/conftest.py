import pytest
import torch

from tests.support import poison_memory
from tossup.kernels.backend import load_backend

# torch lists the functions that a device context redirects once, when it first needs them: before
# one of them is poisoned, lest the list keep the poisoned one.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch)


@pytest.fixture(autouse=True)
def device_of_triton(request):
    """Tests of impl="triton" make their tensors on the GPU, where there is one.

    Many processes share it: none keeps what a test with far strides took.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("impl") == "triton" and torch.cuda.is_available():
        with torch.device("cuda"):
            yield
        torch.cuda.empty_cache()
    else:
        yield


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Cases of one test share its code, which torch compiles only so many times."""
    torch._dynamo.reset()


@pytest.fixture
def small_tiles(monkeypatch):
    """Linear layers' kernels in tiles of 16, so that small tensors have many, and on a GPU of few
    processors."""
    kernel = load_backend("tossup.kernels.linear", "triton")
    for name in ("WARPGROUPS", "WARPS", "SCATTERED", "LANES"):
        monkeypatch.setattr(kernel, name, (kernel.Tile(16, 16, 16, 4, 2, 1),) * 2)
    monkeypatch.setattr(kernel, "processors", lambda: 5)
    monkeypatch.setattr(kernel, "SHORTEST", 2)
    return kernel
