"""One run of a model, its time and its peak memory."""

import contextlib
import ctypes
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from transnormer_hf.model.ops_transnormer import CHUNK_SIZE, LONGEST_CHUNK

from .contenders import COMPILED, EVERYTHING, Contender, Size

TASKS = ("inference", "training")  # in this order: what is too slow in one is too slow in the next
START_UP_SECONDS = 120  # of a process, imports included, on a busy machine
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


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
    is_finite = bool(result.sum(dtype=torch.float32).isfinite())  # without a second tensor as large as the logits
    model.zero_grad()
    return seconds, is_finite


class ProductCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, those of this package's operators by their formulas.

    A causal softmax attention counts half: it has no other products to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten":
            self.flops += loss_flops(*args) if name == "linear_cross_entropy" else attention_flops(name, *args)
            return result
        count = flop_registry.get(getattr(torch.ops.aten, PRODUCTS.get(name, name.rstrip("_")), None))
        if count is not None:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            plain = {key: value for key, value in kwargs.items() if key not in ("out", "beta", "alpha")}
            self.flops += count(*args, **plain, out_val=result) * (0.5 if given.get("is_causal") else 1)
        return result


def attention_flops(name: str, query: torch.Tensor, *others: Any) -> float:
    """Of the operators of `ops_transnormer.py`, recomputation in the backward pass included.

    query: (batch, heads, seq, head_dim). Where a forward pass has a product of scores (chunk x chunk for each chunk),
    there are 2 of them, and 5 in the backward pass; 2 and 5 with states (head_dim x head_dim) as well if causal, 2 and
    4 if not.
    """
    _, _, seq_len, head_dim = query.shape
    is_forward = name.endswith("forward")
    if name.startswith("diag"):
        wide = min(others[8], seq_len) * (2 if is_forward else 5)
    elif name.startswith("norm") and others[7]:
        is_chunked = seq_len > LONGEST_CHUNK
        wide = ((CHUNK_SIZE + head_dim) if is_chunked else seq_len) * (2 if is_forward else 5)
    elif name.startswith("norm"):
        wide = head_dim * (2 if is_forward else 4)
    else:
        raise NotImplementedError(f"The FLOPs of {name} are not known; leave out the model that has it.")
    return 2.0 * query.numel() * wide


def loss_flops(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, needs: list[bool]
) -> float:
    """Of `linear_cross_entropy`: logits of the tokens with a label, and the gradients that are needed."""
    return 2.0 * int((labels >= 0).sum()) * weight.numel() * (1 + sum(needs[:2]))


# Operators of the CPU whose FLOPs torch knows under another name.
PRODUCTS = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


def gemm_seconds(setting: Setting) -> float:
    """Seconds of one product of 1024 x 1024 matrices: the shortest of three."""
    left, right = torch.randn(2, 1024, 1024, device=setting.device, dtype=setting.dtype)
    taken = []
    for _ in range(3):
        synchronize(left.device)
        begin = time.perf_counter()
        left @ right
        synchronize(left.device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> Any:
    """The cache, or a new one, after it has taken in more tokens (batch, seq)."""
    with torch.inference_mode():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


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
            if not cell.name.endswith(COMPILED):  # a compiled graph shows its products to nobody
                with ProductCounter() as counter:
                    run_once(task, model, batch)
                found["flops"] = counter.flops
            yield task, found if is_finite else {"skipped": "its result is not finite"}
        except torch.OutOfMemoryError:
            yield task, {"skipped": "out of memory"}
        except Exception as error:  # whatever a model may raise at a length it does not take
            yield task, {"skipped": f"it raised {type(error).__name__}: {first_line(error)}"}


def probe_alone(cell: Cell, setting: Setting, max_seconds: float) -> dict[str, dict[str, Any]]:
    """`probe`, each task in a process of its own, so that running out of memory ends no more than that.

    Not all tasks in one: memory that a run has freed may stay with the process, and the next run takes it unseen.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transnormer_hf", "transnormer_hf.tasks.glue"])  # imported once for all of them
    found: dict[str, dict[str, Any]] = {}
    reason = ""  # why a task did not end; the later ones need more of everything
    for task in cell.tasks:
        if reason:
            found[task] = {"skipped": reason}
            continue
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, cell._replace(tasks=(task,)), setting)
        process = context.Process(target=send_probe, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            if receiver.poll(max_seconds + START_UP_SECONDS):
                found[task] = receiver.recv()
            else:
                reason = f"one run takes more than --max_seconds_per_cell {max_seconds:g}"
                process.kill()
        except EOFError:
            process.join()
            # the system ends a process that takes too much memory
            reason = "out of memory" if process.exitcode == -9 else f"its process ended with code {process.exitcode}"
        process.join()
        receiver.close()
        if reason:
            found[task] = {"skipped": reason}
    return found


def send_probe(sender: Any, cell: Cell, setting: Setting) -> None:
    free_large_tensors_at_once()
    transformers.utils.logging.set_verbosity_error()
    for _, result in probe(cell, setting):
        sender.send(result)
    sender.close()


def free_large_tensors_at_once() -> None:
    """From now on, with glibc, each tensor of 1 MB or more has pages of its own, and the system gets them back.

    Most would come from a heap otherwise, whose gaps count as resident: its peak may be twice what the tensors take.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


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
