#!/usr/bin/env python
"""Show what a model's attention does on a text: a self-contained HTML page with a table and a figure per layer.

    python scripts/diagnose.py --model outputs/my-model --text "A film without a single dull minute." --output page.html

--model is a folder or a repository with a tokenizer: TransNormer, a baseline, or any model of transformers that
returns attentions (BERT, GPT-2, ...). --text may be repeated; the texts become one padded batch. Needs matplotlib (the
extra `plot`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

import transnormer_hf.research.baselines  # noqa: F401  registers TransNormer and the baselines
from transnormer_hf.research.diagnostics import attention_report
from transnormer_hf.research.diagnostics.maps import EDGES
from transnormer_hf.training.files import write_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a model and its tokenizer")
    parser.add_argument("--text", required=True, action="append", help="a text; repeat for more")
    parser.add_argument("--tokenizer", help="folder or repository of a tokenizer, if not the model's")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text that are kept; default: 256")
    parser.add_argument("--edge", choices=EDGES, default="clip", help="windows at the ends of a text: cut off or moved")
    parser.add_argument("--output", type=Path, default=Path("outputs/diagnose.html"), help="the page to write")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    if options.max_length < 2:
        parser.error(f"--max_length {options.max_length}: an attention map has at least 2 tokens.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer(
            options.text, return_tensors="pt", padding=True, truncation=True, max_length=options.max_length
        )
        model = AutoModel.from_pretrained(options.model, attn_implementation="eager")
        report = attention_report(model, batch, edge=options.edge)
        page = report.to_html(f"Attention of {options.model}", "\n".join(options.text))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    write_atomically(options.output, page)
    if options.json is not None:
        write_atomically(options.json, report.to_json())
    print(report.to_markdown())
    print(f"page: {options.output}")


if __name__ == "__main__":
    main()
