#!/usr/bin/env python
"""Fine-tune or train a sequence classifier on a GLUE task, evaluate it, and predict the test set.

    python scripts/run_glue.py --task_name sst2 --model_name_or_path MODEL --do_train --do_eval --output_dir out
    python scripts/run_glue.py --task_name sst2 --data_dir SST-2 --config_name model_cards/transnormer-t2-base \\
        --tokenizer_name TOKENIZER --do_train --do_eval --do_predict --output_dir out --seeds 1,2,3

Any model that `AutoModelForSequenceClassification` knows can be trained, so a baseline of the same size is the same
call. A run leaves in `output_dir`: the model, `all_results.json`, GLUE submission files and a model card.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

import transnormer_hf.research.baselines  # noqa: F401  registers TransNormer and the baselines
from transnormer_hf.hub.model_card import EvaluatedSplit, build_glue_card
from transnormer_hf.tasks.glue import (
    HUB_DATASET,
    GlueTask,
    compute_glue_metrics,
    get_task,
    load_glue,
    write_submission,
)
from transnormer_hf.training.fine_tuning import (
    TRAINER_DEFAULTS,
    CardTrainer,
    EpochSetter,
    ModelArguments,
    Run,
    RunArguments,
    TrainingClock,
    build_model,
    check_length,
    check_model_arguments,
    check_positions,
    check_run_arguments,
    end_of_text,
    finish_runs,
    load_config,
    load_tokenizer,
    parse_dataclasses,
    plan_runs,
    report,
    set_up_logging,
    token_fields,
    update_results,
)
from transnormer_hf.training.losses import aligned_loss, squared_error
from transnormer_hf.training.predictions import check_finite, labels_of, logits_of
from transnormer_hf.training.text_files import check_file
from transnormer_hf.training.trainer_arguments import (
    check_enough_rows,
    check_metric_for_best_model,
    refuse_unless,
)

logger = logging.getLogger("run_glue")


# ---- Arguments ----


@dataclass
class GlueModelArguments(ModelArguments):
    """Which model to train, and how much of it."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head whose size does not fit the task."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters and the head, not the whole model."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters: alpha / r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout in front of the adapters."})


