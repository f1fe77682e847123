#!/usr/bin/env python
"""How concentrated attention is, kernel by kernel, and what moment matching does for Linear Log-Normal Attention.

    python scripts/log_normal.py --output_dir outputs/log_normal     # a minute on one core, nothing is trained

Queries and keys are independent Gaussian channels with standard deviation s. The scores of softmax then have the
standard deviation s², so its temperature is 1 / s², and a map should become more concentrated as s grows: the entropy
of its rows and its spectral gap fall (arXiv 2311.13541). The first two tables show which kernels follow.

Moment matching chooses alpha and beta of LLN so that the variance of log p is that of softmax. The third table has this
variance with the matching, without it (alpha = beta = 1), and for softmax, at several head dims.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transnormer_hf.research.diagnostics import attention_temperature
from transnormer_hf.research.diagnostics.log_normal import COMPARED, KERNELS, UNMATCHED, compare, compare_concentration
from transnormer_hf.training.files import write_atomically

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
HEAD_DIMS = (16, 32, 64, 128)


def log_variance(weights: torch.Tensor) -> float:
    """The variance of log p within a row of a map, the mean over rows."""
    return (1 / attention_temperature(weights) ** 2).mean().item()


def match_rows(scales: Sequence[float], head_dims: Sequence[int], tokens: int, seed: int) -> list[dict[str, Any]]:
    """The variance of log p of softmax and of LLN with and without moment matching, per head dim and scale."""
    rows = []
    for head_dim in head_dims:
        generator = torch.Generator().manual_seed(seed)
        measured = compare(scales, tokens, head_dim, generator, (*COMPARED, UNMATCHED), {"variance": log_variance})
        rows += [{"head_dim": head_dim, **row} for row in measured]
    return rows


def table(title: str, rows: Sequence[dict[str, Any]], kind: str, label: Callable[[dict[str, Any]], str]) -> list[str]:
    names = list(rows[0][kind])
    lines = [f"## {title}", "", f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    return [
        *lines,
        *(f"| {label(row)} | {' | '.join(f'{row[kind][name]:.3g}' for name in names)} |" for row in rows),
        "",
    ]


def tables(report: dict[str, Any]) -> str:
    tokens, head_dim = report["tokens"], report["head_dim"]
    lines = [f"Maps of {tokens} tokens, seed {report['seed']}; head dim {head_dim} unless a row says another.", ""]
    by_scale = {"rows": report["concentration"], "label": lambda row: f"s = {row['scale']:g}"}
    lines += table(f"Entropy of a row, in bits (at most {torch.tensor(tokens).log2():.3g})", kind="entropy", **by_scale)
    lines += table("Spectral gap", kind="gap", **by_scale)
    lines += table(
        "Variance of log p", report["matching"], "variance",
        lambda row: f"head dim {row['head_dim']}, s = {row['scale']:g}",
    )  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the report that was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="s: standard deviations")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--head_dim", type=int, default=64, help="of the first two tables")
    parser.add_argument("--head_dims", type=int, nargs="+", default=HEAD_DIMS, help="of the third")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/log_normal"))
    options = parser.parse_args(arguments)
    if not min(options.scales) > 0:
        parser.error(f"--scales {min(options.scales)}: must be greater than 0.")
    for argument, least in (("tokens", 2), ("head_dim", 2)):
        if getattr(options, argument) < least:
            parser.error(f"--{argument} {getattr(options, argument)}: must be at least {least}.")
    if min(options.head_dims) < 2:
        parser.error(f"--head_dims {min(options.head_dims)}: must be at least 2.")
    generator = torch.Generator().manual_seed(options.seed)
    report = {
        "tokens": options.tokens,
        "head_dim": options.head_dim,
        "seed": options.seed,
        "concentration": compare_concentration(options.scales, options.tokens, options.head_dim, generator, KERNELS),
        "matching": match_rows(options.scales, options.head_dims, options.tokens, options.seed),
    }
    write_atomically(options.output_dir / "log_normal.json", json.dumps(report, indent=1) + "\n")
    write_atomically(options.output_dir / "log_normal.md", tables(report))
    print(tables(report))
    return report


if __name__ == "__main__":
    main()
