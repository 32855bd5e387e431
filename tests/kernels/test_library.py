"""Ops that write their arguments: what torch knows of them, and what autograd refuses."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from tossup.kernels import library
from tossup.kernels.library import MUTATING, MutatingOp


def fill(out: Tensor, others: list[Tensor], scale: Tensor | None, number: float) -> None:
    """As a kernel writes: torch does not see it."""
    for tensor in (out, *others):
        tensor.detach().numpy()[:] = number
    if scale is not None:
        scale.detach().numpy()[:] *= 2


@pytest.fixture(scope="module")
def op() -> MutatingOp:
    return MutatingOp("written_by_a_test", fill, ("out", "others", "scale"))


def test_what_was_saved_for_a_backward_pass_may_not_be_written(op):
    for place in range(3):
        x = torch.ones(3, requires_grad=True)
        saved = torch.ones(3)
        product = x * saved
        tensors = [torch.ones(3) for _ in range(3)]
        tensors[place] = saved
        op(tensors[0], [tensors[1]], tensors[2], 5.0)
        assert saved.tolist() == [2.0 if place == 2 else 5.0] * 3
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    op(torch.ones(3), [], None, 1.0)


def test_torch_knows_what_it_writes(op):
    assert "Tensor(a0!) out, Tensor(a1!)[] others, Tensor(a2!)? scale" in str(op.overload._schema)
    torch.library.opcheck(op.overload, (torch.ones(3), [torch.ones(2)], torch.ones(1), 4.0))
    compiled = torch.compile(
        lambda a, b: op(a, [b], None, 7.0), fullgraph=True, backend="aot_eager"
    )
    a, b = torch.ones(2), torch.ones(2)
    compiled(a, b)
    assert a.tolist() == b.tolist() == [7.0, 7.0]


def test_no_op_of_the_package_has_defaults():
    """Dispatchers leave out what is as by default; registration here fills nothing in."""
    for path in Path(library.__file__).parent.glob("*/ops.py"):
        importlib.import_module(f"tossup.kernels.{path.parent.name}.ops")
    schemas = [op.overload._schema for op in MUTATING.values()]
    schemas += [op._opoverload._schema for name, op in OPDEFS.items() if name.startswith("tossup")]
    assert len(schemas) > 15
    for schema in schemas:
        assert not any(argument.has_default_value() for argument in schema.arguments), schema
