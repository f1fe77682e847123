"""TransNormer's backbone with a rival's token mixer in the place of its attentions, for all Auto classes.

These are research models: a checkpoint of one is loaded where this package is installed, no code goes with it.
"""

import functools
import inspect
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
)

from ...model.configuration_transnormer import DERIVED_FIELDS, LAYER_TYPES, TransNormerConfig
from ...model.modeling_transnormer import (
    ATTENTION_CLASSES,
    TransNormerAttention,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
)
from ...model.ops_transnormer import without_autocast
from ...model.reference_transnormer import AttentionMetadata, attention_metadata, compute_dtype, zero_padding
from .mixer import MIXERS


@strict
class BaselineConfig(TransNormerConfig):
    """Configuration of a rival in TransNormer's backbone: all fields of `TransNormerConfig`, and two more.

    Args:
        mixer: Name of the rival in every layer (`MIXERS`).
        mixer_options: Keyword arguments of the mixer, by its name: `{"lln_diag": {"mode": "learnable_ratio"}}`.
        layer_types: A rival or one of TransNormer's own attentions per layer (Table 3 mixes them). `None` is `mixer`
            in every layer. Rivals have neither LRPE nor a norm around the attention, whatever the other fields say.
    """

    model_type = "transnormer_hf_baseline"
    _auto_class = None

    mixer: str = "softmax"
    mixer_options: dict[str, Any] | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [self.mixer] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        known = [*MIXERS, *LAYER_TYPES]
        for field, names in (("mixer", [self.mixer]), ("layer_types", self.layer_types)):
            for name in names:
                if name not in known:
                    raise ValueError(f"{field}={name!r} is not known; choose one of {', '.join(map(repr, known))}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one per layer, or None for the mixer in all of them."
            )
        for name, options in (self.mixer_options or {}).items():
            if name not in MIXERS:
                raise ValueError(f"mixer_options has {name!r}, no such mixer; choose one of {', '.join(MIXERS)}.")
            allowed = list(inspect.signature(MIXERS[name]).parameters)[1:]
            for option in options:
                if option not in allowed:
                    raise ValueError(
                        f"mixer_options[{name!r}] has {option!r}; {name} knows {', '.join(allowed) or 'none'}."
                    )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "BaselineConfig":
        """As in TransNormerConfig; another `mixer` is another one in every layer."""
        if "mixer" in kwargs:
            config_dict = {name: value for name, value in config_dict.items() if name != "layer_types"}
            config_dict["mixer"] = kwargs.pop("mixer")
        return super().from_dict(config_dict, **kwargs)


# What a configuration says about its class and files, and what depends on the attentions it has.
NOT_CARRIED_OVER = {"model_type", "architectures", "auto_map", "transformers_version", "use_cache", "mixer"}
NOT_CARRIED_OVER |= {"mixer_options", *DERIVED_FIELDS} - {"intermediate_size"}


def baseline_config(config: TransNormerConfig, mixer: str, **mixer_options: Any) -> BaselineConfig:
    """The backbone of `config` with a rival in every layer; any Auto class builds it (`from_config`).

    Raises ValueError for a mixer or an option that does not exist.
    """
    options = {mixer: mixer_options} if mixer_options else None
    return BaselineConfig(**backbone_fields(config), mixer=mixer, mixer_options=options)


def backbone_fields(config: TransNormerConfig) -> dict[str, Any]:
    """What is left of a configuration where its attentions are taken out."""
    return {name: value for name, value in config.to_dict().items() if name not in NOT_CARRIED_OVER}


