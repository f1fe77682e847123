#!/usr/bin/env python
"""Train and evaluate on a task of the Long-Range Arena, with the hyperparameters published for TransNormer.

    python scripts/run_lra.py --task_name listops --variant t2 --do_train --do_eval --do_predict --output_dir out
    python scripts/run_lra.py --task_name text --variant t1 --train_file train.jsonl --validation_file dev.jsonl \\
        --do_train --do_eval --output_dir out
    python scripts/run_lra.py --task_name listops --model_type bert --config_overrides \\
        hidden_size=128,num_hidden_layers=4,num_attention_heads=8,intermediate_size=512,max_position_embeddings=2048 \\
        --do_train --do_eval --output_dir out

`--variant` makes the authors' model of the task; any other sequence classifier is the same call with its configuration.
ListOps and Pathfinder are generated unless files are given, Text and Image come from the Hub unless files are given,
and Retrieval needs files. Arguments given override the published ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedConfig,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import tqdm

import transnormer_hf.research.baselines  # noqa: F401  registers TransNormer and the baselines
from transnormer_hf.hub.model_card import EvaluatedSplit, build_training_card
from transnormer_hf.tasks.listops import ListOpsLimits
from transnormer_hf.tasks.lra import (
    SCHEDULE_STEPS,
    TASKS,
    DualEncoder,
    LraRows,
    LraTask,
    collate,
    encode_row,
    generate_rows,
    get_task,
    read_rows,
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
    change_factors,
    check_length,
    check_model_arguments,
    check_positions,
    check_run_arguments,
    finish_runs,
    given_arguments,
    load_config,
    parse_config_overrides,
    parse_dataclasses,
    plan_runs,
    report,
    set_up_logging,
    update_results,
)
from transnormer_hf.training.losses import aligned_loss
from transnormer_hf.training.predictions import check_finite, labels_of, logits_of
from transnormer_hf.training.text_files import check_file
from transnormer_hf.training.trainer_arguments import (
    check_enough_rows,
    check_metric_for_best_model,
    refuse_unless,
)

STEPS = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
FILES = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


@dataclass
class LraModelArguments(ModelArguments):
    """Which model to train."""

    variant: str | None = field(default=None, metadata={"help": "t1 or t2: the authors' model of the task."})


@dataclass
class DataArguments:
    """Which task, from where, and how much of it."""

    task_name: str | None = field(default=None, metadata={"help": ", ".join(TASKS)})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: tsv, json lines, csv or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Rows for --do_eval, the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Rows for --do_predict, the same formats."})
    max_length: int = field(default=0, metadata={"help": "Longer sequences are cut to this many tokens."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Rows for training: how many to generate, or how many of a file to use."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for --do_eval and --do_predict."})
    data_seed_generated: int = field(default=0, metadata={"help": "Seed of generated data."})
    listops_min_length: int = field(default=500, metadata={"help": "Tokens of the shortest generated sequence."})
    listops_max_length: int = field(default=2000, metadata={"help": "Tokens of the longest generated sequence."})
    listops_max_depth: int = field(default=10, metadata={"help": "Lists inside each other."})
    listops_max_args: int = field(default=10, metadata={"help": "Arguments of an operator."})
    image_size: int = field(default=32, metadata={"help": "Rows and columns of a generated Pathfinder image."})
    schedule_steps: int = field(
        default=SCHEDULE_STEPS, metadata={"help": "Updates after which the cosine of the learning rate is at its end."}
    )

    @property
    def files(self) -> dict[str, str]:
        """Split -> file, for those given."""
        return {split: getattr(self, name) for split, name in FILES.items() if getattr(self, name) is not None}


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[LraModelArguments, DataArguments, RunArguments, TrainingArguments]:
    """Parse a command line, or the one json file it names, under the published defaults of its task, and check it.

    Raises:
        ValueError, FileNotFoundError: an argument is wrong or missing; the message names it and what would work.
    """
    defaults: dict[str, Any] = {**TRAINER_DEFAULTS, "remove_unused_columns": False}
    types = (LraModelArguments, DataArguments, RunArguments, TrainingArguments)
    if (name := given_arguments(types, argv, defaults).get("task_name")) is not None:
        defaults |= get_task(name).training_defaults()
    model_args, data_args, run_args, training_args = parse_dataclasses(types, argv, defaults)
    task = get_task(data_args.task_name)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    if model_args.variant is None:
        check_model_arguments(model_args, needs_tokenizer=False)
    elif model_args.variant not in ("t1", "t2"):
        raise ValueError(f"--variant {model_args.variant} is not known: choose t1 or t2.")
    elif model_args.model_name_or_path or model_args.config_name or model_args.model_type:
        raise ValueError(f"--variant makes a model of its own: leave --{model_args.source[0]} out.")
    if task.pairs and model_args.model_name_or_path:
        raise ValueError(
            f"--model_name_or_path: {task.title} trains two passes of a new encoder; give a configuration."
        )
    check_data_arguments(task, data_args, training_args)
    check_run_arguments(run_args, training_args)
    refuse_unless(training_args, "remove_unused_columns", (False,), "a row's sequences are no column of the model")
    strategies = ("random", "sequential")
    refuse_unless(training_args, "train_sampling_strategy", strategies, "the rows tell no length to the sampler")
    check_metric_for_best_model(training_args, ("loss", "accuracy"), task.name)
    return model_args, data_args, run_args, training_args


def check_data_arguments(task: LraTask, args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError or FileNotFoundError unless the arguments name the data of every step asked for."""
    if not any(getattr(training_args, step) for step in STEPS):
        raise ValueError("Nothing to do: give at least one of --do_train, --do_eval and --do_predict.")
    for split, file in args.files.items():
        check_file(file, argument=FILES[split])
    needs_files = args.files or not (task.full_sizes or task.hub)
    for step, split in STEPS.items():
        if needs_files and getattr(training_args, step) and split not in args.files:
            reason = (
                f"as --{FILES[next(iter(args.files))]} is given"
                if args.files
                else f"as {task.title} has no other source"
            )
            raise ValueError(f"--{step} needs --{FILES[split]}, {reason}.")
    for name in ("max_length", "max_train_samples", "max_eval_samples", "schedule_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")


