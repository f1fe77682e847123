"""scripts/check_gpu.py on the CPU: it runs, a wrong op is found, and what fails costs nothing else."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import check_gpu
from gpu_checks import correctness, goals, hardware
from gpu_checks.rows import FAIL, MEASURED, OK, SKIPPED, Recorder, worst_error
from kernel_registry import diag, norm

STATUSES = {OK, FAIL, SKIPPED, MEASURED}


def run_tiny(tmp_path, parts=""):
    output = tmp_path / "check_gpu.json"
    status = check_gpu.main(["--tiny", "--output", str(output), *(["--parts", parts] if parts else [])])
    return status, json.loads(output.read_text())


def test_relu_may_jump_at_single_tokens_and_nowhere_else():
    """A score near zero that rounding moves to its other side is no fault of the kernels."""
    truth = torch.randn(100, 8)

    def run_with(factor, tokens):
        def run(backend, inputs):
            scale = torch.ones(100, 1, dtype=inputs["query"].dtype)
            if backend == "triton":
                scale[:tokens] = factor
            return {"output": inputs["query"] * scale + inputs["key"]}

        return run

    inputs = {"query": truth, "key": truth.flip(0)}
    few, many = (correctness.compare(run_with(2.0, tokens), inputs, is_relu=True) for tokens in (20, 80))
    assert few["d query"] < 1e-6 < 0.5 < many["d query"]
    assert few["output"] > 0.5  # the map itself does not jump


@pytest.mark.slow
def test_every_part_runs(tmp_path, capsys):
    status, report = run_tiny(tmp_path)
    assert status == 0
    assert list(report["parts"]) == list(check_gpu.PARTS)
    for name in check_gpu.PARTS:
        rows = [row for row in report["rows"] if row["part"] == name]
        assert rows
        assert {row["status"] for row in rows} <= STATUSES - {FAIL}
    names = [row["name"] for row in report["rows"]]
    for fault in ("3a", "3b", "3c", "3d", "3e"):  # of the issue that asked for this script
        assert any(name.startswith(f"{fault}:") for name in names)
    judged = [row for row in report["rows"] if row["status"] == OK]
    assert all(row["error"] <= row["limit"] for row in judged)
    words = capsys.readouterr().out
    assert "Wrong: nothing" in words
    assert "Please send us this file" in words
    assert words.count(goals.UNKNOWN) == len(report["goals"])


def only(monkeypatch, part, *groups):
    monkeypatch.setitem(check_gpu.PARTS, part, check_gpu.PARTS[part]._replace(tiny_groups=groups))


def test_an_op_that_is_off_by_one_percent_is_found(tmp_path, monkeypatch, capsys):
    right = correctness.norm_attention

    def wrong(*inputs, **options):
        output, state = right(*inputs, **options)
        return output * (1.01 if options["backend"] == "triton" else 1), state

    monkeypatch.setattr(correctness, "norm_attention", wrong)
    few = [case for case in correctness.NORM_CASES if case.packed or case.name == "empty"]
    monkeypatch.setattr(correctness, "NORM_CASES", few)
    only(monkeypatch, "correctness", ("norm", "fp32", 16))
    status, report = run_tiny(tmp_path, "machine,correctness")
    assert status == 1
    rows = {row["name"]: row for row in report["rows"]}
    for name, row in rows.items():
        if row["part"] == "correctness":
            assert row["status"] == (OK if "empty" in name else FAIL)
    row = rows["norm fp32 D16: packed, states, causal"]
    assert row["errors"]["output"] > 0.009
    assert row["errors"]["state"] < 1e-5
    assert "norm fp32 D16: packed, states, causal: error" in capsys.readouterr().out


def test_gradients_and_single_tokens_count():
    """What only touches one gradient, or one token of many, is found as well."""
    truth = torch.randn(1000, 8)
    found = truth.clone()
    found[17] *= 1.5
    assert (found - truth).norm() / truth.norm() < 0.03
    assert worst_error(found, truth) > 0.2
    assert worst_error(truth * 1.01, truth) == pytest.approx(0.01, rel=1e-3)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    def run(backend, inputs):
        key = Wrong.apply(inputs["key"]) if backend == "triton" else inputs["key"]
        return {"output": inputs["query"] * key}

    errors = correctness.compare(run, {"query": truth, "key": truth.flip(0)})
    assert errors["output"] < 1e-6 > errors["d query"]
    assert errors["d key"] > 0.009


def test_an_error_that_is_no_number_is_a_failure():
    rows = []
    record = Recorder("part", rows.append, tiny=True)
    record.judge("row", float("nan"), 1.0)
    record.judge("row", 0.0, 0.0)
    assert [row["status"] for row in rows] == [FAIL, OK]


def breaks(record, *group):
    record.judge("before", 0.0, 1.0)
    if group != ("whole",):
        raise RuntimeError(f"broken {group}") from ValueError("the cause")


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    part = check_gpu.Part(0.1, breaks, tiny_groups=(("first",), ("whole",)))
    monkeypatch.setitem(check_gpu.PARTS, "correctness", part)
    status, report = run_tiny(tmp_path, "correctness,machine")
    assert status == 1
    named = [(row["part"], row["name"], row["status"]) for row in report["rows"]]
    assert named == [
        ("correctness", "before", OK),
        ("correctness", "correctness first", FAIL),
        ("correctness", "before", OK),
        ("machine", "machine", MEASURED),
    ]
    assert report["rows"][1]["reason"].splitlines() == ["RuntimeError: broken ('first',)", "ValueError: the cause"]
    assert report["rows"][3]["copy_bytes_per_second"] > 0
    assert "correctness first: RuntimeError: broken" in capsys.readouterr().out


def test_a_check_that_fails_leaves_those_after_it():
    rows = []
    record = Recorder("part", rows.append, tiny=True)
    with record.guard("first"):
        raise SystemExit("it is wrong; nothing was timed.")
    with record.guard("second"):
        raise torch.OutOfMemoryError("no room")
    with pytest.raises(RuntimeError), record.guard("third"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [(row["name"], row["status"]) for row in rows] == [("first", FAIL), ("second", SKIPPED), ("third", FAIL)]
    assert "nothing was timed" in rows[0]["reason"]


def ends_or_hangs(name, function, group, sender, deadline):
    """In place of `run_in_process`."""
    for number in range(3):
        sender.send({"part": name, "name": f"{group[0]} {number}", "status": OK, "error": 0.0, "limit": 0.0})
    if group == ("dies",):
        os._exit(7)
    while group == ("hangs",):
        time.sleep(1)
    sender.close()


def test_processes_that_die_or_hang_cost_no_others(monkeypatch):
    """With processes that are forked here; on a GPU they are new ones, which import everything again."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: real(kind.replace("spawn", "fork")))
    monkeypatch.setattr(check_gpu, "run_in_process", ends_or_hangs)
    part = check_gpu.Part(0.1, breaks, [("dies",), ("ends",), ("hangs",), ("waits",)])
    begin = time.monotonic()
    rows = {row["name"]: row for row in check_gpu.run_in_processes("part", part, begin + 3, at_once=1)}
    assert time.monotonic() - begin < 30
    assert {name: row["status"] for name, row in rows.items()} == {
        **{f"{group} {number}": OK for group in ("dies", "ends", "hangs") for number in range(3)},
        "part dies": FAIL,
        "part hangs": SKIPPED,
        "part waits": SKIPPED,
    }
    assert "code 7" in rows["part dies"]["reason"]
    assert "time was over" in rows["part hangs"]["reason"]
    assert rows["part waits"]["reason"] == "no time left"


