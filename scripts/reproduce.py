#!/usr/bin/env python
"""Reproduce the tables of "The Devil in Linear Transformer" at laptop scale, and report which conclusions hold there.

    python scripts/reproduce.py --table 1 8 --budget 0.35 --train_file train.txt --validation_file valid.txt
    python scripts/reproduce.py --table 8 9 10 11 12 --seeds 1 2     # WikiText-2 from the Hub
    python scripts/reproduce.py --table fig2 --rows Vanilla 1+elu --max_steps 3750   # some rows, for longer
    python scripts/reproduce.py --table 8 --list                     # which cells are left, and how long they take
    python scripts/reproduce.py --only_draw                          # draw results.md and the figures again

A cell is one training run: a row and column of a table, with one seed. Its result is kept in a JSON file, and a cell
that has one is not run again, so an interrupted command resumes with the next cell. Rows of several tables that are the
same model share one run. On a machine with free cores, start one command per seed.

The text is tokenised by a byte-level BPE of 1024 tokens, trained on the training text: with a large vocabulary, a small
model would spend its time in the output matrix, and its few minutes on word frequencies. Perplexities are per such
token and comparable only with each other.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import benchmark_model
import run_clm
import run_glue
import run_lra
import run_mlm
from transnormer_hf.hub.model_card import package_versions
from transnormer_hf.research.baselines import MIXERS
from transnormer_hf.research.diagnostics import GradientDeviationCallback, attention_report
from transnormer_hf.research.diagnostics.log_normal import compare_concentration, compare_memory, log_normal_error
from transnormer_hf.research.diagnostics.score_gradients import score_gradients
from transnormer_hf.research.reproduction import (
    ABLATION_TABLES,
    ARENA_DATA,
    GLUE_TASKS,
    TABLES,
    VOCAB_SIZE,
    Cell,
    check_folder,
    find_result,
    place_of,
    plan_cells,
    read_cells,
    scale,
    settings_key,
    without_place,
    write_cell,
)
from transnormer_hf.research.reproduction_report import draw, time_of
from transnormer_hf.research.reproduction_tasks import generate_retrieval, generate_small_pathfinder, shrink_image
from transnormer_hf.tasks import lra
from transnormer_hf.tasks.glue import HUB_DATASET, GlueTask, get_task
from transnormer_hf.training.files import write_atomically
from transnormer_hf.training.fine_tuning import ModelArguments, load_tokenizer
from transnormer_hf.training.packing import WIKITEXT_TITLE, TextSource
from transnormer_hf.training.predictions import DivergedError

HUB_TEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
SPECIAL_TOKENS = {  # RoBERTa's
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# Where the rows of Table 6 come from without files.
ARENA_ORIGINS = {
    "text": "IMDb on the Hub",
    "listops": "generated",
    "retrieval": "generated",
    "pathfinder": "generated",
    "image": "CIFAR-10 on the Hub",
}
MEASURED_TEXTS = 4  # whose attention maps are measured


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse_arguments(argv)
    if options.only_draw:
        draw(options.output_dir)
        return
    text = describe_text(options)
    data = {"mlm": text, "glue": describe_glue(options), "lra": describe_arena(options)}
    size = scale(options.budget)
    if options.max_steps is not None:
        size = size._replace(steps=options.max_steps)
    cells = choose_rows(plan_cells(options.table, options.seeds, size, data), options.rows)
    check_folder(options.output_dir, cells, read_cells(options.output_dir))
    if options.list:
        print(list_cells(options.output_dir, cells))
        return
    reads_text = any(cell.settings["task"] in ("mlm", "clm", "glue") for cell in cells)
    run_cells(options, cells, prepare_tokenizer(options, text) if reads_text else "")
    if read_cells(options.output_dir):
        draw(options.output_dir)
        print(f"report: {options.output_dir / 'results.md'}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=list(ABLATION_TABLES), help=f"one or more of {', '.join(TABLES)}")
    parser.add_argument("--rows", nargs="+", help="only these rows of the tables, by their names; default: all")
    parser.add_argument("--budget", type=float, default=1.0, help="0.25: some five minutes a cell on one core")
    parser.add_argument("--max_steps", type=int, help="steps of a training, instead of those of the budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--train_file", type=Path, help=f"text to learn from; default: {' '.join(HUB_TEXT)} on the Hub")
    parser.add_argument("--validation_file", type=Path, help="text to measure on")
    parser.add_argument("--tokenizer_name", help="folder or name on the Hub; default: one trained on the training text")
    parser.add_argument(
        "--glue_dir", type=Path, help="folder of CoLA, SST-2, ... with official files; default: the Hub"
    )
    parser.add_argument(
        "--glue_files", nargs=3, action="append", default=[], metavar=("TASK", "TRAIN", "VALIDATION"),
        help="files of one task, as run_glue.py takes them, in place of --glue_dir's or the Hub's; may be repeated",
    )  # fmt: skip
    for name, origin in ARENA_ORIGINS.items():
        what = f"rows to learn from and rows to measure on, as run_lra.py takes them; default: {origin}"
        parser.add_argument(f"--{name}_files", type=Path, nargs=2, metavar=("TRAIN", "VALIDATION"), help=what)
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="begin no cell after this much time")
    parser.add_argument("--list", action="store_true", help="print the cells and how long they take, run none")
    parser.add_argument("--only_draw", action="store_true", help="draw the cells that there are, run none")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"))
    options = parser.parse_args(argv)
    for table in options.table:
        if table not in TABLES:
            parser.error(f"--table {table}: no such table; choose from {', '.join(TABLES)}.")
    for argument in ("table", "rows", "seeds"):
        values = getattr(options, argument) or []
        if len(set(values)) < len(values):
            parser.error(f"--{argument} {' '.join(map(str, values))}: names one twice.")
    if not options.budget > 0:
        parser.error(f"--budget {options.budget}: must be greater than 0.")
    if options.max_steps is not None and options.max_steps < 2:
        parser.error(f"--max_steps {options.max_steps}: must be at least 2.")
    if not options.max_minutes > 0:
        parser.error(f"--max_minutes {options.max_minutes}: must be greater than 0.")
    if (options.train_file is None) != (options.validation_file is None):
        parser.error("--train_file and --validation_file belong together: give both, or none for the Hub's text.")
    for argument in ("train_file", "validation_file"):
        if (path := getattr(options, argument)) is not None and not path.is_file():
            parser.error(f"--{argument} {path}: no such file.")
    for name in ARENA_ORIGINS:
        for path in getattr(options, f"{name}_files") or ():
            if not path.is_file():
                parser.error(f"--{name}_files {path}: no such file.")
    options.glue_files = {name: (Path(train), Path(validation)) for name, train, validation in options.glue_files}
    for name, paths in options.glue_files.items():
        if name not in GLUE_TASKS:
            parser.error(f"--glue_files {name}: not a task of Table 5; choose from {', '.join(GLUE_TASKS)}.")
        for path in paths:
            if not path.is_file():
                parser.error(f"--glue_files {name} {path}: no such file.")
    if options.glue_dir is not None and not any(glue_files(options.glue_dir, name) for name in GLUE_TASKS):
        parser.error(f"--glue_dir {options.glue_dir}: no folder with train.tsv and dev.tsv, such as SST-2.")
    return options


# ---- Data ----


def text_source(options: argparse.Namespace, split: str) -> TextSource:
    file = {"train": options.train_file, "validation": options.validation_file}[split]
    start = WIKITEXT_TITLE if file is None or file.suffix == ".txt" else None
    return TextSource(str(file) if file else None, None if file else HUB_TEXT, split, document_start=start)


def describe_text(options: argparse.Namespace) -> dict[str, Any]:
    """Text and tokenizer as the settings record them: names and checksums, no paths."""
    tokenizer = (
        {"name": Path(options.tokenizer_name).name}
        if options.tokenizer_name
        else {"trained on": "train", "vocab_size": VOCAB_SIZE}
    )
    if options.train_file is None:
        return {"dataset": " ".join(HUB_TEXT), "tokenizer": tokenizer}
    files = {"train": options.train_file, "validation": options.validation_file}
    return {split: describe_file(file) for split, file in files.items()} | {"tokenizer": tokenizer}


def describe_file(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def glue_files(folder: Path, name: str) -> list[Path]:
    """The official files that a task reads; empty if one is missing."""
    task = get_task(name)
    files = [folder / task.title / file for file in ("train.tsv", *task.eval_files.values())]
    return files if all(file.is_file() for file in files) else []


def describe_glue(options: argparse.Namespace) -> dict[str, Any]:
    """The data of each available task of Table 5 as the settings record them."""
    described: dict[str, Any] = {}
    for name in GLUE_TASKS:
        if name in options.glue_files:
            described[name] = describe_pair(options.glue_files[name])
        elif options.glue_dir is None:
            described[name] = {"dataset": f"{HUB_DATASET} {name}"}
        elif files := glue_files(options.glue_dir, name):
            described[name] = {file.stem: describe_file(file) for file in files}
    return described


def describe_pair(files: Sequence[Path]) -> dict[str, Any]:
    return dict(zip(("train", "validation"), map(describe_file, files), strict=True))


def describe_arena(options: argparse.Namespace) -> dict[str, Any]:
    """The data of each task of Table 6 as the settings record them."""
    described: dict[str, Any] = {}
    for name, origin in ARENA_ORIGINS.items():
        files = getattr(options, f"{name}_files")
        described[name] = (
            describe_pair(files) if files else {"generated": True} if origin == "generated" else {"dataset": origin}
        )
    return described


def prepare_tokenizer(options: argparse.Namespace, text: Mapping[str, Any]) -> str:
    """The tokenizer of all cells, by folder or name on the Hub. A trained one is kept in `output_dir`."""
    if options.tokenizer_name is not None:
        tokenizer = load_tokenizer(ModelArguments(tokenizer_name=options.tokenizer_name))
        if tokenizer.mask_token is None:
            raise ValueError(f"--tokenizer_name {options.tokenizer_name}: no mask_token; give one for masked models.")
        return options.tokenizer_name
    folder = options.output_dir / f"tokenizer-{settings_key(text)}"
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        train_tokenizer(text_source(options, "train").documents()).save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:  # another command was faster
            shutil.rmtree(part)
    return str(folder)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCAB_SIZE` tokens, with RoBERTa's special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


# ---- Cells ----


def choose_rows(cells: Sequence[Cell], rows: Sequence[str] | None) -> Sequence[Cell]:
    """The cells of these rows. Raises ValueError for a row that no table has."""
    known = list(dict.fromkeys(cell.row for cell in cells))
    for row in rows or ():
        if row not in known:
            raise ValueError(f"--rows {row!r}: no row of these tables; choose from {', '.join(map(repr, known))}.")
    return [cell for cell in cells if rows is None or cell.row in rows]


def run_cells(options: argparse.Namespace, cells: Sequence[Cell], tokenizer: str) -> None:
    """Run the cells that have no file yet, one after another, until time is up."""
    began = time.monotonic()
    for number, cell in enumerate(cells, start=1):
        results = read_cells(options.output_dir)  # another command may have written some
        if find_result([result for result in results if place_of(result) == cell.place], cell.settings):
            continue
        if (shared := find_result(results, cell.settings)) is not None:
            place = f"{shared['table']}: {shared['row']}"
            write_cell(options.output_dir, cell, {**without_place(shared), "trained_for": place})
            continue
        if time.monotonic() - began > 60 * options.max_minutes:
            print(f"--max_minutes {options.max_minutes} are over before {cell.name}; the same command goes on there.")
            return
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        content = write_cell(options.output_dir, cell, run_cell(options, cell.settings, tokenizer))
        print(f"{cell.name}: {content['status']}, {headline(content)}, {content['seconds']:.0f} s", flush=True)


def run_cell(options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """Train and measure; an error is recorded as a result too."""
    part = options.output_dir / "runs" / f".{settings_key(settings)}"
    shutil.rmtree(part, ignore_errors=True)  # of a command that was killed: the cell begins again
    began, worked = time.perf_counter(), time.process_time()
    result: dict[str, Any]
    try:
        result = RUNNERS[settings["task"]](options, settings, tokenizer, part)
    except Exception as error:
        traceback.print_exc()
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}", "figures": {}}
    else:
        folder = part.with_name(settings_key(settings))
        shutil.rmtree(folder, ignore_errors=True)  # a command was killed before it wrote the cell
        part.rename(folder)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    return {**result, **{name: round(value, 1) for name, value in spent.items()}, "versions": package_versions()}


class DivergenceWatch(GradientDeviationCallback):
    """Also stops training at the first gradient that is not finite."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not math.isfinite(self.norms[-1]):
            control.should_training_stop = control.should_log = True


