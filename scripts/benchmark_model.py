#!/usr/bin/env python
"""Time whole models of one size: TransNormer against stock models of transformers, training, inference and decoding.

    python scripts/benchmark_model.py                   # about ten minutes on two cores, into outputs/bench
    python scripts/benchmark_model.py --lengths 512,1024,2048,4096,8192,16384,32768 --max_seconds_per_cell 600 \\
        --max_minutes 300                               # everything that runs
    python scripts/benchmark_model.py --table7          # the form of the paper's Table 7

All models have 6 layers, width 512, 8 heads, random weights and no dropout. A training step is forward, cross-entropy
over every token, and backward; no optimizer. Inference is a forward that gives the logits of every token. Decoding is
one token more after a context that the model has taken in.

Nothing wrong is timed: each model is checked on a short input first (TransNormer against its definition in float64,
forward and backward; causal or not, as it claims; decoding against the full forward), and every length is run once for
finite results. Models take turns run by run (A B C A B C ...), so that a slow minute of the machine hits all of them.
A run of many seconds is not warmed up for, and is repeated less often: as --max_seconds_per_cell allows.

Peak memory is that of one run above what was held before it, so without the weights, and in training with their
gradients. On a GPU it is torch's count of allocated bytes. On the CPU it is resident memory: each model and length gets
a process of its own, whose high-water mark is read after its first run (Linux; elsewhere ru_maxrss, which may hide a
small peak behind an earlier one). With --quick the process is this one, and the figure only shows that it is measured.
"""

import argparse
import contextlib
import copy
import functools
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from transnormer_hf import TransNormerConfig
from transnormer_hf.baselines import baseline_config
from transnormer_hf.glue import write_atomically
from transnormer_hf.modeling_transnormer import TransNormerAttention

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Relative errors, in the 2-norm over all logits and over all gradients.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
TASKS = ("inference", "training")  # in this order: the peak of training hides none of inference
LENGTHS = (512, 1024, 2048, 4096)
CONTEXTS = (1024, 4096, 16384, 65536)
TABLE7_LENGTHS = (1024, 2048, 3072, 4096, 5120)
QUICK_LENGTHS = (128, 256)
MAX_GROWING_CONTEXT = 16384  # a cache that grows is followed up to here
CHECKED_LENGTH = 256  # divisible by what the models ask for: landmarks, blocks, windows
PREFILL_CHUNK = 2048
START_UP_SECONDS = 120  # of a process, imports included, on a busy machine
WARM_SECONDS = 5  # a run that is longer needs no other before it

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Size(NamedTuple):
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    vocab_size: int = 8192


class Contender(NamedTuple):
    """A model to time.

    build: size and length to the model with random weights.
    define: turns a copy of the model into its definition, in place; None where transformers answers for it.
    cache: what decoding carries along, "constant" or "grows"; None for models that do not decode.
    prefills_in_chunks: whether a prompt may come in several pieces at full speed.
    """

    build: Callable[[Size, int], PreTrainedModel]
    causal: bool = False
    define: Callable[[PreTrainedModel], None] | None = None
    cache: str | None = None
    prefills_in_chunks: bool = True


class Cell(NamedTuple):
    """One model at one length, and what is to be run of it."""

    name: str
    length: int
    batch_size: int
    tasks: tuple[str, ...] = TASKS


class Setting(NamedTuple):
    """What all cells have in common; goes to the processes that measure memory."""

    size: Size
    device: str
    dtype: torch.dtype
    num_threads: int


# Models


def transnormer_config(size: Size, length: int, variant: str, causal: bool) -> TransNormerConfig:
    """The paper's causal or bidirectional model at this size."""
    preset = MODEL_CARDS / f"transnormer-{variant}-{'wikitext103' if causal else 'base'}"
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.from_pretrained(preset, **size._asdict(), max_position_embeddings=length, **no_dropout)


def build_transnormer(
    size: Size, length: int, variant: str, causal: bool, attend: Attend | None = None
) -> PreTrainedModel:
    """TransNormer, its attention replaced where `attend` is given."""
    config = transnormer_config(size, length, variant, causal)
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config)
    if attend is not None:
        replace_attention(model, attend)
    return model


