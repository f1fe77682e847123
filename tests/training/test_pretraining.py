"""Pre-training: the released schedules, losses that accumulate, perplexities that say what they are of."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from transnormer_hf import TransNormerConfig
from transnormer_hf.training.packing import IGNORED
from transnormer_hf.training.pretraining import (
    PRESETS,
    PretrainingTrainer,
    accumulation_steps,
    aligned_loss,
    perplexities,
)


def learning_rates(preset: str, steps: list[int], tmp_path) -> list[float]:
    """The rate of the preset's schedule before each of these updates."""
    fields = {name: value for name, value in PRESETS[preset].items() if name in TrainingArguments.__annotations__}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)
    config = TransNormerConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    trainer = PretrainingTrainer(model=AutoModelForCausalLM.from_config(config), args=args)
    trainer.warmup_init_lr = PRESETS[preset]["warmup_init_lr"]
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(args.max_steps)
    assert scheduler is trainer.lr_scheduler
    factor = scheduler.lr_lambdas[0]
    assert scheduler.get_last_lr()[0] == pytest.approx(5e-4 * factor(0))
    return [5e-4 * factor(step) for step in steps]


def test_the_causal_preset_follows_the_inverse_square_root(tmp_path):
    rates = learning_rates("wikitext103-clm", [0, 4000, 8000, 32_000, 100_000], tmp_path)
    expected = [1e-7, (1e-7 + 5e-4) / 2, 5e-4, 2.5e-4, 5e-4 * math.sqrt(8000 / 100_000)]
    assert rates == pytest.approx(expected)


def test_the_masked_preset_falls_to_zero_in_a_line(tmp_path):
    rates = learning_rates("wikitext103-mlm", [0, 3000, 26_500, 50_000], tmp_path)
    assert rates == pytest.approx([1e-7, 5e-4, 2.5e-4, 0.0])


@pytest.mark.parametrize(("preset", "rows"), [("wikitext103-clm", 128), ("wikitext103-mlm", 512)])
def test_the_presets_see_as_many_tokens_an_update_as_the_released_runs(preset, rows):
    args = SimpleNamespace(train_batch_size=8, world_size=2)
    assert accumulation_steps(PRESETS[preset]["tokens_per_update"], 512, args) * 16 == rows


def test_perplexities_are_per_token_and_per_word():
    figures = perplexities(total_nll=60.0, tokens=30, words=20)
    assert figures["token_perplexity"] == pytest.approx(math.exp(2))
    assert figures["word_perplexity"] == pytest.approx(math.exp(3))
    assert (figures["loss"], figures["tokens"], figures["words"]) == (2.0, 30, 20)
    assert "word_perplexity" not in perplexities(60.0, 30, None)
    assert perplexities(1e6, 1, None)["token_perplexity"] == math.inf


def test_accumulated_losses_add_up_to_that_of_one_batch():
    logits, labels = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    labels[0, 1:] = IGNORED
    labels[3, :2] = IGNORED
    whole = aligned_loss(SimpleNamespace(logits=logits), labels)
    count = (labels != IGNORED).sum()
    parts = [aligned_loss(SimpleNamespace(logits=logits[rows]), labels[rows], count) for rows in ([0], [1, 2], [3])]
    assert sum(parts) == pytest.approx(whole)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert whole == pytest.approx(expected)
