"""What surrounds the Trainer in every training script: which model, which runs, what is left on disk.

The scripts under `scripts/` share their model arguments, seeds, checkpoints to go on from, time limit, logging and
result files through this module.
"""

import copy
import inspect
import json
import logging
import re
import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..model.modeling_transnormer import TransNormerLRPE
from .checkpoints import is_whole_checkpoint, last_whole_checkpoint
from .files import write_atomically
from .losses import next_token_loss
from .trainer_arguments import LARGEST_SEED, check_trainer_arguments

logger = logging.getLogger(__name__)


# ---- Arguments ----


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on with: a folder or a name on the Hub."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration to train from scratch: a folder, a json file or a Hub name."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Type to train from scratch with its default configuration: bert, gpt2, llama, ..."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Changes to --config_name or --model_type, e.g. hidden_size=128,num_hidden_layers=4 (as in json)."
        },
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

    @property
    def source(self) -> tuple[str, str]:
        """The argument that names the model, and its value."""
        given = [(name, value) for name in MODEL_SOURCES if (value := getattr(self, name)) is not None]
        return given[0]

    @property
    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


MODEL_SOURCES = ("model_name_or_path", "config_name", "model_type")


@dataclass
class RunArguments:
    """What happens around the Trainer."""

    seeds: str | None = field(
        default=None, metadata={"help": "e.g. 1,2,3: one run each in output_dir/seed_N, and the mean and deviation."}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop training after this much time; evaluation and saving do not count."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew in a folder that holds a run; its checkpoints are removed."}
    )


# A loss of NaN is logged as NaN; transformers would write the mean of those before it.
TRAINER_DEFAULTS = {"logging_nan_inf_filter": False}


