"""Transformer-LS (Zhu et al., https://arxiv.org/abs/2107.02192): softmax over nearby tokens and landmarks together.

Landmarks are means of keys and values under weights learned from the hidden states. Tokens and landmarks are normalised
by a LayerNorm each, over all heads together, shared by keys and values:

    out_i = softmax([q_i k~^T | q_i k_near^T]) [v~ ; v_near],  k = LN(x W_k), q = x W_q / sqrt(d)

Bidirectional: r landmarks per head over the whole text, k~ = LN'(p k); near is the own group of w tokens and w/2 on
either side. Causal: one landmark per head and chunk of c tokens, k~ = LN'(p x W_k), of earlier chunks only; near are
the last w tokens. Both scores have relative positions, q · R(sines of the distance), and those of near tokens also
biases, as in Transformer-XL.

Deviations from the authors' code (NVIDIA's, and the TransNormer authors' copies):
- The causal form has no memory of an earlier batch. In training theirs is unrelated text, since samples are shuffled;
  and its landmarks are another function of the hidden states than those of the text.
- Padding is in no landmark and no window, and groups and chunks begin at the first real token; the copies ignore the
  mask. Any length; the causal copy raises at some.
- No dropout on the map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import compute_dtype, rotation_table
from .mixer import BaselineAttention, register_mixer
from .rows import real_tokens


@register_mixer("transformer_ls")
class LongShortAttention(BaselineAttention):
    """window: w; None is 8 bidirectional, 64 causal. num_landmarks: r, bidirectional. chunk_size: c, causal."""

    has_map = False  # landmarks of values are normalised, which no weights of the values are

    def __init__(
        self, config: TransNormerConfig, window: int | None = None, num_landmarks: int = 32, chunk_size: int = 32
    ):
        super().__init__(config)
        self.window = (64 if config.is_causal else 8) if window is None else window
        if min(self.window, num_landmarks, chunk_size) < 1:
            raise ValueError(f"{window=}, {num_landmarks=}, {chunk_size=}: each must be at least 1.")
        self.chunk_size = chunk_size
        width, heads = config.hidden_size, config.num_attention_heads
        self.landmark_proj = nn.Linear(width, heads if config.is_causal else heads * num_landmarks)
        self.landmark_norm, self.token_norm = (nn.LayerNorm(width, config.layer_norm_eps) for _ in range(2))
        if config.is_causal:
            self.near_position_proj, self.far_position_proj = nn.Linear(width, width), nn.Linear(width, width)
            biases = torch.empty(2, heads, 1, self.head_dim).normal_(std=0.02)
            self.content_bias, self.position_bias = (nn.Parameter(bias) for bias in biases)

    def mix(self, hidden_states, metadata, wants_map):
        projections = self.q_proj, self.k_proj, self.v_proj, self.landmark_proj
        states = [project(hidden_states) for project in projections]
        is_real = real_tokens(metadata, hidden_states.shape[1])
        with torch.autocast(hidden_states.device.type, enabled=False):  # sums stay in float32
            query, key, value, landmarks = (s.to(compute_dtype(s.dtype)) for s in states)
            query = self.split_heads(query) * self.head_dim**-0.5
            attend = self._attend_causally if self.config.is_causal else self._attend_to_all
            output = attend(query, key, value, landmarks, is_real.expand(len(query), -1))
        return self.out_proj(self.merge_heads(output).to(states[0].dtype)), None

    def _attend_to_all(self, query, key, value, landmarks, is_real):
        """query (rows, heads, seq, head_dim); key and value (rows, seq, hidden_size); landmarks, the logits of p,
        (rows, seq, heads * num_landmarks); is_real (rows, seq)."""
        seq_len, size, beside = query.shape[2], self.window, max(self.window // 2, 1)
        key, value = self._normalised(self.token_norm, key), self._normalised(self.token_norm, value)
        lowest = torch.finfo(query.dtype).min
        shares = landmarks.masked_fill(~is_real[..., None], lowest).softmax(1)
        shares = shares.unflatten(2, (self.num_heads, -1)).permute(0, 2, 3, 1)  # (rows, heads, landmarks, seq)
        key_landmarks, value_landmarks = (
            self.split_heads(self._normalised(self.landmark_norm, self.merge_heads(shares @ self.split_heads(s))))
            for s in (key, value)
        )  # (rows, heads, landmarks, head_dim)

        tail = -seq_len % size

        def windows(states):  # (..., seq, channels) to (..., groups, size + 2 beside, channels)
            return F.pad(states, (0, 0, beside, tail + beside)).unfold(-2, size + 2 * beside, size).mT

        is_key = windows(is_real[:, None, :, None].to(query.dtype)).mT > 0
        queries = F.pad(query, (0, 0, 0, tail)).unflatten(2, (-1, size))  # (rows, heads, groups, size, head_dim)
        near = (queries @ windows(self.split_heads(key)).mT).masked_fill(~is_key, lowest)
        far = queries @ key_landmarks[:, :, None].mT
        far, near = torch.cat((far, near), -1).softmax(-1).split((far.shape[-1], near.shape[-1]), -1)
        output = far @ value_landmarks[:, :, None] + near @ windows(self.split_heads(value))
        return output.flatten(2, 3)[:, :, :seq_len]

    def _attend_causally(self, query, key, value, landmarks, is_real):
        """Shapes as in `_attend_to_all`; landmarks (rows, seq, heads)."""
        seq_len, size, device = query.shape[2], self.chunk_size, query.device
        lowest = torch.finfo(query.dtype).min
        key_landmarks, value_landmarks, has_tokens = self._chunk_landmarks(key, value, landmarks, is_real)
        places, chunks = torch.arange(seq_len, device=device), torch.arange(has_tokens.shape[1], device=device)
        between = places[:, None] // size - chunks - 1  # chunks between a token's and another; negative: not earlier
        relative = self._relative(query, self.far_position_proj, len(chunks))
        far = query @ key_landmarks.mT + _at_distance(relative, between.clamp(min=0))
        far = far.masked_fill((between < 0) | ~has_tokens[:, None, None, :], lowest)  # (rows, heads, seq, chunks)

        width, tail = self.window, -seq_len % self.window  # a token sees its own block of `window` and the one before
        key, value = (self.split_heads(self._normalised(self.token_norm, states)) for states in (key, value))

        def blocks(states):
            return F.pad(states, (0, 0, 0, tail)).unflatten(2, (-1, width))

        def windows(states):  # (rows, heads, seq, channels) to (rows, heads, blocks, 2 width, channels)
            return F.pad(states, (0, 0, width, tail)).unfold(-2, 2 * width, width).mT

        columns = torch.arange(2 * width, device=device)
        distance = columns[:width, None] + width - columns  # (width, 2 width)
        is_near = (distance >= 0) & (distance < width) & (windows(is_real[:, None, :, None].to(query.dtype)).mT > 0)
        near = blocks(query + self.content_bias.to(query.dtype)) @ windows(key).mT
        relative = self._relative(query + self.position_bias.to(query.dtype), self.near_position_proj, width)
        near = near + _at_distance(blocks(relative), distance.clamp(0, width - 1))
        near = near.masked_fill(~is_near, lowest)  # (rows, heads, blocks, width, 2 width)

        far, near = torch.cat((blocks(far), near), -1).softmax(-1).split((far.shape[-1], near.shape[-1]), -1)
        output = far @ value_landmarks[:, :, None] + near @ windows(value)
        return output.flatten(2, 3)[:, :, :seq_len]

    def _chunk_landmarks(self, key, value, landmarks, is_real):
        """One landmark per chunk: its key and value, (rows, heads, chunks, head_dim), and which chunks have tokens."""
        tail = -key.shape[1] % self.chunk_size
        is_real = F.pad(is_real, (0, tail)).unflatten(1, (-1, self.chunk_size))  # (rows, chunks, chunk_size)
        key, value, landmarks = (
            F.pad(states, (0, 0, 0, tail)).unflatten(1, (-1, self.chunk_size)) for states in (key, value, landmarks)
        )
        shares = landmarks.masked_fill(~is_real[..., None], torch.finfo(key.dtype).min).softmax(2)
        pooled = (
            (shares[..., None] * states.unflatten(-1, (self.num_heads, -1))).sum(2).flatten(2)
            for states in (key, value)
        )  # (rows, chunks, hidden_size)
        keys, values = (self.split_heads(self._normalised(self.landmark_norm, states)) for states in pooled)
        return keys, values, is_real.any(-1)

    def _relative(self, query: torch.Tensor, project: nn.Linear, count: int) -> torch.Tensor:
        """q · R(distance) for distances below `count`: (rows, heads, seq, count)."""
        width = self.config.hidden_size
        theta = 10000.0 ** (-torch.arange(0, width, 2, device=query.device, dtype=torch.float32) / width)
        cos, sin = rotation_table(torch.arange(count, device=query.device), theta)
        encoded = project(torch.cat((sin, cos), -1)[:, :width].to(project.weight.dtype)).to(query.dtype)
        return query @ encoded.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0)

    def _normalised(self, norm: nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
        weight, bias = norm.weight.to(states.dtype), norm.bias.to(states.dtype)
        return F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)


def _at_distance(relative: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Scores by distance (..., seq, distances) as scores by key; distance: (seq, keys)."""
    return relative.gather(-1, distance.expand(*relative.shape[:-2], -1, -1))
