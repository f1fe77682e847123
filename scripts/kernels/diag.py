"""The kernels of DiagAttention: their variants for compiling ahead of time."""

from transnormer_hf.model.diag_kernels_transnormer import KERNELS

__all__ = ["KERNELS"]
