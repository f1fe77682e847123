#!/usr/bin/env python
"""Pre-train a causal language model, measure its perplexity, and let it write.

    python scripts/run_clm.py --preset wikitext103-clm --config_name model_cards/transnormer-t2-wikitext103 \\
        --tokenizer_name gpt2 --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \\
        --do_train --do_eval --do_predict --output_dir out
    python scripts/run_clm.py --model_type llama --config_overrides hidden_size=256,num_hidden_layers=4 \\
        --tokenizer_name gpt2 --train_file train.txt --validation_file valid.txt --do_train --do_eval --output_dir out

Any model that `AutoModelForCausalLM` knows can be trained: a baseline of the same size takes the same command.
Documents are packed into rows in which they do not see each other. `--do_eval` and `--do_predict` give the perplexity
on the validation and the test text, per token and per word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

import transnormer_hf.research.baselines  # noqa: F401  registers TransNormer and the baselines
from transnormer_hf.training.fine_tuning import check_length, end_of_text
from transnormer_hf.training.predictions import check_finite
from transnormer_hf.training.pretraining import Objective, PretrainingArguments, pretrain


@dataclass
class DataArguments(PretrainingArguments):
    """Which text to learn from, and what to write at the end."""

    block_size: int = field(default=512, metadata={"help": "Tokens per row."})
    prompt: str = field(default="", metadata={"help": "Beginning of the text that the trained model continues."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of that text; 0 writes none."})


def start_of_sample(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> list[int]:
    """The tokens that the model continues: the end of the text before, and the prompt."""
    return [end_of_text(tokenizer), *tokenizer(args.prompt, add_special_tokens=False)["input_ids"]]


def check_sample(tokenizer: PreTrainedTokenizerBase, args: DataArguments, config: PreTrainedConfig) -> None:
    """Raise ValueError where prompt and new tokens are more than the model has positions for."""
    if args.max_new_tokens > 0:
        tokens = len(start_of_sample(tokenizer, args)) + args.max_new_tokens - 1  # the last one is not read
        argument = f"max_new_tokens {args.max_new_tokens} and --prompt {args.prompt!r}: a text of"
        check_length(argument, tokens, config)


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: DataArguments, seed: int) -> str:
    """What the model writes after the prompt, drawn from its 50 likeliest tokens at each step.

    Raises:
        ValueError: the model has diverged.
    """
    if args.max_new_tokens < 1:
        return ""
    set_seed(seed)
    input_ids = torch.tensor([start_of_sample(tokenizer, args)], device=model.device)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits  # (1, seq, vocab_size)
    check_finite(logits.float().cpu().numpy(), "A sample")
    written = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        top_k=50,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(written[0], skip_special_tokens=True)


CLM = Objective(
    "clm", AutoModelForCausalLM, "block_size", "text-generation", "Perplexity per token", write_sample, check_sample
)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end."""
    return pretrain(CLM, DataArguments, argv, callbacks)


if __name__ == "__main__":
    main()
