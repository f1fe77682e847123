"""Model cards that rest on a configuration alone: the presets', and that of a model pushed without a card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from ..model.configuration_transnormer import AUTO_MAP
from .model_card import describe_architecture, markdown_table, package_versions, render_card

PAPER = "[The Devil in Linear Transformer](https://arxiv.org/abs/2210.10340) (EMNLP 2022)"
PIPELINES = {
    "TransNormerModel": "feature-extraction",
    "TransNormerForCausalLM": "text-generation",
    "TransNormerForMaskedLM": "fill-mask",
    "TransNormerForSequenceClassification": "text-classification",
    "TransNormerForTokenClassification": "token-classification",
    "TransNormerForQuestionAnswering": "question-answering",
    "TransNormerForMultipleChoice": "multiple-choice",
}
LIMITS = [
    "Its outputs are only as good as its training data, whose biases it repeats. They have not been measured.",
    "Not made for decisions about people.",
]

# What the paper reports for its own models, whose weights were not released. Rows of Tables 4 and 5.
REPORTED_LANGUAGE_MODELS = {
    "transformer": ("29.63", "31.01", "156.00 M"),
    "t1": ("29.89", "31.35", "155.99 M"),
    "t2": ("29.57", "31.01", "155.99 M"),
}
REPORTED_GLUE = {
    "transformer": ("79.37 / 79.07", "87.79", "88.04", "90.25", "88.35", "38.63", "78.79", "124.70 M"),
    "t1": ("79.06 / 79.93", "87.00", "88.61", "91.17", "84.50", "45.38", "79.38", "124.67 M"),
    "t2": ("77.28 / 78.53", "85.39", "88.56", "90.71", "85.06", "45.90", "78.78", "124.67 M"),
}
GLUE_COLUMNS = ("MNLI m / mm", "QNLI", "QQP", "SST-2", "MRPC (F1)", "CoLA (Matthews)", "mean", "parameters")

# The authors' scripts train_alm.sh and train_blm.sh (github.com/OpenNLPLab/Transnormer).
RELEASED_TRAINING = {
    "TransNormerForCausalLM": {
        "data": "WikiText-103, vocabulary of words",
        "tokens per update": "65,536 (128 sequences of 512)",
        "updates": "100,000",
        "optimizer": "Adam, betas (0.9, 0.98), epsilon 1e-8, weight decay 0.01, no clipping",
        "learning rate": "5e-4, inverse square root, 8,000 updates of warm-up from 1e-7",
        "dropout": "0.1, in attention 0",
        "precision": "float32",
    },
    "TransNormerForMaskedLM": {
        "data": "WikiText-103 (raw), byte-level BPE of GPT-2",
        "sequences per update": "512 of at most 512 tokens",
        "updates": "50,000",
        "optimizer": "Adam, betas (0.9, 0.98), epsilon 1e-6, weight decay 0.01, no clipping",
        "learning rate": "5e-4, polynomial decay, 3,000 updates of warm-up",
        "dropout": "0.1, in attention 0.1",
        "masking": "15 % of the tokens",
    },
}


def build_preset_card(folder: Path, requirements: Sequence[str]) -> ModelCard:
    """The card of a preset, from the configuration in its folder (`scripts/make_model_cards.py` writes them all).

    A preset has no weights. What the paper reports for the model it describes is cited as the paper's, with its table.
    `requirements` are the lines of pyproject.toml, so that a card does not depend on where it was made.
    """
    config = AutoConfig.from_pretrained(folder)
    (head,) = config.architectures
    auto_class = auto_class_of(head)
    is_decoder = head == "TransNormerForCausalLM"
    reported = REPORTED_LANGUAGE_MODELS if is_decoder else REPORTED_GLUE
    columns = ("validation perplexity", "test perplexity", "parameters") if is_decoder else GLUE_COLUMNS
    architecture = describe_architecture(config)
    names = {"transformer": "Transformer", config.variant: architecture}
    table = "Table 4 (WikiText-103, autoregressive)" if is_decoder else "Table 5 (GLUE, fine-tuned)"
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=PIPELINES[head],
        tags=[config.model_type, "linear-attention", "custom_code"],
        model_name=folder.name,
    )
    return render_card(
        data,
        title=f"{folder.name}: the configuration of a {architecture} {'decoder' if is_decoder else 'encoder'}",
        summary=(
            f"A configuration, without weights: the authors of {PAPER} released none, and this project has trained none"
            f" of this size. `{head}` of it has {count_parameters(config, auto_class) / 1e6:.2f} M parameters (counted"
            f" by this project: frozen ones too, tied ones once).\n\n{architecture_table(config)}"
        ),
        results_table=markdown_table(["model", *columns], ([name, *reported[key]] for key, name in names.items())),
        results_note=(
            f"**These are not figures of this repository.** They are the paper's, from its {table}, for models that its"
            " authors trained; nobody has repeated them here."
        ),
        loading_code=(
            "import transnormer_hf\n"
            f"from transformers import AutoConfig, {auto_class}\n\n"
            f'config = AutoConfig.from_pretrained("model_cards/{folder.name}")\n'
            f"model = {auto_class}.from_config(config)  # random weights\n\n"
            "# once you have trained it and pushed it:\n"
            f"model = {auto_class}.from_pretrained(\n"
            f'    "your-name/{folder.name}",\n'
            '    revision="COMMIT",  # the full hash of the commit that you have read\n'
            "    trust_remote_code=True,\n"
            ")"
        ),
        custom_code=True,
        output_note=f"The same configuration fits {', '.join(f'`{name}`' for name in other_heads(head))}.",
        intended_use=(
            f"To train {architecture} as the paper describes it, with"
            f" {'the language-model' if is_decoder else 'the masked-language-model'} objective, and to compare with it."
        ),
        limits=[
            "With random weights its outputs mean nothing.",
            f"`{'sinusoidal' if is_decoder else 'learned'}` positions:"
            + (
                " any length, trained at 512 tokens."
                if is_decoder
                else f" at most {config.max_position_embeddings} tokens."
            ),
            f"The vocabulary of {config.vocab_size:,} ids is that of the paper's"
            f" {'words of WikiText-103' if is_decoder else 'byte-level BPE'}; this folder has no tokenizer.",
        ],
        training_note="Not trained. What the authors' training scripts ask for:",
        hyperparameter_table=markdown_table(["hyperparameter", "value"], RELEASED_TRAINING[head].items()),
        environment_table=markdown_table(["", "needed"], versions_needed(requirements)),
    )


def build_architecture_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a saved model about which nothing is known but its configuration and the size of its weights."""
    config = AutoConfig.from_pretrained(folder)
    (head,) = config.architectures
    auto_class = auto_class_of(head)
    architecture = describe_architecture(config)
    has_arguments = (folder / "training_args.json").exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[head],
        tags=[config.model_type, "linear-attention", "custom_code"],
        model_name=repo_id.rpartition("/")[2],
    )
    return render_card(
        data,
        title=f"{data.model_name}: {architecture}",
        summary=(
            f"A `{head}` with {count_parameters(config, auto_class) / 1e6:.2f} M parameters, of the architecture of"
            f" {PAPER}.\n\n{architecture_table(config)}"
        ),
        results_table="",
        loading_code=(
            f"from transformers import {auto_class}\n\n"
            f"model = {auto_class}.from_pretrained(\n"
            f'    "{repo_id}",\n'
            '    revision="COMMIT",  # the full hash of the commit that you have read\n'
            "    trust_remote_code=True,\n"
            ")"
        ),
        custom_code=True,
        output_note=output_note(config, head),
        intended_use="What the model was made for was not recorded when it was published.",
        limits=LIMITS,
        training_note=(
            "The arguments of the training are in `training_args.json`; its data were not recorded."
            if has_arguments
            else "How the model was trained was not recorded when it was published."
        ),
        environment_table=markdown_table(["", "version"], package_versions().items()),
    )


