"""Compile every Triton kernel in every shipped configuration, for GPUs that need not be there.

    python scripts/compile_kernels.py --targets sm_80,sm_90,gfx942 --output report.json

The compilers for all targets are in the triton package; no GPU, driver or CUDA toolkit is needed. For every kernel,
target, dtype, head_dim and variant the report has the registers, the bytes of spilled registers, the shared memory, and
whether the matrix products run on tensor cores (matrix cores on AMD). The exit status is 1 where a configuration spills
registers, needs more shared memory than the target has, or does not compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # it would turn the kernels into Python functions
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud, because triton 3.10 changes the default

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transnormer_hf import diag_kernels_transnormer, norm_kernels_transnormer
from transnormer_hf.triton_features_transnormer import KernelSpec, KernelVariant, compile_arguments

KERNELS: list[KernelSpec] = [*norm_kernels_transnormer.KERNELS, *diag_kernels_transnormer.KERNELS]
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (16, 32, 64, 128, 256)


class Target(NamedTuple):
    """A compiler target and the shared memory that one program may take there, in bytes."""

    gpu: GPUTarget
    shared_bytes: int


KIB = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), 64 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


class Job(NamedTuple):
    """One kernel to compile: names only, so that a worker process can look it up."""

    kernel: str
    target: str
    dtype: str
    head_dim: int
    variant: str


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    jobs = list(list_jobs(options.targets, options.dtypes, options.head_dims, options.kernels, options.variants))
    if not jobs:
        raise SystemExit("No kernel matches --kernels, --variants, --dtypes and --head_dims.")
    rows, failures = [], []
    with ProcessPoolExecutor(options.workers) as pool:
        for done, (job, row) in enumerate(zip(jobs, pool.map(compile_job, jobs), strict=True), start=1):
            rows.append(row)
            name = f"{job.kernel} ({job.variant}) on {job.target}, {job.dtype}, head_dim {job.head_dim}"
            failures += [f"{name}: {problem}" for problem in problems(row)]
            show_progress(done, len(jobs), job, len(failures))
    print_table(rows)
    Path(options.output).write_text(json.dumps({"kernels": rows}, indent=1) + "\n")
    print(f"{len(rows)} kernels compiled, {len(failures)} problems; report: {options.output}")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="sm_80,sm_90,gfx942", help=f"any of {', '.join(TARGETS)}")
    parser.add_argument("--output", default="kernel_report.json", help="where the report goes")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"any of {', '.join(DTYPES)}")
    parser.add_argument("--head_dims", default=",".join(map(str, HEAD_DIMS)), help="multiples of 8 from 8 to 256")
    parser.add_argument("--kernels", default="", help="compile only the kernels whose name contains this")
    parser.add_argument("--variants", default="", help="compile only the variants whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile at the same time")
    options = parser.parse_args(arguments)
    options.targets = choose(parser, "--targets", options.targets, tuple(TARGETS))
    options.dtypes = choose(parser, "--dtypes", options.dtypes, DTYPES)
    head_dims = choose(parser, "--head_dims", options.head_dims, tuple(str(dim) for dim in range(8, 257, 8)))
    options.head_dims = [int(head_dim) for head_dim in head_dims]
    if not Path(options.output).absolute().parent.is_dir():
        parser.error(f"--output={options.output}: its folder does not exist; create it first.")
    return options


def choose(parser: argparse.ArgumentParser, name: str, given: str, choices: tuple[str, ...]) -> list[str]:
    """The values of a comma-separated option, or an error that names what would work."""
    values = [value.strip() for value in given.split(",") if value.strip()]
    unknown = [value for value in values if value not in choices]
    if unknown or not values:
        parser.error(
            f"{name}={given}: {', '.join(unknown) or 'nothing'} is not known; choose from {', '.join(choices)}."
        )
    return list(dict.fromkeys(values))


def list_jobs(
    targets: list[str], dtypes: list[str], head_dims: list[int], kernels: str = "", variants: str = ""
) -> Iterator[Job]:
    for spec in KERNELS:
        if kernels not in spec.name:
            continue
        for target in targets:
            for dtype in dtypes:
                for head_dim in head_dims:
                    for variant in spec.variants(target, dtype, head_dim):
                        if variants in variant.name:
                            yield Job(spec.name, target, dtype, head_dim, variant.name)


def compile_job(job: Job) -> dict[str, Any]:
    """A row of the report."""
    spec = next(spec for spec in KERNELS if spec.name == job.kernel)
    variant = next(v for v in spec.variants(job.target, job.dtype, job.head_dim) if v.name == job.variant)
    row: dict[str, Any] = {
        "kernel": job.kernel,
        "target": job.target,
        "config": {"variant": job.variant, **variant.options},
        "dtype": job.dtype,
        "head_dim": job.head_dim,
        "registers": None,
        "spill_bytes": None,
        "shared_bytes": None,
        "tensor_core": False,
        "has_dot": False,
    }
    try:
        row |= compile_variant(spec, variant, TARGETS[job.target].gpu)
    except Exception as error:  # the compilers raise whatever they like, and every row is to be reported
        row["error"] = f"{type(error).__name__}: {str(error).strip()[-300:]}"
    return row


def compile_variant(spec: KernelSpec, variant: KernelVariant, gpu: GPUTarget) -> dict[str, Any]:
    """Registers, spills, shared memory and use of tensor cores of one compiled kernel."""
    signature, constexprs, attrs = compile_arguments(spec, variant)
    source = ASTSource(spec.function, signature, constexprs, attrs)
    compiled = triton.compile(source, target=gpu, options=variant.options)
    if gpu.backend == "cuda":
        registers, spill_bytes = read_ptxas(compiled.asm["ptx"], gpu.arch)
        tensor_core = (
            re.search(r"\b(wgmma|mma|tcgen05)\S*mma|\bmma\.sync|tcgen05\.mma", compiled.asm["ptx"]) is not None
        )
    else:
        registers, spill_bytes = read_amdgcn(compiled.asm["amdgcn"])
        tensor_core = "v_mfma" in compiled.asm["amdgcn"]
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": tensor_core,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
    }


def read_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores, as the assembler reports them."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = re.search(r"^\.target (\S+?)(,|$)", ptx, re.MULTILINE)
    assembler = binaries / "ptxas"
    if arch >= 90 and (binaries / "ptxas-blackwell").exists():  # the newer of the two
        assembler = binaries / "ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={name.group(1) if name else f'sm_{arch}'}", str(path)]
        process = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"ptxas: {process.stderr.strip()[-300:]}")
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", process.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", process.stderr)]
    return max(registers), max(spills, default=0)


def read_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers per thread, and bytes of those that are spilled to memory.

    Scalar registers are spilled to lanes of vector registers, which costs no memory; `.private_segment_fixed_size` says
    if they went further.
    """
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)\s*$", assembly, re.MULTILINE)}
    return fields["vgpr_count"], max(4 * fields["vgpr_spill_count"], fields["private_segment_fixed_size"])


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes of registers")
    limit = TARGETS[row["target"]].shared_bytes
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, the target has {limit}")
    return found