def build_rival(size: Size, length: int, mixer: str) -> PreTrainedModel:
    config = baseline_config(transnormer_config(size, length, "t2", causal=False), mixer)
    return AutoModelForMaskedLM.from_config(config)


def replace_attention(model: PreTrainedModel, attend: Attend) -> None:
    """Put a function of (batch, heads, seq, head_dim) queries, keys and values in the place of every attention."""
    for module in model.modules():
        if isinstance(module, TransNormerAttention):
            # an instance's own attribute goes before the method of its class
            module.__dict__["attend"] = lambda query, key, value, *_: attend(query, key, value)


def use_definition(model: PreTrainedModel) -> None:
    model.config.backend = "eager"


def build_peer(size: Size, length: int, model_type: str, causal: bool) -> PreTrainedModel:
    """A stock model of transformers at this size, with positions for `length` tokens."""
    width, layers, heads, _ = size
    gated, plain = int(8 / 3 * width), 4 * width  # the same number of weights
    dropout_fields = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    fields: dict[str, Any] = {
        **size._asdict(),
        "max_position_embeddings": length,
        **({} if causal else {"intermediate_size": plain}),
    }
    if model_type == "llama":
        fields |= {"intermediate_size": gated, "num_key_value_heads": heads}
    elif model_type == "minimax":
        # every layer linear; one expert, whose products ask for a width that is a multiple of 16
        fields |= {"intermediate_size": -(-gated // 16) * 16, "num_key_value_heads": heads, "head_dim": width // heads}
        fields |= {"layer_types": ["linear_attention"] * layers, "num_local_experts": 1, "num_experts_per_tok": 1}
    elif model_type == "nystromformer":
        fields |= {"segment_means_seq_len": length}  # left at its default it is the number of landmarks: full attention
    elif model_type == "longformer":
        fields |= {"attention_window": min(512, length), "max_position_embeddings": length + 2}
    elif model_type == "reformer":
        del fields["num_hidden_layers"]
        fields |= {"attn_layers": [("local", "lsh")[index % 2] for index in range(layers)], "hash_seed": 0}
        fields |= {"feed_forward_size": plain, "attention_head_size": width // heads, "axial_pos_embds": False}
        dropout_fields = [
            "hidden_dropout_prob",
            *(f"{layer}_attention_probs_dropout_prob" for layer in ("local", "lsh")),
        ]
    if not causal:
        fields |= dict.fromkeys(dropout_fields, 0.0)
    config = AutoConfig.for_model(model_type, pad_token_id=1, bos_token_id=0, eos_token_id=2, **fields)
    return (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config)


# What takes the place of an attention where a step without it is timed.


class IdentityOnValue(torch.autograd.Function):
    """The values, as they are. Queries and keys get gradients of zero, so that their projections still cost what they
    do: what is left of a step is all but the attention itself."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zeros = torch.zeros_like(gradient)
        return zeros, zeros, gradient


def identity_on_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return IdentityOnValue.apply(query, key, value)


def transnormer(variant: str, causal: bool) -> Contender:
    build = functools.partial(build_transnormer, variant=variant, causal=causal)
    return Contender(build, causal, use_definition, "constant" if causal else None)


def peer(model_type: str, causal: bool = False, cache: str | None = None, **options: Any) -> Contender:
    return Contender(
        functools.partial(build_peer, model_type=model_type, causal=causal), causal, None, cache, **options
    )


def t2_without_attention() -> Contender:
    """Causal T2 with the values, as they are, in the place of what attention makes of them."""
    build = functools.partial(build_transnormer, variant="t2", causal=True, attend=identity_on_value)
    return Contender(build, True, functools.partial(replace_attention, attend=lambda query, key, value: value))


def in_one_backbone(mixer: str) -> Contender:
    """Bidirectional T2 with a rival in every layer, and neither LRPE nor a norm around that."""
    return Contender(functools.partial(build_rival, mixer=mixer), define=use_definition)


FLOOR = "t2-identity"
# The order is that of the turns, and where time runs out, what comes last is left out.
CONTENDERS = {
    "transnormer-t2": transnormer("t2", causal=True),
    FLOOR: t2_without_attention(),
    "llama": peer("llama", causal=True, cache="grows"),
    "minimax": peer("minimax", causal=True, cache="constant", prefills_in_chunks=False),
    "transnormer-t2-bidirectional": transnormer("t2", causal=False),
    "bert": peer("bert"),
    "transnormer-t1": transnormer("t1", causal=True),
    "transnormer-t1-bidirectional": transnormer("t1", causal=False),
    "nystromformer": peer("nystromformer"),
    "big_bird": peer("big_bird"),
    "longformer": peer("longformer"),
    "reformer": peer("reformer"),
}
TABLE7 = {
    "vanilla": in_one_backbone("softmax"),
    "1+elu": in_one_backbone("1+elu"),
    "performer": in_one_backbone("performer"),
    "transnormer-t1-bidirectional": CONTENDERS["transnormer-t1-bidirectional"],
    "transnormer-t2-bidirectional": CONTENDERS["transnormer-t2-bidirectional"],
}
EVERYTHING = CONTENDERS | TABLE7


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
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--max_seconds_per_cell", type=float, default=40.0, help="a cell that needs more is skipped")
    parser.add_argument("--max_minutes", type=float, default=9.0, help="what does not fit into this is skipped")
    parser.add_argument("--table7", action="store_true", help="steps per second at 1K to 5K, in place of all else")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--resume", action="store_true", help="keep the lengths that the report in output_dir has")
    parser.add_argument("--quick", action="store_true", help="tiny models and lengths: to see that it runs")
    options = parser.parse_args(argv)
    known = TABLE7 if options.table7 else CONTENDERS
    options.models = options.models.split(",") if options.models else list(known)
    for name in options.models:
        if name not in known:
            parser.error(f"--models {name}: no such model; choose from {', '.join(known)}.")
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
    for argument, least in (("repeats", 1), ("decode_steps", 1), ("tokens_per_batch", 1), ("vocab_size", 16)):
        if getattr(options, argument) < least:
            parser.error(f"--{argument} {getattr(options, argument)}: must be at least {least}.")
    for argument in ("max_seconds_per_cell", "max_minutes"):
        if not getattr(options, argument) > 0:
            parser.error(f"--{argument} {getattr(options, argument)}: must be greater than 0.")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: choose cpu or cuda.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; use --device cpu.")
    options.size = Size(vocab_size=options.vocab_size)
    if options.quick:
        options.repeats, options.decode_steps = 2, 3
        options.size = Size(64, 2, 2, min(options.vocab_size, 128))
    return options


# Checks


def check(names: Sequence[str], setting: Setting) -> tuple[list[str], list[dict[str, Any]]]:
    """The models that are what they say they are, and a row with the reason for each of the others.

    Raises SystemExit where a model of ours is wrong.
    """
    right, skipped = [], []
    for name in names:
        contender = EVERYTHING[name]
        try:
            error = find_error(contender, setting)
        except Exception as raised:  # whatever a model of transformers may raise
            if contender.define is not None:
                raise
            error = f"it raised {type(raised).__name__}: {first_line(raised)}"
        if error is None:
            right.append(name)
        elif contender.define is not None:
            raise SystemExit(f"{name}: {error}; nothing was timed.")
        else:
            skipped.append({"model": name, "skipped": error})
    return right, skipped


def find_error(contender: Contender, setting: Setting) -> str | None:
    """What is wrong with a model's results on a short input, or None."""
    model = build(contender, setting, CHECKED_LENGTH)
    batch = make_batch(setting, CHECKED_LENGTH, batch_size=1)
    logits, gradients = logits_and_gradients(model, batch)
    if not (logits.isfinite().all() and gradients.isfinite().all()):
        return "logits or gradients are not finite"
    if contender.define is not None:
        definition = copy.deepcopy(model).double()
        contender.define(definition)
        for what, result, truth in zip(
            ("logits", "gradients"), (logits, gradients), logits_and_gradients(definition, batch), strict=True
        ):
            error = ((result - truth).norm() / truth.norm()).item()
            if not error < TOLERANCES[setting.dtype]:
                return f"{what} differ from the definition by {error:.1e}, more than {TOLERANCES[setting.dtype]:g}"

    model.eval()
    half = CHECKED_LENGTH // 2 + 1  # within a block
    changed = batch["input_ids"].clone()
    changed[:, half:] = changed[:, half:].flip(1)
    logits = infer(model, batch).double()
    moved = (infer(model, {"input_ids": changed}).double() - logits)[:, :half].norm() / logits[:, :half].norm()
    if contender.causal and moved > 1e-5:
        return f"it is meant to be causal, and later tokens move the logits of earlier ones by {moved:.1e}"
    if not contender.causal and moved <= 1e-5:
        return "it is meant to be bidirectional, and later tokens do not reach earlier ones"

    if contender.cache is not None:
        cache = prefill(model, None, batch["input_ids"][:, :half])
        with torch.inference_mode():
            for column in range(half, half + 3):
                step = model(batch["input_ids"][:, column : column + 1], past_key_values=cache, use_cache=True)
        error = ((step.logits[:, 0] - logits[:, half + 2]).norm() / logits[:, half + 2].norm()).item()
        if not error < TOLERANCES[setting.dtype]:
            return f"decoding differs from the full forward by {error:.1e}"
    return None


def logits_and_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradients of all parameters in one vector, float64."""
    model.train()
    logits = infer(model, {"input_ids": batch["input_ids"]})
    train(model, batch)
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in model.parameters()
    ]
    model.zero_grad()
    return logits.double(), torch.cat([gradient.flatten().double() for gradient in gradients])


# Runs


def build(contender: Contender, setting: Setting, length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return contender.build(setting.size, length).to(setting.device, setting.dtype)


def make_batch(setting: Setting, length: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Random tokens (batch, seq), special ones left out, and all of them as labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, setting.size.vocab_size, (batch_size, length), generator=generator).to(setting.device)
    return {"input_ids": ids, "labels": ids}


def train(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One training step; gradients stay in the model."""
    loss = model(**batch, **without_cache(model)).loss
    loss.backward()
    return loss.detach()


def infer(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["input_ids"], **without_cache(model)).logits


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Keeps causal models from making the cache that only decoding needs."""
    return {"use_cache": False} if model.can_generate() else {}


RUNS: dict[str, Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor]] = {
    "inference": infer,
    "training": train,
}


def run_once(task: str, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, bool]:
    """Seconds of one run, and whether its result is finite."""
    model.train(task == "training")
    synchronize(batch["input_ids"].device)
    begin = time.perf_counter()
    result = RUNS[task](model, batch)
    synchronize(batch["input_ids"].device)
    seconds = time.perf_counter() - begin
    is_finite = bool(result.isfinite().all())
    model.zero_grad()
    return seconds, is_finite


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Peak memory and a first estimate of the time, of a cell on its own


def probe(cell: Cell, setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, its peak memory and the seconds of its first run, or why it was skipped) for each task in turn."""
    torch.set_num_threads(setting.num_threads)
    device = torch.device(setting.device)
    model = None
    for task in cell.tasks:
        try:
            if model is None:
                model = build(EVERYTHING[cell.name], setting, cell.length)
                batch = make_batch(setting, cell.length, cell.batch_size)
                threads_started = torch.randn(256, 256) @ torch.randn(256, 256)  # their stacks are no part of the peak
                del threads_started
            before = start_of_peak(device)
            seconds, is_finite = run_once(task, model, batch)
            found = {"seconds": seconds, "peak_bytes": max(0, peak_bytes(device) - before)}
            yield task, found if is_finite else {"skipped": "its result is not finite"}
        except torch.OutOfMemoryError:
            yield task, {"skipped": "out of memory"}
        except Exception as error:  # whatever a model may raise at a length it does not take
            yield task, {"skipped": f"it raised {type(error).__name__}: {first_line(error)}"}


def probe_alone(cell: Cell, setting: Setting, max_seconds: float) -> dict[str, dict[str, Any]]:
    """`probe` in a process of its own, so that memory is that of the cell, and running out of it ends no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transnormer_hf", "transnormer_hf.glue"])  # imported once for all of them
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_probe, args=(sender, cell, setting), daemon=True)
    process.start()
    sender.close()
    found: dict[str, dict[str, Any]] = {}
    reason = ""
    allowed = max_seconds + START_UP_SECONDS
    while len(found) < len(cell.tasks):
        if not receiver.poll(allowed):
            reason = f"one run takes more than --max_seconds_per_cell {max_seconds:g}"
            process.kill()
            break
        try:
            task, result = receiver.recv()
        except EOFError:
            process.join()
            # the system ends a process that takes too much memory
            reason = "out of memory" if process.exitcode == -9 else f"its process ended with code {process.exitcode}"
            break
        found[task] = result
        allowed = max_seconds
    process.join()
    receiver.close()
    return {task: found.get(task, {"skipped": reason}) for task in cell.tasks}


def send_probe(sender: Any, cell: Cell, setting: Setting) -> None:
    transformers.utils.logging.set_verbosity_error()
    for result in probe(cell, setting):
        sender.send(result)
    sender.close()


def start_of_peak(device: torch.device) -> int:
    """Forget earlier peaks where that can be done, and return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if platform.system() != "Linux":
        return peak_bytes(device)
    with contextlib.suppress(OSError):  # not allowed everywhere
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() != "Linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


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
    for turn in range(1 + options.repeats):
        for name, task in seconds:
            if turn not in turns[name, task]:
                continue
            taken, is_finite = run_once(task, *ready[name])
            if not is_finite:
                raise SystemExit(f"{name}: {task} at length {length} is finite in one run and not in the next.")
            if turn:
                seconds[name, task].append(taken)
    for key, taken_each in seconds.items():
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


def prefill(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> Any:
    """The cache, or a new one, after it has taken in more tokens (batch, seq)."""
    with torch.inference_mode():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


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


# Output


def describe(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def heading(report: dict[str, Any]) -> str:
    return (
        f"{report['num_hidden_layers']} layers, width {report['hidden_size']}, {report['num_attention_heads']} heads, "
        f"vocabulary {report['vocab_size']}, random weights, {report['dtype']}; {report['device']}; torch "
        f"{report['torch']}, transformers {report['transformers']}. A training step is {report['step']}."
    )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def print_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        what = f"{row['model']:<30}{row['task']:<11}{row['length']:>6}"
        if "skipped" in row:
            print(f"{what}  skipped: {row['skipped']}", flush=True)
            continue
        low, high = (1e3 * seconds for seconds in row["quartile_seconds"])
        memory = row.get("peak_bytes", row.get("state_bytes", 0)) / 1e6
        print(f"{what}{1e3 * row['median_seconds']:>11.2f} ms  ({low:.2f} to {high:.2f}){memory:>10.1f} MB", flush=True)
    return rows


def tables(report: dict[str, Any], is_table7: bool) -> str:
    """The report in Markdown: tables of models against lengths, then what was skipped and why."""
    rows = [row for row in report["results"] if "median_seconds" in row]
    parts = [heading(report)]
    if is_table7:
        for task in reversed(TASKS):
            parts += table(
                f"{task.capitalize()}, steps per second", rows, task, lambda row: f"{row['steps_per_second']:.3g}"
            )
    else:
        for task in reversed(TASKS):
            title = task.capitalize()
            parts += table(f"{title}, µs per token (± half the interquartile range)", rows, task, time_and_spread)
            parts += table(
                f"{title}, time as a multiple of TransNormer T2's (causal models: causal, others: bidirectional)",
                rows,
                task,
                functools.partial(relative_to_t2, rows),
            )
            parts += table(f"{title}, peak memory in MB", rows, task, lambda row: f"{row['peak_bytes'] / 1e6:,.0f}")
        shares = [
            {**row, "model": task, "task": "share", "share": share}
            for task in TASKS
            for row in rows
            if (row["model"], row["task"]) == ("transnormer-t2", task)
            and (share := attention_share(rows, row)) is not None
        ]
        parts += table("Share of attention in T2's time", shares, "share", lambda row: f"{100 * row['share']:.1f} %")
        parts += table(
            "Decoding, ms per token by context (± half the interquartile range)",
            rows,
            "decoding",
            lambda row: time_and_spread(row, unit=1e-3),
        )
        parts += table(
            "State carried while decoding, MB", rows, "decoding", lambda row: f"{row['state_bytes'] / 1e6:.2f}"
        )
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in report["results"]:
        if "skipped" in row:
            key = (row["model"], row.get("task", "not timed"), row["skipped"])
            reasons.setdefault(key, []).append(str(row.get("length", "")))
    if reasons:
        parts += ["### Skipped"]
        parts += ["\n".join(f"* {model}, {task} {', '.join(at)}: {why}" for (model, task, why), at in reasons.items())]
    if not report["complete"]:
        parts.append("This run is not complete.")
    return "\n\n".join(parts) + "\n"


def table(
    title: str, rows: list[dict[str, Any]], task: str, entry: Callable[[dict[str, Any]], str | None]
) -> list[str]:
    entries = {(row["model"], row["length"]): text for row in rows if row["task"] == task and (text := entry(row))}
    if not entries:
        return []
    lengths = sorted({length for _, length in entries})
    lines = [f"| model | {' | '.join(map(str, lengths))} |", "|---" * (1 + len(lengths)) + "|"]
    for model in dict.fromkeys(model for model, _ in entries):
        lines.append(f"| {model} | {' | '.join(entries.get((model, length), '–') for length in lengths)} |")
    return [f"### {title}", "\n".join(lines)]


def time_and_spread(row: dict[str, Any], unit: float = 1e-6) -> str:
    per_unit = row["microseconds_per_token"] / row["median_seconds"] * 1e-6 / unit
    low, high = row["quartile_seconds"]
    digits = 2 if unit > 1e-6 else 0
    return f"{row['median_seconds'] * per_unit:.{digits}f} ± {(high - low) / 2 * per_unit:.{digits}f}"


def relative_to_t2(rows: list[dict[str, Any]], row: dict[str, Any]) -> str | None:
    ours = "transnormer-t2" if EVERYTHING[row["model"]].causal else "transnormer-t2-bidirectional"
    ratio = paired(rows, row, ours)
    return None if ratio is None else f"{ratio:.2f}"


def attention_share(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """The share of a step that goes when the identity on the values takes the place of attention."""
    ratio = paired(rows, row, FLOOR)
    return None if ratio is None else 1 - 1 / ratio


def paired(rows: list[dict[str, Any]], row: dict[str, Any], other: str) -> float | None:
    """The median, over turns, of a row's time as a multiple of another model's in the same turn."""
    for candidate in rows:
        if (candidate["model"], candidate["task"], candidate["length"]) == (other, row["task"], row["length"]):
            turns = zip(row["seconds"], candidate["seconds"], strict=False)  # a long run may have fewer of them
            return statistics.median(a / b for a, b in turns)
    return None


PLOTS = {
    "time_per_token": ("training", "microseconds_per_token", "length", "µs per token of a training step"),
    "memory": ("training", "peak_bytes", "length", "peak memory of a training step, bytes"),
    "decode_latency": ("decoding", "median_seconds", "context", "seconds per new token"),
}


def plot(report: dict[str, Any], folder: Path) -> None:
    """One figure each of time per token, memory and decode latency, both axes logarithmic."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib).")
        return
    colors = {name: colormaps["tab20"](index) for index, name in enumerate(CONTENDERS)}
    for name, (task, quantity, x_label, y_label) in PLOTS.items():
        timed = [row for row in report["results"] if row.get("task") == task and "median_seconds" in row]
        rows = [row for row in timed if row[quantity] > 0]  # a tiny model's peak may hide in memory held before
        if not rows:
            continue
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            style: dict[str, Any] = (
                {"linewidth": 2.5} if "transnormer" in model else {"linewidth": 1.2, "linestyle": "--"}
            )
            lengths = [row["length"] for row in mine]
            axes.plot(
                lengths, [row[quantity] for row in mine], marker="o", markersize=4, label=model,
                color=colors[model], **style,
            )  # fmt: skip
            if quantity != "peak_bytes":
                low, high = (
                    [row[quantity] / row["median_seconds"] * row["quartile_seconds"][end] for row in mine]
                    for end in (0, 1)
                )
                axes.fill_between(lengths, low, high, alpha=0.15, color=colors[model], linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
        axes.set(xlabel=f"{x_label}, tokens", ylabel=y_label)
        axes.set_title(f"{report['device']}, {report['dtype']}", fontsize=9)
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        temporary = folder / f".{name}.png"
        figure.savefig(temporary, dpi=110, format="png")
        temporary.replace(folder / f"{name}.png")


if __name__ == "__main__":
    main()
