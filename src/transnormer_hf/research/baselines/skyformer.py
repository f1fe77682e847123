"""Skyformer (Chen et al., https://arxiv.org/abs/2111.00035): kernelized attention through a sample of rows.

With kernel(x, y) = exp(-|x - y|² / 2) of queries and keys divided by d^(1/4), and a sample X of D rows, half of them
queries and half keys: M = kernel(X, X) + gamma I, R = diag(M 1)^(-1/2), W = R (R M R)^+ R and
out = kernel(Q, X) W kernel(X, K) V. No causal form: the sample may lie in the future.

Deviations from the authors' code:
- The sample is the same in every forward, layer and head, a function of `seed` and the number of tokens. Theirs is
  drawn anew in each forward, evaluation too, from the global generator.
- The pseudo-inverse starts from each map's own scale, not from the batch's (see `nystromformer.py`).
- d is the head dim (theirs is 32 whatever the heads).
"""

import torch

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import AttentionMetadata, zero_padding
from .kernelized import gaussian_kernel
from .mixer import Mixer, register_mixer
from .nystromformer import newton_schulz_inverse
from .rows import nth_token, real_tokens
from .seeded import seeded_uniform


@register_mixer("skyformer")
class SkyformerMixer(Mixer):
    """num_samples: D, an even number; gamma: what is added to the diagonal."""

    has_causal_form = False

    def __init__(self, config: TransNormerConfig, num_samples: int = 128, gamma: float = 0.1, seed: int = 0):
        super().__init__(config)
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"num_samples={num_samples}: half are queries and half keys; use an even number.")
        self.num_samples, self.gamma, self.seed = num_samples, gamma, seed

    def forward(self, query, key, value, metadata, causal):
        to_sample, inverse, from_sample = self._factors(query, key, metadata)
        return to_sample @ (inverse @ (from_sample @ zero_padding(value, metadata)))

    def attention_map(self, query, key, metadata, causal):
        to_sample, inverse, from_sample = self._factors(query, key, metadata)
        return to_sample @ inverse @ from_sample

    def _factors(self, query, key, metadata):
        """kernel(Q, X), W and kernel(X, K): (rows, heads, seq, D), (rows, heads, D, D), (rows, heads, D, seq)."""
        scale = query.shape[-1] ** -0.25
        query, key = query * scale, key * scale
        queries, keys = self.sample(metadata, query.shape[2]).expand(query.shape[0], -1).chunk(2, 1)
        sample = torch.cat([take(states, index) for states, index in ((query, queries), (key, keys))], 2)
        among = gaussian_kernel(sample, sample)  # (rows, heads, D, D)
        among = among + self.gamma * torch.eye(self.num_samples, dtype=among.dtype, device=among.device)
        root = among.sum(-1).rsqrt()  # (rows, heads, D)
        both = root[..., :, None] * root[..., None, :]
        from_sample = gaussian_kernel(sample, key)
        if metadata.is_real is not None:
            from_sample = from_sample * metadata.is_real[:, None, None, :]
        return gaussian_kernel(query, sample), both * newton_schulz_inverse(both * among), from_sample

    def sample(self, metadata: AttentionMetadata, seq_len: int) -> torch.Tensor:
        """Columns of the sampled tokens, real ones, with replacement: (rows or 1, D)."""
        is_real = real_tokens(metadata, seq_len)
        share = seeded_uniform(self.seed, torch.arange(self.num_samples, device=is_real.device))
        return nth_token(metadata, seq_len, (share * is_real.sum(1, keepdim=True)).long())


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(rows, heads, seq, head_dim) at the columns of index (rows, count): (rows, heads, count, head_dim)."""
    return states.take_along_dim(index[:, None, :, None], 2)
