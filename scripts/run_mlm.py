#!/usr/bin/env python
"""Pre-train a masked language model, measure its perplexity on masked tokens, and let it fill a gap.

    python scripts/run_mlm.py --preset wikitext103-mlm --config_name model_cards/transnormer-t2-base \\
        --tokenizer_name roberta-base --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \\
        --do_train --do_eval --do_predict --output_dir out
    python scripts/run_mlm.py --model_type bert --tokenizer_name bert-base-uncased --train_file train.txt \\
        --validation_file valid.txt --do_train --do_eval --output_dir out

Any model that `AutoModelForMaskedLM` knows can be trained: a baseline of the same size takes the same command.
Documents are packed into rows in which they do not see each other; a model that cannot keep them apart gets one
document and padding per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

import transnormer_hf.research.baselines  # noqa: F401  registers TransNormer and the baselines
from transnormer_hf.training.fine_tuning import check_length
from transnormer_hf.training.predictions import check_finite
from transnormer_hf.training.pretraining import Objective, PretrainingArguments, make_packing, pretrain


@dataclass
class DataArguments(PretrainingArguments):
    """Which text to learn from, how much of it to mask, and what to fill at the end."""

    max_seq_length: int = field(default=512, metadata={"help": "Tokens per row."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})
    fill: str = field(
        default="The film was first shown in the United <mask> .",
        metadata={"help": "Text with <mask> in the place that the trained model fills."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} must lie between 0 and 1.")
        if self.fill.count("<mask>") != 1:
            raise ValueError(f"--fill {self.fill!r} must hold <mask> once.")


def masked_text(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> tuple[list[int], int]:
    """The tokens of the text with the gap, between special ones, and the column of the gap."""
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in args.fill.replace(" <mask>", "<mask>").split("<mask>")
    )
    packing = make_packing(MLM, tokenizer, args.max_seq_length)
    tokens = [*packing.first, *before, tokenizer.mask_token_id, *after, *packing.last]
    return tokens, len(packing.first) + len(before)


def check_sample(tokenizer: PreTrainedTokenizerBase, args: DataArguments, config: PreTrainedConfig) -> None:
    """Raise ValueError where the text with the gap has more tokens than the model has positions for."""
    check_length(f"fill {args.fill!r}: a text of", len(masked_text(tokenizer, args)[0]), config)


def fill_mask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: DataArguments, seed: int) -> str:
    """The five likeliest tokens in the place of the mask, with their probabilities.

    Raises:
        ValueError: the model has diverged.
    """
    tokens, place = masked_text(tokenizer, args)
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens], device=model.device)).logits[0, place]  # (vocab_size,)
    check_finite(logits.float().cpu().numpy()[None], "A sample")
    best = logits.float().softmax(-1).topk(5)
    choices = ", ".join(
        f"{tokenizer.decode([token]).strip()} {probability:.3f}"
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return f"{args.fill}\n<mask>: {choices}"


MLM = Objective(
    "mlm",
    AutoModelForMaskedLM,
    "max_seq_length",
    "fill-mask",
    "Perplexity per masked token",
    fill_mask,
    check_sample,
)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end."""
    return pretrain(MLM, DataArguments, argv, callbacks)


if __name__ == "__main__":
    main()
