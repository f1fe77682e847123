"""Check and time the Triton kernels on a GPU: one command, at most eight minutes, nothing to install.

    PYTHONPATH=src python scripts/check_gpu.py           # any NVIDIA or AMD GPU, with torch, triton and transformers
    PYTHONPATH=src python scripts/check_gpu.py --tiny    # on a CPU, in Triton's interpreter: to see that it runs

Nobody has run these kernels on a GPU yet. Please send us the report, check_gpu.json, whatever is in it: open an issue
and attach it. Of the machine it names the card, the number of cores and the releases of what is installed; messages of
errors may have paths in them.

Parts: machine (what it is, bandwidth of a copy), correctness (forward and gradients of every op against the definition
in float64), hardware (what an interpreter cannot show: rounding over 64k tokens, waits of the host, unwritten memory,
over 2^31 elements), training (small models against the torch backend, generation), ops (times beside softmax
attention), models (times beside Llama, 125 M parameters), compile (torch.compile, CUDA graphs).

Each part runs in processes of its own, those that compile much in several side by side: a part that fails, hangs or
ruins the device costs no other. The report is written anew as each part ends. The exit status is 1 if anything is
wrong; to be slow is not.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    # Before the kernels are imported. The processes of the parts inherit it.
    os.environ["TRITON_INTERPRET"] = str(int("--tiny" in sys.argv))
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from gpu_checks import correctness, goals, hardware, training
from gpu_checks.correctness import check_correctness
from gpu_checks.hardware import check_hardware
from gpu_checks.rows import FAIL, MEASURED, OK, SKIPPED, Recorder, explain
from gpu_checks.timings import describe_machine, time_models, time_ops
from gpu_checks.training import check_compiled, check_training
from transnormer_hf.model import triton_norm_transnormer
from transnormer_hf.training.files import write_atomically


class Part(NamedTuple):
    """A part: its share of the time, and its function, which takes a Recorder and what a group holds.

    Each group is a process of its own; as many run side by side as the device has room for, at `gib` each.
    """

    share: float
    function: Callable[..., None]
    groups: Sequence[tuple[Any, ...]] = ((),)
    tiny_groups: Sequence[tuple[Any, ...]] = ((),)
    gib: int = 2


# In the order of what matters most. A part that ends early leaves its time to those after it.
PARTS = {
    "machine": Part(0.05, describe_machine),
    "correctness": Part(0.30, check_correctness, correctness.GROUPS, correctness.TINY_GROUPS, gib=1),
    "hardware": Part(0.12, check_hardware, hardware.GROUPS, hardware.GROUPS, gib=13),
    "training": Part(0.10, check_training, training.GROUPS, training.GROUPS),
    "ops": Part(0.15, time_ops),
    "models": Part(0.16, time_models),
    "compile": Part(0.12, check_compiled, training.COMPILED, training.TINY_COMPILED),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started = time.monotonic()
    report: dict[str, Any] = {"tiny": options.tiny, "minutes": options.minutes, "parts": {}, "rows": []}
    share_so_far = 0.0
    for name in options.parts:
        part = PARTS[name]
        share_so_far += part.share / sum(PARTS[other].share for other in options.parts)
        deadline = started + 60 * options.minutes * share_so_far
        begin = time.monotonic()
        if options.tiny:
            rows = run_here(name, part)
        else:
            room = torch.cuda.get_device_properties(0).total_memory // (part.gib * 2**30)
            rows = list(run_in_processes(name, part, deadline, at_once=max(1, min(room, os.cpu_count() or 1))))
        report["rows"] += rows
        report["parts"][name] = {"seconds": round(time.monotonic() - begin, 1), "counts": count(rows)}
        report["goals"] = goals.reached(report["rows"])
        print(f"{name}: {report['parts'][name]['seconds']:g} s, {in_words(count(rows))}", flush=True)
        write_atomically(options.output, json.dumps(report, indent=1) + "\n")
    print(f"\n{closing_words(report)}\n\nPlease send us this file: {options.output}")
    return int(any(row["status"] == FAIL for row in report["rows"]))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all, %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--output", type=Path, default=Path("check_gpu.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.parts = list(dict.fromkeys(options.parts.split(",")))
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"--parts={name}: no such part; choose from {', '.join(PARTS)}.")
    if not options.minutes > 0:
        parser.error(f"--minutes={options.minutes:g}: must be greater than 0.")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output={options.output}: its folder does not exist; create it first.")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs on the CPU.")
    return options


# Running a part


def run_here(name: str, part: Part) -> list[dict[str, Any]]:
    """The rows of a part at its tiniest, run in this process, with segments of two tiles of 16 tokens."""
    rows: list[dict[str, Any]] = []
    options = triton_norm_transnormer.launch_options
    with (
        mock.patch.object(triton_norm_transnormer, "SEGMENT", 32),
        mock.patch.object(triton_norm_transnormer, "launch_options", lambda *key: options(*key) | {"BLOCK_T": 16}),
    ):
        for group in part.tiny_groups:
            run_group(Recorder(name, rows.append, tiny=True), part.function, group)
    return rows


def run_group(record: Recorder, function: Callable[..., None], group: tuple[Any, ...]) -> None:
    try:
        torch.manual_seed(0)
        function(record, *group)
    except (Exception, SystemExit) as error:
        record.add(title(record.part, group), FAIL, reason=explain(error))


def title(part: str, group: tuple[Any, ...]) -> str:
    return " ".join(map(str, (part, *group)))


def run_in_processes(name: str, part: Part, deadline: float, at_once: int) -> Iterator[dict[str, Any]]:
    """The rows of a part, as they come from a process for each of its groups, `at_once` side by side.

    deadline: of `time.monotonic()`. A process that is not done by then is ended, and its rows so far are kept.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit a driver that only one process may use
    waiting = list(part.groups)
    running: dict[Any, tuple[Any, str]] = {}  # by connection: process and title of its group
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < deadline:
                group = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=run_in_process, args=(name, part.function, group, sender, deadline))
                process.start()
                sender.close()
                running[receiver] = process, title(name, group)
            ready: Any
            for ready in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
                try:
                    yield ready.recv()
                except EOFError:
                    process, its_title = running.pop(ready)
                    process.join(timeout=5)
                    if process.exitcode:
                        reason = f"its process ended with code {process.exitcode}"
                        yield {"part": name, "name": its_title, "status": FAIL, "reason": reason}
                    process.kill()
            if time.monotonic() >= deadline:
                for connection, (process, its_title) in running.items():
                    process.kill()
                    with contextlib.suppress(EOFError, OSError):
                        while connection.poll():
                            yield connection.recv()
                    yield {"part": name, "name": its_title, "status": SKIPPED, "reason": "ended: its time was over"}
                for group in waiting:
                    yield {"part": name, "name": title(name, group), "status": SKIPPED, "reason": "no time left"}
                return
    finally:
        for process, _ in running.values():
            process.kill()


