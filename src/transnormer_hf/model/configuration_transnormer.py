"""Configuration of TransNormer: the paper's two models, and every ablation of it, as fields."""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The release of this package that these files belong to; `save_pretrained` records it beside the code that it writes.
CODE_VERSION = "0.4.2"

# Both attentions of each variant: T1 pairs relu blocks with phi = elu, T2 softmax blocks
# with phi = 1 + elu.
VARIANTS = {
    "t1": {"diag_activation": "relu", "feature_map": "elu"},
    "t2": {"diag_activation": "softmax", "feature_map": "1+elu"},
}

# The argument and output that transformers called past_key_values before 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# What each field may be. `layer_types` takes names that transformers knows: "chunked_attention" is DiagAttention,
# "linear_attention" NormAttention, "hybrid" both in one layer (Table 12), "full_attention" ordinary softmax attention.
CHOICES = {
    "variant": tuple(VARIANTS),
    "feature_map": ("identity", "elu", "1+elu"),
    "diag_activation": ("relu", "softmax"),
    "norm_type": ("simple_rms", "rms", "layer", "batch"),
    "attention_norm_type": ("simple_rms", "rms", "layer", "batch", "none"),
    "embedding_norm": ("simple_rms", "rms", "layer", "batch", "none"),
    "final_norm": ("simple_rms", "rms", "layer", "batch", "none"),
    "norm_placement": ("pre", "post"),
    "position_embedding": ("learned", "sinusoidal", "none"),
    "feed_forward": ("glu", "ffn"),
    "hybrid_combination": ("parallel", "diag_then_norm", "norm_then_diag"),
    "hidden_act": tuple(sorted(ACT2CLS)),
    "classifier_activation": tuple(sorted(ACT2CLS)),
    "pooling": ("first", "mean", "last"),
    "initializer": ("normal", "xavier"),
    "backend": ("auto", "eager", "torch", "triton"),
}
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "block_size",
    "max_position_embeddings",
)  # fmt: skip
ANY_LENGTH = 2**20  # what tools that ask for a maximum are told where positions are not learned; nothing ends there
LAYER_TYPES = ("chunked_attention", "linear_attention", "hybrid", "full_attention")

# Fields that follow from others where they are not given.
DERIVED_FIELDS = (
    "feature_map", "diag_activation", "attention_norm_type", "layer_types", "intermediate_size",
    "max_position_embeddings", "pooling",
)  # fmt: skip

# One repository serves every head, whichever was saved last.
HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
AUTO_MAP = {
    "AutoConfig": "configuration_transnormer.TransNormerConfig",
    "AutoModel": "modeling_transnormer.TransNormerModel",
    "AutoModelForTextEncoding": "modeling_transnormer.TransNormerModel",
    **{f"AutoModelFor{head}": f"modeling_transnormer.TransNormerFor{head}" for head in HEADS},
}


