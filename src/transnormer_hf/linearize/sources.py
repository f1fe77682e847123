"""The weights of a pretrained transformer in a TransNormer: which tensor goes where, for each kind of source.

A TransNormer has the same projections, feed-forwards and norms as a BERT or a Llama and differs in what happens between
the projections. So everything is copied: softmax inside a block (DiagAttention of T2) is then exact for texts that fit
into one block, "full_attention" is exact for every text, and NormAttention has weights to start from.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..model.configuration_transnormer import TransNormerConfig
from ..model.modeling_transnormer import (
    FIRST_POSITION,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
)

logger = logging.get_logger(__name__)


class SourceError(ValueError):
    """The source cannot be expressed: the message names the configuration field, or lists every tensor concerned."""


# Transforms of a weight or bias on its way: (tensor, the source's configuration) to one tensor per name here.

Transform = Callable[[torch.Tensor, PreTrainedConfig], tuple[torch.Tensor, ...]]
Line = tuple[Any, ...]  # name, name or names here, and maybe a transform


def by_head(tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """(heads · head_dim, …) as (heads, head_dim, …)."""
    head_dim = config.hidden_size // config.num_attention_heads
    return tensor.unflatten(0, (-1, head_dim))


def per_query_head(tensor: torch.Tensor, config: PreTrainedConfig) -> tuple[torch.Tensor]:
    """Grouped keys or values, once for each query head that shares them."""
    copies = config.num_attention_heads // config.num_key_value_heads
    return (by_head(tensor, config).repeat_interleave(copies, 0).flatten(0, 1),)


def interleaved(tensor: torch.Tensor, config: PreTrainedConfig) -> tuple[torch.Tensor]:
    """Rows of each head so that the channels i and i + head_dim / 2, which RoPE rotates together, become neighbours."""
    return (by_head(tensor, config).unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 2),)


def interleaved_per_query_head(tensor: torch.Tensor, config: PreTrainedConfig) -> tuple[torch.Tensor]:
    return per_query_head(*interleaved(tensor, config), config)


def conv1d(tensor: torch.Tensor, config: PreTrainedConfig) -> tuple[torch.Tensor]:
    """GPT-2's Conv1D holds (in, out) where a Linear holds (out, in)."""
    return (tensor.mT if tensor.dim() == 2 else tensor,)


def conv1d_in_three(tensor: torch.Tensor, config: PreTrainedConfig) -> tuple[torch.Tensor, ...]:
    return conv1d(tensor, config)[0].chunk(3)


# Module of the source -> module here, each with its weight and bias, `*` a layer's number; "model" is the base model,
# whatever it is called there. A third entry names what is done to the tensors; a tuple of names takes one tensor each.

BERT = [
    ("model.embeddings.word_embeddings", "model.embed_tokens"),
    ("model.embeddings.position_embeddings", "model.embed_positions.embedding"),
    ("model.embeddings.token_type_embeddings", "model.embed_token_types"),
    ("model.embeddings.LayerNorm", "model.embed_norm"),
    ("model.encoder.layer.*.attention.self.query", "model.layers.*.self_attn.q_proj"),
    ("model.encoder.layer.*.attention.self.key", "model.layers.*.self_attn.k_proj"),
    ("model.encoder.layer.*.attention.self.value", "model.layers.*.self_attn.v_proj"),
    ("model.encoder.layer.*.attention.output.dense", "model.layers.*.self_attn.out_proj"),
    ("model.encoder.layer.*.attention.output.LayerNorm", "model.layers.*.attention_norm"),
    ("model.encoder.layer.*.intermediate.dense", "model.layers.*.feed_forward.up_proj"),
    ("model.encoder.layer.*.output.dense", "model.layers.*.feed_forward.down_proj"),
    ("model.encoder.layer.*.output.LayerNorm", "model.layers.*.feed_forward_norm"),
]

