"""Pre-training of causal and masked language models: presets, data, the Trainer's loss, and perplexities.

`scripts/run_clm.py` and `scripts/run_mlm.py` are thin layers over this module. The presets are what the authors'
training scripts set (github.com/OpenNLPLab/Transnormer, train_alm.sh and train_blm.sh).
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.logging import tqdm

from ..hub.model_card import EvaluatedSplit, build_training_card
from .fine_tuning import (
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
    end_of_text,
    finish_runs,
    given_arguments,
    load_config,
    load_tokenizer,
    parse_dataclasses,
    plan_runs,
    report,
    set_up_logging,
    token_fields,
    update_results,
)
from .losses import IGNORED, aligned_loss
from .packing import (
    FILE_FORMATS,
    WIKITEXT_TITLE,
    Masking,
    PackedRows,
    PackedStream,
    Packing,
    Row,
    TextSource,
    count_words,
    encode_documents,
    keeps_sequences_apart,
)
from .predictions import check_finite, labels_of, logits_of
from .text_files import LINES, check_file
from .trainer_arguments import check_enough_rows, check_metric_for_best_model, refuse_unless

logger = logging.getLogger(__name__)

# Both scripts: Adam with betas (0.9, 0.98), weight decay 0.01, no clipping, learning rate 5e-4, 512 tokens a row. Only
# the causal one states that the warm-up begins at 1e-7; the masked one begins there, too, which is close to its first
# step of 5e-4 / 3000.
_RELEASED = {
    "learning_rate": 5e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "warmup_init_lr": 1e-7,
}
PRESETS: dict[str, dict[str, Any]] = {
    "wikitext103-clm": {
        **_RELEASED,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 8000,
        "max_steps": 100_000,
        "adam_epsilon": 1e-8,
        "block_size": 512,
        "tokens_per_update": 128 * 512,
    },
    "wikitext103-mlm": {
        **_RELEASED,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": 0.0},
        "warmup_steps": 3000,
        "max_steps": 50_000,
        "adam_epsilon": 1e-6,
        "max_seq_length": 512,
        "mlm_probability": 0.15,
        "tokens_per_update": 512 * 512,
    },
}
SPLITS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
STEPS = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}


@dataclass(frozen=True)
class Objective:
    """What differs between causal and masked language modelling.

    Attributes:
        name: "clm" or "mlm".
        auto_class: Auto class of the model.
        length_argument: The argument that holds the tokens per row.
        pipeline_tag: The task's name on the Hub.
        perplexity: What the per-token perplexity is of, in words.
        sample: Writes a sample of what the trained model says.
        check_sample: Raises ValueError where the sample would be longer than what the model takes.
    """

    name: str
    auto_class: Any
    length_argument: str
    pipeline_tag: str
    perplexity: str
    sample: Callable[..., str]
    check_sample: Callable[..., None]

    @property
    def is_causal(self) -> bool:
        return self.name == "clm"


# ---- Arguments ----


@dataclass
class PretrainingArguments:
    """Which text to learn from, and the presets."""

    preset: str | None = field(
        default=None,
        metadata={"help": f"The released hyperparameters, {' or '.join(PRESETS)}; other arguments override them."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub with a text column, e.g. Salesforce/wikitext."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, e.g. wikitext-103-raw-v1."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training text: txt, or a table: tsv, csv, json lines or parquet."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Text for --do_eval, the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Text for --do_predict, the same formats."})
    text_column: str = field(default="text", metadata={"help": "Column with the text, where there are columns."})
    document_start: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression of the line that begins a document. Default: an article's title in WikiText"
            " for txt files and WikiText on the Hub; else each row is a document."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenise the training text while training; needs --max_steps."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "With --streaming, rows among which to shuffle."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    tokens_per_update: int | None = field(
        default=None, metadata={"help": "Tokens per update; sets --gradient_accumulation_steps to reach it."}
    )
    warmup_init_lr: float = field(default=0.0, metadata={"help": "Learning rate that the warm-up begins with."})

    @property
    def files(self) -> dict[str, str]:
        """Argument name -> file, for those given."""
        return {name: getattr(self, name) for name in SPLITS.values() if getattr(self, name) is not None}

    def source(self, split: str, cache_dir: str | None = None) -> TextSource:
        """Where the text of a split lies."""
        file = getattr(self, SPLITS[split])
        is_wikitext = Path(file).suffix.lower() in LINES if file else "wikitext" in (self.dataset_name or "")
        return TextSource(
            file=file,
            dataset=None if file else (self.dataset_name or "", self.dataset_config_name),
            split=split,
            text_column=self.text_column,
            document_start=self.document_start or (WIKITEXT_TITLE if is_wikitext else None),
            streaming=self.streaming and split == "train",
            options={"cache_dir": cache_dir},
        )


def parse_pretraining_arguments(
    objective: Objective, data_class: type, argv: Sequence[str] | None = None
) -> tuple[ModelArguments, Any, RunArguments, TrainingArguments]:
    """Parse a command line or the json file it names, under the defaults of its preset, and check it.

    Raises:
        ValueError, FileNotFoundError: an argument is wrong or missing; the message names it and what would work.
    """
    types = (ModelArguments, data_class, RunArguments, TrainingArguments)
    defaults: dict[str, Any] = {**TRAINER_DEFAULTS, "remove_unused_columns": False}
    given = given_arguments(types, argv, defaults)
    preset = given.get("preset")
    known = [name for name in PRESETS if name.endswith(objective.name)]
    if preset is not None and preset not in known:
        raise ValueError(f"--preset {preset} is not one for {objective.name}: choose {' or '.join(known)}.")
    defaults |= PRESETS[preset] if preset else {}
    model_args, data_args, run_args, training_args = parse_dataclasses(types, argv, defaults)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    check_model_arguments(model_args)
    check_data_arguments(data_args, training_args)
    check_run_arguments(run_args, training_args)
    refuse_unless(training_args, "remove_unused_columns", (False,), "rows hold exactly what the model takes")
    metrics = ("loss", "token_perplexity", *(["word_perplexity"] if objective.is_causal else []))
    check_metric_for_best_model(training_args, metrics, objective.name)
    if given.get("greater_is_better") is None and "perplexity" in str(training_args.metric_for_best_model):
        training_args.greater_is_better = False  # the Trainer takes every figure but a loss for a score
    length = getattr(data_args, objective.length_argument)
    if length < 8:
        raise ValueError(f"--{objective.length_argument} {length} must be at least 8.")
    if given.get("gradient_accumulation_steps") is None:
        if data_args.tokens_per_update is not None:
            training_args.gradient_accumulation_steps = accumulation_steps(
                data_args.tokens_per_update, length, training_args
            )
    elif given.get("tokens_per_update") is not None:
        raise ValueError("Got --tokens_per_update and --gradient_accumulation_steps: give one, each sets the other.")
    return model_args, data_args, run_args, training_args


def check_data_arguments(args: PretrainingArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError or FileNotFoundError unless the arguments name the text of every step asked for."""
    if not any(getattr(training_args, step) for step in STEPS):
        raise ValueError("Nothing to do: give at least one of --do_train, --do_eval and --do_predict.")
    if (args.dataset_name is None) == (not args.files):
        raise ValueError(
            f"Got --dataset_name {args.dataset_name} and {'files' if args.files else 'no file'}: give a data set on the"
            " Hub, or text with --train_file, --validation_file and --test_file."
        )
    for name, file in args.files.items():
        check_file(file, FILE_FORMATS, name)
    for step, split in STEPS.items():
        if args.files and getattr(training_args, step) and SPLITS[split] not in args.files:
            raise ValueError(f"--{step} needs --{SPLITS[split]}, as --{next(iter(args.files))} is given.")
    for name in ("max_train_samples", "max_eval_samples", "shuffle_buffer"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    if args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError(f"--streaming needs --max_steps, got {training_args.max_steps}: a stream has no known length.")
    if args.streaming:
        reason = "a stream is shuffled in its buffer"
        refuse_unless(training_args, "train_sampling_strategy", ("random",), reason)
    if not 0 <= args.warmup_init_lr <= training_args.learning_rate:
        raise ValueError(
            f"--warmup_init_lr {args.warmup_init_lr} must lie between 0 and --learning_rate"
            f" {training_args.learning_rate}."
        )


def accumulation_steps(tokens_per_update: int, length: int, args: TrainingArguments) -> int:
    """Batches to accumulate so that an update sees `tokens_per_update` tokens.

    Raises:
        ValueError: no whole number of batches holds them.
    """
    per_batch = length * args.train_batch_size * args.world_size
    if tokens_per_update < 1 or tokens_per_update % per_batch:
        raise ValueError(
            f"--tokens_per_update {tokens_per_update} is not a multiple of {per_batch}, the tokens of one batch"
            f" ({args.train_batch_size} rows of {length} x {args.world_size} processes): change"
            " --per_device_train_batch_size, or give --gradient_accumulation_steps instead."
        )
    return tokens_per_update // per_batch


# ---- Data ----


@dataclass
class PretrainingData:
    """The rows of each split, and where they came from in words."""

    rows: dict[str, Any]
    sources: dict[str, str]


def prepare_data(
    objective: Objective,
    args: Any,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    cache_dir: str | None,
) -> PretrainingData:
    """The rows that the run needs: packed for training, and for causal evaluation windows of one stream of text."""
    length = getattr(args, objective.length_argument)
    together = keeps_sequences_apart(model)
    if not together:
        logger.info("%s sees across packed documents: each row holds one and padding.", type(model).__name__)
    data = PretrainingData({}, {})
    for step, split in STEPS.items():
        if not getattr(training_args, step):
            continue
        source = args.source(split, cache_dir)
        is_train = split == "train"
        packing = make_packing(objective, tokenizer, length, together)
        limit = args.max_train_samples if is_train else args.max_eval_samples
        data.sources[split] = source.describe()
        if is_train and args.streaming:
            make_rows = _RowReader(packing, tokenizer, source, limit)
            data.rows[split] = PackedStream(make_rows, None, args.shuffle_buffer, training_args.seed)
            continue
        documents = list(source.documents())
        words = None
        if objective.is_causal and not is_train:
            # The released code evaluates on windows that follow each other through the whole text of a split.
            documents = ["".join(text if text.endswith("\n") else text + "\n" for text in documents)]
            words = count_words(documents[0])
        bar = tqdm(documents, desc=f"Tokenising {source.describe()}", disable=training_args.disable_tqdm)
        rows = list(_RowReader(packing, tokenizer, source, limit)(bar, is_closed=is_train))
        if not rows:
            raise ValueError(f"{source.describe()} holds no text to make a row of.")
        is_cut = limit is not None and len(rows) >= limit
        if is_train:
            check_enough_rows(training_args, len(rows))
        data.rows[split] = PackedRows(rows, words=None if is_cut else words)
        if is_cut:
            data.sources[split] += ", first rows only"
    return data


@dataclass(frozen=True)
class _RowReader:
    packing: Packing
    tokenizer: PreTrainedTokenizerBase
    source: TextSource
    limit: int | None

    def __call__(self, documents: Iterable[str] | None = None, is_closed: bool = True) -> Iterator[Row]:
        """Rows of the documents, of the source's where none are given; `is_closed` ends each with the end of text."""
        end = end_of_text(self.tokenizer)
        encoded = encode_documents(self.tokenizer, self.source.documents() if documents is None else documents, end)
        if self.packing.causal:
            encoded = ([end, *tokens, *([end] if is_closed else [])] for tokens in encoded)
        return islice(self.packing.rows(encoded), self.limit)


def make_packing(
    objective: Objective, tokenizer: PreTrainedTokenizerBase, length: int, together: bool = True
) -> Packing:
    """How rows are made for this tokenizer; pieces for masked models stand between its special tokens."""
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    if not objective.is_causal:
        start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        first, last = () if start is None else (start,), (end_of_text(tokenizer),)
    return Packing(length, objective.is_causal, tokenizer.pad_token_id, first, last, together)


# ---- Training ----


class PretrainingTrainer(CardTrainer):
    """A Trainer whose labels are aligned with the inputs, and whose evaluation counts tokens and words exactly.

    The loss of training is `aligned_loss`, with `label_smoothing_factor`; perplexities are of the loss without it. A
    model that takes `skip_logits` computes both by itself, unless there is smoothing.
    """

    warmup_init_lr: float = 0.0

    def __init__(self, *args: Any, compute_loss_func: Callable[..., torch.Tensor] | None = None, **kwargs: Any):
        super().__init__(*args, compute_loss_func=compute_loss_func or aligned_loss, **kwargs)
        if compute_loss_func is None and self.can_skip_logits and not self.args.label_smoothing_factor:
            self.compute_loss_func, self.model_accepts_loss_kwargs = None, True

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The scheduler that the arguments name, with a warm-up that begins at `warmup_init_lr`.

        Raises:
            ValueError: the scheduler does not work by factors, so that its warm-up has no beginning.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if self.warmup_init_lr and not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"--warmup_init_lr {self.warmup_init_lr} has no meaning for --lr_scheduler_type"
                f" {self.args.lr_scheduler_type.value}: give --warmup_init_lr 0 or a scheduler with a warm-up."
            )
        if self.warmup_init_lr and warmup_steps:
            start = self.warmup_init_lr / self.args.learning_rate
            self.lr_scheduler = change_factors(scheduler, lambda factor: warm_up_from(start, warmup_steps, factor))
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in transformers, of labels as they stand.

        `shift_labels`, by which labels are counted, is for a causal model that computes the loss by itself.
        """
        inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        if self.compute_loss_func is None:
            inputs |= {"shift_labels": inputs["labels"], "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mean loss, and for each column its negative log-likelihood and its label: (batch, seq)."""
        inputs = self._prepare_inputs({k: v for k, v in inputs.items() if k != "shift_labels"})
        labels = inputs.pop("labels")
        if self.can_skip_logits:
            inputs |= {"labels": labels, "shift_labels": labels, "skip_logits": True, "reduction": "none"}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if outputs.logits is None:
            nll = outputs.loss
        else:
            logits = outputs.logits.float().flatten(0, 1)  # (batch * seq, vocab_size)
            nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)
        return nll.sum() / (labels != IGNORED).sum(), nll, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers, with the mean loss over tokens, not over batches, and the perplexities.

        Raises:
            ValueError: the model has diverged (names the rows), or no row has a token to predict.
        """
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        nll, labels = logits_of(output.predictions), labels_of(output.label_ids)  # (rows, seq) each
        check_finite(nll, f"{description} ({metric_key_prefix})")
        total, tokens = float(nll.sum(dtype="float64")), int((labels != IGNORED).sum())
        figures = perplexities(total, tokens, getattr(dataloader.dataset, "words", None))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output


def perplexities(total_nll: float, tokens: int, words: int | None) -> dict[str, float]:
    """Mean loss and perplexity per token and, where the words of the text are known, per word.

    The latter is exp(total_nll / words), which does not depend on how the text was cut into tokens.

    Raises:
        ValueError: there is no token.
    """
    if tokens < 1:
        raise ValueError("The text holds no token to predict: a perplexity needs at least one.")
    figures: dict[str, float] = {
        "loss": total_nll / tokens,
        "token_perplexity": _exp(total_nll / tokens),
        "tokens": tokens,
    }
    if words is not None:
        figures |= {"word_perplexity": _exp(total_nll / words), "words": words}
    return figures


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def warm_up_from(start: float, warmup_steps: int, factor: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule whose warm-up rises from `start` to 1 rather than from 0; `factor` holds after it."""
    return lambda step: start + (1 - start) * step / warmup_steps if step < warmup_steps else factor(step)


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows as a batch, (batch, length) each. `shift_labels` tells the Trainer to count every label."""
    batch = default_data_collator(rows)
    return {**batch, "shift_labels": batch["labels"]}


def pretrain(
    objective: Objective,
    data_class: type,
    argv: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Run what the command line asks for and return what `all_results.json` holds at the end.

    `callbacks` watch the training of each seed.
    """
    model_args, data_args, run_args, training_args = parse_pretraining_arguments(objective, data_class, argv)
    set_up_logging(f"run_{objective.name}", training_args)
    runs = plan_runs(run_args, training_args)
    tokenizer = load_tokenizer(model_args)
    if not objective.is_causal and tokenizer.mask_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path} has no mask_token: give one made for masked models.")
    config = load_config(model_args, token_fields(tokenizer))
    check_length(objective.length_argument, getattr(data_args, objective.length_argument), config)
    objective.check_sample(tokenizer, data_args, config)
    data, results = None, []
    for planned in runs:
        model = build_model(objective.auto_class, model_args, copy.deepcopy(config), planned.args.seed)
        check_positions(objective.length_argument, getattr(data_args, objective.length_argument), model)
        if data is None:
            data = prepare_data(objective, data_args, training_args, tokenizer, model, model_args.cache_dir)
        results.append(run(objective, model, tokenizer, data, model_args, data_args, run_args, planned, callbacks))
    return finish_runs(run_args, training_args, results)