def auto_class_of(head: str) -> str:
    return next(name for name, reference in AUTO_MAP.items() if reference.endswith(f".{head}"))


def other_heads(head: str) -> list[str]:
    return [
        name.rpartition(".")[2] for key, name in AUTO_MAP.items() if key != "AutoConfig" and not name.endswith(head)
    ]


def count_parameters(config: Any, auto_class: str) -> int:
    with torch.device("meta"):  # shapes only: nothing is allocated
        return getattr(transformers, auto_class).from_config(config).num_parameters()


def architecture_table(config: Any) -> str:
    counts = {
        "DiagAttention": config.layer_types.count("chunked_attention"),
        "NormAttention": config.layer_types.count("linear_attention"),
        "both": config.layer_types.count("hybrid"),
    }
    layers = ", ".join(f"{count} with {kind}" for kind, count in counts.items() if count)
    rows = {
        "layers": f"{config.num_hidden_layers}: {layers}",
        "width": f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}",
        "feed-forward": f"{config.feed_forward.upper()} of width {config.intermediate_size}, {config.hidden_act}",
        "attention": f"blocks of {config.block_size}, {config.diag_activation}; linear, phi = {config.feature_map}",
        "norms": f"{config.norm_type}, {config.norm_placement}-norm",
        "positions": config.position_embedding + (", LRPE" if config.lrpe else ""),
        "vocabulary": f"{config.vocab_size:,}",
    }
    return markdown_table(["architecture", ""], rows.items())


def output_note(config: Any, head: str) -> str:
    if head in ("TransNormerForSequenceClassification", "TransNormerForTokenClassification"):
        return f"Labels: {', '.join(config.id2label[number] for number in sorted(config.id2label))}."
    return f"The outputs are those of transformers' {PIPELINES[head]} models."


def versions_needed(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what is asked of it) of lines such as "torch>=2.13"."""
    return [(name, rest) for line in requirements for name, rest in re.findall(r"^([\w-]+)(.*)$", line)]


__all__ = ["build_architecture_card", "build_preset_card"]
