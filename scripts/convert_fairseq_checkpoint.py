#!/usr/bin/env python
"""Converts a checkpoint of the authors' training code into a folder for `AutoModel….from_pretrained`.

    python scripts/convert_fairseq_checkpoint.py --checkpoint checkpoint_best.pt --output_dir transnormer-t2 \
        --preset transnormer-t2-wikitext103
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoConfig

from transnormer_hf.hub.conversion import convert_checkpoint

PRESETS = Path(__file__).resolve().parent.parent / "model_cards"


def main(arguments: list[str] | None = None) -> None:
    presets = sorted(folder.parent.name for folder in PRESETS.glob("*/config.json"))
    parser = argparse.ArgumentParser(description="Convert a checkpoint of the authors' fairseq code.")
    parser.add_argument("--checkpoint", required=True, help="file with {'model': state_dict, ...}")
    parser.add_argument("--output_dir", required=True, help="folder to write; must not exist or be empty")
    architecture = parser.add_mutually_exclusive_group(required=True)
    architecture.add_argument("--preset", choices=presets, help="a model of the paper")
    architecture.add_argument("--config", help="config.json, or a folder or repository with one")
    parser.add_argument("--tokenizer", help="tokenizer to save beside the model")
    parser.add_argument(
        "--hidden_act",
        help="activation of the GLU, if not the configuration's: 'linear' for checkpoints trained with the released "
        "code as of October 2022 or later, whose 'swish' is the identity",
    )
    options = parser.parse_args(arguments)

    overrides = {"hidden_act": options.hidden_act} if options.hidden_act else {}
    try:
        config = AutoConfig.from_pretrained(options.config or PRESETS / options.preset, **overrides)
        model = convert_checkpoint(options.checkpoint, options.output_dir, config, options.tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters written to {options.output_dir}")


if __name__ == "__main__":
    main()