def run(
    objective: Objective,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PretrainingData,
    model_args: ModelArguments,
    data_args: Any,
    run_args: RunArguments,
    planned: Run,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train, evaluate and show a sample with one seed; returns what the folder's `all_results.json` then holds."""
    args, length = planned.args, getattr(data_args, objective.length_argument)
    rows = {split: copy.copy(split_rows) for split, split_rows in data.rows.items()}
    if not objective.is_causal:
        for split, split_rows in data.rows.items():  # evaluation masks the same tokens whatever the seed
            seed = args.seed if split == "train" else 0
            masking = Masking(tokenizer.mask_token_id, len(tokenizer), data_args.mlm_probability, seed)
            rows[split] = split_rows.with_masking(masking)
    if data_args.streaming and "train" in rows:
        rows["train"].seed = args.seed
    had_cache = getattr(model.config, "use_cache", None)
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=[TrainingClock(run_args.max_minutes), EpochSetter(), *callbacks],
    )
    trainer.warmup_init_lr = data_args.warmup_init_lr
    results: dict[str, Any] = {"task_name": objective.name, "parameters": model.num_parameters()}
    if "train" in rows:
        results |= {"seed": args.seed, **train(trainer, planned.checkpoint, length)}
    if had_cache is not None:  # the Trainer turned it off, whoever loads the model will generate
        model.config.use_cache = had_cache
    if "train" in rows:
        trainer.save_model()
        trainer.save_state()

    evaluated = []
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in rows:
            metrics = trainer.evaluate(rows[split], metric_key_prefix=prefix)
            results |= report(trainer, prefix, {**metrics, f"{prefix}_samples": len(rows[split])})
            evaluated.append(describe_split(data, split, results, prefix))

    trained = trainer.accelerator.unwrap_model(trainer.model)
    results["sample"] = objective.sample(trained, tokenizer, data_args, args.seed)
    logger.info("A sample of the model:\n%s", results["sample"])
    if "train" in rows:
        card = build_training_card(
            model=trained,
            training_args=args,
            base_model=model_args.model_name_or_path,
            dataset=data_args.dataset_name,
            train_source=data.sources["train"],
            max_seq_length=length,
            evaluated=evaluated,
            sample=results["sample"],
            results=results,
            **describe_objective(objective),
        )
        trainer.card = str(card)
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        results = update_results(Path(args.output_dir), results)
    if "train" in rows and args.push_to_hub:
        trainer.push_to_hub()
    return results