def parse_dataclasses(
    types: Sequence[type], argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Parse a command line, or the one json file it names, into one object of each type; `defaults` replace theirs."""
    given = given_arguments(types, argv, defaults)
    return HfArgumentParser(list(types)).parse_dict({**(defaults or {}), **given})


def given_arguments(
    types: Sequence[type], argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a command line, or the one json file it names, gives, by name; `defaults` are those that --help shows."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    parser = HfArgumentParser(list(types))
    parser.set_defaults(**(defaults or {}))
    # argparse leaves what the namespace has already, so that what stays None was not given
    unset = Namespace(**{each.name: None for dataclass_type in types for each in fields(dataclass_type)})
    return {name: value for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}


def check_model_arguments(args: ModelArguments, *, needs_tokenizer: bool = True) -> None:
    """Raise ValueError unless the arguments name one model, from a checkpoint or from a configuration."""
    if sum(getattr(args, name) is not None for name in MODEL_SOURCES) != 1:
        got = ", ".join(f"--{name} {getattr(args, name)}" for name in MODEL_SOURCES)
        raise ValueError(
            f"Got {got}: give one, a checkpoint to go on with, or a configuration or a type to train from scratch."
        )
    name, value = args.source
    if args.model_type is not None and args.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"--model_type {value} is not known: give one such as bert, gpt2, llama or transnormer_hf (with the"
            " spelling of config.json), or a configuration with --config_name."
        )
    if args.model_name_or_path is None and needs_tokenizer and args.tokenizer_name is None:
        raise ValueError(f"--{name} {value} has no tokenizer: give --tokenizer_name, a folder or a name on the Hub.")
    if args.config_overrides is not None and args.model_name_or_path is not None:
        raise ValueError(
            "--config_overrides changes --config_name or --model_type; a checkpoint's configuration cannot be changed."
        )


def check_run_arguments(args: RunArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError unless the seeds, the time limit and the folder to resume from make sense together."""
    check_trainer_arguments(training_args)
    if training_args.push_to_hub and training_args.hub_token:
        raise ValueError(
            "--hub_token would be published: the Trainer saves it in training_args.bin and pushes that file. Set"
            " HF_TOKEN or log in with `hf auth login`."
        )
    if args.seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
            raise ValueError(f"--seeds {args.seeds!r} must be whole numbers with commas between them, e.g. 1,2,3.")
        if any(int(seed) > LARGEST_SEED for seed in args.seeds.split(",")):
            raise ValueError(f"--seeds {args.seeds}: each must be at most {LARGEST_SEED}.")
        if len(set(args.seeds.split(","))) < len(args.seeds.split(",")):
            raise ValueError(f"--seeds {args.seeds} names a seed twice.")
        if training_args.resume_from_checkpoint:
            raise ValueError("--resume_from_checkpoint belongs to one run: give --seed N in the place of --seeds.")
        if training_args.push_to_hub:
            raise ValueError("--push_to_hub pushes one model: give --seed N in the place of --seeds.")
    if args.max_minutes is not None and args.max_minutes <= 0:
        raise ValueError(f"--max_minutes {args.max_minutes} must be more than 0.")
    resume = training_args.resume_from_checkpoint
    if resume and not is_whole_checkpoint(resume):
        raise ValueError(
            f"--resume_from_checkpoint {resume} is not a whole checkpoint: it has no trainer_state.json (which is"
            " written last) or a file is cut off. Without the argument, the last whole one in --output_dir is taken."
        )


# ---- Model ----


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, with a padding token.

    Raises:
        ValueError: there is none where the arguments say.
    """
    name = args.tokenizer_name or args.model_name_or_path
    argument = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **args.hub_options)
    except Exception as error:  # a missing file, an unknown class and a Hub out of reach raise different errors
        raise ValueError(
            f"{argument} {name}: no tokenizer could be loaded ({error}). Give --tokenizer_name, a folder with tokenizer"
            " files or a name on the Hub."
        ) from error
    if tokenizer.pad_token is None:
        logger.warning("The tokenizer %s has no padding token: padding with %r.", name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The fields of a configuration that follow from the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": _first(tokenizer.eos_token_id, tokenizer.sep_token_id),
    }


def load_config(args: ModelArguments, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of the run; from scratch with `fields` and the overrides, in which the latter win.

    Args:
        args: Names a checkpoint, a configuration or a model type.
        fields: What the data fix, such as `token_fields`.

    Raises:
        ValueError: there is no such configuration, an override is wrong, or the checkpoint's vocabulary is smaller
            than that of `fields`.
    """
    argument, name = args.source
    try:
        config = CONFIG_MAPPING[name]() if args.model_type else AutoConfig.from_pretrained(name, **args.hub_options)
    except Exception as error:  # as for the tokenizer
        raise ValueError(
            f"--{argument} {name}: no configuration could be loaded ({error}). Give a folder with config.json"
            f"{', a json file' if argument == 'config_name' else ''} or a name on the Hub."
        ) from error
    if args.model_name_or_path is not None:
        if fields.get("vocab_size", 0) > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {fields['vocab_size']} tokens and the model {name} only {config.vocab_size}:"
                " give the --tokenizer_name that the model was trained with."
            )
        return config
    raw = {} if args.model_type else PreTrainedConfig.get_config_dict(name, **args.hub_options)[0]
    overrides = parse_config_overrides(args.config_overrides or "", config)
    try:
        return type(config)(**{**without_derived_fields(raw, type(config)), **fields, **overrides})
    except Exception as error:  # each configuration class validates in its own way
        raise ValueError(f"--{argument} {name} with --config_overrides {args.config_overrides}: {error}") from error


def parse_config_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Parse `name=value,name=value`; a value is read as json where it is json, else taken as text.

    `PreTrainedConfig.update_from_string` takes no lists, no None and no commas in values.

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


def build_model(auto_class: Any, args: ModelArguments, config: PreTrainedConfig, seed: int, **kwargs: Any) -> Any:
    """A checkpoint, or a new model of `config`, by an Auto class; `kwargs` are for `from_pretrained`."""
    set_seed(seed)  # all of a new model is random, and so is a new head of a checkpoint
    if args.model_name_or_path is None:
        return auto_class.from_config(config, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
    return auto_class.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=torch.float32,  # a half-precision checkpoint, too: mixed precision is the Trainer's (--bf16, --fp16)
        **kwargs,
        **args.hub_options,
    )


def check_length(argument: str, length: int, config: PreTrainedConfig, limit: int | None = None) -> None:
    """Raise ValueError if `length` tokens are more than the model has positions for, or than `limit`."""
    has_table = getattr(config, "position_embedding", "learned") == "learned"
    limits = [number for number in (getattr(config, "max_position_embeddings", None), limit) if number]
    if has_table and limits and length > min(limits):
        raise ValueError(f"--{argument} {length} is more than the {min(limits)} tokens that the model takes.")


