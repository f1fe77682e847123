"""Token mixers: their registry, their base classes, the attention around one, linear attention with a denominator.

Shapes are (batch, heads, seq, head_dim) throughout. A mixer computes in float32 at least; `metadata` says which tokens
are real. Outputs at padding are finite and otherwise undefined. Only softmax has `attention_probs_dropout_prob`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ...model.configuration_transnormer import TransNormerConfig
from ...model.modeling_transnormer import ATTENTION_CLASSES, TransNormerAttention
from ...model.ops_transnormer import norm_attention
from ...model.reference_transnormer import AttentionMetadata, compute_dtype, zero_padding
from .rows import Rows

MIXERS: dict[str, "type[Mixer] | type[BaselineAttention]"] = {}
MixerClass = TypeVar("MixerClass", bound="type[Mixer] | type[BaselineAttention]")
CHUNK_SIZE = 64


def register_mixer(name: str) -> Callable[[MixerClass], MixerClass]:
    """Makes a `Mixer` or a `BaselineAttention` available as `mixer=name`, and as a layer type of the backbone."""

    def register(mixer_class: MixerClass) -> MixerClass:
        MIXERS[name] = mixer_class
        ATTENTION_CLASSES.setdefault(name, partial(make_attention, name=name))
        return mixer_class

    return register


def make_attention(config: Any, name: str) -> "BaselineAttention":
    """The attention of that name. Raises ValueError for one without a causal form in a causal model."""
    mixer_class: Any = MIXERS[name]
    if config.is_causal and not mixer_class.has_causal_form:
        causal = ", ".join(repr(other) for other in sorted(MIXERS) if MIXERS[other].has_causal_form)
        raise ValueError(
            f"mixer={name!r} is defined for bidirectional models only, and is_causal=True; use it in an encoder, or "
            f"choose one of {causal}."
        )
    mixer = mixer_class(config, **(config.mixer_options or {}).get(name, {}))
    attention = mixer if isinstance(mixer, BaselineAttention) else MixerAttention(config, mixer)
    attention.name = name
    return attention


class Mixer(nn.Module, ABC):
    """What an attention computes between its projections. A subclass's keyword arguments are its `mixer_options`.

    Rows begin with their first real token (`Rows`), so that columns are positions.
    """

    has_causal_form = True
    has_map = True
    takes_half_precision = False  # otherwise inputs are float32 at least
    shares_query_and_key = False  # there is no projection of keys then, they are the queries

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata, causal: bool
    ) -> torch.Tensor:
        """The output, of the shape and dtype of the inputs: (batch, heads, seq, head_dim)."""

    def attention_map(
        self, query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, causal: bool
    ) -> torch.Tensor | None:
        """The definition as a map (batch, heads, seq, seq) to multiply values with; None where `has_map` is False."""
        return None


class BaselineAttention(TransNormerAttention):
    """What stands where TransNormer has its attention. A subclass says in `mix` what happens to rows of hidden states.

    If it replaces the feed-forward as well, `mix` gives all that the layer adds to its input, norms included.
    """

    has_causal_form = True
    has_map = True
    replaces_feed_forward = False
    name: str

    def __init__(self, config: TransNormerConfig):
        super().__init__(config, has_norm=False)
        self.lrpe = None

    def forward(self, hidden_states, metadata, state=None, output_attentions=False, query_input=None, **kwargs):
        rows = Rows(metadata, *hidden_states.shape[:2])
        wants_map = output_attentions or self.config.attention_backend == "eager"
        output, weights = self.mix(rows.split(hidden_states), rows.metadata, wants_map)
        return rows.join(output), rows.join_map(weights) if weights is not None and output_attentions else None

    @abstractmethod
    def mix(
        self, hidden_states: torch.Tensor, metadata: AttentionMetadata, wants_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (rows, seq, hidden_size) to the same, and the map if it is wanted and there is one.

        With a map, (rows, heads, seq, seq), the output goes by way of it: that is the definition.
        """

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, seq, hidden_size) to (rows, heads, seq, head_dim)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def merge_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, heads, seq, head_dim) to (rows, seq, hidden_size)."""
        return states.transpose(1, 2).flatten(2)


class MixerAttention(BaselineAttention):
    """Projections around a mixer. `backend="eager"` multiplies by the mixer's map, its definition."""

    def __init__(self, config: Any, mixer: Mixer):
        super().__init__(config)
        self.mixer = mixer
        if mixer.shares_query_and_key:
            self.k_proj = None

    def mix(self, hidden_states, metadata, wants_map):
        query, value = (self.split_heads(project(hidden_states)) for project in (self.q_proj, self.v_proj))
        key = query if self.k_proj is None else self.split_heads(self.k_proj(hidden_states))
        wide = value.dtype if self.mixer.takes_half_precision and not wants_map else compute_dtype(value.dtype)
        query, key, value_states = (states.to(wide) for states in (query, key, value))
        weights = None
        with torch.autocast(value.device.type, enabled=False):  # sums stay in float32
            if wants_map:
                weights = self.mixer.attention_map(query, key, metadata, self.config.is_causal)
            if weights is not None:
                output = weights @ zero_padding(value_states, metadata)
            else:
                output = self.mixer(query, key, value_states, metadata, self.config.is_causal)
        return self.out_proj(self.merge_heads(output.to(value.dtype))), weights


