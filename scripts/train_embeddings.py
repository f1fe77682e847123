#!/usr/bin/env python
"""Trains sentence or document embeddings with sentence-transformers: its Trainer, losses and evaluators.

pip install 'sentence-transformers>=6'
python scripts/train_embeddings.py --model_name_or_path outputs/minilm-linear --train_file STS-B/train.tsv \\
    --validation_file STS-B/dev.tsv --score_column score --matryoshka_dims 384 192 96 --num_train_epochs 4 \\
    --per_device_train_batch_size 32 --learning_rate 5e-5 --output_dir outputs/embeddings

Rows of a tsv, csv or json file hold two texts, with a score (a loss that ranks pairs by it) or without one (the partner
of each text against all others of the batch). A model without learned positions takes documents of any
--max_seq_length, one with a table of positions as many tokens as these. All options of the Trainer apply.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MatryoshkaLoss, MultipleNegativesRankingLoss
from transformers import HfArgumentParser

import transnormer_hf  # noqa: F401  (registers the models)
from transnormer_hf.training.fine_tuning import check_length


@dataclass
class EmbeddingArguments:
    model_name_or_path: str = field(metadata={"help": "a saved model, or a folder that sentence-transformers wrote"})
    train_file: str = field(metadata={"help": "tsv, csv or json with two texts per row"})
    validation_file: str | None = field(default=None, metadata={"help": "the same, with scores"})
    text_columns: list[str] = field(default_factory=lambda: ["sentence1", "sentence2"])
    score_column: str | None = field(default=None, metadata={"help": "how alike the texts are; higher is more alike"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens that longer texts are cut to"})
    matryoshka_dims: list[int] = field(
        default_factory=list, metadata={"help": "widths at which the first numbers of an embedding must do alone"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code of a model that brings its own"})


def read_pairs(file: str, text_columns: list[str], score_column: str | None) -> Dataset:
    """The texts of a tsv, csv or json file, in this order, which is what a loss goes by, and perhaps "score"."""
    kind = Path(file).suffix.removeprefix(".")
    options = {"sep": "\t", "quoting": 3} if kind == "tsv" else {}  # 3: quotes are part of the text
    rows = load_dataset("json" if kind in ("json", "jsonl") else "csv", data_files=file, split="train", **options)
    if score_column is None:
        return rows.select_columns(text_columns)
    rows = rows.select_columns([*text_columns, score_column])
    return rows if score_column == "score" else rows.rename_column(score_column, "score")


def make_evaluator(file: str, args: EmbeddingArguments) -> SequentialEvaluator:
    """Spearman correlation of cosine similarity and score, at each of `matryoshka_dims` or the full width."""
    rows = read_pairs(file, args.text_columns, args.score_column or "score")
    first, second, scores = (list(rows[name]) for name in rows.column_names)
    widths: list[int | None] = [*args.matryoshka_dims] or [None]
    return SequentialEvaluator(
        [
            EmbeddingSimilarityEvaluator(first, second, scores, name=f"{width or 'full'}", truncate_dim=width)
            for width in widths
        ],
        main_score_function=lambda scores: scores[0],
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((EmbeddingArguments, SentenceTransformerTrainingArguments))
    args, training_args = parser.parse_args_into_dataclasses(arguments)
    model = SentenceTransformer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    check_length("max_seq_length", args.max_seq_length, model[0].auto_model.config)
    model.max_seq_length = args.max_seq_length
    loss = CoSENTLoss(model) if args.score_column else MultipleNegativesRankingLoss(model)
    if args.matryoshka_dims:
        loss = MatryoshkaLoss(model, loss, args.matryoshka_dims)
    train_dataset = read_pairs(args.train_file, args.text_columns, args.score_column)
    evaluator = make_evaluator(args.validation_file, args) if args.validation_file else None
    trainer = SentenceTransformerTrainer(model, training_args, train_dataset, loss=loss, evaluator=evaluator)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate() if evaluator else {}
    trainer.save_metrics("eval", metrics)
    print(*(f"{name}: {value:.4f}" for name, value in metrics.items() if "spearman" in name), sep="\n")
    return metrics


if __name__ == "__main__":
    main()
