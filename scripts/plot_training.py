#!/usr/bin/env python
"""Draw the training curves of several runs in one plot: the loss over the minutes of training, and over the tokens.

    python scripts/plot_training.py --runs T1=out/t1 T2=out/t2 Llama=out/llama --output curves.png

A run is a folder that a training script of this project wrote. Points are evaluations. Minutes compare nothing where
the machine was busier in one run than in another: draw over the tokens alone then (--over tokens). Needs matplotlib:
pip install 'transnormer-hf[plot]'.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transnormer_hf.training.files import replacing

AXES = ("minutes", "tokens")


def read_history(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a run logged, entry by entry, and its figures of training and evaluation.

    Raises:
        FileNotFoundError: the folder does not hold a run.
    """
    files = [folder / name for name in ("trainer_state.json", "train_results.json", "eval_results.json")]
    for file in files[:2]:
        if not file.is_file():
            raise FileNotFoundError(f"--runs {folder}: no {file.name}, so this is not the folder of a finished run.")
    state, *results = (json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file())
    return state["log_history"], {name: value for figures in results for name, value in figures.items()}


def smooth(values: Sequence[float], share: float = 0.8) -> list[float]:
    """Running mean in which each value counts 1 - share, corrected at its beginning."""
    mean, smoothed = 0.0, []
    for number, value in enumerate(values, start=1):
        mean = share * mean + (1 - share) * value
        smoothed.append(mean / (1 - share**number))
    return smoothed


def plot(runs: dict[str, Path], output: Path, over: Sequence[str] = AXES) -> None:
    """Write the plot of the runs, by their names, to `output`, with one panel for each of `over`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(over), figsize=(5.5 * len(over), 4), sharey=True, squeeze=False)
    panels = dict(zip(over, axes[0], strict=True))
    for number, (name, folder) in enumerate(runs.items()):
        history, results = read_history(folder)
        losses = [entry for entry in history if "loss" in entry and "train_minutes" in entry]
        evaluations = [entry for entry in history if "eval_loss" in entry and "train_minutes" in entry]
        last = max((entry["step"] for entry in history), default=1)
        per_step = results.get("train_tokens", last) / last
        color, values = f"C{number}", smooth([entry["loss"] for entry in losses])
        label = f"{name}, validation {results['eval_loss']:.3f}" if "eval_loss" in results else name
        for quantity, panel in panels.items():
            field, unit = {"minutes": ("train_minutes", 1.0), "tokens": ("step", per_step)}[quantity]
            panel.plot([unit * entry[field] for entry in losses], values, color=color, label=label)
            for entry in evaluations:
                panel.plot(unit * entry[field], entry["eval_loss"], "o", color=color)
    labels = {"minutes": "minutes of training", "tokens": "tokens seen" if "train_tokens" in results else "updates"}
    for quantity, panel in panels.items():
        panel.set_xlabel(labels[quantity])
    axes[0, 0].set_ylabel("training loss, smoothed (nats per token)")
    axes[0, 0].legend()
    figure.tight_layout()
    with replacing(output) as path:
        figure.savefig(path, dpi=120, format=output.suffix.removeprefix(".") or "png")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs that the command line names and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="finished runs")
    parser.add_argument("--over", nargs="+", choices=AXES, default=AXES, help="what to draw the loss over")
    parser.add_argument("--output", type=Path, required=True, help="png, svg or pdf file")
    args = parser.parse_args(argv)
    for run in args.runs:
        if "=" not in run:
            raise ValueError(f"--runs {run} must have the form NAME=FOLDER.")
    plot({name: Path(folder) for name, _, folder in (run.partition("=") for run in args.runs)}, args.output, args.over)


if __name__ == "__main__":
    main()