class FeatureMixer(Mixer):
    """Linear attention with a denominator: phi(q_i) sum_j phi(k_j) v_j^T / phi(q_i) sum_j phi(k_j).

    A subclass gives `features`.
    """

    @abstractmethod
    def features(
        self, query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(Q) and phi(K), (batch, heads, seq, features) each, not negative in their products."""

    def forward(self, query, key, value, metadata, causal):
        return scaled_linear_attention(*self.features(query, key, metadata, causal), value, metadata, causal)

    def attention_map(self, query, key, metadata, causal):
        return scaled_linear_map(*self.features(query, key, metadata, causal), metadata, causal)


class ExponentialMixer(Mixer):
    """Linear attention whose features are exponentials, kept in range without changing the result.

    A subclass gives `exponents`. A constant per feature, added to the queries' exponents and taken from the keys',
    cancels in each product, and a constant per query in the quotient. So the largest key of each feature is scaled to
    1, then the largest feature of each query, and every denominator is at least 1. In a causal model the largest key
    of all may lie in the future: there keys are scaled by a running maximum.
    """

    @abstractmethod
    def exponents(
        self, query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log phi(Q) and log phi(K), (batch, heads, seq, features) each."""

    def forward(self, query, key, value, metadata, causal):
        query, key = self.exponents(query, key, metadata, causal)
        if causal:
            return causal_exponential_attention(query, key, value, metadata)
        return scaled_linear_attention(*_guarded_features(query, key, metadata), value, metadata, causal=False)

    def attention_map(self, query, key, metadata, causal):
        query, key = self.exponents(query, key, metadata, causal)
        if not causal:
            return scaled_linear_map(*_guarded_features(query, key, metadata), metadata, causal=False)
        query, key, largest = _running_features(query, key, metadata)
        scores = query @ key.mT * _decay(largest)
        return _divide(scores, scores.sum(-1, keepdim=True))


def _guarded_features(
    query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata
) -> tuple[torch.Tensor, torch.Tensor]:
    lowest = torch.finfo(key.dtype).min / 4
    if metadata.is_real is not None:
        key = key.masked_fill(~metadata.is_real[:, None, :, None], lowest)
    largest_key = key.amax(2, keepdim=True).detach().clamp(min=lowest / 2)  # (batch, heads, 1, features)
    query = query + largest_key
    return (query - query.amax(-1, keepdim=True).detach()).exp(), (key - largest_key).exp()


def scaled_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata, causal: bool
) -> torch.Tensor:
    """Linear attention of features that phi has been applied to, divided by the sum of each query's scores.

    query, key: (batch, heads, seq, features); value and the output: (batch, heads, seq, head_dim).
    """
    key = zero_padding(key, metadata)
    if not causal:
        return _divide(query @ (key.mT @ zero_padding(value, metadata)), query @ key.sum(2).unsqueeze(-1))
    # the kernels are made for head dims, and features may be many
    summed, _ = norm_attention(query, key, value, causal=True, metadata=metadata, backend="torch")
    return _divide(summed, (query * key.cumsum(2)).sum(-1, keepdim=True))


