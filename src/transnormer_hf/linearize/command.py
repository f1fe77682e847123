"""From a pretrained transformer to the folder of a TransNormer: what `scripts/linearize.py` runs.

The source's weights are transferred, the attentions learn from the source's, and the result is saved as any other
TransNormer: weights, configuration, code, tokenizer, and a card that says what was measured.
"""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..hub.model_card import ATTENTION_NAMES, build_linearized_card, markdown_table
from ..training.files import new_folder, write_atomically
from ..training.fine_tuning import ModelArguments, check_length, load_tokenizer, parse_dataclasses, update_results
from ..training.packing import FILE_FORMATS, TextSource
from ..training.text_files import check_file
from .distillation import (
    EXACT,
    Losses,
    Stage,
    StageResult,
    TextBatches,
    attention_losses,
    attention_of,
    compare,
    evaluate,
    joint_losses,
    run_stage,
    scale_output_projections,
)
from .sources import transfer

logger = logging.getLogger(__name__)

CHECKPOINTS = {"trained": "attention_transfer.pt", "joint": "joint_distillation.pt"}
# What a sentence encoder of sentence-transformers has beside the model; modules.json names further folders.
SENTENCE_ENCODER = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# Its poolings, by their newer and older names, and ours.
POOLING_MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first", "lasttoken": "last"}
DEFAULT_STEPS = 300  # of attention transfer, if no time is given either
SCALE_TOKENS = 4096  # from which the scale of the output projections is computed


