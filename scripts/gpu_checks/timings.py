"""What the machine is, and times: ops beside softmax attention, calls of the host, whole models beside Llama."""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import benchmark_model
import benchmark_ops
from benchmark_ops import Contender, Shape, copy_bandwidth, norm_by, peers, version_of
from benchmarking.contenders import Size
from benchmarking.reports import describe
from benchmarking.runs import Cell, Setting, probe
from transnormer_hf import diag_attention, norm_attention, simple_rms_norm

from .correctness import make_lrpe
from .rows import MEASURED, SKIPPED, Recorder

OPS = {"norm_attention, causal": ("norm", True), "norm_attention, bidirectional": ("norm", False),
       "diag_attention, causal": ("diag", True)}  # fmt: skip
LENGTHS = tuple(1024 << power for power in range(7))
TINY_SHAPES = (Shape("B1_T20_H1_D16", 1, 1, 20, 16),)
SHAPES = (*benchmark_ops.REGISTRY_SHAPES, *(Shape(f"B1_T{length}_H16_D64", 1, 16, length, 64) for length in LENGTHS))
OURS, SDPA = "ours", "SDPA flash"
MODEL_125M = Size(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000)
TOKENS_PER_BATCH = 16384


def describe_machine(record: Recorder) -> None:
    device = record.device
    fields: dict[str, Any] = {
        "device": describe(device),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "transformers": transformers.__version__,
        "packages": {name: version_of(name) for name in ("triton", "pytorch-triton-rocm", "flash-linear-attention")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            or first_line_of("cat", "/sys/module/amdgpu/version"),
        }
    bandwidth = copy_bandwidth(device, 1 << (20 if record.tiny else 30))
    size = 64 if record.tiny else 8192
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = min(benchmark_ops.time_once(lambda: square @ square, device) for _ in range(5))
    record.add("machine", MEASURED, copy_bytes_per_second=bandwidth, bf16_flops=2 * size**3 / seconds, **fields)


def first_line_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


# Ops


def time_ops(record: Recorder) -> None:
    time_calls(record)
    bandwidth = copy_bandwidth(record.device, 1 << (20 if record.tiny else 28))
    time_shapes(record, bandwidth, lambda operation, causal, head_dim: contenders(record, operation, causal, head_dim))
    with record.guard("flash-linear-attention"):  # last: it tunes itself for each shape
        ready, skipped = benchmark_ops.check(peers(record.device), record.device, torch.bfloat16)
        for peer, reason in skipped:
            record.add(peer, SKIPPED, reason=reason)
        time_shapes(record, bandwidth, lambda *op: ready if op[:2] == ("norm", True) else [])


def time_shapes(
    record: Recorder, bandwidth: float, list_contenders: Callable[[str, bool, int], list[Contender]]
) -> None:
    options = argparse.Namespace(repeats=2 if record.tiny else 15, seconds=2.0, gigabytes=8.0)
    for shape in TINY_SHAPES if record.tiny else SHAPES:
        for what, (operation, causal) in OPS.items():
            for contender in list_contenders(
                operation, causal, shape.head_dim
            ):  # one by one: a failure of one is none of the others
                name = f"{what}, {shape.name}, {contender.name}"
                if record.seconds_left() < 8:
                    record.add(name, SKIPPED, reason="no time left")
                    continue
                with record.guard(name):
                    rows = benchmark_ops.time_shape(
                        operation, causal, shape, [contender], record.device, torch.bfloat16, bandwidth, options, {}
                    )
                    for row in rows:
                        add_timing(record, f"{name}, {row['direction']}", row | {"of": what})


def add_timing(record: Recorder, name: str, row: dict[str, Any]) -> None:
    """A row of the benchmarks, which says with "skipped" why there is no time."""
    status, reason = (SKIPPED, {"reason": row["skipped"]}) if "skipped" in row else (MEASURED, {})
    record.add(name, status, **reason, **{key: value for key, value in row.items() if key != "skipped"})


def contenders(record: Recorder, operation: str, causal: bool, head_dim: int) -> list[Contender]:
    found = [Contender(OURS, our_op(operation, causal, head_dim, record.device), None, 0)]
    if operation == "norm":
        found.append(Contender(f"{OURS}, no phi and no LRPE", norm_by("triton", causal), None, 0))
        found.append(Contender(SDPA, flash(record, causal), None, 0, is_ours=False))
    return found


def our_op(operation: str, causal: bool, head_dim: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """As a T2 layer calls it: phi is 1 + elu, with LRPE; its parameters are there before the call."""
    lrpe = make_lrpe(head_dim, device)

    def norm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return norm_attention(query, key, value, causal=causal, feature_map="1+elu", lrpe=lrpe, backend="triton")[0]

    def diag(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return diag_attention(query, key, value, block_size=64, causal=causal, lrpe=lrpe, backend="triton")

    return norm if operation == "norm" else diag


def our_norm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """SimpleRMSNorm of the queries, all heads together."""
    return simple_rms_norm(query.transpose(1, 2).flatten(2), backend="triton")


def flash(record: Recorder, causal: bool) -> Callable[..., torch.Tensor]:
    """Softmax attention by FlashAttention alone: another kernel in its place would be a row with an error."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if record.device.type == "cpu":
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return run


def time_calls(record: Recorder) -> None:
    """Launches of a call, and what it costs the host: short inputs, many calls, one wait at the end."""
    seq_len, head_dim = (4, 16) if record.tiny else (64, 64)
    runs: dict[str, Callable[..., torch.Tensor]] = {
        **{what: our_op(*op, head_dim, record.device) for what, op in OPS.items()},
        "simple_rms_norm": our_norm,
        SDPA: flash(record, True),
    }
    for what, run in runs.items():
        with record.guard(f"calls of {what}"):
            shape = Shape("call", 1, 2, seq_len, head_dim)
            inputs = benchmark_ops.make_inputs(shape, record.device, torch.bfloat16)
            leaves = [tensor.requires_grad_() for tensor in inputs]
            grad = torch.randn_like(run(*leaves))

            def forward(run: Any = run, leaves: Any = leaves) -> None:
                with torch.no_grad():
                    run(*leaves)

            def both(run: Any = run, leaves: Any = leaves, grad: Any = grad) -> None:
                torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

            fields: dict[str, Any] = {}
            for direction, call in (("forward", forward), ("forward+backward", both)):
                fields[direction] = {
                    "host_microseconds": round(1e6 * seconds_per_call(record, call), 1),
                    "launches": count_launches(record, call),
                }
            record.add(f"calls of {what}", MEASURED, **fields)


def seconds_per_call(record: Recorder, call: Callable[[], None]) -> float:
    repeats = 1 if record.tiny else 200
    for _ in range(1 if record.tiny else 5):
        call()
    record.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - begin
    record.synchronize()
    return seconds / repeats


def count_launches(record: Recorder, call: Callable[[], None]) -> dict[str, int] | None:
    """Kernels, copies and fills of one call, by name; None without a GPU."""
    if record.device.type == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return {event.key[:60]: event.count for event in profiler.key_averages() if event.self_device_time_total > 0}


# Whole models


def time_models(record: Recorder) -> None:
    """A forward and a training step at several lengths, and decoding after several contexts, in bfloat16."""
    transformers.utils.logging.set_verbosity_error()
    size = Size(32, 2, 1, 64) if record.tiny else MODEL_125M
    dtype = torch.float32 if record.tiny else torch.bfloat16
    setting = Setting(size, record.device.type, dtype, torch.get_num_threads())
    names = ["transnormer-t2", "llama"]
    options = argparse.Namespace(
        tokens_per_batch=32 if record.tiny else TOKENS_PER_BATCH,
        repeats=1 if record.tiny else 3,
        decode_steps=2 if record.tiny else 16,
        contexts=(16,) if record.tiny else (1024, 16384, 65536),
        max_seconds_per_cell=1e3,
        max_minutes=8,
        quick=record.tiny,
    )
    for name in names:  # loads the kernels: how long that takes must not speak for the runs after it
        with record.guard(f"first step of {name}"):
            list(probe(Cell(name, 16 if record.tiny else 512, 1), setting))
    for length in (16,) if record.tiny else (4096, 16384, 65536, 1024):
        with record.guard(f"models at {length} tokens"):
            for row in benchmark_model.time_length(names, length, setting, options, record.deadline - 5, {}):
                add_timing(record, f"{row['model']}, {row['task']}, {length} tokens", row)
    with record.guard("decoding"):
        for row in benchmark_model.time_decoding(names, setting, options, record.deadline - 5):
            add_timing(record, f"{row['model']}, {row['task']}, {row['length']} tokens", row)
