"""FLASH-quad: the gated attention unit, which replaces attention and feed-forward.

Hua et al., https://arxiv.org/abs/2202.10447, in the form of the TransNormer authors' models. With e = 2 d channels and
n tokens,

    U = silu(x W_u), V = silu(x W_v) of e channels, Z = silu(x W_z) of 128, x normalised
    q = rope(g_q Z + h_q), k = rope(g_k Z + h_k)
    A = relu(q k^T / P + T)²      if n <= P = max_position_embeddings, with T_ij = w[j - i] learned
    A = relu(q k^T / n)²          if n > P
    y = x + (U · A V) W_o

one head, no softmax, no denominator and no dropout. The original paper divides by n throughout, and its T are buckets.

Deviations from the authors' code:
- Padding is no key. Theirs ignores the mask, and padding has values silu(b).
- n is the number of tokens of a row, not of the padded batch; in a causal model that of the tokens so far, as if the
  text ended there, for the length of a text is in its future.
- Without their second table of biases, which is never used (256 parameters a layer); and linear layers of causal
  models begin with biases of zero.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import AttentionMetadata, compute_dtype, rotation_table, zero_padding
from .mixer import BaselineAttention, register_mixer
from .rows import row_lengths

NORMS = ("layer", "scale")


@register_mixer("flash_quad")
class GatedAttentionUnit(BaselineAttention):
    """norm_type: "layer" (encoders) or "scale" (language models: x / rms(x), times one learned number).

    query_size: channels of Z.
    """

    replaces_feed_forward = True
    num_projections = 2  # queries and keys

    def __init__(self, config: TransNormerConfig, norm_type: str = "layer", query_size: int = 128):
        nn.Module.__init__(self)  # it has none of the projections of TransNormer's attentions
        if norm_type not in NORMS:
            raise ValueError(f"norm_type={norm_type!r} is not known; choose one of {', '.join(map(repr, NORMS))}.")
        if query_size < 2 or query_size % 2:
            raise ValueError(f"query_size={query_size}: positions rotate pairs of channels; use an even number.")
        self.config: Any = config
        width, inner = config.hidden_size, 2 * config.hidden_size
        self.input_norm = nn.LayerNorm(width, config.layer_norm_eps) if norm_type == "layer" else ScaleNorm(config)
        self.gate_proj, self.value_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.base_proj, self.out_proj = nn.Linear(width, query_size), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.empty(self.num_projections, query_size).normal_(std=0.02))
        self.offset = nn.Parameter(torch.zeros(self.num_projections, query_size))
        self.bias = nn.Parameter(torch.empty(2 * self.max_distance() - 1).normal_(std=0.02))

    def max_distance(self) -> int:
        """Distances from which on there is no bias."""
        return self.config.max_position_embeddings

    def mix(self, hidden_states, metadata, wants_map):
        states = self.input_norm(hidden_states)
        gate, value, base = (F.silu(project(states)) for project in (self.gate_proj, self.value_proj, self.base_proj))
        wide = compute_dtype(value.dtype)
        with torch.autocast(value.device.type, enabled=False):  # sums stay in float32
            value, base = zero_padding(value.to(wide)[:, None], metadata)[:, 0], base.to(wide)
            projected = base[..., None, :] * self.scale.to(wide) + self.offset.to(wide)
            projections = rotate(projected.transpose(1, 2)).unbind(1)  # (rows, seq, query_size) each
            weights = self.weigh(projections, metadata) if wants_map else None
            output = self.attend_rows(projections, value, metadata) if weights is None else weights @ value
        if weights is not None:  # one head
            weights = zero_padding(weights.mT[:, None], metadata).mT  # (rows, 1, seq, seq)
        return self.out_proj(gate * output.to(gate.dtype)), weights

    def attend_rows(
        self, projections: tuple[torch.Tensor, ...], value: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """A V of the queries and keys (rows, seq, query_size): (rows, seq, 2 * hidden_size)."""
        return self.weigh(projections, metadata) @ value

    def weigh(self, projections: tuple[torch.Tensor, ...], metadata: AttentionMetadata) -> torch.Tensor:
        """A, (rows, seq, seq), the definition; columns at padding have weights too, but values of zero."""
        query, key = projections
        seq_len, longest = query.shape[1], self.config.max_position_embeddings
        if self.config.is_causal:
            length = torch.arange(1, seq_len + 1, device=query.device)[:, None]  # (seq, 1)
        else:
            length = row_lengths(metadata, seq_len)[:, None, None]  # (rows or 1, 1, 1)
        bias = self.relative_bias(seq_len).to(query.dtype) * (length <= longest)
        is_short = length <= longest
        weights = (query @ key.mT / torch.where(is_short, longest, length) + bias).relu().square()
        return weights.tril() if self.config.is_causal else weights

    def relative_bias(self, seq_len: int) -> torch.Tensor:
        """T, (seq, seq); the farthest distance's where a distance has none of its own."""
        places = torch.arange(seq_len, device=self.bias.device)
        farthest = len(self.bias) // 2
        return self.bias[(farthest + places - places[:, None]).clamp(0, 2 * farthest)]


class ScaleNorm(nn.Module):
    """x / rms(x), times one learned number."""

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(compute_dtype(hidden_states.dtype))
        return (F.rms_norm(wide, wide.shape[-1:], eps=self.eps) * self.scale).to(hidden_states.dtype)


def rotate(states: torch.Tensor) -> torch.Tensor:
    """Rotary positions that pair channel i with i + half: (..., seq, channels) to the same."""
    half = states.shape[-1] // 2
    theta = 10000.0 ** (-torch.arange(half, device=states.device, dtype=states.dtype) / half)
    cos, sin = rotation_table(torch.arange(states.shape[-2], device=states.device), theta)
    left, right = states.split(half, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
