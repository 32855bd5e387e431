import pytest
import torch

from tests.support import poison_memory

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