def local_deviation(norms: Sequence[float], window: int = 50) -> float:
    """The median over windows of so many steps of the norms' standard deviation by their mean.

    Over a whole run, that figure also tells how far the norms moved while the model learned: one that learns nothing
    has the smallest. NaN for less than one window, and where a norm is not finite.
    """
    windows = [norms[start : start + window] for start in range(0, len(norms) - window + 1, window)]
    if not windows or not all(map(math.isfinite, norms)):
        return math.nan
    return statistics.median(statistics.stdev(some) / statistics.fmean(some) for some in windows)


def run_language_model(
    options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str, folder: Path
) -> dict[str, Any]:
    """A language model: perplexity, deviation of the gradients, and attention maps if it is a masked one."""
    is_masked = settings["task"] == "mlm"
    watch = DivergenceWatch()
    arguments = {
        **training_arguments(settings, folder),
        **text_arguments(options),
        "config_name": write_config(settings, folder),
        "tokenizer_name": tokenizer,
    }
    script = run_mlm if is_masked else run_clm
    found = {}
    with contextlib.suppress(DivergedError):
        found = script.main(command_line(arguments), callbacks=[watch])
    state = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [[entry["step"], finite(entry["loss"])] for entry in state["log_history"] if "loss" in entry]
    figures = {
        "perplexity": finite(found.get("eval_token_perplexity", math.nan)),
        "loss": finite(found.get("eval_loss", math.nan)),
        "tokens": found.get("eval_tokens"),
        "relative_deviation": finite(watch.relative_deviation),
        "local_deviation": finite(local_deviation(watch.norms)),
        "parameters": found.get("parameters"),
        "training_losses": losses,
    }
    if figures["perplexity"] is None:
        diverged = {"step": state["global_step"], "loss": losses[-1][1]}
        return {"status": "diverged", "diverged": diverged, "figures": figures}
    if is_masked and all(MIXERS[name].has_map for name in settings["model"]["layer_types"] if name in MIXERS):
        figures["attention"] = measure_attention(options, folder / "run", settings["training"]["max_seq_length"])
    if not is_masked and set(settings["model"]["layer_types"]) <= {"1+elu", "softmax"}:
        found = measure_score_gradients(options, folder / "run", settings["training"]["block_size"])
        figures |= {f"{name}_score_gradient": value for name, value in found.items()}
    return {"status": "done", "figures": figures}