# ---- Model ----


def make_config(task: LraTask, args: LraModelArguments, max_length: int) -> PreTrainedConfig:
    """The authors' configuration, or another one for the task's tokens and classes."""
    if args.variant is not None:
        config: PreTrainedConfig = task.config(args.variant)
        overrides = parse_config_overrides(args.config_overrides or "", config)
        config = task.config(args.variant, **{"max_position_embeddings": max_length, **overrides})
    else:
        config = load_config(args, task.config_fields())
    check_length("max_length", max_length, config)
    return config


def make_model(task: LraTask, args: LraModelArguments, config: PreTrainedConfig, seed: int) -> Any:
    """A classifier, or for pairs a dual encoder."""
    if task.pairs:
        set_seed(seed)
        return DualEncoder(config, getattr(config, "pooling", "first"))
    if args.variant is not None:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return build_model(AutoModelForSequenceClassification, args, config, seed)


# ---- Data ----


def load_rows(
    task: LraTask, args: DataArguments, split: str, has_cls: bool, cache_dir: str | None, quiet: bool
) -> tuple[LraRows, str]:
    """The rows of a split, and where they came from in words."""
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    rows: Iterator[Any]
    if split in args.files:
        rows, source = read_rows(task, args.files[split]), f"file {Path(args.files[split]).name}"
    elif task.full_sizes:
        limit = limit or task.full_sizes[split]
        lengths = args.listops_min_length, args.listops_max_length
        limits = ListOpsLimits(args.listops_max_depth, args.listops_max_args, *lengths)
        rows = generate_rows(task, split, limit, args.data_seed_generated, limits, args.image_size)
        detail = (
            f"{lengths[0]} to {lengths[1]} tokens"
            if task.name == "listops"
            else f"{args.image_size} x {args.image_size}"
        )
        source = f"generated {task.title} ({detail}, seed {args.data_seed_generated}), {split}"
    else:
        rows, source = read_hub(task, split, cache_dir)
    bar = tqdm(islice(rows, limit), desc=f"{task.title} {split}", disable=quiet, total=limit)
    loaded = LraRows(bar, args.max_length, has_cls)
    if not len(loaded):
        raise ValueError(f"{source} holds no rows.")
    is_cut = split in args.files and len(loaded) == limit
    return loaded, source + (", first rows only" if is_cut else "")


def read_hub(task: LraTask, split: str, cache_dir: str | None) -> tuple[Iterator[Any], str]:
    """The rows of a data set on the Hub. Text and Image have no validation split: the Arena evaluates on the test one.

    Raises:
        ConnectionError: the Hub is out of reach.
    """
    from datasets import load_dataset

    name, splits, columns = task.hub or ("", {}, {})
    try:
        dataset = load_dataset(name, split=splits[split], cache_dir=cache_dir)
    except Exception as error:  # connection, proxy, offline mode and cache errors share no base class
        raise ConnectionError(
            f"Could not load {name} from the Hub: {error}. Files on this machine are given with --train_file,"
            " --validation_file and --test_file."
        ) from error
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old in dataset.column_names})
    source = f"split {splits[split]} of {name}"
    return (encode_row(task, row, f"{source}, row {number}") for number, row in enumerate(dataset, 1)), source


