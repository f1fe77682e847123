"""FLASH: the gated attention unit with quadratic attention inside chunks and linear attention between them.

Hua et al., https://arxiv.org/abs/2202.10447, in the form of the TransNormer authors' models: as `flash_quad.py`, with
two pairs of queries and keys from Z, for chunks of C tokens:

    inside the chunk:  relu(q k^T / C + T)² V
    linear:            q' sum_c (k'_c^T V_c) / C, over all chunks; in a causal model over those before its own

Deviations from the authors' code: values at padding are zero and chunks begin at the first real token; theirs fills
texts up to whole chunks with tokens of value silu(b), so that an output depends on the length modulo C. Only 2 C - 1 of
the 2 max_position_embeddings - 1 learned biases are used, as in theirs.
"""

import torch
import torch.nn.functional as F

from ...model.configuration_transnormer import TransNormerConfig
from .flash_quad import GatedAttentionUnit
from .mixer import register_mixer


@register_mixer("flash")
class MixedChunkAttention(GatedAttentionUnit):
    """chunk_size: C; the others as in FLASH-quad."""

    num_projections = 4  # quadratic query, linear query, quadratic key, linear key

    def __init__(
        self, config: TransNormerConfig, norm_type: str = "layer", query_size: int = 128, chunk_size: int = 64
    ):
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
        self.chunk_size = chunk_size
        super().__init__(config, norm_type, query_size)

    def max_distance(self) -> int:
        return max(self.chunk_size, self.config.max_position_embeddings)

    def attend_rows(self, projections, value, metadata):
        seq_len, size = value.shape[1], self.chunk_size
        query, linear_query, key, linear_key, value = (
            F.pad(states, (0, 0, 0, -seq_len % size)).unflatten(1, (-1, size)) for states in (*projections, value)
        )  # (rows, chunks, size, channels)
        weights = (query @ key.mT / size + self.relative_bias(size).to(query.dtype)).relu().square()
        state = linear_key.mT @ value / size  # (rows, chunks, query_size, 2 * hidden_size)
        if self.config.is_causal:
            weights = weights.tril()
            state = state.cumsum(1) - state
        else:
            state = state.sum(1, keepdim=True)
        return (weights @ value + linear_query @ state).flatten(1, 2)[:, :seq_len]

    def weigh(self, projections, metadata):
        query, linear_query, key, linear_key = projections
        seq_len, size = query.shape[1], self.chunk_size
        places = torch.arange(seq_len, device=query.device)
        inside = places[:, None] // size == places // size
        weights = (query @ key.mT / size + self.relative_bias(seq_len).to(query.dtype)).relu().square() * inside
        linear = linear_query @ linear_key.mT / size
        return (weights + linear * ~inside).tril() if self.config.is_causal else weights + linear