def show_progress(done: int, total: int, job: Job, failures: int) -> None:
    if not sys.stderr.isatty() and done not in (1, total) and done % 20:
        return
    bar = "#" * (30 * done // total)
    line = f"[{bar:<30}] {done}/{total}  {failures} problems  {job.kernel} {job.target} {job.dtype} {job.head_dim}"
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    print(f"{line:<110}", end=end, file=sys.stderr, flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per kernel, target, dtype and head_dim: the worst over the variants."""
    columns = "{:<26}{:<8}{:<6}{:>4}{:>9}{:>10}{:>8}{:>11}  {}"
    print(columns.format("kernel", "target", "dtype", "dim", "variants", "registers", "spill B", "shared KiB", "cores"))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"], row["dtype"], row["head_dim"]), []).append(row)
    for key, group in groups.items():
        registers, spills, shared = (
            max((row[column] or 0) for row in group) for column in ("registers", "spill_bytes", "shared_bytes")
        )
        cores = "yes" if all(row["tensor_core"] for row in group if row["has_dot"]) else "no"
        if not any(row["has_dot"] for row in group):
            cores = "no product"
        failed = sum("error" in row for row in group)
        if failed:
            cores += f", {failed} do not compile"
        print(columns.format(*key, len(group), registers, spills, f"{shared / KIB:.1f}", cores))


if __name__ == "__main__":
    sys.exit(main())
