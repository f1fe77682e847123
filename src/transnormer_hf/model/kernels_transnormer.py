"""The Triton backend: NormAttention and its norm as differentiable operators on a GPU.

`ops_transnormer.py` looks here for the backend "triton" and goes without it where triton is not installed.
"""

from .norm_autograd_transnormer import triton_norm_attention, triton_norm_attention_step
from .rms_kernels_transnormer import triton_simple_rms_norm

__all__ = ["triton_norm_attention", "triton_norm_attention_step", "triton_simple_rms_norm"]