def check_positions(argument: str, length: int, model: Any) -> None:
    """Raise ValueError if the model's table of learned positions holds fewer than `length`.

    In RoBERTa and its like the positions of tokens begin behind that of padding, so that the table holds fewer than
    `max_position_embeddings`.
    """
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    limit = min((table.num_embeddings - table.padding_idx - 1 for table in tables), default=length)
    if length > limit:
        raise ValueError(
            f"--{argument} {length} is more than the {limit} tokens that the model takes: its positions begin behind"
            " that of padding."
        )


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents.

    Raises:
        ValueError: the tokenizer has none.
    """
    token = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if token is None:
        raise ValueError("The tokenizer has neither an eos_token nor a sep_token to end a document: give it one.")
    return token


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


# ---- Runs ----


@dataclass(frozen=True)
class Run:
    """One training run: its arguments, with its own folder and seed, and the checkpoint it goes on from."""

    args: TrainingArguments
    checkpoint: str | None


def plan_runs(run_args: RunArguments, training_args: TrainingArguments) -> list[Run]:
    """The run in `output_dir`, or one for each seed in `output_dir/seed_N`."""
    root = Path(training_args.output_dir)
    seeds = [int(seed) for seed in run_args.seeds.split(",")] if run_args.seeds else []
    folders = {root / f"seed_{seed}": seed for seed in seeds} or {root: training_args.seed}
    runs = []
    for folder, seed in folders.items():
        args = copy.copy(training_args)
        args.output_dir, args.seed = str(folder), seed
        runs.append(Run(args, find_checkpoint(folder, run_args, training_args)))
    return runs


def finish_runs(
    run_args: RunArguments, training_args: TrainingArguments, results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The results of the one run, or the summary over the seeds, which is also written to `output_dir`."""
    if not run_args.seeds:
        return results[0]
    summary = summarize_seeds([int(seed) for seed in run_args.seeds.split(",")], results)
    if training_args.should_save:
        summary = update_results(Path(training_args.output_dir), summary)
        for name in (name for name in summary if name.endswith("_std")):
            mean = name.removesuffix("_std")
            logger.info("%s over seeds %s: %.4f ± %.4f", mean, run_args.seeds, summary[mean], summary[name])
    return summary


def find_checkpoint(folder: Path, run_args: RunArguments, training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one given, else the last whole one in the folder, else none.

    Raises:
        ValueError: training would overwrite a folder that holds something else.
    """
    if training_args.resume_from_checkpoint or not training_args.do_train:
        return training_args.resume_from_checkpoint
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if run_args.overwrite_output_dir:
        if found and training_args.should_save:
            logger.warning("--overwrite_output_dir: removing %s.", ", ".join(map(str, found)))
            for path in found:
                shutil.rmtree(path)
        return None
    whole = last_whole_checkpoint(folder)
    if whole is not None:
        logger.info("Going on from %s; train anew with --overwrite_output_dir.", whole)
        return str(whole)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"--output_dir {folder} holds files but no checkpoint to go on from: give another folder or"
            " --overwrite_output_dir."
        )
    return None


def set_up_logging(script: str, training_args: TrainingArguments) -> None:
    """Log the main process at the level of `--log_level`, the others at that of `--log_level_replica`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training_args.get_process_log_level()
    # "passive", the default, would hide this project's own few lines.
    own_level = logging.INFO if training_args.log_level == "passive" and training_args.should_log else level
    for name in (script, "transnormer_hf"):
        logging.getLogger(name).setLevel(own_level)
    datasets.utils.logging.set_verbosity(level)
    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()


class CardTrainer(Trainer):
    """A Trainer whose model card is this project's, so that `push_to_hub` uploads it and not a draft.

    On several processes a checkpoint is whole when its last file is there, and the model is saved whole. With FSDP in
    mixed precision parameters are gathered in float32, for LRPE's sake. Every row of an evaluation is looked at, and
    `label_smoothing_factor` holds for every loss or is refused.
    """

    card: str | None = None
    compute_loss_func: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.can_skip_logits = "skip_logits" in inspect.signature(self.model.forward).parameters
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        has_lrpe = any(isinstance(module, TransNormerLRPE) for module in self.model.modules())
        self.is_autocast_by_us = has_lrpe and plugin is not None and plugin.mixed_precision_policy is not None
        if self.is_autocast_by_us:  # parameters gathered in half precision would round LRPE's angles
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, param_dtype=torch.float32)
        smoothing, loss = self.args.label_smoothing_factor, self.compute_loss_func
        if smoothing and loss is None and getattr(self.model, "loss_type", None) == "ForCausalLM":
            loss = next_token_loss  # the Trainer shifts labels only for the classes that it knows by name
        if loss is None:
            return
        if smoothing:
            if "label_smoothing" not in inspect.signature(loss).parameters:
                name = getattr(loss, "__name__", loss)
                raise ValueError(
                    f"--label_smoothing_factor {smoothing} has no meaning for the loss {name!r}: leave it out, or give"
                    " a compute_loss_func that takes label_smoothing."
                )
            loss = partial(loss, label_smoothing=smoothing)
        self.compute_loss_func = loss
        self.model_accepts_loss_kwargs = False  # the count of labels is for the loss, and the model computes none

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast where FSDP does not cast the parameters; elsewhere accelerate has it in the model's forward."""
        if self.is_autocast_by_us:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As in transformers, without the logits of a language model where only its loss is asked for."""
        if prediction_loss_only and self.can_skip_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """A loader of the rows that were given; the Trainer's, with persistent workers, is that of its first call."""
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        rows = self.eval_dataset if named is None else named
        if rows is None:
            raise ValueError("eval_dataset: got None; evaluation needs rows.")
        return self.get_test_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """A loader of all rows, for one pass: `dataloader_drop_last` and persistent workers are for training."""
        args = self.args
        for_training = args.dataloader_drop_last, args.dataloader_persistent_workers
        args.dataloader_drop_last = args.dataloader_persistent_workers = False
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            args.dataloader_drop_last, args.dataloader_persistent_workers = for_training

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; but with FSDP it writes the whole model also where checkpoints are sharded."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or _internal_call:  # by the Trainer itself: part of a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(kind)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process goes on to trainer_state.json, the mark of a whole checkpoint: not before all have written.
        self.accelerator.wait_for_everyone()

    def create_model_card(self, **_: Any) -> None:
        """Write the card of the run to `output_dir/README.md`, once it is known."""
        if self.card is not None and self.is_world_process_zero():
            write_atomically(Path(self.args.output_dir) / "README.md", self.card)


