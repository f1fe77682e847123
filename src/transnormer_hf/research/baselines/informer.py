"""Informer's ProbSparse attention (Zhou et al., https://arxiv.org/abs/2012.07436): few queries attend, to all keys.

Each query meets U sampled keys; M, the largest of those scores less their sum / n, tells how far from uniform its
attention may be. The u queries of largest M attend by softmax, all others return the mean of the values.
U = u = c ceil(ln n), at most n.

Deviations from the authors' code:
- The sample is a function of `seed` and the query's position, the same for all heads and layers, in training and
  evaluation. Theirs is drawn anew in each forward from the global generator.
- Sample, n, mean and selection are of a row's real tokens alone; theirs take padding for tokens.
- Bidirectional only. Their causal form selects queries by comparison with later ones, so it sees the future.
- No dropout on the map.
"""

import math

import torch

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import AttentionMetadata, zero_padding
from .mixer import Mixer, masked_softmax, register_mixer
from .rows import nth_token, real_tokens
from .seeded import seeded_uniform
from .skyformer import take


@register_mixer("informer")
class InformerMixer(Mixer):
    """factor: c. None is ceil(128 / ln(max_position_embeddings)), as in Skyformer's models of the Long-Range Arena."""

    has_causal_form = False

    def __init__(self, config: TransNormerConfig, factor: int | None = None, seed: int = 0):
        super().__init__(config)
        if factor is None:
            factor = math.ceil(128 / math.log(max(2, config.max_position_embeddings)))
        if factor < 1:
            raise ValueError(f"factor={factor} must be at least 1.")
        self.factor, self.seed = factor, seed

    def forward(self, query, key, value, metadata, causal):
        index, is_selected = self.select(query, key, metadata)
        is_real = real_tokens(metadata, query.shape[2])
        value = zero_padding(value, metadata)
        mean = (
            value.sum(2, keepdim=True) / is_real.sum(1).clamp(min=1)[:, None, None, None]
        )  # (rows, heads, 1, head_dim)
        scores = query.take_along_dim(index[..., None], 2) @ key.mT * query.shape[-1] ** -0.5
        attended = masked_softmax(scores, is_real[:, None, None, :]) @ value  # (rows, heads, u, head_dim)
        attended = torch.where(is_selected[..., None], attended, mean)
        return mean.expand_as(value).scatter(2, index[..., None].expand_as(attended), attended)

    def attention_map(self, query, key, metadata, causal):
        index, is_selected = self.select(query, key, metadata)
        is_real = real_tokens(metadata, query.shape[2])[:, None, None, :]
        weights = masked_softmax(query @ key.mT * query.shape[-1] ** -0.5, is_real)
        attends = torch.zeros_like(weights[..., 0], dtype=torch.bool).scatter(2, index, is_selected)
        return torch.where(attends[..., None], weights, is_real / is_real.sum(-1, keepdim=True).clamp(min=1))

    @torch.no_grad()
    def select(
        self, query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the queries that attend, (rows, heads, u), and which of them count in a shorter row."""
        seq_len = query.shape[2]
        is_real = real_tokens(metadata, seq_len)
        count = is_real.sum(1, keepdim=True)  # (rows, 1)
        number = (self.factor * count.clamp(min=1).log().ceil().long()).clamp(min=1).minimum(count)  # (rows, 1)
        longest = min(seq_len, self.factor * max(1, math.ceil(math.log(seq_len))))
        draws = torch.arange(longest, device=query.device)
        is_drawn = draws < number  # (rows, longest)

        share = seeded_uniform(self.seed, metadata.positions[:, None], draws)  # (seq, longest)
        sampled = nth_token(metadata, seq_len, (share.flatten() * count).long()).unflatten(1, (seq_len, longest))
        # draw by draw: all sampled keys together would be many times as large as the keys
        scores = torch.stack([(query * take(key, index)).sum(-1) for index in sampled.unbind(2)], -1)
        scores = scores * query.shape[-1] ** -0.5  # (rows, heads, seq, longest)
        largest = scores.masked_fill(~is_drawn[:, None, None], -math.inf).amax(-1)
        mean = scores.masked_fill(~is_drawn[:, None, None], 0).sum(-1) / count.clamp(min=1)[:, None]
        sparsity = (largest - mean).masked_fill(~is_real[:, None], -math.inf)  # (rows, heads, seq)
        index = sparsity.topk(longest, dim=-1).indices
        return index, is_drawn[:, None].expand_as(index)
