#!/usr/bin/env python
"""Fine-tune or train a sequence classifier on a GLUE task, evaluate it, and predict the test set.

    python scripts/run_glue.py --task_name sst2 --model_name_or_path MODEL --do_train --do_eval --output_dir out
    python scripts/run_glue.py --task_name sst2 --data_dir SST-2 --config_name model_cards/transnormer-t2-base \\
        --tokenizer_name TOKENIZER --do_train --do_eval --do_predict --output_dir out --seeds 1,2,3

Any model that `AutoModelForSequenceClassification` knows can be trained, so a baseline of the same size is the same
call. A run leaves in `output_dir`: the model, `all_results.json`, GLUE submission files and a model card.
"""

import copy
import json
import logging
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import transnormer_hf  # noqa: F401  registers TransNormer with the Auto classes
from transnormer_hf.glue import (
    FILE_FORMATS,
    HUB_DATASET,
    GlueTask,
    compute_glue_metrics,
    get_task,
    load_glue,
    write_atomically,
    write_submission,
)
from transnormer_hf.model_card import EvaluatedSplit, build_glue_card

logger = logging.getLogger("run_glue")


# ---- Arguments ----


@dataclass
class ModelArguments:
    """Which model to train, and how much of it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune: a folder or a name on the Hub."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration to train from scratch: a folder, a json file or a Hub name."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to --config_name, e.g. hidden_size=128,num_hidden_layers=4 (values as in json)."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not that of --model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub; default: that of `hf auth`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub. Read it first, and pin --model_revision."}
    )
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
class RunArguments:
    """What happens around the Trainer."""

    seeds: str | None = field(
        default=None, metadata={"help": "e.g. 1,2,3: one run each in output_dir/seed_N, and the mean and deviation."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better --metric_for_best_model."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew in a folder that holds a run; its checkpoints are removed."}
    )


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RunArguments, TrainingArguments]:
    """Parse a command line, or the one json file it names, and check what can be checked without loading anything.

    Raises:
        ValueError: an argument is wrong or missing; the message names it and what would work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser([ModelArguments, DataArguments, RunArguments, TrainingArguments])
    if len(argv) == 1 and argv[0].endswith(".json"):
        values = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        model_args, data_args, run_args, training_args = parser.parse_dict({"metric_for_best_model": "best", **values})
    else:
        parser.set_defaults(metric_for_best_model="best")
        model_args, data_args, run_args, training_args = parser.parse_args_into_dataclasses(argv)
    task = get_task(data_args.task_name)
    if training_args.metric_for_best_model == "best":
        training_args.metric_for_best_model = task.best_metric if task.metrics else None
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    check_model_arguments(model_args)
    check_data_arguments(task, data_args, training_args)
    check_run_arguments(task, run_args, training_args)
    return model_args, data_args, run_args, training_args


def check_model_arguments(args: ModelArguments) -> None:
    """Raise ValueError unless the arguments name one model, from a checkpoint or from a configuration."""
    if (args.model_name_or_path is None) == (args.config_name is None):
        raise ValueError(
            f"Got --model_name_or_path {args.model_name_or_path} and --config_name {args.config_name}: give one,"
            " a checkpoint to fine-tune or a configuration to train from scratch."
        )
    if args.config_name is not None and args.tokenizer_name is None:
        raise ValueError(
            f"--config_name {args.config_name} has no tokenizer: give --tokenizer_name, a folder or a name on the Hub."
        )
    if args.config_overrides is not None and args.config_name is None:
        raise ValueError("--config_overrides changes --config_name; a checkpoint's configuration cannot be changed.")
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
        if Path(file).suffix.lower() not in FILE_FORMATS:
            raise ValueError(f"--{name} {file}: unknown extension, expected one of {', '.join(FILE_FORMATS)}.")
        if not Path(file).is_file():
            raise FileNotFoundError(f"--{name} {file}: no such file.")
    for step, name in steps.items():
        if args.files and getattr(training_args, step) and name not in args.files:
            raise ValueError(f"--{step} needs --{name}, as --{next(iter(args.files))} is given.")
    for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")


