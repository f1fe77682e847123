"""The baselines of the paper's Tables 4 and 5 at full size, as the authors' released code configures them.

Two things differ: Transformer-LS as a language model has dropout on its embeddings here, and FLASH lacks the 256
parameters a layer that theirs never uses.
"""

from typing import Any

from .modeling import BaselineConfig

LANGUAGE_MODEL: dict[str, Any] = {
    "is_causal": True,
    "vocab_size": 267744,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "intermediate_size": 2048,
    "hidden_act": "relu",
    "norm_placement": "pre",
    "embedding_norm": "none",
    "final_norm": "layer",
    "position_embedding": "sinusoidal",
    "scale_embedding": True,
    "initializer": "xavier",
    "attention_probs_dropout_prob": 0.0,
}
ENCODER: dict[str, Any] = {"hidden_act": "gelu"}  # RoBERTa; the rest of it are the defaults
COMMON: dict[str, Any] = {"lrpe": False, "feed_forward": "ffn", "norm_type": "layer", "attention_norm_type": "none"}

# What a row changes. A layer of FLASH is attention and feed-forward in one, so there are more of them.
FLASH_LANGUAGE_MODEL: dict[str, Any] = {"num_hidden_layers": 10, "num_attention_heads": 1, "final_norm": "none"}
FLASH_ENCODER: dict[str, Any] = {"num_hidden_layers": 24, "num_attention_heads": 1}
CHANGES: dict[tuple[str, bool], dict[str, Any]] = {
    ("flash_quad", True): {**FLASH_LANGUAGE_MODEL, "mixer_options": {"flash_quad": {"norm_type": "scale"}}},
    ("flash", True): {**FLASH_LANGUAGE_MODEL, "mixer_options": {"flash": {"norm_type": "scale"}}},
    ("transformer_ls", True): {
        "norm_placement": "post",
        "final_norm": "none",
        "position_embedding": "none",
        "initializer": "normal",
        "lm_head_bias": True,
    },
    ("flash_quad", False): FLASH_ENCODER,
    ("flash", False): FLASH_ENCODER,
}
PAPER_ROWS = ("softmax", "1+elu", "performer", "transformer_ls", "flash_quad", "flash")


def paper_row_config(mixer: str, causal: bool) -> BaselineConfig:
    """A row of Table 4 (causal: language models on WikiText-103) or Table 5 (encoders of GLUE); T1 and T2 have cards.

    Raises ValueError for a mixer that these tables do not have.
    """
    if mixer not in PAPER_ROWS:
        raise ValueError(f"mixer={mixer!r} has no row in Tables 4 and 5; choose one of {', '.join(PAPER_ROWS)}.")
    fields = COMMON | (LANGUAGE_MODEL if causal else ENCODER) | CHANGES.get((mixer, causal), {})
    return BaselineConfig(**fields, mixer=mixer)
