"""Nystromformer (Xiong et al., https://arxiv.org/abs/2102.03902): softmax attention through m landmarks.

With queries and keys divided by d^(1/4), and landmarks Q~, K~ the means of m segments of consecutive tokens,
out = softmax(Q K~^T) · softmax(Q~ K~^T)^+ · softmax(Q~ K^T) V; the pseudo-inverse is six steps of an iteration. No
causal form: every landmark mixes all tokens of its segment.

Deviations from the authors' code:
- Segments divide the real tokens of a row, not the padded length, so padding is in no landmark. A text with fewer
  tokens than landmarks has as many landmarks as tokens. It is never switched to softmax, so padding changes nothing.
- The iteration starts from each map's own largest column sum. Theirs is the largest of the whole batch, so that a
  text's output would depend on its neighbours.
- No depthwise convolution over the values (as in the Long-Range Arena models, where it is off), and no dropout.
"""

import torch
import torch.nn.functional as F

from ...model.configuration_transnormer import TransNormerConfig
from .mixer import Mixer, masked_softmax, register_mixer
from .rows import real_tokens


@register_mixer("nystromformer")
class NystromformerMixer(Mixer):
    """num_landmarks: m."""

    has_causal_form = False

    def __init__(self, config: TransNormerConfig, num_landmarks: int = 128):
        super().__init__(config)
        if num_landmarks < 1:
            raise ValueError(f"num_landmarks={num_landmarks} must be at least 1.")
        self.num_landmarks = num_landmarks

    def forward(self, query, key, value, metadata, causal):
        to_landmarks, inverse, from_tokens = self._factors(query, key, metadata)
        return to_landmarks @ (inverse @ (from_tokens @ value))

    def attention_map(self, query, key, metadata, causal):
        to_landmarks, inverse, from_tokens = self._factors(query, key, metadata)
        return to_landmarks @ inverse @ from_tokens

    def _factors(self, query, key, metadata):
        """The three maps: (rows, heads, seq, m), (rows, heads, m, m) and (rows, heads, m, seq)."""
        is_real = real_tokens(metadata, query.shape[2])
        segments = segment_means(is_real, min(self.num_landmarks, query.shape[2])).to(query.dtype)[:, None]
        is_empty = (segments == 0).all(-1)  # (rows, 1, m) landmarks that a short text does not have
        scale = query.shape[-1] ** -0.25
        query, key = query * scale, key * scale
        query_landmarks, key_landmarks = segments @ query, segments @ key  # (rows, heads, m, head_dim)
        among = masked_softmax(query_landmarks @ key_landmarks.mT, ~is_empty[:, :, None, :])
        # an absent landmark stands for itself, so that the map can be inverted
        among = torch.where(
            is_empty[..., None], torch.eye(among.shape[-1], dtype=among.dtype, device=among.device), among
        )
        from_tokens = masked_softmax(query_landmarks @ key.mT, is_real[:, None, None, :] & ~is_empty[..., None])
        to_landmarks = masked_softmax(query @ key_landmarks.mT, ~is_empty[:, :, None, :])
        return to_landmarks, newton_schulz_inverse(among), from_tokens


def segment_means(is_real: torch.Tensor, num_landmarks: int) -> torch.Tensor:
    """The matrix that averages each segment of a row's real tokens: (rows, seq) bool to (rows, landmarks, seq).

    Of c tokens, number t (from 0) is in segment floor(t · min(m, c) / c). Rows of absent segments are zero.
    """
    count = is_real.sum(1, keepdim=True).clamp(min=1)
    rank = is_real.cumsum(1) - 1
    segment = (rank * count.clamp(max=num_landmarks) // count).clamp(min=0)  # (rows, seq)
    member = F.one_hot(segment, num_landmarks) * is_real[..., None]  # (rows, seq, landmarks)
    return (member / member.sum(1, keepdim=True).clamp(min=1)).mT


def newton_schulz_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of (..., m, m) maps of non-negative rows that sum to 1, by six steps of third order."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = matrix.mT / matrix.sum(-2).amax(-1)[..., None, None]
    for _ in range(6):
        product = matrix @ inverse
        inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
    return inverse