real = multiprocessing.get_context


@pytest.mark.slow
def test_a_part_in_a_process_of_its_own():
    """As on a GPU, where each imports the package anew: here none of them finds one, and says so."""
    part = check_gpu.PARTS["machine"]
    rows = list(check_gpu.run_in_processes("machine", part, time.monotonic() + 300, at_once=1))
    assert [row["name"] for row in rows] == ["machine"]
    if torch.cuda.is_available():
        assert rows[0]["status"] == MEASURED
    else:
        assert rows[0]["status"] == FAIL
        assert "CUDA" in rows[0]["reason"]


# Goals


def timing(of, contender, direction, shape=goals.LARGEST, seq_len=8192, seconds=1.0, times_floor=1.0):
    return {
        "of": of, "contender": contender, "direction": direction, "shape": shape, "seq_len": seq_len,
        "median_seconds": seconds, "times_floor": times_floor,
    }  # fmt: skip


def test_goals_say_what_was_reached():
    causal, both = "norm_attention, causal", "forward+backward"
    rows = [
        # 4 U in 1.5 times their floor are 6 units of time, 11 U in 3 times theirs are 33: 27 units for 7 U
        timing(causal, "ours", "forward", times_floor=1.5),
        timing(causal, "ours", both, times_floor=3.0),
        timing(causal, "SDPA flash", "forward", seconds=2.0),
        timing(causal, "ours", both, "short", 1024, seconds=9.0),  # below the length of the goal
        timing(causal, "SDPA flash", both, "short", 1024, seconds=1.0),
        timing(causal, "ours", both, "long", 4096, seconds=3.0),
        timing(causal, "SDPA flash", both, "long", 4096, seconds=2.0),
        {"task": "training", "model": "llama", "length": 4096, "median_seconds": 2.0},
        {"task": "training", "model": "transnormer-t2", "length": 4096, "median_seconds": 1.0},
        {"task": "training", "model": "transnormer-t2", "length": 1024, "median_seconds": 9.0},
    ]
    found = {goal["goal"]: goal for goal in goals.reached(rows)}
    forward, backward = (
        next(goal for text, goal in found.items() if text.startswith(f"{causal}, {direction} at"))
        for direction in ("forward", "backward")
    )
    assert (forward["value"], forward["status"]) == (1.5, goals.REACHED)
    assert (backward["value"], backward["status"]) == (pytest.approx(27 / 7, abs=1e-3), goals.MISSED)
    sdpa = next(goal for text, goal in found.items() if text.startswith(causal) and "SDPA" in text)
    assert (sdpa["value"], sdpa["status"]) == (1.5, goals.MISSED)
    assert "long" in sdpa["words"]
    llama = next(goal for text, goal in found.items() if "Llama" in text)
    assert (llama["value"], llama["status"]) == (0.5, goals.REACHED)
    assert [goal["status"] for text, goal in found.items() if "bidirectional" in text] == [goals.UNKNOWN] * 3


