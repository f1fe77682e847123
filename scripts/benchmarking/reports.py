"""What benchmark_model.py prints, writes and draws."""

import functools
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transnormer_hf.training.files import replacing

from .contenders import COMPILED, CONTENDERS, EVERYTHING, FLOOR
from .runs import TASKS


def describe(device: str | torch.device) -> str:
    """The name of the card, or the processor and the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def heading(report: dict[str, Any]) -> str:
    return (
        f"{report['num_hidden_layers']} layers, width {report['hidden_size']}, {report['num_attention_heads']} heads, "
        f"vocabulary {report['vocab_size']}, random weights, {report['dtype']}; {report['device']}; torch "
        f"{report['torch']}, transformers {report['transformers']}. A training step is {report['step']}."
    )


def print_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        what = f"{row['model']:<30}{row['task']:<11}{row['length']:>6}"
        if "skipped" in row:
            print(f"{what}  skipped: {row['skipped']}", flush=True)
            continue
        low, high = (1e3 * seconds for seconds in row["quartile_seconds"])
        memory = row.get("peak_bytes", row.get("state_bytes", 0)) / 1e6
        print(f"{what}{1e3 * row['median_seconds']:>11.2f} ms  ({low:.2f} to {high:.2f}){memory:>10.1f} MB", flush=True)
    return rows


def tables(report: dict[str, Any], is_table7: bool) -> str:
    """The report in Markdown: tables of models against lengths, then what was skipped and why."""
    rows = [row for row in report["results"] if "median_seconds" in row]
    parts = [heading(report)]
    if is_table7:
        for task in reversed(TASKS):
            parts += table(
                f"{task.capitalize()}, steps per second", rows, task, lambda row: f"{row['steps_per_second']:.3g}"
            )
    else:
        for task in reversed(TASKS):
            title = task.capitalize()
            parts += table(f"{title}, µs per token (± half the interquartile range)", rows, task, time_and_spread)
            parts += table(
                f"{title}, time as a multiple of TransNormer T2's (causal models: causal, others: bidirectional)",
                rows,
                task,
                functools.partial(relative_to_t2, rows),
            )
            parts += table(
                f"{title}, time over that of its own products at the rate of 1024 x 1024 matrices",
                rows,
                task,
                functools.partial(over_own_products, rows),
            )
            parts += table(f"{title}, peak memory in MB", rows, task, lambda row: f"{row['peak_bytes'] / 1e6:,.0f}")
        shares = [
            {**row, "model": task, "task": "share", "share": share}
            for task in TASKS
            for row in rows
            if (row["model"], row["task"]) == ("transnormer-t2", task)
            and (share := attention_share(rows, row)) is not None
        ]
        parts += table("Share of attention in T2's time", shares, "share", lambda row: f"{100 * row['share']:.1f} %")
        parts += table(
            "Decoding, ms per token by context (± half the interquartile range)",
            rows,
            "decoding",
            lambda row: time_and_spread(row, unit=1e-3),
        )
        parts += table(
            "State carried while decoding, MB", rows, "decoding", lambda row: f"{row['state_bytes'] / 1e6:.2f}"
        )
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in report["results"]:
        if "skipped" in row:
            key = (row["model"], row.get("task", "not timed"), row["skipped"])
            reasons.setdefault(key, []).append(str(row.get("length", "")))
    if reasons:
        parts += ["### Skipped"]
        parts += ["\n".join(f"* {model}, {task} {', '.join(at)}: {why}" for (model, task, why), at in reasons.items())]
    if not report["complete"]:
        parts.append("This run is not complete.")
    return "\n\n".join(parts) + "\n"


def table(
    title: str, rows: list[dict[str, Any]], task: str, entry: Callable[[dict[str, Any]], str | None]
) -> list[str]:
    entries = {(row["model"], row["length"]): text for row in rows if row["task"] == task and (text := entry(row))}
    if not entries:
        return []
    lengths = sorted({length for _, length in entries})
    lines = [f"| model | {' | '.join(map(str, lengths))} |", "|---" * (1 + len(lengths)) + "|"]
    for model in dict.fromkeys(model for model, _ in entries):
        lines.append(f"| {model} | {' | '.join(entries.get((model, length), '–') for length in lengths)} |")
    return [f"### {title}", "\n".join(lines)]


def time_and_spread(row: dict[str, Any], unit: float = 1e-6) -> str:
    per_unit = row["microseconds_per_token"] / row["median_seconds"] * 1e-6 / unit
    low, high = row["quartile_seconds"]
    digits = 2 if unit > 1e-6 else 0
    return f"{row['median_seconds'] * per_unit:.{digits}f} ± {(high - low) / 2 * per_unit:.{digits}f}"


def relative_to_t2(rows: list[dict[str, Any]], row: dict[str, Any]) -> str | None:
    ours = "transnormer-t2" if EVERYTHING[row["model"]].causal else "transnormer-t2-bidirectional"
    ratio = paired(rows, row, ours)
    return None if ratio is None else f"{ratio:.2f}"


def over_own_products(rows: list[dict[str, Any]], row: dict[str, Any]) -> str | None:
    """The median over turns; a compiled model has the products of the eager one."""
    name = row["model"].removesuffix(COMPILED)
    key = (name, row["task"], row["length"])
    flops = next((r["flops"] for r in rows if (r["model"], r["task"], r["length"]) == key and "flops" in r), None)
    if not flops or "gemm_seconds" not in row:
        return None
    turns = zip(row["seconds"], row["gemm_seconds"], strict=True)
    return f"{statistics.median(taken / gemm for taken, gemm in turns) * 2 * 1024**3 / flops:.2f}"


def attention_share(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """The share of a step that goes when the identity on the values takes the place of attention."""
    ratio = paired(rows, row, FLOOR)
    return None if ratio is None else 1 - 1 / ratio


def paired(rows: list[dict[str, Any]], row: dict[str, Any], other: str) -> float | None:
    """The median, over turns, of a row's time as a multiple of another model's in the same turn."""
    for candidate in rows:
        if (candidate["model"], candidate["task"], candidate["length"]) == (other, row["task"], row["length"]):
            turns = zip(row["seconds"], candidate["seconds"], strict=False)  # a long run may have fewer of them
            return statistics.median(a / b for a, b in turns)
    return None


PLOTS = {
    "time_per_token": ("training", "microseconds_per_token", "length", "µs per token of a training step"),
    "memory": ("training", "peak_bytes", "length", "peak memory of a training step, bytes"),
    "decode_latency": ("decoding", "median_seconds", "context", "seconds per new token"),
}


def plot(report: dict[str, Any], folder: Path) -> None:
    """One figure each of time per token, memory and decode latency, both axes logarithmic."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib).")
        return
    colors = {name: colormaps["tab20"](index) for index, name in enumerate(CONTENDERS)}
    for name, (task, quantity, x_label, y_label) in PLOTS.items():
        timed = [row for row in report["results"] if row.get("task") == task and "median_seconds" in row]
        rows = [row for row in timed if row[quantity] > 0]  # a tiny model's peak may hide in memory held before
        if not rows:
            continue
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            color = colors[model.removesuffix(COMPILED)]
            style: dict[str, Any] = (
                {"linewidth": 2.5} if "transnormer" in model else {"linewidth": 1.2, "linestyle": "--"}
            )
            lengths = [row["length"] for row in mine]
            axes.plot(
                lengths, [row[quantity] for row in mine], marker="o", markersize=4, label=model,
                color=color, **style,
            )  # fmt: skip
            if quantity != "peak_bytes":
                low, high = (
                    [row[quantity] / row["median_seconds"] * row["quartile_seconds"][end] for row in mine]
                    for end in (0, 1)
                )
                axes.fill_between(lengths, low, high, alpha=0.15, color=color, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
        axes.set(xlabel=f"{x_label}, tokens", ylabel=y_label)
        axes.set_title(f"{report['device']}, {report['dtype']}", fontsize=9)
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        with replacing(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=110, format="png")
