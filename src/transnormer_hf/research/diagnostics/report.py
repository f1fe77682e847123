"""`attention_report`: every map instrument on every layer of a model, as a table, as JSON and as figures."""

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...training.files import replacing, write_atomically
from .maps import (
    accumulated_attention_curve,
    attention_temperature,
    fit_log_normal,
    mean_over_rows,
    normalize_rows,
    row_entropy,
    spectral_gap,
)

RATIOS = tuple(step / 20 for step in range(21))
SHOWN_RATIO = 0.4  # the one that the paper reads off its Figure 2a

# Column of the table and meaning of each number of a layer; a layer has one per head, and their mean.
MEASURES = {
    "accumulated": f"share of the attention within {SHOWN_RATIO:.0%} of the text about a token",
    "entropy": "entropy of a row, bits",
    "spectral_gap": "spectral gap 1 - |λ₂|",
    "temperature": "temperature 1 / σ(log p)",
    "log_mean": "log-normal fit: mean of log p",
    "log_variance": "log-normal fit: variance of log p",
    "fit_distance": "log-normal fit: Kolmogorov-Smirnov distance",
}


@dataclass
class AttentionReport:
    """The result of `attention_report`.

    layers: one mapping per map: "layer", "kind", each of MEASURES as a list with one number per head (None where there
        is none), and "curve", the accumulated attention at each of `ratios`, the mean over heads.
    maps: per layer, the normalised map of the first text, mean over heads, real tokens only: (seq, seq).
    log_weights: per layer, log p of the nonzero weights of the whole batch, centred per head.
    """

    ratios: Sequence[float]
    edge: str
    layers: list[dict[str, Any]]
    maps: list[torch.Tensor]
    log_weights: list[torch.Tensor]

    def to_json(self) -> str:
        """The numbers, without the maps."""
        report = {"ratios": list(self.ratios), "edge": self.edge, "measures": MEASURES, "layers": self.layers}
        return json.dumps(report, indent=1, allow_nan=False) + "\n"

    def rows(self) -> list[list[str]]:
        """The table's cells, header first; numbers are means over heads."""
        cells = [["layer", "kind", *MEASURES]]
        for layer in self.layers:
            numbers = [_mean(layer[measure]) for measure in MEASURES]
            cells.append([str(layer["layer"]), layer["kind"], *("–" if n is None else f"{n:.3f}" for n in numbers)])
        return cells

    def to_markdown(self) -> str:
        header, *rows = self.rows()
        lines = [header, ["---"] * len(header), *rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def figures(self) -> list[Any]:
        """A matplotlib Figure per layer: map, accumulated attention, and the weights beside their log-normal fit.

        Raises ImportError where matplotlib is not installed (`pip install transnormer-hf[plot]`).
        """
        return [self._draw(index) for index in range(len(self.layers))]

    def _draw(self, index: int) -> Any:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'transnormer-hf[plot]'.") from error
        layer = self.layers[index]
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        figure.suptitle(f"Layer {layer['layer']} ({layer['kind']})")
        map_axes, curve_axes, weight_axes = figure.subplots(1, 3)
        image = map_axes.imshow(self.maps[index].numpy(), cmap="viridis", vmin=0)
        figure.colorbar(image, ax=map_axes)
        map_axes.set(title="map of the first text, mean over heads", xlabel="key", ylabel="query")
        curve_axes.plot(self.ratios, layer["curve"], marker=".")
        curve_axes.set(
            title="accumulated attention",
            xlabel="share of the text, r",
            ylabel="l(i, r, N)",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        curve_axes.grid(alpha=0.3)
        logs = self.log_weights[index]
        if len(logs) > 1 and logs.max() > logs.min():
            weight_axes.hist(logs.numpy(), bins=60, density=True, alpha=0.6, label="weights")
            grid = torch.linspace(float(logs.min()), float(logs.max()), 200)
            variance = float(logs.var())
            density = (-(grid**2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
            weight_axes.plot(grid.numpy(), density.numpy(), label="normal fit")
            weight_axes.legend()
        weight_axes.set(title="log p, mean of each head taken off", xlabel="log p", ylabel="density")
        return figure

    def to_html(self, title: str, text: str = "") -> str:
        """A self-contained page with the table and the figures; title and text are escaped."""
        header, *rows = self.rows()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        meanings = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>\n" for name, meaning in MEASURES.items()
        )
        images = "".join(
            f'<img alt="Layer {layer["layer"]}" src="data:image/png;base64,{_png(figure)}"/>\n'
            for layer, figure in zip(self.layers, self.figures(), strict=True)
        )
        return PAGE.format(
            title=html.escape(title), text=html.escape(text), head=head, body=body, meanings=meanings, images=images
        )

    def save(self, folder: str | Path) -> None:
        """Writes attention.json, attention.md and a layer_N.png per layer into a folder."""
        folder = Path(folder)
        write_atomically(folder / "attention.json", self.to_json())
        write_atomically(folder / "attention.md", self.to_markdown())
        for index, figure in enumerate(self.figures()):
            with replacing(folder / f"layer_{index}.png") as path:
                figure.savefig(path, format="png")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #ccc; padding: 0.3em 0.6em; text-align: right; }}
img {{ display: block; margin: 1em 0; max-width: 100%; }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 1em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<pre>{text}</pre>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
<p>Numbers are means over heads and texts. Scores of a map without a denominator count with their absolute values,
divided by their sum.</p>
<dl>
{meanings}</dl>
{images}</body>
</html>
"""


@torch.no_grad()
def attention_report(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], ratios: Sequence[float] = RATIOS, edge: str = "clip"
) -> AttentionReport:
    """Runs a model on a batch and measures the attention map of every layer (`maps.py` defines the instruments).

    model: one of ours, or any model of transformers that returns attentions. It runs in eval mode, which is undone
        afterwards.
    batch: the model's inputs, tensors of (batch, seq), with an `attention_mask` if there is padding.

    Raises ValueError if the model returns no maps of (batch, heads, seq, seq).
    """
    was_training = model.training
    try:
        attentions = model.eval()(**batch, output_attentions=True).get("attentions")
    finally:
        model.train(was_training)
    if not attentions or any(weights is None or weights.dim() != 4 for weights in attentions):
        raise ValueError(
            f"model ({type(model).__name__}) gave no attention maps of (batch, heads, seq, seq); load it with "
            "attn_implementation='eager', and an encoder or decoder alone."
        )
    attention_mask = batch.get("attention_mask")
    if attention_mask is not None:
        attention_mask = attention_mask.cpu()
    report = AttentionReport(list(ratios), edge, [], [], [])
    for layer_index, kind, weights in _maps(model, attentions):
        weights = weights.float().cpu()
        layer, mean_map, logs = _measure(weights, attention_mask, ratios, edge)
        report.layers.append({"layer": layer_index, "kind": kind, **layer})
        report.maps.append(mean_map)
        report.log_weights.append(logs)
    return report


def _measure(
    weights: torch.Tensor, attention_mask: torch.Tensor | None, ratios: Sequence[float], edge: str
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The numbers of one layer, the map of its first text, and its centred log weights."""
    curves = accumulated_attention_curve(weights, [*ratios, SHOWN_RATIO], attention_mask, edge)  # (heads, ratios + 1)
    fit = fit_log_normal(weights, attention_mask)
    per_head = {
        "accumulated": curves[:, -1],
        "entropy": mean_over_rows(row_entropy(weights, attention_mask)),
        "spectral_gap": spectral_gap(weights, attention_mask).nanmean(0),
        "temperature": attention_temperature(weights, attention_mask).nanmean(0),
        "log_mean": fit.mean.nanmean(0),
        "log_variance": fit.variance.nanmean(0),
        "fit_distance": fit.distance.nanmean(0),
    }
    layer: dict[str, Any] = {name: _finite(numbers) for name, numbers in per_head.items()}
    layer["curve"] = _finite(curves[:, :-1].nanmean(0))
    probabilities = normalize_rows(weights, attention_mask)  # (batch, heads, seq, seq)
    logs = torch.cat(
        [
            head[head > 0].log() - fit.mean[row, index]
            for row, heads in enumerate(probabilities)
            for index, head in enumerate(heads)
        ]
    )
    first = probabilities[0].mean(0)
    if attention_mask is not None:
        is_real = attention_mask[0].bool()
        first = first[is_real][:, is_real]
    return layer, first, logs


def _maps(model: PreTrainedModel, attentions: Sequence[torch.Tensor]) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Layer, kind and weights of each map; a hybrid layer of ours has two, one after the other in its heads."""
    layer_types = getattr(model.config, "layer_types", None) or []
    if len(layer_types) != len(attentions):
        layer_types = ["attention"] * len(attentions)
    for index, (layer_type, weights) in enumerate(zip(layer_types, attentions, strict=True)):
        if layer_type == "hybrid":
            diag, linear = weights.chunk(2, 1)
            yield index, "chunked_attention", diag
            yield index, "linear_attention", linear
        else:
            yield index, layer_type, weights


def _finite(numbers: torch.Tensor) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers.tolist()]


def _mean(numbers: Sequence[float | None]) -> float | None:
    finite = [number for number in numbers if number is not None]
    return sum(finite) / len(finite) if finite else None


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
