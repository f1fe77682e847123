#!/usr/bin/env python
"""Writes the model cards of the presets, `model_cards/<preset>/README.md`, from their configurations and the template.

python scripts/make_model_cards.py            # write
python scripts/make_model_cards.py --check    # only say which are out of date; exit status 1 if any is
"""

import argparse
import ast
import re
import sys
from pathlib import Path

from transnormer_hf.hub.model_card import build_preset_card
from transnormer_hf.training.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "model_cards"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the model cards of the presets.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card is out of date")
    options = parser.parse_args(arguments)
    # Python 3.10 has no reader of toml; one list of strings needs none.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = ast.literal_eval(re.findall(r"^dependencies = (\[.*?^\])", project, re.DOTALL | re.MULTILINE)[0])
    outdated = []
    for config in sorted(PRESETS.glob("*/config.json")):
        card = f"{build_preset_card(config.parent, requirements)}\n"
        path = config.with_name("README.md")
        if not path.exists() or path.read_text(encoding="utf-8") != card:
            outdated.append(path)
            if not options.check:
                write_atomically(path, card)
    for path in outdated:
        print(f"{path}: {'out of date' if options.check else 'written'}")
    if options.check and outdated:
        sys.exit("Run scripts/make_model_cards.py and commit what it writes.")


if __name__ == "__main__":
    main()
