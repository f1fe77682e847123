#!/usr/bin/env python
"""Softmax against linear attention on one planted token: closed form, measurement, and what training achieves.

    python scripts/separation.py --output_dir outputs/separation             # the planted token, seconds
    python scripts/separation.py --train --output_dir outputs/separation     # and single-location regression, minutes

Models that the report in `output_dir` has already are not trained again.

The question is that of "Superiority of Softmax" (arXiv 2310.11685): can attention tell a text with one marked token
from one without, however long it is? We could not check its theorem and constants against the paper. Both experiments
are our own stand-ins.

Planted token. One key of n has the score (a + c) log n, all others c log n; a is 1.2 in texts with a marked token and
0.01 in those without, c is 0.1. Softmax gives it the weight n^a / (n^a + n - 1), linear attention, whose weights are
the scores over their sum, (a + c) / (n c + a). A threshold of 1/2 separates the two kinds of text where it lies between
the weights. Measured are the attentions of this package, in float64, on keys that have these scores; the linear one is
`scaled_linear_attention` with features whose products are the scores.

Single-location regression (the task of arXiv 2509.21936, in numbers of our own). A text is n Gaussian vectors, one of
which, at a random place, is shifted in one direction; the target is its component in another. Two layers of each
attention predict it at a first, constant token; T1 and T2 have a DiagAttention and a NormAttention. The figure is the
share of the targets' variance that is explained on fresh texts, at best 1.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.trainer_utils import set_seed

from transnormer_hf import TransNormerConfig
from transnormer_hf.model.reference_transnormer import attention_metadata
from transnormer_hf.research.baselines import MIXERS, baseline_config
from transnormer_hf.research.baselines.mixer import scaled_linear_attention
from transnormer_hf.training.files import write_atomically

LENGTHS = (100, 200, 1000, 10_000, 100_000)
MARKED, UNMARKED, COMMON = 1.2, 0.01, 0.1  # a of both kinds of text, and c
THRESHOLD = 0.5
WIDTH, HEADS, DIRECTIONS = 64, 2, 16
UNMATCHED = "lln_unmatched"  # LLN without moment matching, alpha = beta = 1
MODELS = ("t1", "t2", *MIXERS, UNMATCHED)


def planted_weight(n: int, a: float, attention: str) -> float:
    """The weight of the planted token in closed form."""
    if attention == "softmax":
        return n**a / (n**a + n - 1)
    return (a + COMMON) / (n * COMMON + a)


def measure_planted_weight(n: int, a: float, attention: str) -> float:
    """The same, measured: an attention over n tokens whose values are 1 at the planted token and 0 elsewhere."""
    length = torch.tensor(n, dtype=torch.float64)
    scores = torch.full((1, 1, n, 1), COMMON, dtype=torch.float64)
    planted = int(torch.randint(n, ()))
    scores[:, :, planted] += a
    key = scores * length.log()  # (1, 1, n, 1): a query of 1 makes them the scores
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    value = torch.zeros_like(key)
    value[:, :, planted] = 1
    if attention == "softmax":
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0).item()
    metadata = attention_metadata(1, n, key.device)
    return scaled_linear_attention(query, key, value, metadata, causal=False).item()


def planted_rows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for n in lengths:
        for attention in ("softmax", "linear"):
            weights = {
                kind: {
                    "closed_form": planted_weight(n, a, attention),
                    "measured": measure_planted_weight(n, a, attention),
                }
                for kind, a in (("marked", MARKED), ("unmarked", UNMARKED))
            }
            separates = weights["unmarked"]["measured"] < THRESHOLD < weights["marked"]["measured"]
            rows.append({"n": n, "attention": attention, **weights, "separates": separates})
    return rows


class SingleLocationRegressor(nn.Module):
    """A projection of the vectors, layers with an attention, and a projection of the output at the first token."""

    def __init__(self, layers: PreTrainedModel):
        super().__init__()
        self.embed = nn.Linear(DIRECTIONS, WIDTH)
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.layers = layers
        self.predict = nn.Linear(WIDTH, 1)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """vectors (batch, n, DIRECTIONS) to predictions (batch,)."""
        first = self.first.expand(len(vectors), 1, WIDTH)
        states = torch.cat((first, self.embed(vectors)), 1)  # (batch, n + 1, WIDTH)
        return self.predict(self.layers(inputs_embeds=states).last_hidden_state[:, 0])[:, 0]


def draw_texts(count: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (count, n, DIRECTIONS) and targets (count,): direction 0 marks one vector, direction 1 is its target."""
    vectors = torch.randn(count, n, DIRECTIONS, generator=generator)
    place = torch.randint(n, (count,), generator=generator)
    vectors[torch.arange(count), place, 0] += DIRECTIONS**0.5 * 2
    return vectors, vectors[torch.arange(count), place, 1]


