"""Linformer (Wang et al., https://arxiv.org/abs/2006.04768): keys and values projected to a fixed number of places.

out = softmax(Q (E K)^T / sqrt(d)) (E V), with E (heads, k, max_position_embeddings) learned, one per layer and head,
for keys and values alike. It has a largest length, and no causal form: every place mixes all tokens.

Deviations: E is trained (in Skyformer's code, whose table the paper quotes, it moved to the GPU as a plain tensor and
stayed random), dropout does not apply to the map, and a text uses the first columns of E wherever its padding stands.
"""

import torch
from torch import nn

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import zero_padding
from .mixer import Mixer, register_mixer


@register_mixer("linformer")
class LinformerMixer(Mixer):
    """projected_length: k."""

    has_causal_form = False

    def __init__(self, config: TransNormerConfig, projected_length: int = 128):
        super().__init__(config)
        if projected_length < 1:
            raise ValueError(f"projected_length={projected_length} must be at least 1.")
        shape = (config.num_attention_heads, projected_length, config.max_position_embeddings)
        self.projection = nn.Parameter(torch.empty(shape).normal_(std=0.02))

    def forward(self, query, key, value, metadata, causal):
        weights, projection = self._weights(query, key, metadata)
        return weights @ (projection @ zero_padding(value, metadata))

    def attention_map(self, query, key, metadata, causal):
        weights, projection = self._weights(query, key, metadata)
        weights = weights @ projection
        return weights if metadata.is_real is None else weights * metadata.is_real[:, None, None, :]

    def _weights(self, query, key, metadata):
        """Weights of the k places, (rows, heads, seq, k), and E for this length, (heads, k, seq)."""
        seq_len, longest = query.shape[2], self.projection.shape[-1]
        if seq_len > longest:
            raise ValueError(
                f"the input has {seq_len} tokens and max_position_embeddings={longest}, the width of Linformer's "
                "projection; raise max_position_embeddings or truncate the input."
            )
        projection = self.projection[..., :seq_len].to(query.dtype)
        projected = projection @ zero_padding(key, metadata)  # (rows, heads, k, head_dim)
        return (query @ projected.mT * query.shape[-1] ** -0.5).softmax(-1), projection