@dataclass
class SourceArguments:
    """Which model to linearise, and into what."""

    model_name_or_path: str = field(metadata={"help": "The pretrained model: a folder or a name on the Hub."})
    output_dir: str = field(
        metadata={"help": "New or empty folder for the TransNormer, or that of an interrupted run, to go on with it."}
    )
    architecture: str | None = field(
        default=None,
        metadata={
            "help": "Class of transformers to load the model with, e.g. BertModel. Default: its configuration's."
        },
    )
    layer_types: str | None = field(
        default=None,
        metadata={
            "help": "The attention of each layer, with commas between: linear_attention (NormAttention),"
            " chunked_attention (DiagAttention) or full_attention (the source's softmax). Default: the paper's, the"
            " first half chunked, the second half linear."
        },
    )
    num_linear_layers: int | None = field(
        default=None, metadata={"help": "Instead: this many of the last layers linear, the others chunked."}
    )
    softmax_layers: str | None = field(
        default=None, metadata={"help": "Layers that keep softmax over the whole text, counted from 0, e.g. 3,7,11."}
    )
    variant: str = field(default="t2", metadata={"help": "t2 (softmax blocks, phi = 1 + elu) or t1 (relu, elu)."})
    block_size: int = field(default=64, metadata={"help": "Tokens per block of chunked attention."})
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Learned positions; more than the source's need --position_extension."}
    )
    position_extension: str = field(
        default="none", metadata={"help": "Where further positions come from: interpolate, tile or none."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub; default: that of `hf auth`."})

    @property
    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    @property
    def of_model(self) -> ModelArguments:
        """The same as the training scripts call it."""
        names = ("model_name_or_path", "tokenizer_name", "cache_dir", "model_revision", "token")
        return ModelArguments(**{name: getattr(self, name) for name in names})


@dataclass
class TextArguments:
    """The texts to learn from. No labels are needed: what the source makes of a text is what is learned."""

    train_file: str | None = field(
        default=None, metadata={"help": "Texts, one a row: txt, or a table: tsv, csv, json lines or parquet."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead: data set on the Hub with a text column, e.g. Salesforce/wikitext."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, e.g. wikitext-103-raw-v1."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text, where there are columns."})
    document_start: str | None = field(
        default=None,
        metadata={"help": "Regular expression of the line that begins a document. Default: each row is a text."},
    )
    max_train_samples: int = field(default=100_000, metadata={"help": "Texts to read at most."})
    held_out_samples: int = field(
        default=256,
        metadata={"help": "Texts, spread over all and at most a tenth, that are not learned from but measured on."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per text; longer ones are cut into several."})

    def source(self, cache_dir: str | None) -> TextSource:
        """Where the texts lie."""
        return TextSource(
            file=self.train_file,
            dataset=None if self.train_file else (self.dataset_name or "", self.dataset_config_name),
            split="train",
            text_column=self.text_column,
            document_start=self.document_start,
            streaming=True,
            options={"cache_dir": cache_dir},
        )


@dataclass
class LearningArguments:
    """How long and how fast the student learns."""

    max_steps: int | None = field(
        default=None,
        metadata={"help": f"Steps of attention transfer; 0 for none. Default: {DEFAULT_STEPS}, or --max_minutes."},
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Or minutes of it; evaluation and saving do not count."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate of attention transfer."})
    joint_steps: int = field(default=0, metadata={"help": "Steps of joint distillation after it."})
    joint_learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate of these."})
    per_device_train_batch_size: int = field(default=24, metadata={"help": "Texts per step."})
    eval_steps: int = field(
        default=50, metadata={"help": "Measure on the held-out texts and write a checkpoint after so many steps."}
    )
    seed: int = field(default=42, metadata={"help": "Of the order of the texts."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})


def check_arguments(source: SourceArguments, texts: TextArguments, learning: LearningArguments) -> None:
    """Raise ValueError or FileNotFoundError where arguments are missing, contradict each other or make no sense."""
    if (texts.train_file is None) == (texts.dataset_name is None):
        raise ValueError(
            f"Got --train_file {texts.train_file} and --dataset_name {texts.dataset_name}: give one of them, the texts"
            " to learn from."
        )
    if texts.train_file is not None:
        check_file(texts.train_file, FILE_FORMATS, "train_file")
    for arguments, least in (
        (texts, {"max_train_samples": 2, "held_out_samples": 1, "max_seq_length": 8}),
        (learning, {"max_steps": 0, "joint_steps": 0, "per_device_train_batch_size": 1, "eval_steps": 1, "seed": 0}),
        (source, {"block_size": 1, "max_position_embeddings": 1}),
    ):
        for name, smallest in least.items():
            value = getattr(arguments, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name} {value} must be at least {smallest}.")
    for name in ("max_minutes", "learning_rate", "joint_learning_rate"):
        value = getattr(learning, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be more than 0.")
    check_output_dir(Path(source.output_dir))


def check_output_dir(folder: Path) -> None:
    """Raise ValueError if the folder holds anything but the checkpoints of an interrupted run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is not a folder: name a new or empty one.")
    others = (
        sorted(path.name for path in folder.iterdir() if path.name not in CHECKPOINTS.values())
        if folder.exists()
        else []
    )
    if others:
        raise ValueError(
            f"--output_dir {folder} holds {', '.join(others[:3])}{' ...' * (len(others) > 3)}, and nothing is"
            " overwritten: name a new or empty folder, or that of an interrupted run."
        )


def parse_numbers(argument: str, text: str | None) -> list[int] | None:
    """Whole numbers with commas between them; None for None.

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{argument} {text!r} must be whole numbers with commas between them, e.g. 2,5.") from None


# ---- Source and texts ----


def load_source(args: SourceArguments) -> PreTrainedModel:
    """The pretrained model, in float32, with the head that its configuration names.

    Raises:
        ValueError: there is none, or `--architecture` is no class of transformers.
    """
    name = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name, **args.hub_options)
        architecture = args.architecture or next(iter(config.architectures or ()), "AutoModel")
        model_class = getattr(transformers, architecture, None)
        if model_class is None or not hasattr(model_class, "from_pretrained"):
            raise ValueError(
                f"{architecture!r} is no model of transformers: give --architecture, e.g. BertModel or"
                " LlamaForCausalLM."
            )
        return model_class.from_pretrained(name, dtype=torch.float32, **args.hub_options).eval()
    except Exception as error:  # a missing file, an unknown type and a Hub out of reach raise different errors
        raise ValueError(
            f"--model_name_or_path {name}: no model could be loaded ({error}). Give a folder with config.json and"
            " weights, or a name on the Hub."
        ) from error


def make_models(source: PreTrainedModel, args: SourceArguments) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student: the source as a TransNormer with full attention, and with the attentions asked for."""
    positions: dict[str, Any] = {
        "max_position_embeddings": args.max_position_embeddings,
        "position_extension": args.position_extension,
    }
    layer_types = args.layer_types.split(",") if args.layer_types is not None else None
    if layer_types is not None and len(layer_types) != source.config.num_hidden_layers:
        raise ValueError(
            f"--layer_types {args.layer_types} names {len(layer_types)} layers, and {args.model_name_or_path} has"
            f" {source.config.num_hidden_layers}: name each."
        )
    student = transfer(
        source,
        layer_types=layer_types,
        num_linear_layers=args.num_linear_layers,
        softmax_layers=parse_numbers("softmax_layers", args.softmax_layers),
        block_size=args.block_size,
        variant=args.variant,
        **positions,
    )
    teacher = transfer(source, layer_types=["full_attention"] * student.config.num_hidden_layers, **positions)
    return teacher.requires_grad_(False), student


def read_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Iterator[list[int]]:
    """The token ids of each text, between the special tokens that the tokenizer puts around it.

    A longer text gives several rows.
    """
    plain, whole = (tokenizer("a", add_special_tokens=is_whole)["input_ids"] for is_whole in (False, True))
    start = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    first, last = whole[:start], whole[start + len(plain) :]
    room = max_seq_length - len(first) - len(last)
    texts = iter(texts)
    while batch := list(islice(texts, 1000)):
        for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            for begin in range(0, len(tokens), room):
                yield [*first, *tokens[begin : begin + room], *last]


def hold_out(texts: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    """The texts to learn from, and `number` of them that are spread evenly over all: at most a tenth, at least one.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"Got {len(texts)} texts: there must be at least 2, one of which is held out.")
    stride = min(len(texts), max(10, len(texts) // number))
    held_out = set(range(stride // 2, len(texts), stride)[:number])
    return (
        [text for place, text in enumerate(texts) if place not in held_out],
        [texts[place] for place in sorted(held_out)],
    )


# ---- Learning ----


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    train: TextBatches,
    held_out: TextBatches,
    args: LearningArguments,
    checkpoints: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let the student learn from its teacher: closed form, attention transfer, and joint distillation if asked for.

    Args:
        teacher, student: Two TransNormers of the same size on one device, as `make_models` gives them; the teacher's
            layers are "full_attention".
        train, held_out: The texts, on that device.
        args: How long and how fast.
        checkpoints: Folder to resume from and to write to, of a run with the same `settings`; None for neither.

    Returns:
        The figures, all on the held-out texts. Squared errors are relative to the teacher's squares.

        - `attention`: by layer, the error of its attention alone after each step, "copied", "scaled", "trained";
        - `whole`: after each of these and "joint", what `compare` measures;
        - `steps` and `minutes` of "trained" and "joint".
    """
    student.requires_grad_(False)
    # a layer that computes the same as the teacher's has nothing to learn
    all_layers = range(student.config.num_hidden_layers)
    copied = evaluate(attention_losses(teacher, student, all_layers), held_out)
    layers = [layer for layer in all_layers if copied[f"layer {layer}"] > EXACT]
    figures: dict[str, Any] = {
        "attention": {str(layer): {"copied": copied[f"layer {layer}"]} for layer in all_layers},
        "whole": {"teacher": compare(teacher, teacher, held_out), "copied": compare(teacher, student, held_out)},
        "steps": {},
        "minutes": {},
    }

    def learn(name: str, parts: Mapping[str, nn.Module], losses: Losses, **limits: Any) -> StageResult:
        options: dict[str, Any] = {
            "eval_steps": args.eval_steps,
            "checkpoint": checkpoints and checkpoints / CHECKPOINTS[name],
        }
        title = STEPS[name].capitalize()
        result = run_stage(Stage(title, parts, losses, train, held_out, settings=settings, **limits, **options))
        figures["whole"][name] = compare(teacher, student, held_out)
        figures["steps"][name], figures["minutes"][name] = result.steps, result.minutes
        return result

    if layers:
        scale_output_projections(teacher, student, layers, train.holding(SCALE_TOKENS))
        figures["whole"]["scaled"] = compare(teacher, student, held_out)
        limits = {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
        if args.max_steps is None and args.max_minutes is None:
            limits["max_steps"] = DEFAULT_STEPS
        attentions = {f"layer {layer}": attention_of(student, layer) for layer in layers}
        losses = attention_losses(teacher, student, layers)
        result = learn("trained", attentions, losses, learning_rate=args.learning_rate, **limits)
        for layer in layers:
            errors = {"scaled": result.before[f"layer {layer}"], "trained": result.after[f"layer {layer}"]}
            figures["attention"][str(layer)] |= errors
    if args.joint_steps:
        whole, losses = {"student": student.base_model.layers}, joint_losses(teacher, student)
        learn("joint", whole, losses, learning_rate=args.joint_learning_rate, max_steps=args.joint_steps)
    student.requires_grad_(True)
    return figures


# ---- The run ----


def linearize(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for, and return what `all_results.json` in the output folder then holds."""
    source_args, text_args, args = parse_dataclasses((SourceArguments, TextArguments, LearningArguments), argv)
    check_arguments(source_args, text_args, args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("transnormer_hf").setLevel(logging.INFO)
    if args.disable_tqdm:
        disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"

    tokenizer = load_tokenizer(source_args.of_model)
    source = load_source(source_args)
    source_positions = source.config.max_position_embeddings
    teacher, student = (model.to(device) for model in make_models(source, source_args))
    del source  # two copies of a large model are enough
    check_length("max_seq_length", text_args.max_seq_length, student.config)

    documents = text_args.source(source_args.cache_dir).documents()
    texts = [text.strip() for text in islice(filter(str.strip, documents), text_args.max_train_samples)]
    train_texts, held_out_texts = hold_out(texts, text_args.held_out_samples)

    def batches(texts: Sequence[str], max_seq_length: int) -> TextBatches:
        rows = list(read_rows(texts, tokenizer, max_seq_length))
        return TextBatches(rows, args.per_device_train_batch_size, tokenizer.pad_token_id, device, args.seed)

    train, held_out = (batches(part, text_args.max_seq_length) for part in (train_texts, held_out_texts))
    settings = {
        name: value
        for arguments in (source_args, text_args, args)
        for name, value in dataclasses.asdict(arguments).items()
        if name not in ("output_dir", "cache_dir", "token", "use_cpu", "disable_tqdm")
    }
    results = distill(teacher, student, train, held_out, args, Path(source_args.output_dir), settings)
    results["parameters"] = student.num_parameters()
    results |= {"train_rows": len(train.rows), "held_out_rows": len(held_out.rows)}
    longest = student.config.max_position_embeddings
    if longest > source_positions:
        long_text = batches([" ".join(held_out_texts)], longest)
        long_text.rows = long_text.rows[:1]
        results["long"] = {"tokens": len(long_text.rows[0]), **compare(teacher, student, long_text)}
    return save(student.cpu(), tokenizer, results, source_args, text_args, args)


def save(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    results: dict[str, Any],
    source_args: SourceArguments,
    text_args: TextArguments,
    args: LearningArguments,
) -> dict[str, Any]:
    """Write the folder of the run, whole or not at all, in the place of its checkpoints; returns the results there."""
    output_dir, texts = Path(source_args.output_dir), text_args.source(None).describe()
    table = describe_results(results, student.config.layer_types)
    with new_folder(output_dir) as folder:
        pooling = copy_sentence_encoder(source_args, folder)
        if pooling is not None and student.base_model is student:  # of a head to come
            student.config.pooling = pooling
        student.save_pretrained(folder)
        # With the source's length, sentence-transformers would cut texts there, whatever the positions.
        tokenizer.model_max_length = max(tokenizer.model_max_length, student.config.max_position_embeddings)
        tokenizer.save_pretrained(folder)
        results = update_results(folder, results)
        card = build_linearized_card(
            folder,
            name=output_dir.resolve().name,
            source=source_args.model_name_or_path,
            source_license=license_of(source_args),
            results_table=table,
            results_note=describe_measures(results, texts, text_args.max_seq_length),
            training_note=f"Learned from {results['train_rows']} rows of text ({texts}), without labels.",
            hyperparameters=describe_learning(results, text_args, args),
        )
        write_atomically(folder / "README.md", str(card))
        for name in CHECKPOINTS.values():
            (output_dir / name).unlink(missing_ok=True)
    logger.info("Saved in %s.\n%s", output_dir, table)
    return results


def copy_sentence_encoder(args: SourceArguments, folder: Path) -> str | None:
    """Copy what makes a sentence encoder of a model (sentence-transformers): its pooling and other modules, if any.

    Returns:
        The value of the configuration's `pooling` that does what its pooling does, None where there is none.
    """
    source = Path(args.model_name_or_path)
    if not source.is_dir():
        try:
            patterns = [*SENTENCE_ENCODER, "[0-9]*_*/*"]
            source = Path(snapshot_download(args.model_name_or_path, allow_patterns=patterns, **args.hub_options))
        except (OSError, HfHubHTTPError):  # offline, with the model in the cache
            return None
    if not (source / "modules.json").is_file():
        return None
    for name in SENTENCE_ENCODER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    poolings = []
    for module in json.loads((source / "modules.json").read_text(encoding="utf-8")):
        name = Path(module["path"]).name  # "" for the model itself; a normalisation, for one, has no files
        if not name or not (source / name).is_dir():
            continue
        shutil.copytree(source / name, folder / name)
        if name.endswith("_Pooling"):
            modes = json.loads((source / name / "config.json").read_text(encoding="utf-8"))
            poolings += [
                pooling
                for mode, pooling in POOLING_MODES.items()
                if modes.get(f"pooling_mode_{mode}") or modes.get("pooling_mode") == mode
            ]
    return poolings[0] if len(poolings) == 1 else None


def license_of(args: SourceArguments) -> str | None:
    """The licence that the source's card states, None if there is no card or it states none."""
    path = Path(args.model_name_or_path, "README.md")
    try:
        if not path.is_file():
            path = Path(hf_hub_download(args.model_name_or_path, "README.md", **args.hub_options))
        return ModelCard.load(path).data.license
    except (OSError, ValueError, HfHubHTTPError):  # no card, no such repository, no network; or no valid metadata
        return None


# ---- What the card says ----

STEPS = {
    "teacher": "the source itself",
    "copied": "weights copied",
    "scaled": "output projections scaled",
    "trained": "attention transfer",
    "joint": "joint distillation",
}


def describe_results(results: Mapping[str, Any], layer_types: Sequence[str]) -> str:
    """Two tables in Markdown: the whole student after each step, and each of its attentions by itself."""
    whole, minutes = results["whole"], results["minutes"]
    columns = {"hidden_states": "error of the last hidden states", "perplexity": "perplexity"}
    columns = {measure: title for measure, title in columns.items() if measure in whole["teacher"]}
    students = [
        [
            title,
            *(f"{whole[step][measure]:.4g}" for measure in columns),
            f"{minutes[step]:.1f}" if step in minutes else "",
        ]
        for step, title in STEPS.items()
        if step in whole
    ]
    steps = ("copied", "scaled", "trained")
    attentions = [
        [layer, ATTENTION_NAMES[kind], *(f"{errors[step]:.4g}" if step in errors else "" for step in steps)]
        for (layer, errors), kind in zip(results["attention"].items(), layer_types, strict=True)
    ]
    return "\n\n".join(
        (
            markdown_table(["", *columns.values(), "minutes of training"], students),
            markdown_table(["layer", "attention", *(f"error, {STEPS[step]}" for step in steps)], attentions),
        )
    )


def describe_measures(results: Mapping[str, Any], source: str, max_seq_length: int) -> str:
    """How the figures of the tables were measured, and the one on a long text where there is one."""
    note = (
        f"Measured on {results['held_out_rows']} rows of at most {max_seq_length} tokens ({source}) that it did not"
        " learn from. An error is the sum of squared differences from the source, in which every attention is softmax"
        " over the whole text, divided by the sum of squares of the source. In the second table each attention gets"
        " what enters that of the source; one with an error of rounding alone had nothing to learn."
    )
    if "long" in results:
        note += (
            f" On one text of {results['long']['tokens']} tokens, the held-out ones in a row, the error of the last"
            f" hidden states is {results['long']['hidden_states']:.4g}; there the source's positions are extended in"
            " the same way."
        )
    return note


def describe_learning(results: Mapping[str, Any], texts: TextArguments, args: LearningArguments) -> dict[str, Any]:
    """What it takes to repeat the run, by the names of the command line."""
    steps = results["steps"]
    return {
        "max_steps": steps.get("trained", 0),
        "learning_rate": args.learning_rate,
        "joint_steps": steps.get("joint", 0),
        "joint_learning_rate": args.joint_learning_rate,
        "lr_scheduler_type": "one cycle: linear over the first tenth, then a cosine to 0",
        "optimizer": "AdamW, betas (0.9, 0.999), no weight decay",
        "batch size": args.per_device_train_batch_size,
        "max_seq_length": texts.max_seq_length,
        "seed": args.seed,
    }