class MixerAttention(TransNormerAttention):
    """Projections around a mixer. `backend="eager"` goes by way of the mixer's map, its definition."""

    def __init__(self, config: BaselineConfig, name: str):
        super().__init__(config, has_norm=False)
        self.lrpe = None
        self.name = name
        self.mixer = MIXERS[name](config, **(config.mixer_options or {}).get(name, {}))

    def attend(self, query, key, value, metadata, lrpe, state):
        weights = self.attention_map(query, key, metadata, lrpe) if self.config.backend == "eager" else None
        if weights is not None:
            return (weights @ zero_padding(value.to(weights.dtype), metadata)).to(value.dtype)
        wide = value.dtype if self.mixer.takes_half_precision else compute_dtype(value.dtype)
        rows = _one_sequence_per_row(metadata)
        query, key, value_states = (_unpack(states.to(wide), metadata, rows) for states in (query, key, value))
        with without_autocast(query.device):
            output = self.mixer(query, key, value_states, rows, self.config.is_causal)
        if rows is not metadata:  # (sequences, heads, longest, head_dim) to (1, heads, seq, head_dim)
            output = output[metadata.sequence_ids, :, metadata.positions].transpose(0, 1)[None]
        return output.to(value.dtype)

    def attention_map(self, query, key, metadata, lrpe):
        wide = compute_dtype(query.dtype)
        rows = _one_sequence_per_row(metadata)
        query, key = (_unpack(states.to(wide), metadata, rows) for states in (query, key))
        with without_autocast(query.device):
            weights = self.mixer.attention_map(query, key, rows, self.config.is_causal)
        if weights is None or rows is metadata:
            return weights
        sequence, position = metadata.sequence_ids, metadata.positions  # (seq,)
        weights = weights[sequence[:, None], :, position[:, None], position]  # (seq, seq, heads)
        is_other = sequence[:, None] != sequence
        return weights.masked_fill(is_other[..., None], 0).permute(2, 0, 1)[None]


def _one_sequence_per_row(metadata: AttentionMetadata) -> AttentionMetadata:
    """Packed sequences as a padded batch, (sequences, longest), so that no mixer has to know of them."""
    if metadata.cu_seqlens is None:
        return metadata
    sequences, longest = len(metadata.cu_seqlens), int(metadata.positions.max()) + 1
    is_real = metadata.positions.new_zeros(sequences, longest)
    is_real[metadata.sequence_ids, metadata.positions] = 1
    return attention_metadata(sequences, longest, is_real.device, is_real)


def _unpack(states: torch.Tensor, metadata: AttentionMetadata, rows: AttentionMetadata) -> torch.Tensor:
    """(1, heads, seq, head_dim) to (sequences, heads, longest, head_dim), zeros where a sequence is shorter."""
    if rows is metadata:
        return states
    unpacked = states.new_zeros(rows.is_real.shape[0], states.shape[1], rows.is_real.shape[1], states.shape[3])
    unpacked[metadata.sequence_ids, :, metadata.positions] = states[0].transpose(0, 1)
    return unpacked


class Baseline:
    """What the backbone and all heads have in common: another configuration, and no state to decode with."""

    config_class = BaselineConfig
    _auto_class = None

    def __init__(self, config: BaselineConfig):
        for name in MIXERS:  # here, so that a rival may register at any time
            ATTENTION_CLASSES.setdefault(name, functools.partial(MixerAttention, name=name))
        super().__init__(config)  # type: ignore[call-arg]
        self.register_forward_pre_hook(_refuse_cache, with_kwargs=True)  # type: ignore[attr-defined]


def _refuse_cache(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get("use_cache") or options.get("past_key_values") is not None:
        given = "use_cache=True" if options.get("use_cache") else "past_key_values"
        raise ValueError(f"{given}: the rivals carry no state from one forward to the next; pass use_cache=False.")


class BaselineModel(Baseline, TransNormerModel):
    pass


class BaselineForCausalLM(Baseline, TransNormerForCausalLM):
    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Every step of generation runs the whole text again."""
        generation_config.use_cache = False


class BaselineForMaskedLM(Baseline, TransNormerForMaskedLM):
    pass


class BaselineForSequenceClassification(Baseline, TransNormerForSequenceClassification):
    pass


class BaselineForTokenClassification(Baseline, TransNormerForTokenClassification):
    pass


class BaselineForQuestionAnswering(Baseline, TransNormerForQuestionAnswering):
    pass


class BaselineForMultipleChoice(Baseline, TransNormerForMultipleChoice):
    pass


AutoConfig.register(BaselineConfig.model_type, BaselineConfig, exist_ok=True)
for _auto_class, _model_class in {
    AutoModel: BaselineModel,
    AutoModelForCausalLM: BaselineForCausalLM,
    AutoModelForMaskedLM: BaselineForMaskedLM,
    AutoModelForSequenceClassification: BaselineForSequenceClassification,
    AutoModelForTokenClassification: BaselineForTokenClassification,
    AutoModelForQuestionAnswering: BaselineForQuestionAnswering,
    AutoModelForMultipleChoice: BaselineForMultipleChoice,
}.items():
    _auto_class.register(BaselineConfig, _model_class, exist_ok=True)
