"""Time both attentions, forward and forward + backward, against softmax attention and what else is installed.

    python scripts/benchmark_ops.py                    # a GPU where there is one, else the CPU
    python scripts/benchmark_ops.py --device cpu --lengths 512,2048 --output bench.json --plot bench.png

Contenders are this package's backends, torch's scaled_dot_product_attention (a yardstick: it is another function), and,
where they are installed, flash-linear-attention and lightning-attention (causal NormAttention only). Whatever claims to
compute one of our attentions is first held to the definition on a small input; a backend of ours that fails ends the
run. Contenders take turns, so that a slow minute of the machine hits all of them. The report has the median, the
quartiles, and the share of the memory floor: the bytes that the operation cannot do without (4 U forward, 7 U
backward, U = batch · heads · seq · head_dim · element size) over the time, as a share of the bandwidth of a copy. On a
GPU its second-level cache is overwritten before each run; on the CPU a short input may stay in the caches, and then
come out above the bandwidth of a copy. The report is written as the run goes on.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarking.reports import describe
from transnormer_hf.model.ops_transnormer import diag_attention, norm_attention
from transnormer_hf.training.files import write_atomically

try:
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]
except ImportError:
    chunk_linear_attn = None
try:
    from lightning_attn.ops import lightning_attn_func  # type: ignore[import-not-found]
except ImportError:
    lightning_attn_func = None

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK_SIZE = 64
FLOOR = {"forward": 4, "forward+backward": 11}  # in U


class Shape(NamedTuple):
    name: str
    batch_size: int
    num_heads: int
    seq_len: int
    head_dim: int


REGISTRY_SHAPES = (
    Shape("B1_T8192_H96_D128", 1, 96, 8192, 128),
    Shape("B4_T2048_H16_D128", 4, 16, 2048, 128),
    Shape("B8_T1024_H8_D64", 8, 8, 1024, 64),
)


class Contender(NamedTuple):
    """One way to compute an attention.

    run: query, key, value (batch, heads, seq, head_dim) to the output.
    definition: what the output must equal, or None for a yardstick.
    score_bytes: bytes per entry of a (seq, seq) map that it keeps, 0 where memory is linear in the length.
    is_ours: a wrong result is our error and ends the run.
    """

    name: str
    run: Callable[..., torch.Tensor]
    definition: Callable[..., torch.Tensor] | None
    score_bytes: int
    is_ours: bool = True


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device, 1 << (22 if options.quick else 28 if device.type == "cuda" else 26))
    print(f"{describe(device)}, {options.dtype}, copy {bandwidth / 1e9:.1f} GB/s")
    report: dict[str, Any] = {
        "device": describe(device),
        "python": platform.python_version(),
        "packages": {
            name: version_of(name) for name in ("torch", "triton", "flash-linear-attention", "lightning_attn")
        },
        "dtype": options.dtype,
        "copy_bytes_per_second": bandwidth,
        "block_size": BLOCK_SIZE,
        "results": [],
    }
    for operation in options.ops:
        for causal in (False, True):
            candidates = [*contenders(operation, causal, device)]
            ready, skipped = check(candidates, device, dtype)
            report["results"] += [result_row(operation, causal, None, name, None, skipped=why) for name, why in skipped]
            slow: dict[tuple[str, str], float] = {}  # seconds per token² of what was last timed
            for shape in options.shapes:
                rows = time_shape(operation, causal, shape, ready, device, dtype, bandwidth, options, slow)
                report["results"] += rows
                print_rows(rows)
                if options.output:
                    write_atomically(options.output, json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, Path(options.plot))
    for path in filter(None, (options.output, options.plot)):
        print(f"written: {path}")
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--ops", default="norm,diag", help="norm, diag or both")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="for 1 row of 12 heads of 64 channels")
    parser.add_argument("--no_registry_shapes", action="store_true", help="leave out B1_T8192_H96_D128 and its like")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each contender per measurement")
    parser.add_argument("--seconds", type=float, default=2.0, help="skip what takes longer than this for one run")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="skip what needs a larger map of scores than this")
    parser.add_argument("--output", help="write the report here, JSON")
    parser.add_argument("--plot", help="write a plot here (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two repeats: to see that it runs")
    options = parser.parse_args(arguments)
    options.ops = options.ops.split(",")
    if not set(options.ops) <= {"norm", "diag"}:
        parser.error(f"--ops={','.join(options.ops)}: choose from norm, diag.")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device={options.device}: choose cpu or cuda.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no GPU here; use --device cpu.")
    if options.repeats < 2:
        parser.error(f"--repeats={options.repeats}: must be at least 2, for a spread.")
    for name in ("output", "plot"):
        path = getattr(options, name)
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"--{name}={path}: its folder does not exist; create it first.")
    if options.plot and find_spec("matplotlib") is None:
        parser.error(f"--plot={options.plot}: needs matplotlib, which is not installed (pip install matplotlib).")
    if options.dtype is None:
        options.dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    if options.quick:
        options.repeats = 2
        options.shapes = [Shape("B1_T96_H2_D16", 1, 2, 96, 16), Shape("B1_T160_H2_D16", 1, 2, 160, 16)]
        return options
    try:
        lengths = [int(length) for length in options.lengths.split(",") if length]
        if min(lengths, default=1) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--lengths={options.lengths}: give whole numbers from 1 with commas between them, like 512,1024.")
    options.shapes = [Shape(f"B1_T{length}_H12_D64", 1, 12, length, 64) for length in lengths]
    if not options.no_registry_shapes:
        options.shapes += REGISTRY_SHAPES
    return options


# Contenders


def contenders(operation: str, causal: bool, device: torch.device) -> list[Contender]:
    ours = (["triton"] if device.type == "cuda" else []) + ["torch", "eager"]
    found = []
    for backend in ours:
        score_bytes = 12 if backend == "eager" else 0  # scores, weights and their gradient
        run = norm_by(backend, causal) if operation == "norm" else diag_by(backend, causal)
        definition = norm_by("eager", causal) if operation == "norm" else diag_by("eager", causal)
        found.append(Contender(backend, run, definition, score_bytes))
    if operation == "norm":
        backend = ours[0]
        found.append(
            Contender(f"{backend}, 1+elu, LRPE", norm_by(backend, causal, True), norm_by("eager", causal, True), 0)
        )
        if causal:
            found += peers(device)
    # torch's fused kernels keep no map; on the CPU the backward pass may
    found.append(Contender("sdpa", sdpa(causal), None, 0, is_ours=False))
    return found


def norm_by(backend: str, causal: bool, features: bool = False) -> Callable[..., torch.Tensor]:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        lrpe = example_lrpe(query) if features else None
        feature_map = "1+elu" if features else "identity"
        return norm_attention(
            query, key, value, causal=causal, feature_map=feature_map, lrpe=lrpe, backend=backend
        )[0]  # fmt: skip

    return run


def diag_by(backend: str, causal: bool) -> Callable[..., torch.Tensor]:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return diag_attention(
            query, key, value, block_size=BLOCK_SIZE, causal=causal, lrpe=example_lrpe(query), backend=backend
        )

    return run


def example_lrpe(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    head_dim = query.shape[-1]
    theta = 10000 ** (-torch.arange(head_dim // 2, device=query.device) / (head_dim // 2))
    householder = torch.full((head_dim,), head_dim**-0.5, device=query.device)
    return theta, householder


def sdpa(causal: bool) -> Callable[..., torch.Tensor]:
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def peers(device: torch.device) -> list[Contender]:
    """Causal linear attention of other packages, without a denominator and without decay."""
    found = []
    if device.type == "cuda" and chunk_linear_attn is not None:

        def by_fla(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return chunk_linear_attn(query, key, value, scale=1.0, normalize=False)[0].transpose(1, 2)

        found.append(Contender("flash-linear-attention", by_fla, norm_by("eager", True), 0, is_ours=False))
    if device.type == "cuda" and lightning_attn_func is not None:

        def by_lightning(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            no_decay = torch.zeros(query.shape[1], device=query.device)
            return lightning_attn_func(query, key, value, no_decay)

        found.append(Contender("lightning-attention", by_lightning, norm_by("eager", True), 0, is_ours=False))
    return found


def check(
    candidates: list[Contender], device: torch.device, dtype: torch.dtype
) -> tuple[list[Contender], list[tuple[str, str]]]:
    """Those that equal their definition, forward and backward, and those that do not run, with the reason.

    Raises SystemExit where one of our own backends is wrong.
    """
    ready, skipped = [], []
    inputs = make_inputs(Shape("check", 2, 2, 200, 64), device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for contender in candidates:
        if contender.definition is not None:
            expected = outputs_of(contender.definition, [tensor.double() for tensor in inputs])
            try:
                results = outputs_of(contender.run, inputs)
            except Exception as error:
                if contender.is_ours:
                    raise
                skipped.append((contender.name, f"it raised {type(error).__name__}: {error}"))
                continue
            errors = [
                ((result.double() - truth).abs().max() / truth.abs().max()).item()
                for result, truth in zip(results, expected, strict=True)
            ]
            if not max(errors) < tolerance:  # NaN is wrong too
                message = f"differs from the definition by {max(errors):.1e} (output, dq, dk, dv: {errors})"
                if contender.is_ours:
                    raise SystemExit(f"{contender.name} {message}; nothing was timed.")
                skipped.append((contender.name, message))
                continue
        ready.append(contender)
    return ready, skipped


def outputs_of(run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = run(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value as projections give them: heads side by side in memory."""
    size = (shape.batch_size, shape.seq_len, shape.num_heads, shape.head_dim)
    scale = shape.head_dim**-0.5  # keeps scores without a denominator within half precision
    return [(torch.randn(size, device=device) * scale).to(dtype).transpose(1, 2) for _ in range(3)]