DISTILBERT = [
    ("model.embeddings.word_embeddings", "model.embed_tokens"),
    ("model.embeddings.position_embeddings", "model.embed_positions.embedding"),
    ("model.embeddings.LayerNorm", "model.embed_norm"),
    ("model.transformer.layer.*.attention.q_lin", "model.layers.*.self_attn.q_proj"),
    ("model.transformer.layer.*.attention.k_lin", "model.layers.*.self_attn.k_proj"),
    ("model.transformer.layer.*.attention.v_lin", "model.layers.*.self_attn.v_proj"),
    ("model.transformer.layer.*.attention.out_lin", "model.layers.*.self_attn.out_proj"),
    ("model.transformer.layer.*.sa_layer_norm", "model.layers.*.attention_norm"),
    ("model.transformer.layer.*.ffn.lin1", "model.layers.*.feed_forward.up_proj"),
    ("model.transformer.layer.*.ffn.lin2", "model.layers.*.feed_forward.down_proj"),
    ("model.transformer.layer.*.output_layer_norm", "model.layers.*.feed_forward_norm"),
]

GPT2 = [
    ("model.wte", "model.embed_tokens"),
    ("model.wpe", "model.embed_positions.embedding"),
    ("model.h.*.ln_1", "model.layers.*.attention_norm"),
    (
        "model.h.*.attn.c_attn",
        ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"),
        conv1d_in_three,
    ),
    ("model.h.*.attn.c_proj", "model.layers.*.self_attn.out_proj", conv1d),
    ("model.h.*.ln_2", "model.layers.*.feed_forward_norm"),
    ("model.h.*.mlp.c_fc", "model.layers.*.feed_forward.up_proj", conv1d),
    ("model.h.*.mlp.c_proj", "model.layers.*.feed_forward.down_proj", conv1d),
    ("model.ln_f", "model.norm"),
]

LLAMA = [
    ("model.embed_tokens", "model.embed_tokens"),
    ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.q_proj", interleaved),
    ("model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.k_proj", interleaved_per_query_head),
    ("model.layers.*.self_attn.v_proj", "model.layers.*.self_attn.v_proj", per_query_head),
    ("model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.out_proj"),
    ("model.layers.*.mlp.gate_proj", "model.layers.*.feed_forward.gate_proj"),
    ("model.layers.*.mlp.up_proj", "model.layers.*.feed_forward.up_proj"),
    ("model.layers.*.mlp.down_proj", "model.layers.*.feed_forward.down_proj"),
]

# RMSNorm -> the Linears after it, which take its gain: our RMSNorm has no weights.
LLAMA_GAINS = [
    (
        "model.layers.*.input_layernorm",
        ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"),
    ),
    (
        "model.layers.*.post_attention_layernorm",
        ("model.layers.*.feed_forward.gate_proj", "model.layers.*.feed_forward.up_proj"),
    ),
    ("model.norm", ("lm_head", "classifier.out_proj", "classifier", "qa_outputs")),
]

# The heads. The first line whose name here exists in the model applies; (): a part that is not used.
HEADS = [
    # masked language models: BERT
    ("cls.predictions.transform.dense", "lm_head.dense"),
    ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    ("cls.predictions.decoder", "lm_head.decoder"),
    ("cls.predictions", "lm_head.decoder"),  # its bias has two names
    # RoBERTa
    ("lm_head.dense", "lm_head.dense"),
    ("lm_head.layer_norm", "lm_head.layer_norm"),
    ("lm_head.decoder", "lm_head.decoder"),
    ("lm_head", "lm_head.decoder"),  # so has this
    # DistilBERT
    ("vocab_transform", "lm_head.dense"),
    ("vocab_layer_norm", "lm_head.layer_norm"),
    ("vocab_projector", "lm_head.decoder"),
    # ELECTRA's generator
    ("generator_predictions.dense", "lm_head.dense"),
    ("generator_predictions.LayerNorm", "lm_head.layer_norm"),
    ("generator_lm_head", "lm_head.decoder"),
    # causal language models
    ("lm_head", "lm_head"),
    # sequences and choices: a dense layer, an activation, a projection
    ("model.pooler.dense", "classifier.dense"),  # BERT
    ("model.pooler.dense", ()),
    ("classifier.dense", "classifier.dense"),  # RoBERTa, ELECTRA
    ("pre_classifier", "classifier.dense"),  # DistilBERT
    ("sequence_summary.summary", "classifier.dense"),  # ELECTRA, multiple choice
    ("classifier.out_proj", "classifier.out_proj"),
    ("classifier", "classifier.out_proj"),
    ("score", "classifier.out_proj"),  # decoders
    # tokens
    ("classifier", "classifier"),
    ("score", "classifier"),
    # spans
    ("qa_outputs", "qa_outputs"),
]