# ---- Runs ----


class LraTrainer(CardTrainer):
    """A Trainer whose cosine is at its end after `schedule_steps` updates, however long training goes on."""

    schedule_steps: int = SCHEDULE_STEPS

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The scheduler that the arguments name, over `schedule_steps`."""
        scheduler = super().create_scheduler(self.schedule_steps, optimizer)
        last = self.schedule_steps
        self.lr_scheduler = change_factors(scheduler, lambda factor: lambda step: factor(min(step, last)))
        return self.lr_scheduler


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end."""
    model_args, data_args, run_args, training_args = parse_arguments(argv)
    set_up_logging("run_lra", training_args)
    task = get_task(data_args.task_name)
    runs = plan_runs(run_args, training_args)
    config = make_config(task, model_args, data_args.max_length)
    has_cls = getattr(config, "pooling", "first") == "first"
    splits = {
        split: load_rows(task, data_args, split, has_cls, model_args.cache_dir, training_args.disable_tqdm)
        for step, split in STEPS.items()
        if getattr(training_args, step)
    }
    if "train" in splits:
        check_enough_rows(training_args, len(splits["train"][0]))
    results = [run(task, splits, config, model_args, data_args, run_args, planned) for planned in runs]
    return finish_runs(run_args, training_args, results)


def run(
    task: LraTask,
    splits: dict[str, tuple[LraRows, str]],
    config: PreTrainedConfig,
    model_args: LraModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    planned: Run,
) -> dict[str, Any]:
    """Train and evaluate with one seed; returns what the folder's `all_results.json` then holds."""
    args = planned.args
    model = make_model(task, model_args, config, args.seed)
    check_positions("max_length", data_args.max_length, model)
    trainer = LraTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"][0] if "train" in splits else None,
        eval_dataset=splits["validation"][0] if "validation" in splits else None,
        data_collator=collate,
        compute_loss_func=aligned_loss,
        compute_metrics=compute_accuracy,
        callbacks=[TrainingClock(run_args.max_minutes), EpochSetter()],
    )
    trainer.schedule_steps = data_args.schedule_steps
    results: dict[str, Any] = {
        "task_name": task.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if "train" in splits:
        metrics = trainer.train(resume_from_checkpoint=planned.checkpoint).metrics
        metrics |= {"train_minutes": trainer.state.log_history[-1]["train_minutes"]}
        metrics |= {"train_steps": trainer.state.global_step, "train_samples": len(splits["train"][0])}
        results |= {"seed": args.seed, **report(trainer, "train", metrics)}
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            config.save_pretrained(args.output_dir)  # a dual encoder is no PreTrainedModel

    evaluated = []
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in splits:
            rows, source = splits[split]
            metrics = trainer.evaluate(rows, metric_key_prefix=prefix)
            results |= report(trainer, prefix, {**metrics, f"{prefix}_samples": len(rows)})
            figures = {"accuracy": results[f"{prefix}_accuracy"]}
            evaluated.append(EvaluatedSplit(split, source, len(rows), is_cut=False, metrics=figures))
    if "train" in splits and not task.pairs:
        trainer.card = str(
            build_training_card(
                model=trainer.accelerator.unwrap_model(trainer.model),
                training_args=args,
                task=f"{task.title} of the Long-Range Arena",
                pipeline_tag="text-classification",
                dataset=None,
                base_model=model_args.model_name_or_path,
                train_source=splits["train"][1],
                max_seq_length=data_args.max_length,
                metric_titles={"accuracy": "Accuracy"},
                evaluated=evaluated,
                notes=["The inputs are ids of bytes, pixels or list tokens as in `lra.py`; there is no tokenizer."],
                sample="",
                results=results,
            )
        )
        trainer.create_model_card()
    return update_results(Path(args.output_dir), results) if trainer.is_world_process_zero() else results


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of rows whose likeliest class is the right one.

    Raises:
        ValueError: the model has diverged; names the rows.
    """
    logits = logits_of(prediction.predictions)  # (rows, classes)
    check_finite(logits, "Long-Range Arena, evaluation")
    return {"accuracy": float((logits.argmax(-1) == labels_of(prediction.label_ids)).mean())}


if __name__ == "__main__":
    main()