def make_layers(name: str, n: int) -> PreTrainedModel:
    """Two layers of a baseline, or of T1 or T2: a DiagAttention, then a NormAttention."""
    fields: dict[str, Any] = {
        "vocab_size": 3,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "max_position_embeddings": n + 1,
        "position_embedding": "none",
        "embedding_norm": "none",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "norm_placement": "pre",
        "initializer": "xavier",
    }
    if name in ("t1", "t2"):
        return AutoModel.from_config(TransNormerConfig(**fields, variant=name))
    mixer, options = ("lln", {"moments": "none"}) if name == UNMATCHED else (name, {})
    return AutoModel.from_config(baseline_config(TransNormerConfig(**fields), mixer, **options))


def train_row(name: str, n: int, steps: int, seed: int) -> dict[str, Any]:
    """Trains one model; returns the share of the targets' variance that it explains on fresh texts."""
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SingleLocationRegressor(make_layers(name, n))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        vectors, targets = draw_texts(64, n, generator)
        loss = nn.functional.mse_loss(model(vectors), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        vectors, targets = draw_texts(512, n, torch.Generator().manual_seed(seed + 1000))
        error = nn.functional.mse_loss(model(vectors), targets)
    explained = (1 - error / targets.var(correction=0)).item()
    return {"model": name, "n": n, "steps": steps, "seed": seed, "explained": explained}


def tables(report: dict[str, Any]) -> str:
    lines = ["## Planted token: its weight", ""]
    lines += ["| n | attention | marked, closed form | measured | unmarked, closed form | measured | separates |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in report["planted"]:
        numbers = [f"{row[kind][way]:.4g}" for kind in ("marked", "unmarked") for way in ("closed_form", "measured")]
        verdict = "yes" if row["separates"] else "no"
        lines.append(f"| {row['n']} | {row['attention']} | {' | '.join(numbers)} | {verdict} |")
    if report["trained"]:
        lines += ["", "## Single-location regression: share of the variance explained", ""]
        lines += ["| model | n | steps | mean over the seeds | each seed |", "|---|---|---|---|---|"]
        seeds: dict[tuple[str, int, int], dict[int, float]] = {}
        for row in report["trained"]:
            seeds.setdefault((row["model"], row["n"], row["steps"]), {})[row["seed"]] = row["explained"]
        for (model, n, steps), explained in sorted(seeds.items(), key=lambda item: item[0][1:]):
            each = ", ".join(f"{seed}: {share:.3f}" for seed, share in sorted(explained.items()))
            lines.append(f"| {model} | {n} | {steps} | {statistics.mean(explained.values()):.3f} | {each} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the report that was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="n of the planted token")
    parser.add_argument("--train", action="store_true", help="also train on single-location regression")
    parser.add_argument("--models", nargs="+", default=MODELS, help="what to train")
    parser.add_argument("--train_lengths", type=int, nargs="+", default=[64, 256], help="n in training")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/separation"))
    options = parser.parse_args(arguments)
    for name in options.models:
        if name not in MODELS:
            parser.error(f"--models {name}: no such model; choose from {', '.join(MODELS)}.")
    for argument in ("lengths", "train_lengths"):
        if (least := min(getattr(options, argument))) < 2:
            parser.error(f"--{argument} {least}: a text has at least 2 tokens.")
    if options.steps < 10:
        parser.error(f"--steps {options.steps}: must be at least 10.")
    set_seed(0)
    earlier = options.output_dir / "separation.json"
    trained = json.loads(earlier.read_text())["trained"] if earlier.is_file() else []
    report: dict[str, Any] = {"threshold": THRESHOLD, "planted": planted_rows(options.lengths), "trained": trained}
    known = {(row["model"], row["n"], row["steps"], row["seed"]) for row in trained}

    def save() -> None:  # after each model, so that a run that is cut off leaves what it has
        write_atomically(earlier, json.dumps(report, indent=1) + "\n")
        write_atomically(options.output_dir / "separation.md", tables(report))

    save()
    if options.train:
        for n in options.train_lengths:
            for seed in options.seeds:
                for name in options.models:
                    if (name, n, options.steps, seed) in known:
                        continue
                    report["trained"].append(train_row(name, n, options.steps, seed))
                    save()
    print(tables(report))
    return report


if __name__ == "__main__":
    main()