@dataclass
class DataArguments:
    """Which data to use, and how much of it."""

    task_name: str | None = field(
        default=None, metadata={"help": "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli or ax."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the task's official TSV files; default: load nyu-mll/glue from the Hub."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training rows: tsv, csv, json lines or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation rows, the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict, the same formats."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length rather than to the longest row of each batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict only the first rows."})

    @property
    def files(self) -> dict[str, str]:
        """Argument name -> file, for those given."""
        names = ("train_file", "validation_file", "test_file")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class GlueRunArguments(RunArguments):
    """What happens around the Trainer."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better --metric_for_best_model."}
    )


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[GlueModelArguments, DataArguments, GlueRunArguments, TrainingArguments]:
    """Parse a command line, or the one json file it names, and check what can be checked without loading anything.

    Raises:
        ValueError: an argument is wrong or missing; the message names it and what would work.
    """
    types = (GlueModelArguments, DataArguments, GlueRunArguments, TrainingArguments)
    model_args, data_args, run_args, training_args = parse_dataclasses(
        types, argv, {**TRAINER_DEFAULTS, "metric_for_best_model": "best"}
    )
    task = get_task(data_args.task_name)
    if training_args.metric_for_best_model == "best":
        training_args.metric_for_best_model = task.best_metric if task.metrics else None
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    check_lora_arguments(model_args)
    check_data_arguments(task, data_args, training_args)
    check_glue_run_arguments(task, run_args, training_args)
    return model_args, data_args, run_args, training_args


def check_lora_arguments(args: GlueModelArguments) -> None:
    """Raise ValueError unless the arguments name one model, and one that adapters can be added to if they are."""
    check_model_arguments(args)
    if args.use_lora and args.model_name_or_path is None:
        raise ValueError("--use_lora needs --model_name_or_path: adapters of a random model cannot be loaded again.")
    if args.use_lora and args.lora_r < 1:
        raise ValueError(f"--lora_r {args.lora_r} must be at least 1.")


def check_data_arguments(task: GlueTask, args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError or FileNotFoundError unless the arguments name the data of every step asked for."""
    steps = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
    if not any(getattr(training_args, step) for step in steps):
        raise ValueError("Nothing to do: give at least one of --do_train, --do_eval and --do_predict.")
    if not task.metrics and (training_args.do_train or training_args.do_eval):
        raise ValueError(f"--task_name {task.name} has no labels: give --do_predict and a model trained on mnli.")
    if args.files and args.data_dir is not None:
        raise ValueError(
            f"Got --data_dir {args.data_dir} and --{next(iter(args.files))}: give a folder or single files."
        )
    for name, file in args.files.items():
        check_file(file, argument=name)
    for step, name in steps.items():
        if args.files and getattr(training_args, step) and name not in args.files:
            raise ValueError(f"--{step} needs --{name}, as --{next(iter(args.files))} is given.")
    for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")


def check_glue_run_arguments(task: GlueTask, args: GlueRunArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError unless the seeds, the early stopping and the folder to resume from make sense together."""
    check_run_arguments(args, training_args)
    if task.metrics:
        check_metric_for_best_model(training_args, [*task.metrics, task.best_metric, "loss"], task.name)
    if task.is_regression:
        refuse_unless(training_args, "label_smoothing_factor", (0.0,), f"{task.name} has scores in place of classes")
    if args.early_stopping_patience is not None:
        if args.early_stopping_patience < 1:
            raise ValueError(f"--early_stopping_patience {args.early_stopping_patience} must be at least 1.")
        if not training_args.load_best_model_at_end:
            raise ValueError(
                "--early_stopping_patience needs --load_best_model_at_end, and --eval_strategy and --save_strategy set"
                " to the same of epoch and steps."
            )


# ---- Model ----


def load_glue_config(args: ModelArguments, task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the run, with the task's labels; from scratch also with the tokenizer's size and token ids.

    A checkpoint that was trained on the same labels in another order keeps its order.
    """
    config = load_config(args, token_fields(tokenizer))
    names = [str(config.id2label[number]).lower() for number in sorted(config.id2label)]
    if sorted(names) != sorted(task.labels):
        names = list(task.labels) or ["score"]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    return config


def add_lora(model: PreTrainedModel, args: GlueModelArguments) -> PreTrainedModel:
    """Freeze the model but its head and add LoRA adapters to the modules that peft lists for its type."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ImportError("--use_lora needs peft: pip install 'transnormer-hf[train]'.") from error

    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(
            f"--use_lora: peft cannot adapt a model of type {model.config.model_type!r}: {error}"
        ) from error


# ---- Data ----


@dataclass
class GlueData:
    """Tokenised splits by name, and where the rows came from."""

    train: Dataset | None
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]


def make_tokenize(
    task: GlueTask, args: DataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """The function from rows of text to rows of tokens, with the labels as the model numbers them.

    Raises:
        ValueError: `--max_seq_length` is more than the model takes, or leaves no room for a text.
    """
    check_length("max_seq_length", args.max_seq_length, config, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(task.texts) == 2)
    if args.max_seq_length <= special:
        raise ValueError(
            f"--max_seq_length {args.max_seq_length} leaves no room beside the tokenizer's {special} special tokens:"
            f" give at least {special + 1}."
        )
    label_ids = {task_id: config.label2id[name] for task_id, name in enumerate(task.labels)}

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            *(rows[name] for name in task.texts),
            truncation=True,
            max_length=args.max_seq_length,
            padding="max_length" if args.pad_to_max_length else False,
            return_attention_mask=True,
        )
        fill_empty_rows(encoded, tokenizer)
        if "label" in rows:
            encoded["label"] = [label_ids.get(label, label) for label in rows["label"]]
        return encoded

    return tokenize


def prepare_data(
    task: GlueTask,
    args: DataArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    cache_dir: str | None,
) -> GlueData:
    """Load the splits that the run needs, cut them to the sizes asked for, and tokenise them."""
    tokenize = make_tokenize(task, args, tokenizer, config)

    def prepare(splits: Mapping[str, Dataset], limit: int | None) -> dict[str, Dataset]:
        return {
            name: split.select(range(min(limit or len(split), len(split)))).map(
                tokenize, batched=True, remove_columns=split.column_names, desc=f"Tokenising {task.title} {name}"
            )
            for name, split in splits.items()
        }

    eval_splits, test_splits = list(task.eval_files), list(task.test_files)
    files: dict[str, str] = {}
    if args.files:  # a file stands for the first split of its kind
        eval_splits, test_splits = eval_splits[:1], test_splits[:1]
        for split, file in zip(
            ("train", *eval_splits, *test_splits), (args.train_file, args.validation_file, args.test_file), strict=True
        ):
            if file is not None:
                files[split] = file
    elif "ax" in test_splits and args.data_dir and not (Path(args.data_dir) / task.files["ax"]).is_file():
        test_splits.remove("ax")
        logger.info("No %s in %s: AX is not predicted.", task.files["ax"], args.data_dir)

    def load(splits: list[str]) -> dict[str, Dataset]:
        return load_glue(task, splits, data_dir=args.data_dir, files=files, cache_dir=cache_dir)

    with training_args.main_process_first(desc="reading and tokenising the data"):
        data = GlueData(
            train=prepare(load(["train"]), args.max_train_samples)["train"] if training_args.do_train else None,
            evaluation=prepare(load(eval_splits), args.max_eval_samples) if training_args.do_eval else {},
            test=prepare(load(test_splits), args.max_predict_samples) if training_args.do_predict else {},
        )
    if data.train is not None:
        check_enough_rows(training_args, len(data.train))
    return data


def fill_empty_rows(encoded: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the end of text into rows of no tokens: an empty text, where the tokenizer frames none."""
    for number, mask in enumerate(encoded["attention_mask"]):
        if not any(mask):
            for name, value in (("input_ids", end_of_text(tokenizer)), ("attention_mask", 1), ("token_type_ids", 0)):
                if name in encoded:
                    encoded[name][number][:1] = [value]


# ---- Runs ----


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end."""
    model_args, data_args, run_args, training_args = parse_arguments(argv)
    set_up_logging("run_glue", training_args)
    task = get_task(data_args.task_name)
    runs = plan_runs(run_args, training_args)
    tokenizer = load_tokenizer(model_args)
    config = load_glue_config(model_args, task, tokenizer)
    data = prepare_data(task, data_args, training_args, tokenizer, config, model_args.cache_dir)
    results = []
    for planned in runs:
        model = build_model(
            AutoModelForSequenceClassification,
            model_args,
            copy.deepcopy(config),
            planned.args.seed,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        )
        check_positions("max_seq_length", data_args.max_seq_length, model)
        if model_args.use_lora:
            model = add_lora(model, model_args)
        results.append(run(task, model, tokenizer, data, model_args, data_args, run_args, planned))
    return finish_runs(run_args, training_args, results)


def make_trainer(
    task: GlueTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: GlueData,
    run_args: GlueRunArguments,
    training_args: TrainingArguments,
) -> tuple[CardTrainer, Callable[[Any, str], np.ndarray]]:
    """The Trainer of a task, and the function from its predictions for a split to the task's answers, (rows,)."""
    names = model.config.id2label
    task_ids = np.array([task.labels.index(names[number]) for number in range(len(task.labels))], dtype=int)

    def decode(outputs: Any, split: str) -> np.ndarray:
        logits = logits_of(outputs)  # (rows, labels)
        check_finite(logits, f"{task.title}, {split}")
        return logits[:, 0] if task.is_regression else task_ids[logits.argmax(axis=-1)]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = labels_of(prediction.label_ids)
        references = labels.reshape(-1) if task.is_regression else task_ids[labels]
        return compute_glue_metrics(task, decode(prediction.predictions, "evaluation"), references)

    callbacks: list[TrainerCallback] = [TrainingClock(run_args.max_minutes), EpochSetter()]
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run_args.early_stopping_patience))
    trainer = CardTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=next(iter(data.evaluation.values()), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_loss_func=squared_error if task.is_regression else aligned_loss,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    return trainer, decode


def run(
    task: GlueTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: GlueData,
    model_args: GlueModelArguments,
    data_args: DataArguments,
    run_args: GlueRunArguments,
    planned: Run,
) -> dict[str, Any]:
    """Train, evaluate and predict with one seed; returns what the folder's `all_results.json` then holds."""
    training_args = planned.args
    trainer, decode = make_trainer(task, model, tokenizer, data, run_args, training_args)
    results: dict[str, Any] = {"task_name": task.name}

    if data.train is not None:
        results |= {
            "seed": training_args.seed,
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
        }
        outcome = trainer.train(resume_from_checkpoint=planned.checkpoint)
        results |= report(trainer, "train", {**outcome.metrics, "train_samples": len(data.train)})
        trainer.save_model()
        trainer.save_state()

    evaluated = []
    for position, (name, split) in enumerate(data.evaluation.items()):
        metrics = {**trainer.evaluate(split), "eval_samples": len(split)}
        evaluated.append(describe_split(task, data_args, name, metrics))
        if position:  # MNLI mismatched, named as in transformers' example
            metrics = {f"{key}_mm": value for key, value in metrics.items() if key.startswith("eval_")}
        results |= report(trainer, "eval_mm" if position else "eval", metrics)

    predictions = {
        name: decode(trainer.predict(split, metric_key_prefix="predict").predictions, name)
        for name, split in data.test.items()
    }
    if trainer.is_world_process_zero():
        for name, answers in predictions.items():
            path = write_submission(training_args.output_dir, task, name, answers)
            logger.info("Wrote %d predictions to %s.", len(answers), path)

    if data.train is not None:
        is_cut = len(data.train) == data_args.max_train_samples
        card = build_glue_card(
            task,
            model=trainer.accelerator.unwrap_model(trainer.model),
            training_args=training_args,
            max_seq_length=data_args.max_seq_length,
            base_model=model_args.model_name_or_path,
            train_source=describe_source(task, data_args, "train") + (", first rows only" if is_cut else ""),
            official_data=not data_args.files,
            evaluated=evaluated,
            results=results,
        )
        trainer.card = str(card)
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        results = update_results(Path(training_args.output_dir), results)
    if data.train is not None and training_args.push_to_hub:
        trainer.push_to_hub()
    return results


def describe_source(task: GlueTask, args: DataArguments, split: str) -> str:
    """Where the rows of a split came from, in words; never a path of this machine."""
    if not args.files:
        return (
            f"split {split} of {HUB_DATASET} ({task.name})"
            if args.data_dir is None
            else f"official {task.files[split]}"
        )
    file = args.train_file if split == "train" else args.validation_file
    return f"file {Path(file or '').name}"


def describe_split(task: GlueTask, args: DataArguments, split: str, metrics: Mapping[str, float]) -> EvaluatedSplit:
    """What the model card says about one evaluation."""
    return EvaluatedSplit(
        split=split,
        source=describe_source(task, args, split),
        rows=int(metrics["eval_samples"]),
        is_cut=args.max_eval_samples is not None and metrics["eval_samples"] == args.max_eval_samples,
        metrics={name: metrics[f"eval_{name}"] for name in task.metrics},
    )


if __name__ == "__main__":
    main()