# Measuring


def time_shape(
    operation: str,
    causal: bool,
    shape: Shape,
    candidates: list[Contender],
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    options: argparse.Namespace,
    slow: dict[tuple[str, str], float],
) -> list[dict[str, Any]]:
    """A row per contender and direction; contenders that are too large or too slow get a row that says so."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(shape, device, dtype)]
    grad = torch.randn_like(inputs[2])
    unit = inputs[0].numel() * inputs[0].element_size()
    rows = []
    for direction, units in FLOOR.items():
        runs: dict[str, Callable[[], Any]] = {}
        for contender in candidates:
            why = too_much(contender, direction, shape, options, slow)
            run = forward(contender, inputs) if direction == "forward" else forward_backward(contender, inputs, grad)
            if why is None:
                try:
                    seconds = time_once(run, device)
                    if device.type == "cuda" and seconds > options.seconds:
                        seconds = time_once(run, device)  # the first run compiled the kernels
                except torch.OutOfMemoryError:
                    seconds, why = float("inf"), "out of memory"
                slow[contender.name, direction] = seconds / shape_work(shape)
                if seconds > options.seconds:
                    why = why or f"one run takes {seconds:.1f} s, over --seconds {options.seconds:g}"
            if why is not None:
                rows.append(result_row(operation, causal, shape, contender.name, direction, skipped=why))
                continue
            runs[contender.name] = run
        seconds_of: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                seconds_of[name].append(time_once(run, device))
        for name, all_seconds in seconds_of.items():
            rows.append(
                result_row(
                    operation, causal, shape, name, direction,
                    seconds=all_seconds, floor_bytes=units * unit, bandwidth=bandwidth,
                )
            )  # fmt: skip
    return rows


def too_much(
    contender: Contender,
    direction: str,
    shape: Shape,
    options: argparse.Namespace,
    slow: dict[tuple[str, str], float],
) -> str | None:
    """Why a contender is not tried on a shape, or None."""
    gigabytes = contender.score_bytes * shape.batch_size * shape.num_heads * shape.seq_len**2 / 1e9
    if gigabytes > options.gigabytes:
        return f"its map takes {gigabytes:.0f} GB, over --gigabytes {options.gigabytes:g}"
    # linear contenders are overestimated, so ten times the limit is let through to be timed once
    expected = slow.get((contender.name, direction), 0.0) * shape_work(shape)
    if expected > 10 * options.seconds:
        return f"one run would take about {expected:.0f} s, over --seconds {options.seconds:g}"
    return None


def shape_work(shape: Shape) -> float:
    return float(shape.batch_size * shape.num_heads * shape.seq_len**2 * shape.head_dim)


def forward(contender: Contender, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    detached = [tensor.detach() for tensor in inputs]
    return lambda: contender.run(*detached)


def forward_backward(contender: Contender, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(contender.run(*inputs), inputs, grad)


def time_once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        # While the GPU is busy with this, the CPU queues what is timed: launches are not part of it.
        larger_than_caches(device).zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@lru_cache
def larger_than_caches(device: torch.device) -> torch.Tensor:
    return torch.empty(1 << 29, dtype=torch.uint8, device=device)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that a copy reads and writes, the best of ten."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(time_once(lambda: target.copy_(source), device) for _ in range(10))


def result_row(
    operation: str,
    causal: bool,
    shape: Shape | None,
    contender: str,
    direction: str | None,
    *,
    seconds: list[float] | None = None,
    floor_bytes: int = 0,
    bandwidth: float = 1.0,
    skipped: str | None = None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": operation, "causal": causal, "contender": contender, "direction": direction}
    if shape is not None:
        row |= {"shape": shape.name, "seq_len": shape.seq_len}
    if seconds is None:
        return row | {"skipped": skipped}
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    floor_seconds = floor_bytes / bandwidth
    return row | {
        "median_seconds": median,
        "quartile_seconds": [low, high],
        "runs": len(seconds),
        "floor_bytes": floor_bytes,
        "achieved_bytes_per_second": floor_bytes / median,
        "times_floor": median / floor_seconds,
        "floor_share": floor_seconds / median,
    }


# Output


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        what = f"{row['op']:<5}{'causal' if row['causal'] else 'full':<7}{row['shape']:<20}{row['direction']:<17}"
        if "skipped" in row:
            print(f"{what}{row['contender']:<24} skipped: {row['skipped']}")
            continue
        low, high = (1e3 * seconds for seconds in row["quartile_seconds"])
        print(
            f"{what}{row['contender']:<24}{1e3 * row['median_seconds']:>10.3f} ms  ({low:.3f} to {high:.3f})"
            f"{row['times_floor']:>9.1f} x floor",
            flush=True,
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """Median time over length, a panel per operation, mask and direction."""
    from matplotlib.figure import Figure

    rows = [row for row in report["results"] if "median_seconds" in row]
    panels = sorted({(row["op"], row["causal"], row["direction"]) for row in rows})
    contenders = list(dict.fromkeys(row["contender"] for row in rows))  # of one colour in all panels
    figure = Figure(figsize=(4.5 * max(1, (len(panels) + 1) // 2), 7), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(2, (len(panels) + 1) // 2, index + 1)
        mine = [row for row in rows if (row["op"], row["causal"], row["direction"]) == panel]
        sweep = [row for row in mine if row["shape"] not in {shape.name for shape in REGISTRY_SHAPES}]
        for contender in dict.fromkeys(row["contender"] for row in sweep):
            points = sorted(
                (row["seq_len"], row["median_seconds"], *row["quartile_seconds"])
                for row in sweep
                if row["contender"] == contender
            )
            lengths, medians, lows, highs = zip(*points, strict=True)
            color = f"C{contenders.index(contender)}"
            axes.plot(lengths, medians, marker="o", markersize=3, color=color, label=contender)
            axes.fill_between(lengths, lows, highs, color=color, alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel="length", ylabel="seconds")
        axes.set_title(f"{panel[0]}, {'causal' if panel[1] else 'full'}, {panel[2]}", fontsize=9)
        axes.legend(fontsize=7)
    figure.suptitle(f"{report['device']}, {report['dtype']}")
    unfinished = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(unfinished, dpi=90)
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
