"""The compiled loops of CPU backends: their exponential, and how they are run."""

import pytest
import torch

from tossup.kernels.sweeps import exp_float32, sweep


def test_exponential():
    points = torch.cat([torch.linspace(-86.9, 88.7, 20001), torch.linspace(-1e-3, 1e-3, 1001)])
    ours = torch.tensor([exp_float32(x) for x in points.numpy()], dtype=torch.float64)
    exact = points.double().exp()
    assert ((ours - exact) / exact).abs().max() < 1.3 * torch.finfo(torch.float32).eps
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([-inf, -1000, -88, 0, 89, 1000, inf, nan])
    values = torch.tensor([exp_float32(x) for x in special.numpy()])
    torch.testing.assert_close(
        values, torch.tensor([0, 0, 0, 1.0, inf, inf, inf, nan]), equal_nan=True, rtol=0, atol=0
    )


@sweep()
def add(tasks, number, x, out):
    for task in tasks:
        for i in range(x.shape[1]):
            out[task, i] = x[task, i] + number


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_task_runs_once_whatever_the_threads_and_strides(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (torch.float32, torch.float64):
        for tasks in (0, 1, 5):
            x = torch.randn(3, tasks, dtype=dtype).mT
            out = torch.zeros(tasks, 6, dtype=dtype)[:, ::2]
            add(tasks, 2, x, out)
            assert torch.equal(out, x + 2)
