#!/usr/bin/env python
"""Serves a causal TransNormer with transformers' own server: OpenAI's chat, completions and responses, streamed or not.

pip install 'transformers[serving]'
python scripts/serve.py outputs/clm --port 8000
transformers chat outputs/clm http://localhost:8000/v1

`transformers serve` looks the class of a model up among its own. Here it finds TransNormer's as well; everything else
is that command, with its options (`--help`), and it serves any other model too. Chatting needs a tokenizer with a chat
template, plain completions do not.
"""

import sys

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import transnormer_hf


def main() -> None:
    if "--continuous-batching" in sys.argv:
        raise SystemExit(
            "--continuous-batching pages keys and values, which a TransNormer does not keep: its state has one size for"
            " any length. Leave it out; requests are then answered one after the other."
        )
    # Of several: while transformers is imported, it puts another module of this name in place of the first.
    for model_class in transnormer_hf.AUTO_CLASSES.values():
        setattr(model_manager.transformers, model_class.__name__, model_class)
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app()


if __name__ == "__main__":
    main()
