"""A mode that refuses whatever makes the host look at the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}
INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}


class RefuseHostReads(TorchDispatchMode):
    """Raises where an op's result or shape takes the host a look at the device.

    What an op does inside is not seen: that of Tossup's is its kernels.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError("a tensor of numbers copies from the host")
        masked = func in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in READS or masked:
            raise RuntimeError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))
