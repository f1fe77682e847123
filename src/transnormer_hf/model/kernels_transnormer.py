"""The Triton backend: both attentions and the norm as differentiable operators on a GPU.

`ops_transnormer.py` looks here for the backend "triton" and goes without it where triton is not installed. The kernels
of each attention are in `norm_kernels_transnormer.py` and `diag_kernels_transnormer.py`, their launches and gradients
in `norm_autograd_transnormer.py` and `diag_autograd_transnormer.py`; SimpleRMSNorm is in `rms_kernels_transnormer.py`.
"""

from .diag_autograd_transnormer import triton_diag_attention
from .norm_autograd_transnormer import triton_norm_attention, triton_norm_attention_step
from .rms_kernels_transnormer import triton_simple_rms_norm

__all__ = ["triton_diag_attention", "triton_norm_attention", "triton_norm_attention_step", "triton_simple_rms_norm"]
