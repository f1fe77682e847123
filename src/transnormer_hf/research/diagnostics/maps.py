"""Measurements of attention maps: how local, how concentrated, how log-normal they are.

A map is (batch, heads, seq, seq), one row per query, from a softmax, from linear attention or from NormAttention,
whose map has no denominator and may be negative. Each instrument first makes its rows sum to 1 (`normalize_rows`);
`attention_mask` is (batch, seq) with 1 for real tokens; only their rows and columns are measured. Empty rows (padding,
or no key seen) are NaN in results per row and left out of every mean.

Where the papers leave a definition open, ours is marked as such.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

EDGES = ("clip", "shift")


def normalize_rows(
    weights: torch.Tensor, attention_mask: torch.Tensor | None = None, signed: bool = False
) -> torch.Tensor:
    """The map with rows that sum to 1, as (batch, heads, seq, seq) in float32 or float64; zeros at padding.

    A score counts with its absolute value, p_ij = |w_ij| / sum_k |w_ik| (ours; no change for a map of positive
    scores). `signed=True` divides by the signed sum instead, as in the authors' dump for their Figure 2a: its entries
    may be negative or very large, which only the accumulated attention can make sense of.
    """
    weights = _checked(weights, attention_mask)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if attention_mask is not None:
        is_real = attention_mask.bool()
        weights = weights.masked_fill(~(is_real[:, None, :, None] & is_real[:, None, None, :]), 0)
    if not signed:
        weights = weights.abs()
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(weights), weights / torch.where(total == 0, 1, total))


def mean_over_rows(per_row: torch.Tensor) -> torch.Tensor:
    """The mean over batch and rows, without NaN; (batch, heads, seq) to (heads,). Each row has the same weight."""
    return per_row.nanmean((0, 2))


def locally_accumulated_attention(
    weights: torch.Tensor,
    ratio: float,
    attention_mask: torch.Tensor | None = None,
    edge: str = "clip",
    signed: bool = False,
) -> torch.Tensor:
    """l(i, r, N) (Figure 2a of "The Devil in Linear Transformer"): attention of token i within r·N tokens about it.

    l(i, r, N) = sum of p_ij over the window; N is the length of the row from its first to its last real token. The
    paper leaves the edges open; ours are

    - "clip": all j with |j - i| <= r·N/2. What lies outside of the text is lost, so a uniform map has a mean of nearly
      r - r²/4 and not of r (0.36 at 0.4), and at r = 2 everything is inside.
    - "shift": max(1, round(r·N)) tokens about i (one more behind it where the number is even), moved inwards at the
      ends, so that every token has as many; a uniform map has r, and at r = 1 everything is inside.

    Returns (batch, heads, seq). Raises ValueError for a negative ratio or an unknown edge.
    """
    curve = _accumulate(weights, [ratio], attention_mask, edge, signed)
    return curve[..., 0]


def accumulated_attention_curve(
    weights: torch.Tensor,
    ratios: Sequence[float],
    attention_mask: torch.Tensor | None = None,
    edge: str = "clip",
    signed: bool = False,
) -> torch.Tensor:
    """The mean of `locally_accumulated_attention` over rows and batch, per head and ratio: (heads, ratios).

    The paper does not say how its curve is averaged. The mean of this over heads weighs every head and every real token
    of the batch the same; a curve of a model is the mean over its layers as well.
    """
    return _accumulate(weights, ratios, attention_mask, edge, signed).nanmean((0, 2))


def _accumulate(
    weights: torch.Tensor,
    ratios: Sequence[float],
    attention_mask: torch.Tensor | None,
    edge: str,
    signed: bool,
) -> torch.Tensor:
    """l(i, r, N) as (batch, heads, seq, ratios)."""
    if edge not in EDGES:
        raise ValueError(f"edge={edge!r} is not known; choose one of {', '.join(map(repr, EDGES))}.")
    for ratio in ratios:
        if not ratio >= 0:
            raise ValueError(f"ratio={ratio} must be at least 0, the share of the text that is in the window.")
    probabilities = normalize_rows(weights, attention_mask, signed)
    batch, heads, seq, _ = probabilities.shape
    first, length = _span(probabilities, attention_mask)  # (batch, 1, 1) each
    token = torch.arange(seq, device=weights.device) - first  # (batch, 1, seq), counted from the first real token
    # up_to[..., k] is the mass of the first k columns
    up_to = torch.nn.functional.pad(probabilities.cumsum(-1), (1, 0))
    columns = []
    for ratio in ratios:
        if edge == "clip":
            # a hair more, for r·N/2 that is whole but for rounding
            reach = torch.floor(ratio * length / 2 + 1e-6).long()
            start, end = token - reach, token + reach + 1
        else:
            width = torch.round(ratio * length).long().clamp(min=1)
            width = torch.minimum(width, length.long())
            start = torch.minimum(
                (token - torch.div(width, 2, rounding_mode="floor")).clamp(min=0), length.long() - width
            )
            end = start + width
        start, end = ((bound + first).clamp(0, seq).expand(batch, heads, seq)[..., None] for bound in (start, end))
        columns.append(up_to.gather(-1, end) - up_to.gather(-1, start))
    return _nan_where_empty(torch.cat(columns, -1), probabilities)


def row_entropy(weights: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """-sum_j p_ij log2 p_ij of every row, in bits, (batch, heads, seq): log2(n) for n equal weights, 0 for one.

    The base of the logarithm is our choice; a lower entropy is a more concentrated attention.
    """
    probabilities = normalize_rows(weights, attention_mask)
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True) / math.log(2)
    return _nan_where_empty(entropy, probabilities)[..., 0]


def spectral_gap(weights: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """1 - |λ₂| of the map as a transition matrix between real tokens, (batch, heads).

    λ₂ is the second largest eigenvalue by magnitude; a map of one token has a gap of 1. The eigenvalues of a causal map
    are its diagonal, so there the gap only says how much a token attends to itself. The form is recalled, not checked
    against "Linear Log-Normal Attention with Unbiased Concentration".
    """
    probabilities = normalize_rows(weights, attention_mask)
    if probabilities.shape[-1] == 1:
        return torch.ones_like(probabilities[..., 0, 0])
    # columns of padding add eigenvalues of 0, which come last
    magnitudes = torch.linalg.eigvals(probabilities.detach()).abs()  # (batch, heads, seq)
    gap = (1 - magnitudes.sort(-1, descending=True).values[..., 1]).clamp(min=0)  # below only by rounding
    return gap.masked_fill((probabilities.sum(-1) == 0).all(-1), math.nan)


def attention_temperature(weights: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """1 / σ, where σ² is the mean over rows of the variance of log p_ij over the keys a row sees: (batch, heads).

    Our definition: for p = softmax(x / T) with scores x of variance 1 it is T. A row that sees one key has no variance
    and is left out; a uniform map has an infinite temperature.
    """
    logs, is_seen = _log_probabilities(weights, attention_mask)
    count = is_seen.sum(-1)
    mean = logs.sum(-1) / count.clamp(min=1)
    variance = ((logs - mean[..., None]) * is_seen).square().sum(-1) / (count - 1).clamp(min=1)
    # equal weights have no variance, only rounding errors
    rounding = 4 * torch.finfo(logs.dtype).eps * mean.abs()
    variance = torch.where(variance.sqrt() <= rounding, 0.0, variance)
    return variance.masked_fill(count < 2, math.nan).nanmean(-1).rsqrt()


class LogNormalFit(NamedTuple):
    """A log-normal distribution fitted to the weights of each head; all (batch, heads).

    mean, variance: of log p, natural logarithm, the maximum-likelihood fit.
    distance: Kolmogorov-Smirnov's, the largest difference between the distribution of the weights and that of the fit:
        near 0 for a good fit, at most 1.
    num_weights: number of nonzero weights.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    distance: torch.Tensor
    num_weights: torch.Tensor


