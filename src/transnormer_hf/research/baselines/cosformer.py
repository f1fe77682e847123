"""cosFormer (Qin et al., https://arxiv.org/abs/2202.08791): relu features and a cosine that favours near tokens.

The score of tokens i and j is relu(q_i)·relu(k_j) cos(π/2 · (i - j)/M), which is linear attention on features twice
as wide: cos(a - b) = cos a cos b + sin a sin b.
"""

import torch

from .mixer import FeatureMixer, register_mixer


@register_mixer("cosformer")
class CosformerMixer(FeatureMixer):
    """M is the length of the sequence. A causal token cannot know it: there M is `max_position_embeddings`, and longer
    inputs raise ValueError."""

    def features(self, query, key, metadata, causal):
        seq_len = query.shape[2]
        positions = metadata.positions  # (seq,) or (batch, seq)
        if causal:
            length = self.config.max_position_embeddings
            if seq_len > length:
                raise ValueError(
                    f"the input has {seq_len} tokens and max_position_embeddings={length}, within which causal "
                    "cosFormer weighs distances; raise max_position_embeddings or truncate the input."
                )
            lengths = torch.full((1,), length, device=query.device)
        elif metadata.is_real is None:
            lengths = torch.full((1,), seq_len, device=query.device)
        else:
            lengths = positions.masked_fill(~metadata.is_real, 0).amax(-1, keepdim=True) + 1  # (batch, 1)
        # padding stands at the end of the text: farther off, its scores would be negative and might cancel in the sum
        positions = torch.minimum(positions, lengths - 1)
        angles = (torch.pi / 2 * positions / lengths).to(query.dtype)
        if angles.dim() == 2:
            angles = angles[:, None]  # (batch, 1, seq)
        cos, sin = angles.cos()[..., None], angles.sin()[..., None]
        query, key = query.relu(), key.relu()
        return torch.cat((query * cos, query * sin), -1), torch.cat((key * cos, key * sin), -1)
