"""Drop-in functions of flash-attn, mamba-ssm and causal-conv1d, and how to put them in place.

    from tossup.kernels.compat import flash_attn_func, selective_scan_fn

Signatures, defaults, layouts and results are those of flash-attn 2.8.3, mamba-ssm 2.3.2 and
causal-conv1d 1.7.0. `install` puts the functions under upstream's import names, and `tossup.Mamba`
under mamba-ssm's, so that code which imports those finds them.
"""

from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .install import Installation, install
from .mamba_ssm import (
    mamba_inner_fn,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
)

__all__ = [
    "Installation",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
]
