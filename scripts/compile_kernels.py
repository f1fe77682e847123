"""Compile every Triton kernel in every shipped configuration, for GPUs that need not be there.

    python scripts/compile_kernels.py --targets sm_80,sm_90,gfx942 --output report.json

The compilers for all targets are in the triton package; no GPU, driver or CUDA toolkit is needed. For every kernel,
target, dtype, head_dim and variant the report has the registers, the bytes of spilled registers, the shared memory, and
whether the matrix products run on tensor cores (matrix cores on AMD). The exit status is 1 where a configuration spills
registers, needs more shared memory than the target has, or does not compile.

Every row of the tables of configurations is compiled for each power of two that heads are padded to, in the variant of
the kernel that takes the most registers, and for the two head_dims that are used most in the plainer ones too. That
takes about a quarter of an hour of one core for a target. The report is written as it grows, and `--resume` compiles
only what the report at `--output` lacks or what has changed since, so a run may be interrupted, or be made in parts
with `--kernels`. `--summary` sums all of the report up in a page of Markdown.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # it would turn the kernels into Python functions
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud, because triton 3.10 changes the default
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached answer comes without the log, and some kernels are alike
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # the assembler's own words about registers and spills

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernel_registry import diag, norm
from kernel_registry.registry import KernelSpec, compile_arguments
from transnormer_hf.training.files import write_atomically

KERNELS: list[KernelSpec] = [*norm.KERNELS, *diag.KERNELS]
DTYPES = ("bf16", "fp16", "fp32")
# One for each power of two that head_dim is padded to. Where it is padded, masks are added to what the power of two
# itself would take; the two that are used most are also compiled as they are, in all variants.
HEAD_DIMS = (8, 24, 40, 64, 96, 128, 200)
QUICK_HEAD_DIMS = (8, 24, 64, 96, 128, 200)  # 40 is padded to 64, and both give the same picture
ALL_VARIANTS = (64, 128)
TILE_SIZES = ("BLOCK_T", "HALVES", "TILE", "CHUNK", "BLOCK", "BLOCK_ROWS", "BLOCK_WIDTH")  # constexprs of a table


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

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Job":
        return cls(row["kernel"], row["target"], row["dtype"], row["head_dim"], row["config"]["variant"])


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    jobs = list(
        list_jobs(options.targets, options.dtypes, options.head_dims, options.kernels, options.variants, options.quick)
    )
    if not jobs:
        raise SystemExit("No kernel matches --kernels, --variants, --dtypes and --head_dims.")
    output = Path(options.output)
    known = {Job.of(row): row for row in read_report(output)} if options.resume else {}
    rows, failures, started = [], [], time.monotonic()
    # Triton's cache would answer without the assembler's log; what was compiled before is in the report.
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            options.jobs, initializer=os.environ.__setitem__, initargs=("TRITON_CACHE_DIR", cache)
        ) as pool,
    ):
        results = pool.map(compile_job, jobs, [known.get(job) for job in jobs])
        for done, (job, row) in enumerate(zip(jobs, results, strict=True), start=1):
            rows.append(row)
            known[job] = row
            name = f"{job.kernel} ({job.variant}) on {job.target}, {job.dtype}, head_dim {job.head_dim}"
            failures += [f"{name}: {problem}" for problem in problems(row)]
            show_progress(done, len(jobs), job, len(failures))
            write_report(output, list(known.values()))
    if options.summary:
        write_atomically(Path(options.summary), summary(list(known.values())))
    print_table(rows)
    _, spilled, shared = most(rows)
    print(
        f"{len(rows)} kernels compiled in {time.monotonic() - started:.0f} s, {len(failures)} problems; "
        f"at most {spilled} bytes spilled, {shared:.1f} KiB shared; report: {options.output}"
    )
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


def read_report(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, none where there is no report."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["kernels"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--output={path}: not a report of this script, so --resume cannot go on from it.") from error


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, json.dumps({"kernels": rows}, indent=1) + "\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="sm_80,sm_90,gfx942", help=f"any of {', '.join(TARGETS)}")
    parser.add_argument("--output", default="kernel_report.json", help="where the report goes")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"any of {', '.join(DTYPES)}")
    parser.add_argument("--head_dims", help=f"multiples of 8 from 8 to 256; default {HEAD_DIMS}, quick without 40")
    parser.add_argument("--kernels", default="", help="compile only the kernels whose name contains this")
    parser.add_argument("--variants", default="", help="compile only the variants whose name contains this")
    parser.add_argument("--quick", action="store_true", help="compile only the variant that takes the most registers")
    parser.add_argument("--summary", help="where a page of Markdown about the whole report goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at the same time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the report at --output that still hold")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs}: must be at least 1.")
    options.targets = choose(parser, "--targets", options.targets, tuple(TARGETS))
    options.dtypes = choose(parser, "--dtypes", options.dtypes, DTYPES)
    usual = ",".join(map(str, QUICK_HEAD_DIMS if options.quick else HEAD_DIMS))
    head_dims = choose(parser, "--head_dims", options.head_dims or usual, tuple(str(dim) for dim in range(8, 257, 8)))
    options.head_dims = [int(head_dim) for head_dim in head_dims]
    for name in ("output", "summary"):
        path = getattr(options, name)
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"--{name}={path}: its folder does not exist; create it first.")
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
    targets: list[str],
    dtypes: list[str],
    head_dims: list[int],
    kernels: str = "",
    variants: str = "",
    quick: bool = False,
) -> Iterator[Job]:
    """What is asked for. A kernel lists its variants so that the last one takes the most registers."""
    for spec in KERNELS:
        if kernels not in spec.name:
            continue
        for target in targets:
            for dtype in dtypes:
                for head_dim in head_dims:
                    listed = [v.name for v in spec.variants(target, dtype, head_dim) if variants in v.name]
                    if quick or head_dim not in ALL_VARIANTS:
                        listed = listed[-1:]
                    for variant in listed:
                        yield Job(spec.name, target, dtype, head_dim, variant)


def compile_job(job: Job, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row of the report; the known one where neither kernel nor configuration nor compiler has changed since."""
    spec = next(spec for spec in KERNELS if spec.name == job.kernel)
    variant = next(v for v in spec.variants(job.target, job.dtype, job.head_dim) if v.name == job.variant)
    source, gpu = ASTSource(spec.function, *compile_arguments(spec, variant)), TARGETS[job.target].gpu
    identity = (source.hash(), gpu, sorted(variant.options.items()), triton.__version__)
    row: dict[str, Any] = {
        "kernel": job.kernel,
        "target": job.target,
        "config": {
            "variant": job.variant,
            **variant.options,
            **{name: variant.constexprs[name] for name in TILE_SIZES if name in variant.constexprs},
        },
        "dtype": job.dtype,
        "head_dim": job.head_dim,
        "registers": None,
        "spill_bytes": None,
        "shared_bytes": None,
        "tensor_core": False,
        "has_dot": False,
        "seconds": 0.0,
        "source": hashlib.sha256(repr(identity).encode()).hexdigest()[:16],
    }
    if known is not None and known.get("source") == row["source"] and "error" not in known:
        return known
    started = time.monotonic()
    try:
        row |= compile_source(source, gpu, variant.options)
    except Exception as error:  # the compilers raise whatever they like, and every row is to be reported
        row["error"] = f"{type(error).__name__}: {str(error).strip()[-300:]}"
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def compile_source(source: ASTSource, gpu: GPUTarget, options: dict[str, int]) -> dict[str, Any]:
    """Registers, spills, shared memory and use of tensor cores of one compiled kernel."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        registers, spill_bytes = read_ptxas(log.getvalue())
        products = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])
    else:
        registers, spill_bytes = read_amdgcn(compiled.asm["amdgcn"])
        products = re.search(r"\bv_s?mfma", compiled.asm["amdgcn"])
    # a product whose result is laid out as for plain arithmetic is one that found no matrix instruction
    scalar_products = re.search(r"\btt\.dot\b.*-> tensor<[^>]*#blocked", compiled.asm["ttgir"])
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": products is not None and scalar_products is None,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
    }


def read_ptxas(log: str) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores, as `ptxas -v` reports them of the binary that is shipped."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", log)]
    if not registers or not spills:
        raise RuntimeError(f"ptxas said nothing about registers: {log.strip()[-200:]!r}")
    return max(registers), max(spills)


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


def summary(rows: list[dict[str, Any]]) -> str:
    """A page of Markdown: one table of the targets, and one of the kernels with a column for each target."""
    targets = [target for target in TARGETS if any(row["target"] == target for row in rows)]
    lines = [
        "# What the kernels take",
        "",
        f"Written by `scripts/compile_kernels.py --summary` with triton {triton.__version__}, without a GPU.",
        "",
        "| target | compiled | problems | registers | bytes spilled | shared KiB | without matrix units | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target in targets:
        group = [row for row in rows if row["target"] == target]
        failed = sum(bool(problems(row)) for row in group)
        slow = sum(row["has_dot"] and not row["tensor_core"] for row in group)
        registers, spills, shared = most(group)
        seconds = sum(row["seconds"] for row in group)
        lines.append(
            f"| {target} | {len(group)} | {failed} | {registers} | {spills} | {shared:.1f} | {slow} | {seconds:.0f} |"
        )
    lines += [
        "",
        "Below, the most of any configuration and head_dim: registers of a thread / bytes spilled / shared KiB.",
        "",
        f"| kernel | dtype | {' | '.join(targets)} |",
        "|---|---|" + "---|" * len(targets),
    ]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        cells = []
        for target in targets:
            key = (kernel, dtype, target)
            group = [row for row in rows if (row["kernel"], row["dtype"], row["target"]) == key]
            registers, spills, shared = most(group)
            cells.append(f"{registers} / {spills} / {shared:.1f}" if group else "not compiled")
        lines.append(f"| {kernel} | {dtype} | {' | '.join(cells)} |")
    head_dims = ", ".join(str(head_dim) for head_dim in sorted({row["head_dim"] for row in rows}))
    lines += ["", f"head_dims compiled: {head_dims}."]
    return "\n".join(lines) + "\n"


def most(rows: list[dict[str, Any]]) -> tuple[int, int, float]:
    """The most registers, bytes spilled and KiB of shared memory of any row."""
    registers, spills, shared = (
        max((row[column] or 0 for row in rows), default=0) for column in ("registers", "spill_bytes", "shared_bytes")
    )
    return registers, spills, shared / KIB


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per kernel, target, dtype and head_dim: the worst over the variants."""
    columns = "{:<26}{:<8}{:<6}{:>4}{:>9}{:>10}{:>8}{:>11}  {}"
    print(columns.format("kernel", "target", "dtype", "dim", "variants", "registers", "spill B", "shared KiB", "cores"))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"], row["dtype"], row["head_dim"]), []).append(row)
    for key, group in groups.items():
        registers, spills, shared = most(group)
        cores = "yes" if all(row["tensor_core"] for row in group if row["has_dot"]) else "no"
        if not any(row["has_dot"] for row in group):
            cores = "no product"
        failed = sum("error" in row for row in group)
        if failed:
            cores += f", {failed} do not compile"
        print(columns.format(*key, len(group), registers, spills, f"{shared:.1f}", cores))


if __name__ == "__main__":
    sys.exit(main())