def fit_log_normal(weights: torch.Tensor, attention_mask: torch.Tensor | None = None) -> LogNormalFit:
    """Fits a log-normal to all weights p_ij > 0 of each head's map, separately for each text.

    NaN with fewer than two weights; a distance of 1 if all are equal.
    """
    logs, is_seen = (t.flatten(-2) for t in _log_probabilities(weights, attention_mask))  # (batch, heads, seq * seq)
    count = is_seen.sum(-1)
    mean = logs.sum(-1) / count
    variance = ((logs - mean[..., None]) * is_seen).square().sum(-1) / count
    deviation = variance.sqrt()[..., None]
    standard = ((logs - mean[..., None]) / deviation).masked_fill(~is_seen, math.inf).sort(-1).values
    ranks = torch.arange(1, standard.shape[-1] + 1, device=logs.device)
    expected = torch.special.ndtr(standard)
    above, below = ranks / count[..., None] - expected, expected - (ranks - 1) / count[..., None]
    is_inside = ranks <= count[..., None]
    distance = torch.maximum(above, below).masked_fill(~is_inside, 0).amax(-1)
    is_flat = deviation[..., 0] <= 4 * torch.finfo(logs.dtype).eps * mean.abs()
    distance = torch.where(is_flat, torch.ones_like(distance), distance).masked_fill(count < 2, math.nan)
    return LogNormalFit(mean, torch.where(is_flat, 0.0, variance), distance, count)


def _log_probabilities(weights: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_ij, with 0 in place of log 0, and the mask of p_ij > 0; (batch, heads, seq, seq) both."""
    probabilities = normalize_rows(weights, attention_mask)
    is_seen = probabilities > 0
    return torch.where(is_seen, probabilities, 1).log(), is_seen


def _span(probabilities: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first real token, and the number of tokens from it to the last: (batch, 1, 1) each."""
    seq = probabilities.shape[-1]
    if attention_mask is None:
        attention_mask = torch.ones(probabilities.shape[0], seq, device=probabilities.device)
    is_real = attention_mask.bool().to(probabilities.dtype)
    first = is_real.argmax(-1)
    last = seq - 1 - is_real.flip(-1).argmax(-1)
    return first[:, None, None], (last - first + 1)[:, None, None].double()


def _nan_where_empty(per_row: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    return per_row.masked_fill((probabilities == 0).all(-1, keepdim=True), math.nan)


def _checked(weights: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    shape = tuple(weights.shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"weights has shape {shape}; an attention map is (batch, heads, seq, seq).")
    if attention_mask is not None and tuple(attention_mask.shape) != (shape[0], shape[2]):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for this map it is (batch, seq) = "
            f"{(shape[0], shape[2])}, 1 for real tokens and 0 for padding."
        )
    return weights