def run_in_process(
    name: str, function: Callable[..., None], group: tuple[Any, ...], sender: Any, deadline: float
) -> None:
    run_group(Recorder(name, sender.send, deadline=deadline), function, group)
    sender.close()


# The words at the end


def count(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {status: sum(row["status"] == status for row in rows) for status in (OK, FAIL, SKIPPED, MEASURED)}


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items() if number) or "nothing"


def closing_words(report: dict[str, Any]) -> str:
    """What passed, what failed, what was left out, and the goals."""
    lines = ["part          OK   FAIL  skipped  measured   seconds"]
    for name, part in report["parts"].items():
        counts = part["counts"]
        lines.append(
            f"{name:<12}{counts[OK]:>4}{counts[FAIL]:>7}{counts[SKIPPED]:>9}{counts[MEASURED]:>10}{part['seconds']:>10}"
        )
    for status, heading in ((FAIL, "Wrong:"), (SKIPPED, "Left out:")):
        rows = [row for row in report["rows"] if row["status"] == status]
        lines += ["", heading if rows else f"{heading} nothing"]
        for row in rows:
            why = row.get("reason") or f"error {row['error']:g}, limit {row['limit']:g} {row.get('of', '')}"
            lines.append(f"  {row['name']}: {why.splitlines()[0]}")
    lines += ["", "Goals:"]
    lines += [f"  {goal['status']:<12} {goal['goal']}: {goal['words']}" for goal in report["goals"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