def scaled_linear_map(
    query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, causal: bool
) -> torch.Tensor:
    """The map of `scaled_linear_attention`, (batch, heads, seq, seq); rows of real tokens sum to 1."""
    scores = query @ zero_padding(key, metadata).mT
    if causal:
        scores = scores.tril()
    return _divide(scores, scores.sum(-1, keepdim=True))


def causal_exponential_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """Causal linear attention with features exp(query) and exp(key), chunk by chunk.

    Keys are scaled by the largest exponent so far, m_j, and their scores brought to that of the query: with
    exp(k_j - m_j) · exp(m_j - m_i), j <= i, nothing overflows, and no token sees a later one. A query whose every score
    underflows beside its largest feature times the largest key so far gets zeros.

    query, key: exponents (batch, heads, seq, features); value and the output: (batch, heads, seq, head_dim).
    """
    query_features, key_features, largest = _running_features(query, key, metadata)
    with_ones = F.pad(value, (0, 1), value=1.0)

    state, state_largest = with_ones.new_zeros(*key.shape[:2], key.shape[-1], with_ones.shape[-1]), largest[..., :1]
    outputs = []
    for start in range(0, key.shape[2], CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        queries, keys, values = query_features[:, :, chunk], key_features[:, :, chunk], with_ones[:, :, chunk]
        m = largest[..., chunk]  # (batch, heads, chunk)
        summed = (queries @ keys.mT * _decay(m)) @ values
        outputs.append(summed + (state_largest - m).exp()[..., None] * (queries @ state))
        last = m[..., -1:]
        to_end = (m - last).exp()[..., None]
        state = (state_largest - last).exp()[..., None] * state + (keys * to_end).mT @ values
        state_largest = last
    summed = torch.cat(outputs, 2)
    return _divide(summed[..., :-1], summed[..., -1:])


def _running_features(
    query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of exponents, 1 at most, and m, the largest exponent of the keys so far: (batch, heads, seq)."""
    lowest = torch.finfo(key.dtype).min / 4
    if metadata.is_real is not None:
        key = key.masked_fill(~metadata.is_real[:, None, :, None], lowest)
    largest = key.detach().amax(-1).cummax(-1).values.clamp(min=lowest / 2)
    return (query - query.detach().amax(-1, keepdim=True)).exp(), (key - largest[..., None]).exp(), largest


def _decay(largest: torch.Tensor) -> torch.Tensor:
    """exp(m_j - m_i) where j <= i, else 0: (batch, heads, seq, seq)."""
    # above the diagonal the difference is positive, and its exponential might be infinite
    return (largest[..., None, :] - largest[..., :, None]).clamp(max=0).exp().tril()


def visible_keys(metadata: AttentionMetadata, seq_len: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """True where a query may see a key: (seq, seq) or (batch, 1, seq, seq); None where all see all."""
    visible = None
    if causal:
        visible = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    if metadata.is_real is not None:
        real_keys = metadata.is_real[:, None, None, :]  # (batch, 1, 1, seq)
        visible = real_keys.expand(-1, -1, seq_len, -1) if visible is None else visible & real_keys
    return visible


def masked_softmax(scores: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys that are visible, zero elsewhere and for queries that see none."""
    if visible is None:
        return scores.softmax(-1)
    # the lowest finite number and not -inf, whose softmax is not a number where nothing is visible
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~visible, 0)


def _divide(summed: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, or zero (and no gradient) for a query that meets no key, or none within the range of the dtype."""
    is_met = denominator > 2**26 * torch.finfo(denominator.dtype).tiny  # so that gradients stay in range as well
    return torch.where(is_met, summed / torch.where(is_met, denominator, 1.0), 0.0)