# End of the source's class name -> class here.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "Model": TransNormerModel,
    "ForMaskedLM": TransNormerForMaskedLM,
    "LMHeadModel": TransNormerForCausalLM,
    "ForCausalLM": TransNormerForCausalLM,
    "ForSequenceClassification": TransNormerForSequenceClassification,
    "ForTokenClassification": TransNormerForTokenClassification,
    "ForQuestionAnswering": TransNormerForQuestionAnswering,
    "ForMultipleChoice": TransNormerForMultipleChoice,
}


# What each kind of source is in the fields of TransNormerConfig.


SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "id2label", "label2id", "problem_type"),
)


def encoder_fields(config: PreTrainedConfig, task: str) -> dict[str, Any]:
    """BERT, RoBERTa and ELECTRA: LayerNorm after each branch, learned positions and token types."""
    activation, dropout = "tanh", config.classifier_dropout
    if config.model_type == "electra":
        activation = "gelu"
        if task == "ForMultipleChoice":
            activation, dropout = config.summary_activation or "linear", config.summary_last_dropout
    return {
        "norm_type": "layer",
        "layer_norm_eps": config.layer_norm_eps,
        "intermediate_size": config.intermediate_size,
        "feed_forward": "ffn",
        "hidden_act": config.hidden_act,
        "type_vocab_size": config.type_vocab_size,
        "classifier_activation": activation,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "classifier_dropout": dropout,
    }


def distilbert_fields(config: PreTrainedConfig, task: str) -> dict[str, Any]:
    """As BERT, under other names and without token types."""
    classifies_sequences = task in ("ForSequenceClassification", "ForMultipleChoice")
    return {
        "norm_type": "layer",
        "layer_norm_eps": 1e-12,
        "intermediate_size": config.hidden_dim,
        "feed_forward": "ffn",
        "hidden_act": config.activation,
        "classifier_activation": "relu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.seq_classif_dropout if classifies_sequences else config.dropout,
    }


def gpt2_fields(config: PreTrainedConfig, task: str) -> dict[str, Any]:
    """LayerNorm before each branch and after the last layer, learned positions."""
    return decoder_fields(config, task) | {
        "norm_type": "layer",
        "final_norm": "layer",
        "layer_norm_eps": config.layer_norm_epsilon,
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "feed_forward": "ffn",
        "hidden_act": config.activation_function,
        "hidden_dropout_prob": config.resid_pdrop,
        "attention_probs_dropout_prob": config.attn_pdrop,
    }


def llama_fields(config: PreTrainedConfig, task: str) -> dict[str, Any]:
    """RMSNorm before each branch and after the last layer, gated feed-forward, RoPE in place of positions."""
    return decoder_fields(config, task) | {
        "norm_type": "rms",
        "final_norm": "rms",
        "rms_norm_eps": config.rms_norm_eps,
        "position_embedding": "none",
        "intermediate_size": config.intermediate_size,
        "feed_forward": "glu",
        "hidden_act": config.hidden_act,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": config.attention_dropout or 0.0,
    }


