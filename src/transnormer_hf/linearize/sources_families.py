"""The kinds of pretrained models that become TransNormers: their names of the tensors, and their configurations.

For each kind there is a list, module there -> module here, and a function that says the same of the configuration. What
they leave to be done is in `sources.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

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
LLAMA_GAINS = (
    (
        "model.layers.*.input_layernorm",
        ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"),
    ),
    (
        "model.layers.*.post_attention_layernorm",
        ("model.layers.*.feed_forward.gate_proj", "model.layers.*.feed_forward.up_proj"),
    ),
    ("model.norm", ("lm_head", "classifier.out_proj", "classifier", "qa_outputs")),
)

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
    # the field that the masked language model's head reads as well; elsewhere that head has gelu
    head_activation: str | None = None


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
    "bert": Family("Bert", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), head_activation="hidden_act"),
    "roberta": Family("Roberta", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "xlm-roberta": Family("XLMRoberta", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "camembert": Family("Camembert", BERT, encoder_fields, (BIDIRECTIONAL, ABSOLUTE), skips_padding_rows=True),
    "distilbert": Family("DistilBert", DISTILBERT, distilbert_fields, (), head_activation="activation"),
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
    "llama": Family("Llama", LLAMA, llama_fields, (), LLAMA_GAINS),
    "mistral": Family("Mistral", LLAMA, llama_fields, (NO_WINDOW,), LLAMA_GAINS),
    "qwen2": Family("Qwen2", LLAMA, llama_fields, (NO_WINDOW,), LLAMA_GAINS),
}
