"""TransNormer's backbone with another token mixer in place of its attentions, for all Auto classes.

These are research models: a checkpoint of one loads only where this package is installed and
`transnormer_hf.research.baselines` imported; no code goes with it.
"""

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

from ...model.configuration_transnormer import ANY_LENGTH, LAYER_TYPES, TransNormerConfig
from ...model.modeling_transnormer import (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerLayer,
    TransNormerModel,
)
from .mixer import MIXERS


@strict
class BaselineConfig(TransNormerConfig):
    """Configuration of a baseline in TransNormer's backbone: all fields of `TransNormerConfig`, and three more.

    Args:
        mixer: Name of the mixer in every layer (`MIXERS`).
        mixer_options: Keyword arguments of mixers, by name: `{"lln_diag": {"mode": "learnable_ratio"}}`.
        lm_head_bias: Whether the output of a causal language model has a bias per token (Transformer-LS).
        layer_types: A mixer or one of TransNormer's own attentions per layer (Table 3 mixes them). `None` means `mixer`
            in every layer. A mixer has neither LRPE nor a norm after it, whatever the other fields say.
    """

    model_type = "transnormer_hf_baseline"
    _auto_class = None

    mixer: str = "softmax"
    mixer_options: dict[str, Any] | None = None
    lm_head_bias: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [self.mixer] * self.num_hidden_layers
        if self.max_position_embeddings in (None, ANY_LENGTH):  # mixers compute with it, whatever the positions
            self.max_position_embeddings = 512
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
        """As in TransNormerConfig; a `mixer` given here replaces that of every layer."""
        if "mixer" in kwargs:
            config_dict = {name: value for name, value in config_dict.items() if name != "layer_types"}
            config_dict["mixer"] = kwargs.pop("mixer")
        return super().from_dict(config_dict, **kwargs)


# Fields about a configuration's class and files, and those that depend on its attentions.
NOT_CARRIED_OVER = {"model_type", "architectures", "auto_map", "transformers_version", "use_cache", "mixer"}
NOT_CARRIED_OVER |= {"mixer_options", "layer_types", "feature_map", "diag_activation", "attention_norm_type"}


def baseline_config(config: TransNormerConfig, mixer: str, **mixer_options: Any) -> BaselineConfig:
    """The backbone of `config` with this mixer in every layer; any Auto class builds it (`from_config`).

    Raises ValueError for a mixer or an option that does not exist.
    """
    options = {mixer: mixer_options} if mixer_options else None
    return BaselineConfig(**backbone_fields(config), mixer=mixer, mixer_options=options)


def backbone_fields(config: TransNormerConfig) -> dict[str, Any]:
    """The fields of a configuration that do not depend on its attentions."""
    return {name: value for name, value in config.to_dict().items() if name not in NOT_CARRIED_OVER}


class Baseline:
    """Common to the backbone and all heads: their own configuration class, and no cache."""

    config_class = BaselineConfig
    _auto_class = None

    def __init__(self, config: BaselineConfig):
        super().__init__(config)  # type: ignore[call-arg]
        for layer in self.modules():  # type: ignore[attr-defined]
            if isinstance(layer, TransNormerLayer) and getattr(layer.self_attn, "replaces_feed_forward", False):
                _leave_attention_alone(layer)
        self.register_forward_pre_hook(_refuse_cache, with_kwargs=True)  # type: ignore[attr-defined]


def _leave_attention_alone(layer: TransNormerLayer) -> None:
    """Makes the layer x + attention(x): no norm of its own, no dropout, no feed-forward."""
    layer.feed_forward = NoFeedForward()  # type: ignore[assignment]
    for name in ("attention_norm", "feed_forward_norm", "dropout"):
        setattr(layer, name, nn.Identity())


class NoFeedForward(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _refuse_cache(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get("use_cache") or options.get("past_key_values") is not None:
        given = "use_cache=True" if options.get("use_cache") else "past_key_values"
        raise ValueError(f"{given}: baselines carry no state from one forward to the next; pass use_cache=False.")


class BaselineModel(Baseline, TransNormerModel):
    pass


class BaselineForCausalLM(Baseline, TransNormerForCausalLM):
    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        if config.lm_head_bias:
            self.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Without a cache, every step of generation runs over the whole text."""
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
