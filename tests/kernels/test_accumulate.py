"""accumulate_into: what is stored, what is added, and what is left alone."""

import pytest
import torch
from torch import Tensor

from tests.support import every_impl, route_of, seeded
from tossup.kernels.accumulate import accumulate_into

SHAPES = [(5,), (3, 1, 4), (1500, 7), (1,)]


def pairs(totals_dtype, gradients_dtype) -> tuple[list[Tensor], list[Tensor]]:
    random = seeded(0)
    totals, gradients = (
        [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
        for dtype in (totals_dtype, gradients_dtype)
    )
    return totals, [gradient.flatten() for gradient in gradients]


def flag(times: int) -> Tensor:
    return torch.tensor(times, dtype=torch.int32)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
     (torch.float32, torch.float16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("chosen", [None, (2, 0)])
@every_impl
def test_adds_to_what_was_written_and_overwrites_what_was_not(impl, chosen, dtypes):
    route = None if chosen is None else route_of(*chosen, batch=3)
    totals, gradients = pairs(*dtypes)
    expected = [
        (gradient.view_as(total).double() + total.double()).to(total.dtype)
        for total, gradient in zip(totals, gradients, strict=True)
    ]
    accumulate_into(totals, gradients, written=flag(2), route=route, impl=impl)
    torch.testing.assert_close(totals, expected)
    for written in (flag(0), None):
        fresh = [torch.full_like(total, float("nan")) for total in totals]
        accumulate_into(fresh, gradients, written=written, route=route, impl=impl)
        expected = [g.view_as(t).to(t.dtype) for t, g in zip(totals, gradients, strict=True)]
        torch.testing.assert_close(fresh, expected)


@pytest.mark.parametrize("times", [0, 1])
@every_impl
def test_without_a_sample_nothing_is_written(impl, times):
    totals, _ = pairs(torch.float32, torch.float32)
    before = [total.clone() for total in totals]
    garbage = [torch.full_like(total, float("nan")) for total in totals]
    accumulate_into(totals, garbage, written=flag(times), route=route_of(batch=3), impl=impl)
    torch.testing.assert_close(totals, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("totals", "gradients", "message"),
    [
        ([torch.zeros(3)], [], "as many as totals, got 0 and 1"),
        ([torch.zeros(3)], [torch.zeros(4)], r"as many elements as its total, got \(4,\)"),
        ([torch.zeros(3, 2).t()], [torch.zeros(6)], "totals must be contiguous and floating"),
        ([torch.zeros(3)], [torch.zeros(3).int()], "gradients must be contiguous and floating"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(totals, gradients, message):
    with pytest.raises(ValueError, match=message):
        accumulate_into(totals, gradients)


@every_impl
@pytest.mark.parametrize("written", [torch.tensor(0.5), torch.zeros(1, dtype=torch.int32)])
def test_a_flag_of_another_kind_is_refused(impl, written):
    with pytest.raises(ValueError, match="written must be int32 of shape"):
        accumulate_into([torch.zeros(3)], [torch.ones(3)], written=written, impl=impl)
