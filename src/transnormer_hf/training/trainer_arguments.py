"""Which of the Trainer's arguments our scripts take: what cannot be honoured is refused by name before anything loads.

Arguments that are not named here are the Trainer's own affair, and do what transformers says.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

# Argument -> the values that work, and why no other does.
UNSUPPORTED: dict[str, tuple[Sequence[Any], str]] = {
    "prediction_loss_only": ((False,), "the figures are computed from the predictions"),
    "batch_eval_metrics": ((False,), "the figures are those of a whole split, which those of its batches do not give"),
    "include_for_metrics": (([], None), "the figures are computed from predictions and labels alone"),
    "label_names": ((None, ["labels"]), "the labels of every row are called labels"),
}
# Argument -> its least value; None is left alone.
LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "neftune_noise_alpha": 0,
    "seed": 0,
    "data_seed": 0,
}
LARGEST_SEED = 2**32 - 1  # numpy's


def check_trainer_arguments(args: TrainingArguments) -> None:
    """Raise ValueError where an argument has no effect here, or a value that would fail or do nothing later."""
    for name, (allowed, reason) in UNSUPPORTED.items():
        refuse_unless(args, name, allowed, reason)
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}.")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be more than 0; to have none, give the strategy no.")
    for name in ("seed", "data_seed"):
        if (getattr(args, name) or 0) > LARGEST_SEED:
            raise ValueError(f"--{name} {getattr(args, name)} must be at most {LARGEST_SEED}.")
    if not 0 <= args.label_smoothing_factor < 1:
        raise ValueError(f"--label_smoothing_factor {args.label_smoothing_factor} must be at least 0 and less than 1.")
    if args.dataloader_persistent_workers and args.dataloader_num_workers < 1:
        raise ValueError("--dataloader_persistent_workers needs --dataloader_num_workers, got 0.")
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(
            f"--max_steps {args.max_steps} must be at least 1; leave it out to train for --num_train_epochs."
        )
    if args.do_train and args.max_steps < 1 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(
            f"--num_train_epochs {args.num_train_epochs} must be more than 0; to evaluate without training, leave"
            " --do_train out and name the model with --model_name_or_path."
        )


def refuse_unless(args: TrainingArguments, name: str, allowed: Sequence[Any], reason: str) -> None:
    """Raise ValueError unless an argument has one of the values; transformers may not have it in every version."""
    value = getattr(args, name, allowed[0])
    if value not in allowed:
        usable = " or ".join(str(choice) for choice in allowed if choice not in (None, []))
        way_out = f"leave it out{f' or give {usable}' if usable else ''}"
        raise ValueError(f"--{name} {value} is not supported, as {reason}: {way_out}.")


def check_metric_for_best_model(args: TrainingArguments, known: Sequence[str], task: str) -> None:
    """Raise ValueError unless the figure that chooses the best checkpoint is one of those that are evaluated."""
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"--metric_for_best_model {metric} is not a figure of {task}: choose one of {', '.join(sorted(known))}."
        )


def check_enough_rows(args: TrainingArguments, rows: int) -> None:
    """Raise ValueError where `dataloader_drop_last` would leave no batch to train on."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing of {rows} training rows in batches of {batch}: leave it out, or"
            f" lower --per_device_train_batch_size {args.per_device_train_batch_size}."
        )
