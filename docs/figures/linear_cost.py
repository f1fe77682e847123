#!/usr/bin/env python
"""Draws `linear_cost.png`, the figure of the README, from `benchmark_model.json`. Needs matplotlib.

python docs/figures/linear_cost.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
LONGEST = 8192  # above it, the peers took too long to be timed
MODELS = {
    "transnormer-t2": ("TransNormer T2, causal", "tab:blue", "-"),
    "llama": ("Llama (SDPA), causal", "tab:blue", "--"),
    "transnormer-t2-bidirectional": ("TransNormer T2, bidirectional", "tab:orange", "-"),
    "bert": ("BERT (SDPA), bidirectional", "tab:orange", "--"),
}


def main() -> None:
    report = json.loads((FOLDER / "benchmark_model.json").read_text(encoding="utf-8"))
    timed = [row for row in report["results"] if "median_seconds" in row and row["model"] in MODELS]
    training = [row for row in timed if row["task"] == "training" and row["length"] <= LONGEST]
    decoding = [row for row in timed if row["task"] == "decoding"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, rows in ((left, training), (right, decoding)):
        for model, (label, color, line) in MODELS.items():
            mine = [row for row in rows if row["model"] == model]
            if mine:
                milliseconds = [row["microseconds_per_token"] / 1000 for row in mine]
                axes.plot([row["length"] for row in mine], milliseconds, line, color=color, marker="o", label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("ms per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set(title="Training step", xlabel="tokens in the text")
    right.set(title="Generation", xlabel="tokens read before")
    figure.suptitle(f"Models of one size, {report['dtype']}, {report['device']}", fontsize=10)
    figure.savefig(FOLDER / "linear_cost.png", dpi=110)


if __name__ == "__main__":
    main()