# Faults


def test_waits_are_counted(monkeypatch):
    """By torch's own warnings, which need a GPU: here they are given by hand."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    waits = hardware.waits_of(run)
    assert list(waits.values()) == [2]
    assert next(iter(waits)).startswith("test_check_gpu.py:")
    assert modes == ["warn", "default"]


def test_operations_are_counted():
    with hardware.CountOperations() as operations:
        (torch.ones(3) + 1).sum()
    assert operations.count == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "speed"], "--parts=speed: no such part; choose from machine, correctness"),
        (["--tiny", "--minutes", "0"], "--minutes=0: must be greater than 0"),
        (["--tiny", "--output", "/nowhere/report.json"], "--output=/nowhere/report.json: its folder does not exist"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        check_gpu.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_works(capsys):
    with pytest.raises(SystemExit):
        check_gpu.main([])
    assert "torch sees no GPU here; --tiny runs on the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_launches_without_a_gpu():
    """Each fills the 132 multiprocessors of an H100, and spills next to nothing."""
    root = Path(check_gpu.__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # it turns that off
    command = [sys.executable, "-m", "gpu_checks.without_gpu"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if line.startswith("|")]
    launches = [line for line in lines if "·" in line[-1]]
    kernels = {line[2] for line in launches}
    assert kernels == {spec.function.__name__ for spec in [*norm.KERNELS, *diag.KERNELS]}
    for *_, first, second in launches:
        for cell in (first, second):
            programs, at_once, registers, stack, *_ = (int(number.replace(",", "")) for number in cell.split(" · "))
            assert programs >= 132
            assert at_once >= 1
            assert 0 < registers <= 255
            assert stack <= 8
    host = {line[0]: line[1:] for line in lines if len(line) == 5 and line[1].isdecimal()}
    assert host["norm_attention, causal"][:2] == host["norm_attention, bidirectional"][:2] == ["3", "3"]
    assert all(float(number) > 0 for _, _, *times in host.values() for number in times)