def training_arguments(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of all training scripts."""
    return {
        **settings["training"],
        "seed": settings["seed"],
        "output_dir": folder / "run",
        "per_device_eval_batch_size": 32,
        "logging_steps": max(1, settings["training"]["max_steps"] // 20),
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "log_level": "error",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def write_config(settings: Mapping[str, Any], folder: Path) -> Path:
    AutoConfig.for_model(**settings["model"]).save_pretrained(folder / "config")
    return folder / "config"


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    flags = (part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value)))
    return ["--do_train", "--do_eval", *flags]


def text_arguments(options: argparse.Namespace) -> dict[str, Any]:
    if options.train_file is None:
        return dict(zip(("dataset_name", "dataset_config_name"), HUB_TEXT, strict=True))
    return {"train_file": options.train_file, "validation_file": options.validation_file}


def measure_attention(options: argparse.Namespace, folder: Path, length: int) -> dict[str, Any]:
    """Accumulated attention, entropy and spectral gap of each layer on the first validation texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = (text for text in text_source(options, "validation").documents() if text.strip())
    batch = tokenizer(
        list(islice(documents, MEASURED_TEXTS)), truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    report = attention_report(AutoModelForMaskedLM.from_pretrained(folder), inputs, edge="shift")
    kept = ("kind", "curve", "entropy", "spectral_gap")
    return {"ratios": report.ratios, "layers": [{name: layer[name] for name in kept} for layer in report.layers]}


def measure_score_gradients(options: argparse.Namespace, folder: Path, length: int) -> dict[str, float]:
    """How far attention weights move with their scores, on the first validation texts of a whole row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = (tokenizer(text)["input_ids"] for text in text_source(options, "validation").documents())
    rows = list(islice((ids[:length] for ids in documents if len(ids) >= length), MEASURED_TEXTS))
    if not rows:
        return {}
    return score_gradients(AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor(rows))


def run_classifier(
    options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str, folder: Path
) -> dict[str, Any]:
    """A GLUE task: fine-tune the masked language model of the settings, which is trained first if need be."""
    pretrained = options.output_dir / "runs" / settings_key(settings["pretrained"])
    spent = {}
    if not pretrained.is_dir():
        first = run_cell(options, settings["pretrained"], tokenizer)
        if first["status"] != "done":
            raise RuntimeError(f"the masked language model to start from {first['status']}")
        spent = {"pretraining_seconds": time_of(first)}
    perplexity = json.loads((pretrained / "run" / "all_results.json").read_text())["eval_token_perplexity"]
    task = get_task(settings["name"])
    arguments = {
        **training_arguments(settings, folder),
        "model_name_or_path": pretrained / "run",
        "tokenizer_name": write_pair_tokenizer(tokenizer, folder),
        "task_name": task.name,
        **glue_arguments(options, task),
    }
    found = run_glue.main(command_line(arguments))
    metric = {"mrpc": "f1", "cola": "matthews_correlation"}.get(task.name, "accuracy")
    figures = {"score": found[f"eval_{metric}"], "metric": metric, "pretrained_perplexity": perplexity}
    return {"status": "done", "figures": figures, **spent}


def glue_arguments(options: argparse.Namespace, task: GlueTask) -> dict[str, Any]:
    if task.name in options.glue_files:
        return dict(zip(("train_file", "validation_file"), options.glue_files[task.name], strict=True))
    return {"data_dir": options.glue_dir / task.title} if options.glue_dir else {}


def write_pair_tokenizer(tokenizer: str, folder: Path) -> Path:
    """The tokenizer with RoBERTa's frame about texts and between two: `<s> A </s>` and `<s> A </s></s> B </s>`."""
    framed = AutoTokenizer.from_pretrained(tokenizer)
    start, end = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    framed.backend_tokenizer.post_processor = processors.RobertaProcessing(
        (end, framed.eos_token_id), (start, framed.bos_token_id), trim_offsets=False, add_prefix_space=False
    )
    framed.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def run_arena(options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str, folder: Path) -> dict[str, Any]:
    """A task of the Long-Range Arena, and the share of the largest class, which a model that learns nothing reaches."""
    arguments = {
        **training_arguments(settings, folder),
        "config_name": write_config(settings, folder),
        "task_name": settings["name"],
        **arena_files(options, settings),
    }
    argv = command_line(arguments)
    found = run_lra.main(argv)
    _, data_args, _, _ = run_lra.parse_arguments(argv)
    task = lra.get_task(settings["name"])
    rows, _ = run_lra.load_rows(task, data_args, "validation", has_cls=False, cache_dir=None, quiet=True)
    figures = {
        "accuracy": found["eval_accuracy"],
        "largest_class": max(Counter(rows.labels).values()) / len(rows),
        "rows": len(rows),
        "parameters": found["parameters"],
    }
    return {"status": "done", "figures": figures}


def arena_files(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Path]:
    """The files of rows that a task is given; what is made for these tables is written once."""
    name, data = settings["name"], settings["data"]
    given = dict(zip(("train", "validation"), getattr(options, f"{name}_files") or (), strict=False))
    if name not in ARENA_DATA or (given and name != "image"):
        return {f"{split}_file": file for split, file in given.items()}
    files = {}
    for split, number in (("train", "max_train_samples"), ("validation", "max_eval_samples")):
        limit = settings["training"].get(number)
        path = options.output_dir / "arena" / f"{name}-{split}-{settings_key({**data, 'rows': limit})}.jsonl"
        if not path.is_file():
            rows = small_images(split, given, data["side"]) if name == "image" else make_rows(name, split, limit, data)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        files[f"{split}_file"] = path
    return files


def make_rows(name: str, split: str, number: int, data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Generated rows of Retrieval or Pathfinder; each split has a seed of its own."""
    seed = ("train", "validation").index(split)
    if name == "retrieval":
        return generate_retrieval(number, seed, data["bytes"], data["subject_share"])
    return generate_small_pathfinder(number, seed, data["drawn"], data["side"])


def small_images(split: str, files: Mapping[str, Path], side: int) -> Iterator[dict[str, Any]]:
    """The rows of Image, with pictures of `side` rows and columns."""
    task = lra.get_task("image")
    rows = lra.read_rows(task, str(files[split])) if files else run_lra.read_hub(task, split, None)[0]
    for (ids,), label in rows:
        yield {"pixels": shrink_image(ids - lra.FIRST, side), "label": label}


def run_speed(options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str, folder: Path) -> dict[str, Any]:
    """Table 7 is measured by `benchmark_model.py --table7`."""
    lengths = ",".join(map(str, settings["lengths"]))
    flags = ["--table7", "--lengths", lengths, *(f"--{name}={settings[name]}" for name in ("repeats", "max_minutes"))]
    report = benchmark_model.main([*flags, "--output_dir", str(folder)])
    timed = [row for row in report["results"] if "steps_per_second" in row]
    kept = ("model", "length", "steps_per_second", "peak_bytes")
    figures = {
        task: [{name: row[name] for name in kept} for row in timed if row["task"] == task]
        for task in ("training", "inference")
    }
    return {"status": "done", "device": report["device"], "figures": figures}


def run_log_normal(
    options: argparse.Namespace, settings: Mapping[str, Any], tokenizer: str, folder: Path
) -> dict[str, Any]:
    """The figures of Linear Log-Normal Attention: nothing is trained."""
    generator = torch.Generator().manual_seed(settings["seed"])
    tokens, head_dim = settings["tokens"], settings["head_dim"]
    folder.mkdir(parents=True)
    return {
        "status": "done",
        "figures": {
            "error": log_normal_error(tokens, head_dim, generator),
            "concentration": compare_concentration(settings["input_scales"], tokens, head_dim, generator),
            "memory": compare_memory(settings["lengths"], head_dim),
        },
    }


RUNNERS = {
    "mlm": run_language_model,
    "clm": run_language_model,
    "glue": run_classifier,
    "lra": run_arena,
    "speed": run_speed,
    "lln": run_log_normal,
}


def finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def headline(content: Mapping[str, Any]) -> str:
    if "error" in content:
        return content["error"]
    if "diverged" in content:
        return f"step {content['diverged']['step']}, loss {content['diverged']['loss']}"
    name, value = next(iter(content["figures"].items()))
    return ", ".join(content["figures"]) if isinstance(value, list) else f"{name} {value:.4g}"  # speed has tables


def list_cells(folder: Path, cells: Sequence[Cell]) -> str:
    """The cells, which of them are done, and how long the others should take."""
    results = read_cells(folder)
    lines: list[str] = []
    open_settings: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        result = find_result(results, cell.settings)
        if result is None:
            open_settings[settings_key(cell.settings)] = cell.settings
        lines.append(f"{cell.name}: {headline(result) if result else 'to do'}")
    lines.append(f"{len(open_settings)} trainings to do{estimate(results, open_settings.values())}")
    return "\n".join(lines)


def estimate(results: Sequence[Mapping[str, Any]], planned: Iterable[Mapping[str, Any]]) -> str:
    """Estimated minutes of work for runs with these settings, from the mean time of a step in finished runs of their
    kind; empty if a kind has none."""
    seconds: dict[tuple[str, str], list[float]] = {}

    def note(settings: Mapping[str, Any], spent: float) -> None:
        seconds.setdefault(kind_of(settings), []).append(spent / steps_of(settings))

    started_from = [result["settings"]["pretrained"] for result in results if "pretrained" in result["settings"]]
    for result in results:
        pretraining = result.get("pretraining_seconds", 0.0)
        note(result["settings"], time_of(result) - pretraining)
        if pretraining:
            note(result["settings"]["pretrained"], pretraining)
    planned = list(planned)
    for settings in [settings["pretrained"] for settings in planned if "pretrained" in settings]:
        if settings not in started_from:
            started_from.append(settings)
            planned.append(settings)
    if not planned or not set(map(kind_of, planned)) <= set(seconds):
        return ""
    total = sum(statistics.fmean(seconds[kind_of(settings)]) * steps_of(settings) for settings in planned)
    return f", some {total / 60:.0f} minutes of one core"


def kind_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    return settings["task"], settings.get("name", "")


def steps_of(settings: Mapping[str, Any]) -> int:
    """Steps of a run; 1 where nothing is trained."""
    return settings.get("training", {}).get("max_steps", 1)


if __name__ == "__main__":
    main()
