"""What can be known of the launches without a GPU: kernels compiled for sm_90, through a driver that runs nothing.

    PYTHONPATH=src:scripts python -m gpu_checks.without_gpu

Calls of the ops in bfloat16 go through the real launcher, which compiles as it would for an H100; only the last step,
the launch itself, does nothing. Prints two tables in Markdown. One has for each launch, at two shapes: programs ·
programs that fit onto a multiprocessor at a time · registers of a thread · bytes of stack, where registers are spilled
to · KiB of shared memory · asynchronous copies in the code. The other has what a call costs the host. Registers, stack
and code are those of the binary, by cuobjdump, which triton brings.
"""

import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # it would turn the kernels into Python functions
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud, because triton 3.10 changes the default

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmark_ops import Shape, make_inputs
from transnormer_hf.model import ops_transnormer, triton_diag_transnormer, triton_norm_transnormer

from .timings import OPS, our_norm, our_op

MULTIPROCESSORS = 132  # of an H100, and what each of them has:
REGISTERS, SHARED_BYTES, WARPS = 65536, 228 * 1024, 64
SHAPES = (Shape("B4 H16 D128 T2048", 4, 16, 2048, 128), Shape("B8 H8 D64 T1024", 8, 8, 1024, 64))


class Binary(NamedTuple):
    """A compiled kernel. async_copies: instructions that copy from global to shared memory past the registers."""

    name: str
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    async_copies: int

    @property
    def per_multiprocessor(self) -> int:
        """Programs that fit onto one. Registers come in steps of 8 per thread; 1 KiB of shared memory is reserved."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(REGISTERS // registers, SHARED_BYTES // (self.shared_bytes + 1024), WARPS // self.warps, 32)


class Driver:
    """Stands in for the driver of an H100. launches: (number of the binary, programs)."""

    def __init__(self) -> None:
        self.warps = 0
        self.binaries: list[Binary] = []
        self.launches: list[tuple[int, int]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name: str, code: bytes, shared_bytes: int, device: int) -> tuple[int, ...]:
        self.binaries.append(inspect_binary(name, code, shared_bytes, self.warps))
        return 1, len(self.binaries) - 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.warps = metadata.num_warps  # of the binary that is loaded next

        def run(columns: int, rows: int, layers: int, stream: int, function: int, *arguments: Any) -> None:
            self.launches.append((function, columns * rows * layers))

        return run


def inspect_binary(name: str, code: bytes, shared_bytes: int, warps: int) -> Binary:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, assembly = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    fields = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    copies = len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)", assembly))
    return Binary(name, warps, shared_bytes, fields["REG"], fields["STACK"] + fields["LOCAL"], copies)


def main() -> None:
    fake = Driver()
    driver.set_active(fake)
    print(f"triton {triton.__version__}, torch {torch.__version__}; sm_90, bfloat16, LRPE, phi = 1 + elu\n")
    with (
        mock.patch.object(ops_transnormer, "unsupported", supports_all),
        mock.patch.object(triton_norm_transnormer, "target_of", always_sm_90),
        mock.patch.object(triton_diag_transnormer, "target_of", always_sm_90),
    ):
        print_launches(fake)
        print_host_times(fake)


def ops(head_dim: int) -> dict[str, Callable[..., torch.Tensor]]:
    device = torch.device("cpu")
    return {**{what: our_op(*op, head_dim, device) for what, op in OPS.items()}, "simple_rms_norm": our_norm}


def supports_all(*tensors: torch.Tensor) -> None:
    """In place of `unsupported`, which asks for CUDA tensors."""


def always_sm_90(tensor: torch.Tensor) -> str:
    return "sm_90"


def print_launches(fake: Driver) -> None:
    """A row for each launch, with both shapes side by side."""
    rows: dict[tuple[str, str, int], list[str]] = {}
    for shape in SHAPES:
        leaves = [tensor.requires_grad_() for tensor in make_inputs(shape, torch.device("cpu"), torch.bfloat16)]
        for what, run in ops(shape.head_dim).items():
            fake.launches.clear()
            output = run(*leaves)
            forward = len(fake.launches)
            torch.autograd.grad(output, leaves, torch.zeros_like(output), allow_unused=True)
            for number, (function, programs) in enumerate(fake.launches):
                kernel = fake.binaries[function]
                row = rows.setdefault((what, "forward" if number < forward else "backward", number), [kernel.name])
                row.append(
                    f"{programs:,} · {kernel.per_multiprocessor} · {kernel.registers} · {kernel.stack_bytes} · "
                    f"{kernel.shared_bytes / 1024:.0f} · {kernel.async_copies}"
                )
    print(f"| op | pass | kernel | {' | '.join(shape.name for shape in SHAPES)} |\n|---|---|---|---|---|")
    for (what, direction, _), cells in rows.items():
        print(f"| {what} | {direction} | {' | '.join(cells)} |")


def print_host_times(fake: Driver) -> None:
    print("\n| op | launches forward | launches backward | host µs forward | host µs forward + backward |")
    print("|---|---|---|---|---|")
    shape = Shape("call", 1, 2, 64, 64)
    leaves = [tensor.requires_grad_() for tensor in make_inputs(shape, torch.device("cpu"), torch.bfloat16)]
    for what, run in ops(shape.head_dim).items():
        grad = torch.zeros_like(run(*leaves))

        def forward(run: Any = run) -> None:
            with torch.no_grad():
                run(*leaves)

        def both(run: Any = run, grad: Any = grad) -> None:
            torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

        counts, microseconds = [], []
        for call in (forward, both):
            call()
            fake.launches.clear()
            call()
            counts.append(len(fake.launches))
            microseconds.append(1e6 * lower_quartile(call))
        print(f"| {what} | {counts[0]} | {counts[1] - counts[0]} | {microseconds[0]:.0f} | {microseconds[1]:.0f} |")


def lower_quartile(call: Callable[[], None]) -> float:
    """Seconds of a call: the lower quartile of 500, because other processes only ever add."""
    times = []
    for _ in range(500):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.quantiles(times, n=4)[0]


if __name__ == "__main__":
    main()