@strict
class TransNormerConfig(PreTrainedConfig):
    r"""
    Configuration of a TransNormer model ("The Devil in Linear Transformer", EMNLP 2022). The defaults are the paper's
    bidirectional encoder, T2, with the vocabulary of RoBERTa; the four models of the paper are presets under
    `model_cards/`.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the model.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads; divides `hidden_size`.
        intermediate_size: Width of the feed-forward. `None` is int(8/3 · hidden_size) for "glu", 4 · hidden_size for
            "ffn".
        variant: "t1" (relu blocks, phi = elu) or "t2" (softmax blocks, phi = 1 + elu).
        layer_types: One of "chunked_attention" (DiagAttention), "linear_attention" (NormAttention), "hybrid" (both) or
            "full_attention" (ordinary softmax attention over the whole sequence, for converted models: its cost is
            quadratic and its state grows) per layer, in any order. `None` is the paper's: DiagAttention in the first
            half, NormAttention in the rest.
        block_size: Tokens per block of DiagAttention.
        feature_map: phi of NormAttention: "elu", "1+elu" or "identity". `None` follows `variant`.
        diag_activation: "relu" or "softmax". `None` follows `variant`. Relu scores are not normalised, so the output
            of such a layer passes the attention norm; that of a softmax layer does not.
        norm_type: "simple_rms" (x / (rms + eps), no weights), "rms" (x / sqrt(ms + eps), no weights), "layer"
            (LayerNorm) or "batch" (batch norm over all tokens, for fixed-length tasks), around the sub-layers.
        attention_norm_type: The norm on the output of NormAttention and of relu blocks, over all heads together.
            `None` follows `norm_type`; "none" leaves it out (the ablation of Table 1).
        norm_placement: "pre" or "post".
        embedding_norm: A norm type, or "none", on the embeddings.
        final_norm: A norm type, or "none", after the last layer.
        layer_norm_eps: Epsilon of "layer" and "batch".
        rms_norm_eps: Epsilon of "simple_rms" and "rms".
        position_embedding: "learned" (up to `max_position_embeddings`), "sinusoidal" or "none" (any length).
        max_position_embeddings: Number of learned positions; else the length that lm-eval, sentence-transformers and
            others cut texts to, which the model itself ignores. `None` is 512 for "learned", otherwise `ANY_LENGTH`.
        type_vocab_size: Number of token types, as BERT has them for pairs of texts; 0: none.
        scale_embedding: Multiply token embeddings by sqrt(hidden_size).
        lrpe: Learned relative position encoding (a reflection and a rotation) on queries and keys.
        feed_forward: "glu" (gated) or "ffn".
        hidden_act: Activation of the feed-forward. "silu" is the paper's; "linear" is what the released code computes
            for "swish" since October 2022.
        hybrid_combination: In "hybrid" layers: "parallel" (mean of both attentions), or one attention whose output is
            the query of the other, "diag_then_norm" or "norm_then_diag" (Table 12).
        hidden_dropout_prob: Dropout on the embeddings and on both residual branches.
        attention_probs_dropout_prob: Dropout on the probabilities of DiagAttention.
        classifier_dropout: Dropout of the classification heads; `None` is `hidden_dropout_prob`.
        classifier_activation: Between the two projections of the heads that classify whole texts.
        initializer: "normal" (every matrix N(0, initializer_range), the released encoder) or "xavier" (the released
            decoder: embeddings N(0, 1/sqrt(hidden_size)), Xavier-uniform attention).
        initializer_range: Standard deviation of "normal".
        is_causal: Whether a token sees earlier tokens only. `TransNormerForCausalLM` sets it.
        pooling: Token that represents a sequence for classification: "first", "last" or the "mean" of all real ones.
            `None` is "first", or "last" for a causal model, whose first token sees nothing else.
        use_cache: Whether a causal model returns its state for generation.
        backend: "eager", "torch", "triton" or "auto" (see `ops_transnormer.py`). `attn_implementation` of
            `from_pretrained` is accepted as scripts for transformers pass it: "eager" is the eager backend for this
            one model object, "sdpa" what is written here; both give the same numbers. Others raise.
        transnormer_version: Release of this package that saved the configuration, and the code beside it; set by
            `save_pretrained`.
    """

    model_type = "transnormer_hf"
    keys_to_ignore_at_inference = [CACHE_NAME]
    attribute_map = {"attention_chunk_size": "block_size"}
    # The norm after the heads runs over the full width, so heads cannot be sharded by columns.
    base_model_tp_plan = None

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    variant: str = "t2"
    layer_types: list[str] | None = None
    block_size: int = 64
    feature_map: str | None = None
    diag_activation: str | None = None
    norm_type: str = "simple_rms"
    attention_norm_type: str | None = None
    norm_placement: str = "post"
    embedding_norm: str = "layer"
    final_norm: str = "none"
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-8
    position_embedding: str = "learned"
    max_position_embeddings: int | None = None
    type_vocab_size: int = 0
    scale_embedding: bool = False
    lrpe: bool = True
    feed_forward: str = "glu"
    hidden_act: str = "silu"
    hybrid_combination: str = "parallel"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    classifier_activation: str = "tanh"
    initializer: str = "normal"
    initializer_range: float = 0.02
    is_causal: bool = False
    pooling: str | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    backend: str = "auto"
    transnormer_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.variant in VARIANTS:
            for field, value in VARIANTS[self.variant].items():
                if getattr(self, field) is None:
                    setattr(self, field, value)
        if self.attention_norm_type is None:
            self.attention_norm_type = self.norm_type
        if self.pooling is None:
            self.pooling = "last" if self.is_causal else "first"
        if self.max_position_embeddings is None:
            self.max_position_embeddings = 512 if self.position_embedding == "learned" else ANY_LENGTH
        if self.layer_types is None:
            early = self.num_hidden_layers // 2
            self.layer_types = ["chunked_attention"] * early + ["linear_attention"] * (self.num_hidden_layers - early)
        if self.intermediate_size is None:
            factor = 8 / 3 if self.feed_forward == "glu" else 4
            self.intermediate_size = int(factor * self.hidden_size)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_backend(self) -> str:
        """The backend in use: `backend`, or "eager" where `attn_implementation="eager"` was asked for."""
        return "eager" if self._attn_implementation == "eager" else self.backend

    def validate_architecture(self) -> None:
        """Raises ValueError with the field, its value and what is allowed. Runs on creation and before saving."""
        for field, choices in CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise ValueError(f"{field}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")
        for field in SIZES:
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            divisors = [str(number) for number in range(1, self.hidden_size + 1) if self.hidden_size % number == 0]
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}; "
                f"choose one of {', '.join(divisors)}."
            )
        if self.lrpe and self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads} gives "
                f"head_dim={self.head_dim}, and lrpe=True rotates pairs of channels: use an even head_dim, or "
                "lrpe=False."
            )
        if self.is_causal and self.pooling == "first":
            raise ValueError(
                "pooling='first' with is_causal=True takes a token that sees nothing but itself; use 'last' or 'mean'."
            )
        if self.position_embedding == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            raise ValueError(
                f"hidden_size={self.hidden_size} with position_embedding='sinusoidal': sines and cosines fill half of "
                "the width each, so it must be even and at least 4."
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if (value := getattr(self, field)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{field}={value} must be a probability, from 0 to 1.")
        for field in ("initializer_range", "layer_norm_eps", "rms_norm_eps"):
            if not (value := getattr(self, field)) > 0:
                raise ValueError(f"{field}={value} must be greater than 0.")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size={self.type_vocab_size} must be 0 (no token types) or more.")

    def validate_layer_type(self) -> None:
        """Raises ValueError unless `layer_types` names one known attention per layer."""
        for index, layer_type in enumerate(self.layer_types):
            if layer_type not in LAYER_TYPES:
                raise ValueError(
                    f"layer_types[{index}]={layer_type!r} is not known; choose one of "
                    f"{', '.join(map(repr, LAYER_TYPES))}."
                )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one per layer, or None for the paper's half and half."
            )

    def validate_token_ids(self) -> None:
        """Raises ValueError where a special token lies outside of the vocabulary."""
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{field}={value} lies outside of the vocabulary: vocab_size={self.vocab_size} allows 0 to "
                        f"{self.vocab_size - 1}, or None."
                    )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "TransNormerConfig":
        """As in transformers, but overrides are validated, and what follows from a field follows its new value.

        So `from_pretrained(folder, num_hidden_layers=4)` has the layer types of 4 layers, unless the stored ones were
        somebody's choice: then their number is wrong, and it raises.
        """
        warn_of_older_code(config_dict, kwargs.get("name_or_path") or "this model")
        config_dict = without_former_defaults(config_dict)
        overrides = {field: kwargs.pop(field) for field in TransNormerConfig.__annotations__ if field in kwargs}
        if overrides:
            given = {name: value for name, value in config_dict.items() if name not in DERIVED_FIELDS}
            derived = cls(**given).to_dict()
            stored = {name: config_dict.get(name) for name in DERIVED_FIELDS}
            chosen = {name: value for name, value in stored.items() if value not in (None, derived[name])}
            config_dict = given | chosen | overrides
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, with the `auto_map` of every head, the code that it names and the release of that code.

        So one folder serves all Auto classes, and says whether its code is older than the installed package.
        """
        if self._auto_class is not None:
            folder = Path(__file__).parent
            if not (folder / "modeling_transnormer.py").exists():  # in the cache of remote code, without a model
                folder = Path(self.name_or_path)
            if (folder / "modeling_transnormer.py").exists():  # else `auto_map` names a repository on the Hub
                self.auto_map = dict(AUTO_MAP)
                os.makedirs(save_directory, exist_ok=True)
                for file in folder.glob("*_transnormer.py"):  # perhaps of that very folder
                    Path(save_directory, file.name).write_bytes(file.read_bytes())
        self.transnormer_version = CODE_VERSION
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def without_former_defaults(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration as this version reads it: fields that an earlier one filled in by itself are left out."""
    release = _release(config_dict.get("transnormer_version") or "")
    former: list[tuple[str, Any]] = [("pooling", "first")] if not release and config_dict.get("is_causal") else []
    is_baseline = config_dict.get("model_type") != TransNormerConfig.model_type  # cosFormer computes with the length
    if release <= (0, 3, 0) and config_dict.get("position_embedding", "learned") != "learned" and not is_baseline:
        former.append(("max_position_embeddings", 512))
    return {name: value for name, value in config_dict.items() if (name, value) not in former}


def warn_of_older_code(config_dict: dict[str, Any], name: str) -> None:
    """Say, once per model, that the code saved with it is older than the installed package.

    Where the package is imported, its own code runs; everywhere else the saved code does. Folders from before the
    version was recorded count as older.
    """
    if "auto_map" not in config_dict:
        return  # a configuration without code
    try:
        installed = version("transnormer-hf")
    except PackageNotFoundError:
        return
    recorded = config_dict.get("transnormer_version")
    if _release(recorded or "") < _release(installed):
        logger.warning_once(
            f"The code saved with {name} is of transnormer-hf {recorded or '0.1.0 or earlier'}, older than the"
            f" installed {installed}. `scripts/push_to_hub.py --refresh_code` replaces it and leaves the weights alone."
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
