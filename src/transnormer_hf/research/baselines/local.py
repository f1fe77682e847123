"""Softmax attention within a band: a bidirectional token sees w/2 tokens on either side, a causal one the last w.

The sliding window of Longformer (Beltagy et al., https://arxiv.org/abs/2004.05150) without global tokens. Beside
DiagAttention, whose blocks do not overlap, it tells what the blocks' borders cost.
"""

import torch
import torch.nn.functional as F

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import zero_padding
from .mixer import Mixer, masked_softmax, register_mixer
from .rows import real_tokens


@register_mixer("local")
class LocalMixer(Mixer):
    """window: w, the token itself included in a causal model; None is `block_size`, DiagAttention's."""

    def __init__(self, config: TransNormerConfig, window: int | None = None):
        super().__init__(config)
        self.window = config.block_size if window is None else window
        if self.window < 1:
            raise ValueError(f"window={window} must be at least 1, the token itself.")

    def reach(self, causal: bool) -> int:
        """Distance of the farthest token seen."""
        return self.window - 1 if causal else self.window // 2

    def _is_near(self, distance: torch.Tensor, causal: bool) -> torch.Tensor:
        """Whether a token sees another, from how far that one lies before it."""
        return (distance.abs() <= self.reach(causal)) & ((distance >= 0) | (not causal))

    def forward(self, query, key, value, metadata, causal):
        # blocks as long as the band reaches see themselves and their neighbours
        seq_len, reach = query.shape[2], max(1, self.reach(causal))
        tail = -seq_len % reach
        after = 0 if causal else reach
        queries = F.pad(query, (0, 0, 0, tail)).unflatten(2, (-1, reach))  # (rows, heads, blocks, reach, head_dim)
        width = reach + reach + after

        def windows(states):  # (..., seq, channels) to (..., blocks, width, channels)
            return F.pad(states, (0, 0, reach, tail + after)).unfold(-2, width, reach).mT

        is_key = windows(real_tokens(metadata, seq_len)[:, None, :, None].to(query.dtype)).mT > 0
        columns = torch.arange(width, device=query.device)
        is_near = self._is_near(columns[:reach, None] + reach - columns, causal)
        scores = queries @ windows(key).mT * query.shape[-1] ** -0.5
        output = masked_softmax(scores, is_key & is_near) @ windows(zero_padding(value, metadata))
        return output.flatten(2, 3)[:, :, :seq_len]

    def attention_map(self, query, key, metadata, causal):
        seq_len = query.shape[2]
        is_near = self._is_near(metadata.positions[:, None] - metadata.positions, causal)
        visible = is_near & real_tokens(metadata, seq_len)[:, None, None, :]
        return masked_softmax(query @ key.mT * query.shape[-1] ** -0.5, visible)
