"""Kernelized attention: a Gaussian kernel in place of softmax's exponential, and no denominator.

Chen et al., https://arxiv.org/abs/2111.00035, Section 3: with x = q / d^(1/4) and y = k / d^(1/4),
out_i = sum_j exp(-|x_i - y_j|² / 2) v_j. The map is between 0 and 1, and quadratic.

Deviations from the authors' code: d is the head dim (theirs is 32 whatever the heads), and dropout does not apply to
the map. The causal form, the sum over j <= i, is ours.
"""

import torch

from ...model.reference_transnormer import zero_padding
from .mixer import Mixer, register_mixer


@register_mixer("kernelized")
class KernelizedMixer(Mixer):
    def forward(self, query, key, value, metadata, causal):
        return self.attention_map(query, key, metadata, causal) @ zero_padding(value, metadata)

    def attention_map(self, query, key, metadata, causal):
        scale = query.shape[-1] ** -0.25
        weights = gaussian_kernel(query * scale, key * scale)
        if causal:
            weights = weights.tril()
        return weights if metadata.is_real is None else weights * metadata.is_real[:, None, None, :]


def gaussian_kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|² / 2): (..., n, d) and (..., m, d) to (..., n, m)."""
    squares = left.square().sum(-1)[..., :, None] + right.square().sum(-1)[..., None, :]
    return (left @ right.mT - squares / 2).exp()
