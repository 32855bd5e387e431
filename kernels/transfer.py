"""Copies from the host to a device that neither of them waits for."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, itself if it is there.

    From the host to a GPU it goes by pinned memory, which torch keeps until it has arrived: a copy
    of other memory waits until the GPU has done all that was asked of it. While a graph is captured
    it is refused, as any copy from the host whose memory the graph would have to keep.
    """
    if x.device.type != "cpu" or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)