def decoder_fields(config: PreTrainedConfig, task: str) -> dict[str, Any]:
    dropout = 0.0
    if task == "ForTokenClassification":  # transformers' GenericForTokenClassification
        given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        dropout = next((value for value in given if value is not None), 0.1)
    return {
        "is_causal": True,
        "pooling": "last",
        "norm_placement": "pre",
        "embedding_norm": "none",
        "classifier_activation": "linear",
        "classifier_dropout": dropout,
    }


@dataclass(frozen=True)
class Family:
    """One architecture: its classes' prefix, its names, its configuration, and what would make it another model."""

    class_prefix: str
    names: list[Line]
    fields: Callable[[PreTrainedConfig, str], dict[str, Any]]
    # (field, the only value that can be expressed, what to do)
    required: tuple[tuple[str, Any, str], ...]
    gains: tuple[tuple[str, tuple[str, ...]], ...] = ()
    # of the table of positions, the row of position 0 (pad_token_id + 1 in RoBERTa)
    skips_padding_rows: bool = False


BIDIRECTIONAL = ("is_decoder", False, "only bidirectional encoders can be; load the source with is_decoder=False")
ABSOLUTE = ("position_embedding_type", "absolute", "relative positions have no counterpart; use a source without them")
NO_WINDOW = (
    "sliding_window",
    None,
    "there is no attention to a sliding window; load the source with sliding_window=None if texts of that length are "
    "enough",
)
SCALED = "attention scores are divided by sqrt(head_dim), and by nothing else; use a source that does the same"

