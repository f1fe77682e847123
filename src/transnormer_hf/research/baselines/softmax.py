"""Softmax attention: softmax(Q K^T / sqrt(head_dim)) V, the "vanilla" rows of the paper."""

import torch.nn.functional as F

from .mixer import Mixer, masked_softmax, register_mixer, visible_keys


@register_mixer("softmax")
class SoftmaxMixer(Mixer):
    """Through torch's fused attention; `attention_probs_dropout_prob` applies to its map."""

    takes_half_precision = True

    def forward(self, query, key, value, metadata, causal):
        dropout_p = self.config.attention_probs_dropout_prob if self.training else 0.0
        visible = None if metadata.is_real is None else visible_keys(metadata, query.shape[2], causal, query.device)
        if visible is not None:
            visible = visible | ~visible.any(-1, keepdim=True)  # a softmax over no key at all is not a number
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout_p, is_causal=causal and visible is None
        )

    def attention_map(self, query, key, metadata, causal):
        visible = visible_keys(metadata, query.shape[2], causal, query.device)
        weights = masked_softmax(query @ key.mT * query.shape[-1] ** -0.5, visible)
        return F.dropout(weights, self.config.attention_probs_dropout_prob, self.training)