def train(trainer: PretrainingTrainer, checkpoint: str | None, length: int) -> dict[str, Any]:
    """Train, report, and return the figures, with the tokens seen in rows of `length`."""
    args, rows = trainer.args, trainer.train_dataset
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    batch_size = trainer.state.train_batch_size or args.train_batch_size  # --auto_find_batch_size may lower it
    per_update = length * batch_size * args.world_size * args.gradient_accumulation_steps
    minutes, seen = trainer.state.log_history[-1]["train_minutes"], per_update * trainer.state.global_step
    metrics |= {"train_minutes": minutes, "train_tokens": seen}
    if minutes > 0:  # a checkpoint of another Trainer that was at its end has no time
        metrics["train_tokens_per_second"] = seen / (60 * minutes)
    if isinstance(rows, PackedRows):
        metrics["train_samples"] = len(rows)
    return report(trainer, "train", metrics)


def describe_objective(objective: Objective) -> dict[str, Any]:
    """What the model card says about every model of an objective."""
    titles = {"token_perplexity": objective.perplexity}
    if objective.is_causal:
        titles["word_perplexity"] = "Perplexity per word"
    return {
        "task": f"{'causal' if objective.is_causal else 'masked'} language modelling",
        "pipeline_tag": objective.pipeline_tag,
        "metric_titles": titles,
        "notes": [NOTES[objective.name]],
    }


NOTES = {
    "clm": "Windows of the training length follow each other through the text without overlap; every token is"
    " predicted, the first of a window from the token before it. Perplexity per word divides by the words between"
    " blanks and one end of sentence a line.",
    "mlm": "The perplexity is that of the masked tokens only, with the same masks at each evaluation. It cannot be"
    " compared with that of a causal model.",
}


def describe_split(data: PretrainingData, split: str, results: Mapping[str, Any], prefix: str) -> EvaluatedSplit:
    """What the model card says about one evaluation."""
    names = ("token_perplexity", "word_perplexity")
    return EvaluatedSplit(
        split=split,
        source=data.sources[split],
        rows=results[f"{prefix}_samples"],
        is_cut=False,
        metrics={name: results[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in results},
    )
