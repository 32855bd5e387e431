"""mamba-ssm as an oracle. Tests import it nowhere else.

It is installed without its compiled extensions, yet importing it imports one, for which an empty
module stands in. mamba-ssm's `Mamba` then takes its own slow path, in which its own reference
replaces the CUDA scan.
"""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from tossup.autotune.workloads.upstream import stand_in


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What mamba-ssm takes from causal-conv1d, of which nothing runs without its extension."""
    past = weight.shape[1] - 1
    return F.silu(F.conv1d(F.pad(x, (past, 0)), weight.unsqueeze(1), bias, groups=len(weight)))


def import_without_extensions() -> tuple[ModuleType, ModuleType, ModuleType]:
    """mamba-ssm's modules of the scan, of its one step and of `Mamba`."""
    with stand_in("selective_scan_cuda"):
        from mamba_ssm.modules import mamba_simple
        from mamba_ssm.ops import selective_scan_interface
        from mamba_ssm.ops.triton import selective_state_update
    mamba_simple.selective_scan_fn = selective_scan_interface.selective_scan_ref
    selective_scan_interface.causal_conv1d_fn = convolve
    return selective_scan_interface, selective_state_update, mamba_simple


_scan, _step, _module = import_without_extensions()

selective_scan_fn = _scan.selective_scan_fn  # its signature: it needs the extension to run
selective_scan_ref = _scan.selective_scan_ref
mamba_inner_fn = _scan.mamba_inner_fn
mamba_inner_ref = _scan.mamba_inner_ref
_scan.selective_scan_fn = selective_scan_ref  # which mamba_inner_ref calls
selective_state_update = _step.selective_state_update
selective_state_update_ref = _step.selective_state_update_ref
Mamba = _module.Mamba

__all__ = [
    "Mamba",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
