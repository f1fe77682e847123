"""Linear Log-Normal Attention (https://arxiv.org/abs/2311.13541), alone and with softmax blocks beside it.

phi(q) = exp(alpha q) and phi(k) = exp(beta k), elementwise and without 1/sqrt(head_dim). alpha and beta are chosen so
that the scores have the log-variance of softmax's: the logarithm of a sum of head_dim products exp(x) with x of
variance v has a variance of nearly a·v + b, so with v = 2 s² the rule is s² = (var(q) var(k) - b) / (2 a),
alpha = s / std(q), beta = s / std(k). No gradient flows through alpha and beta.
"""

import functools

import torch
from torch import nn

from ...model.configuration_transnormer import TransNormerConfig
from ...model.ops_transnormer import diag_attention
from ...model.reference_transnormer import AttentionMetadata, diag_attention_map
from .mixer import ExponentialMixer, Mixer, register_mixer
from .rows import real_tokens

# a and b of the authors' code, for their head dim of 64.
PUBLISHED_CONSTANTS = {64: (0.14855178144710912, -0.35487039130661086)}
# Variances of the exponent through which the line is fitted. At head dim 64 it reproduces the published one.
FITTED_VARIANCES = (4.0, 6.0, 8.0, 10.0)
FIT_SAMPLES = 50_000
MODES = ("average", "learnable_scale", "learnable_ratio")
MOMENTS = ("row", "batch", "none")


@functools.lru_cache
def moment_matching_constants(head_dim: int) -> tuple[float, float]:
    """a and b with Var(log sum_d exp(x_d)) = a·v + b for head_dim Gaussians x_d of variance v.

    The published ones at 64; else a least-squares line through simulated variances, from a seed of its own.
    """
    if head_dim in PUBLISHED_CONSTANTS:
        return PUBLISHED_CONSTANTS[head_dim]
    return fit_constants(head_dim)


def fit_constants(head_dim: int) -> tuple[float, float]:
    """The fitted line of `moment_matching_constants`, also at the head dim whose constants are published."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(FIT_SAMPLES, head_dim, generator=generator)
    variances = torch.tensor(FITTED_VARIANCES)
    measured = torch.stack([(normal * v.sqrt()).logsumexp(-1).var() for v in variances])
    centred = variances - variances.mean()
    slope = (centred * measured).sum() / centred.square().sum()
    return slope.item(), (measured.mean() - slope * variances.mean()).item()


@register_mixer("lln")
class LogNormalMixer(ExponentialMixer):
    """moments: the numbers whose standard deviation is taken, of real tokens only.

    "row": bidirectional, all tokens, heads and channels of a row; causal, those up to the token, so alpha_i and beta_i
    are each token's own. "batch" is the authors' code: the whole batch, so that a text's output depends on its
    neighbours; bidirectional only, since in their causal form the moments are of future tokens too. "none" matches
    nothing, alpha = beta = 1: the ablation.
    """

    def __init__(self, config: TransNormerConfig, moments: str = "row"):
        super().__init__(config)
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r} is not known; choose one of {', '.join(map(repr, MOMENTS))}.")
        if moments == "batch" and config.is_causal:
            raise ValueError("moments='batch' with is_causal=True would see future tokens; use 'row'.")
        self.moments = moments

    def exponents(self, query, key, metadata, causal):
        if self.moments == "none":
            return query, key
        with torch.no_grad():
            spread = running_std if causal else functools.partial(total_std, per_row=self.moments == "row")
            query_std, key_std = spread(query, metadata), spread(key, metadata)
            a, b = moment_matching_constants(query.shape[-1])
            # b is negative, so this is positive; at a head dim of 1 it is 0, but for an error of rounding
            matched = ((query_std * key_std).square() - b).clamp(min=0).div(2 * a).sqrt()
            smallest = torch.finfo(query.dtype).tiny ** 0.5  # one token of equal channels has no spread
            alpha = torch.where(query_std > smallest, matched / query_std.clamp(min=smallest), 1.0)
            beta = torch.where(key_std > smallest, matched / key_std.clamp(min=smallest), 1.0)
        return query * alpha, key * beta


def total_std(states: torch.Tensor, metadata: AttentionMetadata, per_row: bool) -> torch.Tensor:
    """The standard deviation (unbiased) of all numbers of real tokens: (batch, 1, 1, 1), or (1, 1, 1, 1) of all."""
    is_real = real_tokens(metadata, states.shape[2])[:, None, :, None].to(states.dtype).expand_as(states)
    dims = (1, 2, 3) if per_row else (0, 1, 2, 3)
    count = is_real.sum(dims, keepdim=True)
    mean = (states * is_real).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = ((states - mean) * is_real).square().sum(dims, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def running_std(states: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """The standard deviation (unbiased) of a row's real tokens up to each one: (batch, 1, seq, 1).

    Squares within each token about its own mean, plus those of the token means about theirs: no large numbers are
    subtracted from each other.
    """
    per_token = states.shape[1] * states.shape[3]
    is_real = torch.ones_like(states[:, 0, :, 0]) if metadata.is_real is None else metadata.is_real.to(states.dtype)
    means = states.mean((1, 3)) * is_real  # (batch, seq)
    within = ((states - means[:, None, :, None]).square().sum((1, 3)) * is_real).cumsum(-1)
    tokens = is_real.cumsum(-1)
    mean = means.cumsum(-1) / tokens.clamp(min=1)
    between = per_token * (means.square().cumsum(-1) - tokens * mean.square()).clamp(min=0)
    variance = (within + between) / (per_token * tokens - 1).clamp(min=1)
    return variance.sqrt()[:, None, :, None]


@register_mixer("lln_diag")
class LogNormalDiagMixer(Mixer):
    """Linear Log-Normal Attention and softmax attention inside blocks of head_dim tokens, combined.

    mode: "average" (their mean), "learnable_scale" (r·LLN + p·Diag) or "learnable_ratio" (r·LLN + (1 - r)·Diag), with
        r and p per head and channel, 1/2 at first. Blocks start at a row's first real token.
    moments: as in "lln".
    """

    def __init__(self, config: TransNormerConfig, mode: str = "average", moments: str = "row"):
        super().__init__(config)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(map(repr, MODES))}.")
        self.has_map = mode == "average"  # otherwise each channel has one of its own
        self.mode, self.log_normal = mode, LogNormalMixer(config, moments)
        shape = (1, config.num_attention_heads, 1, config.head_dim)
        self.ratio = nn.Parameter(torch.full(shape, 0.5)) if mode != "average" else None
        self.scale = nn.Parameter(torch.full(shape, 0.5)) if mode == "learnable_scale" else None

    def forward(self, query, key, value, metadata, causal):
        linear = self.log_normal(query, key, value, metadata, causal)
        diag = diag_attention(query, key, value, block_size=query.shape[-1], causal=causal, metadata=metadata)
        if self.ratio is None:
            return (linear + diag) / 2
        other = 1 - self.ratio if self.scale is None else self.scale
        return self.ratio * linear + other * diag

    def attention_map(self, query, key, metadata, causal):
        if not self.has_map:
            return None
        diag = diag_attention_map(
            query,
            key,
            metadata=metadata,
            block_size=query.shape[-1],
            causal=causal,
            activation="softmax",
            scale=query.shape[-1] ** -0.5,
            lrpe=None,
        )
        return (self.log_normal.attention_map(query, key, metadata, causal) + diag) / 2
