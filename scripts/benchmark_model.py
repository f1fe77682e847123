#!/usr/bin/env python
"""Time whole models of one size: TransNormer against stock models of transformers, training, inference and decoding.

    python scripts/benchmark_model.py                   # about ten minutes on two cores, into outputs/bench
    python scripts/benchmark_model.py --lengths 512,1024,2048,4096,8192,16384,32768 --max_seconds_per_cell 600 \\
        --max_minutes 300                               # everything that runs
    python scripts/benchmark_model.py --table7          # the form of the paper's Table 7
    python scripts/benchmark_model.py --table7 --hidden_size 768 --num_hidden_layers 12 --num_attention_heads 12 \\
        --models vanilla,nystrom,lln,lln-diag,transnormer-t2-bidirectional --lengths 512,1024,2048,4096,8192,16384 \\
        --repeats 1 --max_seconds_per_cell 600 --max_minutes 90             # RoBERTa-base's size
    python scripts/benchmark_model.py --compile         # each model a second time, by torch.compile

All models have one size (6 layers, width 512 and 8 heads unless options say another), random weights and no dropout. A
training step is forward, cross-entropy over every token, and backward; no optimizer. Inference is a forward that gives
the logits of every token. Decoding is one more token after a context that the model has read.

Only correct models are timed: each is first checked on a short input (TransNormer against its definition in float64,
forward and backward; causality as claimed; decoding against the full forward), and every length must give finite
results once. Models take turns run by run (A B C A B C ...), so that a slow minute of the machine hits all of them.
Runs of many seconds get no warm-up and fewer repeats, as --max_seconds_per_cell allows.

Beside the time stands what it is a multiple of: the FLOPs of the model's own matrix products, recomputation included,
at the rate of a product of 1024 x 1024 matrices that is timed in the same turn.

Peak memory is that of one run above what was held before: without the weights, but in training with their gradients.
On a GPU it is torch's count of allocated bytes. On the CPU it is resident memory: each model, length and task gets a
process of its own, whose high-water mark is read after its first run (on Linux; elsewhere ru_maxrss, in which an
earlier peak may hide a smaller one). With glibc these processes give freed tensors back at once, so it is what tensors
take; in other processes the gaps of its heap come on top, up to as much again. With --quick it is measured in this
process, only to show that it can be.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarking.checks import check
from benchmarking.contenders import COMPILED, CONTENDERS, EVERYTHING, TABLE7, Size
from benchmarking.reports import describe, heading, plot, print_rows, tables
from benchmarking.runs import (
    TASKS,
    Cell,
    Setting,
    build,
    gemm_seconds,
    make_batch,
    prefill,
    probe,
    probe_alone,
    run_once,
    synchronize,
)
from transnormer_hf.training.files import write_atomically

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LENGTHS = (512, 1024, 2048, 4096)
CONTEXTS = (1024, 4096, 16384, 65536)
TABLE7_LENGTHS = (1024, 2048, 3072, 4096, 5120)
QUICK_LENGTHS = (128, 256)
MAX_GROWING_CONTEXT = 16384  # a cache that grows is followed up to here
PREFILL_CHUNK = 2048
WARM_SECONDS = 5  # a run that is longer needs no other before it


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the report that was written."""
    options = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    setting = Setting(options.size, options.device, DTYPES[options.dtype], torch.get_num_threads())
    stem = "table7" if options.table7 else "benchmark_model"
    report: dict[str, Any] = {
        "device": describe(options.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": options.dtype,
        **options.size._asdict(),
        "step": "forward, loss and backward, without an optimizer",
        "complete": False,
        "results": [],
    }
    if options.resume:
        report["results"] = read_results(options.output_dir / f"{stem}.json", report)
    rows = report["results"]
    done = {(row["task"], row["length"]) for row in rows if "length" in row}
    deadline = time.monotonic() + 60 * options.max_minutes

    def save() -> None:  # after each length, so that a run that is cut off leaves what it has
        write_atomically(options.output_dir / f"{stem}.json", json.dumps(report, indent=1) + "\n")
        write_atomically(options.output_dir / f"{stem}.md", tables(report, options.table7))

    print(heading(report))
    names, skipped = check(options.models, setting)
    rows += [row for row in skipped if row not in rows]
    if not options.table7 and not any(task == "decoding" for task, _ in done):
        rows += print_rows(time_decoding(names, setting, options, deadline))
        save()
    too_slow: dict[tuple[str, str], str] = {}
    for length in options.lengths:
        if (TASKS[0], length) in done:
            continue
        timed = [row for row in rows if row.get("task") in TASKS]
        too_slow = too_slow_at(length, timed, options) | too_slow
        rows += print_rows(time_length(names, length, setting, options, deadline, too_slow))
        save()
    report["complete"] = True
    save()
    if not options.table7:
        plot(report, options.output_dir)
    print(f"\n{tables(report, options.table7)}\nreport: {options.output_dir / stem}.json, .md")
    return report


def read_results(file: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with these settings; none where there was no such run.

    Raises SystemExit where the file is of other settings.
    """
    if not file.is_file():
        return []
    earlier = json.loads(file.read_text(encoding="utf-8"))
    for name in report.keys() - {"complete", "results"}:
        if earlier.get(name) != report[name]:
            raise SystemExit(
                f"--resume: {file} has {name}={earlier.get(name)!r}, this run {report[name]!r};"
                " leave --resume out or choose another --output_dir."
            )
    return earlier["results"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--models", help=f"default: all of {','.join(CONTENDERS)}")
    parser.add_argument("--lengths", help=f"tokens per sequence; default: {','.join(map(str, LENGTHS))}")
    parser.add_argument("--contexts", help=f"for decoding; default: {','.join(map(str, CONTEXTS))}")
    parser.add_argument("--tokens_per_batch", type=int, default=1, help="rows to make up this many; default: one row")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each cell")
    parser.add_argument("--decode_steps", type=int, default=24, help="timed tokens per model and context")
    for name, default in Size._field_defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of all models; default: {default}")
    parser.add_argument("--max_seconds_per_cell", type=float, default=40.0, help="a cell that needs more is skipped")
    parser.add_argument("--max_minutes", type=float, default=9.0, help="what does not fit into this is skipped")
    parser.add_argument("--table7", action="store_true", help="steps per second at 1K to 5K, in place of all else")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--resume", action="store_true", help="keep the lengths that the report in output_dir has")
    parser.add_argument("--compile", action="store_true", help="each model also as torch.compile(dynamic=True) has it")
    parser.add_argument("--quick", action="store_true", help="tiny models and lengths: to see that it runs")
    options = parser.parse_args(argv)
    known = TABLE7 if options.table7 else CONTENDERS
    options.models = options.models.split(",") if options.models else list(known)
    for name in options.models:
        if name not in known:
            parser.error(f"--models {name}: no such model; choose from {', '.join(known)}.")
    if options.compile:
        options.models = [each for name in options.models for each in (name, name + COMPILED)]
    defaults = {"lengths": TABLE7_LENGTHS if options.table7 else LENGTHS, "contexts": CONTEXTS}
    for argument, default in defaults.items():
        text = getattr(options, argument)
        if text is None:
            setattr(options, argument, QUICK_LENGTHS if options.quick else default)
            continue
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) >= 2 for part in parts):
            parser.error(f"--{argument} {text}: give whole numbers from 2 with commas between them, e.g. 512,1024.")
        setattr(options, argument, sorted({int(part) for part in parts}))
    least_sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16}
    for argument, least in (("repeats", 1), ("decode_steps", 1), ("tokens_per_batch", 1), *least_sizes.items()):
        if getattr(options, argument) < least:
            parser.error(f"--{argument} {getattr(options, argument)}: must be at least {least}.")
    for argument in ("max_seconds_per_cell", "max_minutes"):
        if not getattr(options, argument) > 0:
            parser.error(f"--{argument} {getattr(options, argument)}: must be greater than 0.")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: choose cpu or cuda.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; use --device cpu.")
    options.size = Size(*(getattr(options, name) for name in Size._fields))
    if options.quick:
        options.repeats, options.decode_steps = 2, 3
        options.size = Size(64, 2, 2, min(options.vocab_size, 128))
    return options


# Timing


def time_length(
    names: Sequence[str],
    length: int,
    setting: Setting,
    options: argparse.Namespace,
    deadline: float,
    too_slow: dict[tuple[str, str], str],
) -> list[dict[str, Any]]:
    """Rows of training and inference at one length, all models in turns.

    too_slow: (model, task) that took too long at a shorter length, with the reason; filled here.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    turns: dict[tuple[str, str], range] = {}  # turn 0 is not timed
    planned = 0.0  # seconds
    ready: dict[str, tuple[PreTrainedModel, dict[str, torch.Tensor]]] = {}
    for name in names:
        tasks = tuple(task for task in TASKS if (name, task) not in too_slow)
        cell = Cell(name, length, max(1, options.tokens_per_batch // length), tasks)
        found: dict[str, dict[str, Any]] = {}
        if not tasks:
            pass
        elif time.monotonic() + planned > deadline:
            found = {task: {"skipped": f"no time left of --max_minutes {options.max_minutes:g}"} for task in tasks}
        elif setting.device == "cpu" and not options.quick:
            found = probe_alone(cell, setting, options.max_seconds_per_cell)
        else:
            found = dict(probe(cell, setting))
        for task in TASKS:
            row: dict[str, Any] = {"model": name, "task": task, "length": length, "batch_size": cell.batch_size}
            row |= found[task] if task in found else {"skipped": too_slow[name, task]}
            one_run = row.pop("seconds", 0.0)
            first = 0 if one_run < WARM_SECONDS else 1
            affordable = int(options.max_seconds_per_cell / max(one_run, 1e-9))
            turns[name, task] = range(first, min(1 + options.repeats, first + affordable))
            needed = len(turns[name, task]) * one_run
            if "skipped" not in row and turns[name, task].stop < 2:
                row["skipped"] = (
                    f"one run takes {one_run:.0f} s, over --max_seconds_per_cell {options.max_seconds_per_cell:g}"
                )
            if "--max_seconds_per_cell" in row.get("skipped", ""):
                row["skipped"] = too_slow.setdefault((name, task), f"{row['skipped']} (at length {length})")
            elif "skipped" not in row and time.monotonic() + planned + needed > deadline:
                row["skipped"] = f"{needed:.0f} s do not fit into --max_minutes {options.max_minutes:g}"
            rows[name, task] = row
            if "skipped" not in row:
                planned += needed
                if name not in ready:
                    batch = make_batch(setting, length, cell.batch_size)
                    ready[name] = build(EVERYTHING[name], setting, length), batch

    seconds: dict[tuple[str, str], list[float]] = {key: [] for key, row in rows.items() if "skipped" not in row}
    of_products: dict[tuple[str, str], list[float]] = {key: [] for key in seconds}
    for turn in range(1 + options.repeats):
        product = gemm_seconds(setting)
        for name, task in seconds:
            if turn not in turns[name, task]:
                continue
            taken, is_finite = run_once(task, *ready[name])
            if not is_finite:
                raise SystemExit(f"{name}: {task} at length {length} is finite in one run and not in the next.")
            if turn:
                seconds[name, task].append(taken)
                of_products[name, task].append(product)
    for key, taken_each in seconds.items():
        rows[key]["gemm_seconds"] = of_products[key]
        rows[key] |= summarize(taken_each, tokens=rows[key]["length"] * rows[key]["batch_size"])
    return list(rows.values())


def too_slow_at(length: int, shorter: list[dict[str, Any]], options: argparse.Namespace) -> dict[tuple[str, str], str]:
    """(model, task) to the reason not to try it: too slow even at the cost per token of a shorter length."""
    reasons = {}
    for row in shorter:
        tokens = max(length, options.tokens_per_batch // length * length)
        seconds = 1e-6 * tokens * row.get("microseconds_per_token", 0.0)
        if seconds > options.max_seconds_per_cell:
            reasons[row["model"], row["task"]] = (
                f"at the cost per token of length {row['length']} a run takes {seconds:.0f} s,"
                f" over --max_seconds_per_cell {options.max_seconds_per_cell:g}"
            )
    return reasons


def time_decoding(
    names: Sequence[str], setting: Setting, options: argparse.Namespace, deadline: float
) -> list[dict[str, Any]]:
    """Rows of one token more after each context, all models and contexts in turns."""
    rows: list[dict[str, Any]] = []
    caches: list[tuple[dict[str, Any], PreTrainedModel, Any]] = []
    longest = max(options.contexts) + options.decode_steps + 1
    ids = make_batch(setting, longest, batch_size=1)["input_ids"]
    for name in names:
        contender = EVERYTHING[name]
        if contender.cache is None:
            continue
        model, cache, taken_in = build(contender, setting, longest).eval(), None, 0
        begin, reason = time.monotonic(), None
        for context in options.contexts:
            row: dict[str, Any] = {"model": name, "task": "decoding", "length": context, "batch_size": 1}
            rows.append(row)
            spent = time.monotonic() - begin
            if contender.cache == "grows" and context > MAX_GROWING_CONTEXT:
                reason = f"its cache grows, and is followed up to {MAX_GROWING_CONTEXT} tokens"
            elif reason is None and spent * context / max(1, taken_in) > options.max_seconds_per_cell:
                reason = (
                    f"taking in the context takes longer than --max_seconds_per_cell {options.max_seconds_per_cell:g}"
                )
            elif time.monotonic() > deadline:
                reason = f"no time left of --max_minutes {options.max_minutes:g}"
            if reason is not None:
                row["skipped"] = reason
                continue
            if not contender.prefills_in_chunks:
                cache, taken_in = None, 0
            pieces = ids[:, taken_in:context].split(PREFILL_CHUNK if contender.prefills_in_chunks else context, 1)
            for piece in pieces:
                cache = prefill(model, cache, piece)
            taken_in = context
            branch = copy.deepcopy(cache)
            row["state_bytes"] = tensor_bytes(branch)
            caches.append((row, model, branch))

    seconds: list[list[float]] = [[] for _ in caches]
    for turn in range(1 + options.decode_steps):  # the first one warms up
        for index, (row, model, cache) in enumerate(caches):
            token = ids[:, row["length"] + turn, None]
            synchronize(ids.device)
            begin = time.perf_counter()
            with torch.inference_mode():
                logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            synchronize(ids.device)
            taken = time.perf_counter() - begin
            if not logits.isfinite().all():
                raise SystemExit(f"{row['model']}: logits after {row['length'] + turn} tokens are not finite.")
            if turn:
                seconds[index].append(taken)
    for (row, _, _), taken_each in zip(caches, seconds, strict=True):
        row |= summarize(taken_each, tokens=1)
    return rows


def tensor_bytes(holder: Any) -> int:
    """Bytes of all tensors that an object holds, directly or in what it holds."""
    pending, seen, total = [holder], set(), 0
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            pending += vars(item).values()
    return total


def summarize(seconds: list[float], tokens: int) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "median_seconds": median,
        "quartile_seconds": [low, high],
        "seconds": seconds,
        "steps_per_second": 1 / median,
        "tokens_per_second": tokens / median,
        "microseconds_per_token": 1e6 * median / tokens,
    }


if __name__ == "__main__":
    main()