class TrainingClock(TrainerCallback):
    """Measures the time spent in training steps, across resumes, logs it as `train_minutes`, and ends training in time.

    Evaluation and saving do not count, so runs with equal limits have the same time to learn in.
    """

    def __init__(self, max_minutes: float | None = None):
        self.max_minutes = max_minutes
        self.seconds, self._step_began = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        known = [entry["train_minutes"] for entry in state.log_history if "train_minutes" in entry]
        self.seconds = 60 * max(known, default=0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._step_began
        if self.max_minutes is None:
            return
        is_over = self.seconds >= 60 * self.max_minutes
        if torch.distributed.is_initialized():  # clocks differ, and all ranks must stop after the same step
            flag = torch.tensor(float(is_over), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            is_over = bool(flag)
        if is_over:
            control.should_training_stop = True
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        state.log_history[-1]["train_minutes"] = self.seconds / 60


class EpochSetter(TrainerCallback):
    """Tells the epoch to the sampler that shuffles the training rows, and to the rows where they care.

    After a resume in the middle of an epoch accelerate does not reach the rows, and 1.3 not even the sampler.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        epoch = int((state.epoch or 0) + 1e-6)  # a resumed run has part of an epoch behind it
        for target in (train_dataloader, getattr(train_dataloader, "dataset", None)):
            if target is not None and hasattr(target, "set_epoch"):
                target.set_epoch(epoch)


def change_factors(scheduler: Any, change: Callable[[Callable[[int], float]], Callable[[int], float]]) -> Any:
    """The scheduler with each factor of the learning rate, a function of the step, replaced by `change` of it.

    One that does not work by factors is returned as it is. SequentialLR of torch cannot do this: the schedules of
    transformers hold their own warm-up, and the inverse square root counts from it.
    """
    if not isinstance(scheduler, LambdaLR):
        return scheduler
    return LambdaLR(scheduler.optimizer, [change(factor) for factor in scheduler.lr_lambdas])


# ---- Results ----


def report(trainer: Trainer, step: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Print the figures of a step and keep them in `<step>_results.json`."""
    trainer.log_metrics(step, metrics)
    trainer.save_metrics(step, metrics, combined=False)
    return metrics


def summarize_seeds(seeds: Sequence[int], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and single values of every evaluation and test figure over the seeds."""
    summary: dict[str, Any] = {"task_name": results[0]["task_name"], "seeds": list(seeds)}
    for name in results[0]:
        if not name.startswith(("eval_", "test_")) or "samples" in name or "runtime" in name or "per_second" in name:
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