FAMILIES = {
    "bert": Family("Bert", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE)),
    "roberta": Family("Roberta", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "xlm-roberta": Family("XLMRoberta", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "camembert": Family("Camembert", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "distilbert": Family("DistilBert", DISTILBERT, distilbert_fields, ()),
    "electra": Family("Electra", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE)),
    "gpt2": Family(
        "GPT2",
        GPT2,
        gpt2_fields,
        (
            ("scale_attn_weights", True, SCALED),
            ("scale_attn_by_inverse_layer_idx", False, SCALED),
            ("add_cross_attention", False, "there is no encoder to attend to; use a source without it"),
        ),
    ),
    "llama": Family("Llama", LLAMA, llama_fields, (), tuple(LLAMA_GAINS)),
    "mistral": Family("Mistral", LLAMA, llama_fields, (NO_WINDOW,), tuple(LLAMA_GAINS)),
    "qwen2": Family("Qwen2", LLAMA, llama_fields, (NO_WINDOW,), tuple(LLAMA_GAINS)),
}


def transfer(
    source: PreTrainedModel,
    layer_types: list[str] | None = None,
    num_linear_layers: int | None = None,
    softmax_layers: list[int] | None = None,
    block_size: int = 64,
    variant: str = "t2",
    max_position_embeddings: int | None = None,
    position_extension: str = "none",
) -> PreTrainedModel:
    """A TransNormer that begins where `source` ends: every weight of it, in the class with the same head.

    With T2 (softmax blocks) layers of DiagAttention compute what the source's do for texts of up to `block_size`
    tokens, and "full_attention" for all texts. NormAttention inherits projections that were made for softmax: train
    those layers before use.

    Args:
        source: a model of one of `FAMILIES`, with or without a head of language modelling, sequences, tokens, spans or
            choices. It stays as it is.
        layer_types: "chunked_attention" (DiagAttention), "linear_attention" (NormAttention) or "full_attention" (the
            source's own) per layer. `None` is the paper's: DiagAttention in the first half, NormAttention in the rest.
        num_linear_layers: instead of `layer_types`, how many of the last layers become NormAttention.
        softmax_layers: indices of layers that become "full_attention", whatever the above says of them.
        block_size: tokens per block of DiagAttention.
        variant: "t2", or "t1", whose relu blocks are not the source's softmax for any text.
        max_position_embeddings: number of positions; `None` is the source's.
        position_extension: how learned positions beyond the source's table come about. "interpolate": the table is
            stretched, linearly between its rows; "tile": it is repeated; "none": they do not.

    Returns:
        The TransNormer in evaluation mode and float32, on the source's device.

    Raises:
        SourceError: an architecture, a field of its configuration or a tensor that has no counterpart.
        ValueError: an argument that does not fit the source.
    """
    family, task = recognise(source)
    check_source(source, family, task)
    config = target_config(source, family, task) | {"block_size": block_size, "variant": variant}
    num_layers = source.config.num_hidden_layers
    config["layer_types"] = choose_layer_types(num_layers, layer_types, num_linear_layers, softmax_layers)
    table = position_table(source, family, max_position_embeddings, position_extension)
    if table is not None:
        config["max_position_embeddings"] = len(table) - FIRST_POSITION
    elif max_position_embeddings is not None:
        config["max_position_embeddings"] = max_position_embeddings
    target = MODEL_CLASSES[task](TransNormerConfig(**config)).eval()
    target.load_state_dict(map_parameters(source, target, family, table))
    if target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    return target.to(source.device)


def recognise(source: PreTrainedModel) -> tuple[Family, str]:
    """The family of a model and what its class name ends in, a key of `MODEL_CLASSES`."""
    model_type, class_name = source.config.model_type, type(source).__name__
    if model_type == "qwen3":
        raise SourceError(
            "model_type='qwen3' normalises queries and keys inside the attention (q_norm, k_norm), which has no "
            "counterpart here; use a Qwen2 or Llama model."
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise SourceError(f"model_type={model_type!r} is not known; known are {', '.join(map(repr, FAMILIES))}.")
    task = class_name.removeprefix(family.class_prefix)
    if task not in MODEL_CLASSES or not class_name.startswith(family.class_prefix):
        raise SourceError(
            f"{class_name} has a head without a counterpart; load the source with AutoModel, or as one of "
            f"{', '.join(family.class_prefix + name for name in MODEL_CLASSES)}, as far as transformers has them."
        )
    return family, task


def check_source(source: PreTrainedModel, family: Family, task: str) -> None:
    """Raises SourceError with the field, its value and what works, unless a TransNormer can compute the same."""
    config = source.config

    def refuse(field: str, value: Any, remedy: str) -> None:
        raise SourceError(f"{config.model_type}: {field}={value!r} cannot be expressed: {remedy}.")

    if getattr(config, "quantization_config", None) is not None:
        refuse("quantization_config", config.quantization_config, "load the source without it, in float32 or bfloat16")
    for field, value, remedy in family.required:
        if getattr(config, field, value) != value:
            refuse(field, getattr(config, field), remedy)
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "embedding_size", hidden_size) != hidden_size:
        remedy = f"embeddings are as wide as hidden_size={hidden_size}; use a source where both are equal"
        refuse("embedding_size", config.embedding_size, remedy)
    if (getattr(config, "head_dim", None) or hidden_size // num_heads) * num_heads != hidden_size:
        remedy = f"num_attention_heads={num_heads} heads must fill hidden_size={hidden_size}; use such a source"
        refuse("head_dim", getattr(config, "head_dim", None), remedy)
    if task == "ForMaskedLM" and not hasattr(source, "lm_head") and not hasattr(source, "generator_lm_head"):
        field = "activation" if config.model_type == "distilbert" else "hidden_act"
        if getattr(config, field) != "gelu":  # BERT and DistilBERT use it in the head as well
            refuse(field, getattr(config, field), "the head's activation is 'gelu'; load the source with AutoModel")
    if task == "ForMultipleChoice" and getattr(config, "summary_type", "first") != "first":
        refuse("summary_type", config.summary_type, "the head reads the first token; load the source with AutoModel")
    rotary = getattr(source.base_model, "rotary_emb", None)
    if rotary is not None:
        if rotary.rope_type in ("dynamic", "longrope"):
            remedy = "its angles depend on the text's length; load the source with 'default', 'linear' or 'llama3'"
            refuse("rope_parameters['rope_type']", rotary.rope_type, remedy)
        if rotary.attention_scaling != 1:
            remedy = f"{rotary.rope_type!r} scales the attention; load the source with 'default', 'linear' or 'llama3'"
            refuse("attention_scaling of RoPE", rotary.attention_scaling, remedy)


def target_config(source: PreTrainedModel, family: Family, task: str) -> dict[str, Any]:
    """The source's configuration as fields of TransNormerConfig, but for the layers and positions that are chosen."""
    config = source.config
    fields = {name: getattr(config, name) for name in SAME_FIELDS} | family.fields(config, task)
    fields["attention_norm_type"] = "simple_rms"  # of the layers that softmax attention leaves
    embeddings, head = source.get_input_embeddings(), source.get_output_embeddings()
    if head is not None:  # a tied head cannot take the last norm's gain
        fields["tie_word_embeddings"] = head.weight is embeddings.weight and not family.gains
    return fields


def choose_layer_types(
    num_layers: int,
    layer_types: list[str] | None,
    num_linear_layers: int | None,
    softmax_layers: list[int] | None,
) -> list[str]:
    if layer_types is not None and num_linear_layers is not None:
        raise ValueError(f"layer_types and num_linear_layers={num_linear_layers} say the same; give one of them.")
    if layer_types is None:
        num_linear = num_layers - num_layers // 2 if num_linear_layers is None else num_linear_layers
        if not 0 <= num_linear <= num_layers:
            raise ValueError(f"num_linear_layers={num_linear} must be from 0 to {num_layers}, the source's layers.")
        layer_types = ["chunked_attention"] * (num_layers - num_linear) + ["linear_attention"] * num_linear
    if "hybrid" in layer_types:
        raise ValueError("layer_types holds 'hybrid', two attentions with one set of weights; use one of the others.")
    layer_types = list(layer_types)
    for index in softmax_layers or ():
        if not 0 <= index < num_layers:
            raise ValueError(f"softmax_layers holds {index}; the source's layers are 0 to {num_layers - 1}.")
        layer_types[index] = "full_attention"
    return layer_types


def position_table(
    source: PreTrainedModel, family: Family, num_positions: int | None, extension: str
) -> torch.Tensor | None:
    """Learned positions, (FIRST_POSITION + num_positions, hidden_size) with the unused rows in front; None for RoPE."""
    if extension not in ("none", "interpolate", "tile"):
        raise ValueError(f"position_extension={extension!r} is not known; choose 'none', 'interpolate' or 'tile'.")
    name = next((line[0] for line in family.names if line[1] == "model.embed_positions.embedding"), None)
    if name is None:
        if extension != "none":
            raise ValueError(
                f"position_extension={extension!r}: {source.config.model_type} has no table of positions, its angles "
                "exist for all of them; leave 'none', and load the source with rope_parameters for other angles."
            )
        return None
    weight = source.base_model.get_submodule(name.removeprefix("model.")).weight.detach().float()  # (rows, hidden_size)
    rows = weight[source.config.pad_token_id + 1 :] if family.skips_padding_rows else weight
    if num_positions is None:
        num_positions = len(rows)
    if num_positions > len(rows):
        if extension == "none":
            raise ValueError(
                f"max_position_embeddings={num_positions} and the source learned {len(rows)} positions; choose "
                "position_extension='interpolate' or 'tile'."
            )
        if extension == "tile":
            rows = rows.repeat(-(-num_positions // len(rows)), 1)
        else:
            channels = nn.functional.interpolate(rows.mT[None], num_positions, mode="linear", align_corners=True)
            rows = channels[0].mT
    return nn.functional.pad(rows[:num_positions], (0, 0, FIRST_POSITION, 0))


def map_parameters(
    source: PreTrainedModel, target: PreTrainedModel, family: Family, table: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The state dict of `target` in float32: the source's tensors, the table of positions, and what the source lacks.

    Raises SourceError that lists every missing, left-over and misshapen tensor.
    """
    # the base model is called "model." on both sides here, also where it is all there is
    base_prefix = "" if source.base_model is source else f"{source.base_model_prefix}."
    own_prefix = "model." if isinstance(target, TransNormerModel) else ""
    wanted = {own_prefix + name: tensor.shape for name, tensor in target.state_dict().items()}

    mapped: dict[str, torch.Tensor] = {}
    gains: list[tuple[str, list[str], torch.Tensor]] = []
    problems: list[str] = []
    for source_name, parameter in source.named_parameters(remove_duplicate=False):  # tied weights by all their names
        name, tensor = source_name, parameter.detach().float()
        if source_name.startswith(base_prefix):
            name = f"model.{source_name.removeprefix(base_prefix)}"
        for names, _ in places(name, family.gains):
            gains.append((source_name, names, tensor))
            break
        else:
            for names, transform in places(name, [*HEADS, *family.names]):
                if all(place in wanted for place in names):
                    tensors = [tensor] if transform is None else transform(tensor, source.config)
                    mapped.update(zip(names, tensors, strict=bool(names)))
                    break
            else:
                problems.append(f"left over: {source_name} {tuple(tensor.shape)}")
    if table is not None:
        mapped["model.embed_positions.embedding.weight"] = table
    if not hasattr(TransNormerConfig, "type_vocab_size"):  # until the model has token types: type 0 for all
        types = "embeddings.token_type_embeddings.weight"
        problems = [problem for problem in problems if types not in problem]
        if types in dict(source.base_model.named_parameters()):
            table += source.base_model.get_parameter(types).detach().float()[0]

    for source_name, names, gain in gains:
        takers = [name for name in names if name in mapped]
        for name in takers:
            mapped[name] = mapped[name] * gain  # (out, in) · (in,)
        if not takers and not torch.equal(gain, torch.ones_like(gain)):
            problems.append(f"left over: {source_name} {tuple(gain.shape)}, a gain that no linear layer follows")

    # what the source does without
    rotary = getattr(source.base_model, "rotary_emb", None)
    for name, shape in wanted.items():
        if name.endswith("lrpe.theta"):
            mapped[name] = torch.zeros(shape) if rotary is None else rotary.inv_freq.float()
        elif name.endswith("lrpe.householder"):
            mapped[name] = torch.zeros(shape)  # no reflection
        elif name == "classifier.dense.weight" and target.config.is_causal:
            mapped[name] = torch.eye(*shape)
        elif name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in mapped:
            mapped.setdefault(name, torch.zeros(shape))

    for name, shape in wanted.items():
        if name not in mapped:
            problems.append(f"missing: {name} {tuple(shape)}")
        elif mapped[name].shape != shape:
            problems.append(f"wrong shape: {name} is {tuple(mapped[name].shape)}, the model has {tuple(shape)}")
    if problems:
        listing = "\n  ".join(problems)
        raise SourceError(
            f"{type(source).__name__} does not fit ({len(problems)} tensors):\n  {listing}\n"
            "Load it with another head, or without one, and without adapters; compare its sizes with its configuration."
        )
    return {name.removeprefix(own_prefix): tensor for name, tensor in mapped.items()}


def places(name: str, lines: Iterable[Line]) -> Iterator[tuple[list[str], Transform | None]]:
    """Where a weight or bias may go by each line that matches its module, and what is done to it."""
    module, _, kind = name.rpartition(".")
    for pattern, here, *transform in lines:
        match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), module)
        if match is not None:
            modules = [here] if isinstance(here, str) else here
            names = [f"{place.replace('*', match[match.lastindex or 0])}.{kind}" for place in modules]
            yield names, transform[0] if transform else None
