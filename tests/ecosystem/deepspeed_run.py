"""Run by test_deepspeed.py on each process: 20 steps with the Trainer; the first one writes the losses.

python deepspeed_run.py OUTPUT_DIR [SETTINGS]   # the settings of DeepSpeed as JSON; none: one process alone
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 8}
SIZES |= {"position_embedding": "none", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_rows() -> torch.Tensor:
    """(80, 24) tokens, the same in every process."""
    return torch.randint(3, 64, (80, 24), generator=torch.Generator().manual_seed(1))


def main(output_dir: str, settings: str | None = None) -> None:
    arguments = TrainingArguments(
        output_dir, max_steps=20, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, deepspeed=settings and json.loads(settings),
    )  # fmt: skip
    torch.manual_seed(0)
    model = TransNormerForCausalLM(TransNormerConfig(**SIZES, initializer_range=0.2))
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in make_rows()])
    trainer.train()
    trainer.save_model()
    if arguments.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(f"{output_dir}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
