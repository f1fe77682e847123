"""Performer: softmax attention estimated by positive orthogonal random features, FAVOR+.

Choromanski et al., https://arxiv.org/abs/2009.14794: with rows w of a random matrix of m directions,
exp(q·k) = E[exp(w·q - |q|²/2) exp(w·k - |k|²/2)], and queries and keys scaled by head_dim ** -1/4 each.
"""

import functools
import math

import torch

from ...model.configuration_transnormer import TransNormerConfig
from .mixer import ExponentialMixer, register_mixer


@register_mixer("performer")
class PerformerMixer(ExponentialMixer):
    """The directions are drawn once, from `seed`, and are the same in all layers and heads.

    num_features: number of directions; None is head_dim · log(head_dim).
    """

    def __init__(self, config: TransNormerConfig, num_features: int | None = None, seed: int = 0):
        super().__init__(config)
        if num_features is None:
            num_features = max(1, int(config.head_dim * math.log(config.head_dim)))
        if num_features < 1:
            raise ValueError(f"num_features={num_features}: the estimate needs at least 1 direction.")
        self.num_features, self.seed = num_features, seed

    def exponents(self, query, key, metadata, causal):
        directions = favor_directions(query.shape[-1], self.num_features, self.seed).to(query)

        def project(states: torch.Tensor) -> torch.Tensor:
            states = states * states.shape[-1] ** -0.25
            return states @ directions - states.square().sum(-1, keepdim=True) / 2  # (batch, heads, seq, features)

        return project(query), project(key)


@functools.lru_cache
def favor_directions(head_dim: int, num_features: int, seed: int) -> torch.Tensor:
    """Random directions (head_dim, num_features), orthogonal in blocks of head_dim, with the lengths of Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        block, triangle = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
        # a positive diagonal of R makes Q uniform; otherwise signs are biased, and exp(w·x) is not symmetric in w
        blocks.append(block * triangle.diagonal().sign())
    lengths = torch.randn(head_dim, num_features, generator=generator, dtype=torch.float64).norm(dim=0)
    return torch.cat(blocks, 1)[:, :num_features] * lengths