def check_run_arguments(task: GlueTask, args: RunArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError unless the seeds, the early stopping and the folder to resume from make sense together."""
    metric = training_args.metric_for_best_model
    known = {*task.metrics, task.best_metric, "loss"} if task.metrics else {None}
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"--metric_for_best_model {metric} is not a figure of {task.name}: choose one of"
            f" {', '.join(sorted(map(str, known)))}."
        )
    if args.seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
            raise ValueError(f"--seeds {args.seeds!r} must be whole numbers with commas between them, e.g. 1,2,3.")
        if len(set(args.seeds.split(","))) < len(args.seeds.split(",")):
            raise ValueError(f"--seeds {args.seeds} names a seed twice.")
        if training_args.resume_from_checkpoint:
            raise ValueError("--resume_from_checkpoint belongs to one run: give --seed N in the place of --seeds.")
        if training_args.push_to_hub:
            raise ValueError("--push_to_hub pushes one model: give --seed N in the place of --seeds.")
    if args.early_stopping_patience is not None:
        if args.early_stopping_patience < 1:
            raise ValueError(f"--early_stopping_patience {args.early_stopping_patience} must be at least 1.")
        if not training_args.load_best_model_at_end:
            raise ValueError(
                "--early_stopping_patience needs --load_best_model_at_end, and --eval_strategy and --save_strategy set"
                " to the same of epoch and steps."
            )
    resume = training_args.resume_from_checkpoint
    if resume and not (Path(resume) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {resume} is not a checkpoint folder: it has no trainer_state.json.")


# ---- Model ----


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, with a padding token.

    Raises:
        ValueError: there is none where the arguments say.
    """
    name = args.tokenizer_name or args.model_name_or_path
    argument = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub_options(args))
    except Exception as error:  # a missing file, an unknown class and a Hub out of reach raise different errors
        raise ValueError(
            f"{argument} {name}: no tokenizer could be loaded ({error}). Give --tokenizer_name, a folder with tokenizer"
            " files or a name on the Hub."
        ) from error
    if tokenizer.pad_token is None:
        logger.warning("The tokenizer %s has no padding token: padding with %r.", name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(args: ModelArguments, task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the run, with the task's labels; from scratch also with the tokenizer's size and token ids.

    A checkpoint that was trained on the same labels in another order keeps its order.

    Raises:
        ValueError: there is no such configuration, an override is wrong, or the tokenizer does not fit the checkpoint.
    """
    name = args.model_name_or_path or args.config_name
    argument = "--model_name_or_path" if args.model_name_or_path else "--config_name"
    try:
        config = AutoConfig.from_pretrained(name, **_hub_options(args))
    except Exception as error:  # as for the tokenizer
        raise ValueError(
            f"{argument} {name}: no configuration could be loaded ({error}). Give a folder with config.json"
            f"{', a json file' if argument == '--config_name' else ''} or a name on the Hub."
        ) from error
    if args.config_name is not None:
        raw, _ = PreTrainedConfig.get_config_dict(name, **_hub_options(args))
        overrides = parse_config_overrides(args.config_overrides or "", config)
        token_ids = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
            "eos_token_id": _first(tokenizer.eos_token_id, tokenizer.sep_token_id),
        }
        try:
            config = type(config)(**{**without_derived_fields(raw, type(config)), **token_ids, **overrides})
        except Exception as error:  # each configuration class validates in its own way
            raise ValueError(
                f"--config_name {name} with --config_overrides {args.config_overrides}: {error}"
            ) from error
    elif len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {name} only {config.vocab_size}:"
            " give the --tokenizer_name that the model was trained with."
        )
    names = [str(config.id2label[number]).lower() for number in sorted(config.id2label)]
    if sorted(names) != sorted(task.labels):
        names = list(task.labels) or ["score"]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    return config


def parse_config_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Parse `name=value,name=value`; a value is read as json where it is json, else taken as text.

    Raises:
        ValueError: an item without "=", or a name that the configuration does not have.
    """
    overrides = {}
    for item in filter(None, re.split(r",(?=\s*\w+\s*=|$)", text)):
        name, separator, value = (part.strip() for part in item.partition("="))
        if not separator or not value:
            raise ValueError(f"--config_overrides {item!r} must have the form name=value.")
        if not hasattr(config, name) or callable(getattr(config, name)):
            fields = ", ".join(sorted(config.to_dict()))
            raise ValueError(
                f"--config_overrides {item!r}: {type(config).__name__} has no field {name!r}, only {fields}."
            )
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return overrides


def without_derived_fields(raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The entries of a config.json that the class would not fill in by itself.

    What it derives, such as the kind of each layer from their number, then follows the overrides.
    """
    whole = config_class(**raw).to_dict()
    needed = dict(raw)
    for name in raw:
        rest = {key: value for key, value in needed.items() if key != name}
        try:
            if config_class(**rest).to_dict() == whole:
                needed = rest
        except Exception:  # not valid without this entry
            continue
    return needed


def build_model(args: ModelArguments, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The classifier to train: a checkpoint or a new model, with LoRA adapters where asked for."""
    set_seed(seed)  # the head of a checkpoint and all of a new model are random
    if args.model_name_or_path is None:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, trust_remote_code=args.trust_remote_code
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path,
            config=config,
            dtype=torch.float32,  # a half-precision checkpoint, too: mixed precision is the Trainer's (--bf16, --fp16)
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            **_hub_options(args),
        )
    return add_lora(model, args) if args.use_lora else model


def add_lora(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
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


def _hub_options(args: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


# ---- Data ----


@dataclass
class GlueData:
    """Tokenised splits by name, and where the rows came from."""

    train: Dataset | None
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]


def prepare_data(
    task: GlueTask,
    args: DataArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    cache_dir: str | None,
) -> GlueData:
    """Load the splits that the run needs, cut them to the sizes asked for, and tokenise them."""
    max_length = sequence_length(args, tokenizer, config)
    label_ids = {task_id: config.label2id[name] for task_id, name in enumerate(task.labels)}

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            *(rows[name] for name in task.texts),
            truncation=True,
            max_length=max_length,
            padding="max_length" if args.pad_to_max_length else False,
        )
        if "label" in rows:
            encoded["label"] = [label_ids.get(label, label) for label in rows["label"]]
        return encoded

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
        return GlueData(
            train=prepare(load(["train"]), args.max_train_samples)["train"] if training_args.do_train else None,
            evaluation=prepare(load(eval_splits), args.max_eval_samples) if training_args.do_eval else {},
            test=prepare(load(test_splits), args.max_predict_samples) if training_args.do_predict else {},
        )


def sequence_length(args: DataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """The length that inputs are cut to.

    Raises:
        ValueError: `--max_seq_length` is more than the model has positions for.
    """
    has_table = getattr(config, "position_embedding", "learned") == "learned"
    limit = min(getattr(config, "max_position_embeddings", None) or args.max_seq_length, tokenizer.model_max_length)
    if has_table and args.max_seq_length > limit:
        raise ValueError(
            f"--max_seq_length {args.max_seq_length} is more than the {limit} tokens that the model takes."
        )
    return args.max_seq_length


# ---- Runs ----


class GlueTrainer(Trainer):
    """A Trainer whose model card is this project's, so that `push_to_hub` uploads it and not a draft."""

    card: str | None = None

    def create_model_card(self, **_: Any) -> None:
        """Write the card of the run to `output_dir/README.md`, once it is known."""
        if self.card is not None and self.is_world_process_zero():
            write_atomically(Path(self.args.output_dir) / "README.md", self.card)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end."""
    model_args, data_args, run_args, training_args = parse_arguments(argv)
    set_up_logging(training_args)
    task = get_task(data_args.task_name)
    root = Path(training_args.output_dir)
    seeds = [int(seed) for seed in run_args.seeds.split(",")] if run_args.seeds else []
    runs = {root / f"seed_{seed}": seed for seed in seeds} or {root: training_args.seed}
    checkpoints = {folder: find_checkpoint(folder, run_args, training_args) for folder in runs}

    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args, task, tokenizer)
    data = prepare_data(task, data_args, training_args, tokenizer, config, model_args.cache_dir)
    results = []
    for folder, seed in runs.items():
        args = copy.copy(training_args)
        args.output_dir, args.seed = str(folder), seed
        model = build_model(model_args, copy.deepcopy(config), seed)
        results.append(run(task, model, tokenizer, data, model_args, data_args, run_args, args, checkpoints[folder]))
    if not seeds:
        return results[0]
    summary = summarize_seeds(seeds, results)
    if training_args.should_save:
        summary = update_results(root, summary)
        for name in (name for name in summary if name.endswith("_std")):
            mean = name.removesuffix("_std")
            logger.info("%s over seeds %s: %.4f ± %.4f", mean, run_args.seeds, summary[mean], summary[name])
    return summary


def set_up_logging(training_args: TrainingArguments) -> None:
    """Log the main process at the level of `--log_level`, the others at that of `--log_level_replica`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training_args.get_process_log_level()
    # "passive", the default, would hide this script's own few lines.
    own_level = logging.INFO if training_args.log_level == "passive" and training_args.should_log else level
    for name in ("run_glue", "transnormer_hf"):
        logging.getLogger(name).setLevel(own_level)
    datasets.utils.logging.set_verbosity(level)
    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()


def find_checkpoint(folder: Path, run_args: RunArguments, training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one given, else the last whole one in the folder, else none.

    Raises:
        ValueError: training would overwrite a folder that holds something else.
    """
    if training_args.resume_from_checkpoint or not training_args.do_train:
        return training_args.resume_from_checkpoint
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    # A run that was killed while saving leaves a folder without the file that is written last.
    whole = [path for path in found if (path / "trainer_state.json").is_file()]
    if run_args.overwrite_output_dir:
        if found and training_args.should_save:
            logger.warning("--overwrite_output_dir: removing %s.", ", ".join(map(str, found)))
            for path in found:
                shutil.rmtree(path)
        return None
    if whole:
        logger.info("Going on from %s; train anew with --overwrite_output_dir.", whole[-1])
        return str(whole[-1])
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} holds files but no checkpoint to go on from: give another folder or"
            " --overwrite_output_dir."
        )
    return None


def run(
    task: GlueTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: GlueData,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    training_args: TrainingArguments,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Train, evaluate and predict with one seed; returns what the folder's `all_results.json` then holds."""
    names = model.config.id2label
    task_ids = np.array([task.labels.index(names[number]) for number in range(len(task.labels))], dtype=int)

    def decode(outputs: Any) -> np.ndarray:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs  # (rows, labels)
        return logits[:, 0] if task.is_regression else task_ids[logits.argmax(axis=-1)]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        references = labels.reshape(-1) if task.is_regression else task_ids[labels]
        return compute_glue_metrics(task, decode(prediction.predictions), references)

    patience = run_args.early_stopping_patience
    trainer = GlueTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=next(iter(data.evaluation.values()), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(patience)] if patience is not None else None,
    )
    results: dict[str, Any] = {"task_name": task.name}

    if data.train is not None:
        results |= {
            "seed": training_args.seed,
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
        }
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        results |= report(trainer, "train", {**outcome.metrics, "train_samples": len(data.train)})
        trainer.save_model()
        trainer.save_state()

    evaluated = []
    if training_args.do_eval:
        for position, (name, split) in enumerate(data.evaluation.items()):
            metrics = {**trainer.evaluate(split), "eval_samples": len(split)}
            evaluated.append(describe_split(task, data_args, name, metrics))
            if position:  # MNLI mismatched, named as in transformers' example
                metrics = {f"{key}_mm": value for key, value in metrics.items() if key.startswith("eval_")}
            results |= report(trainer, "eval_mm" if position else "eval", metrics)

    for name, split in data.test.items():
        predictions = decode(trainer.predict(split, metric_key_prefix="predict").predictions)
        if trainer.is_world_process_zero():
            path = write_submission(training_args.output_dir, task, name, predictions)
            logger.info("Wrote %d predictions to %s.", len(predictions), path)

    if data.train is not None:
        trainer.card = str(
            build_glue_card(
                task,
                model=trainer.accelerator.unwrap_model(trainer.model),
                training_args=training_args,
                max_seq_length=data_args.max_seq_length,
                base_model=model_args.model_name_or_path,
                train_source=describe_source(task, data_args, "train")
                + (", first rows only" if len(data.train) == data_args.max_train_samples else ""),
                official_data=not data_args.files,
                evaluated=evaluated,
                results=results,
            )
        )
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        results = update_results(Path(training_args.output_dir), results)
    if data.train is not None and training_args.push_to_hub:
        trainer.push_to_hub()
    return results


def report(trainer: Trainer, step: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Print the figures of a step and keep them in `<step>_results.json`."""
    trainer.log_metrics(step, metrics)
    trainer.save_metrics(step, metrics, combined=False)
    return metrics


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


def summarize_seeds(seeds: Sequence[int], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and single values of every evaluation figure over the seeds."""
    summary: dict[str, Any] = {"task_name": results[0]["task_name"], "seeds": list(seeds)}
    for name in results[0]:
        if not name.startswith("eval_") or "samples" in name or "runtime" in name or "per_second" in name:
            continue
        values = [float(result[name]) for result in results]
        summary[name] = statistics.mean(values)
        summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[f"{name}_values"] = values
    return summary


def update_results(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Add results to the folder's `all_results.json`, keeping what is there, and return the whole."""
    path = folder / "all_results.json"
    known: dict[str, Any] = {}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            kept = path.replace(path.with_suffix(".json.unreadable"))
            logger.warning("%s is not json: kept as %s.", path, kept)
    merged = {**known, **results}
    write_atomically(path, json.dumps(merged, indent=2, sort_keys=True) + "\n")
    return merged


if __name__ == "__main__":
    main()
