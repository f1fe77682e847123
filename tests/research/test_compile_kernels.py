"""scripts/compile_kernels.py: what it compiles, what it reports, and what it calls a failure."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compile_kernels

SCRIPT = Path(compile_kernels.__file__)
ROW = {
    "kernel": "diag_forward", "target": "sm_86", "config": {"variant": "tile 64", "num_warps": 4, "num_stages": 1},
    "dtype": "bf16", "head_dim": 64, "registers": 128, "spill_bytes": 0, "shared_bytes": 8192, "tensor_core": True,
    "has_dot": True,
}  # fmt: skip


def run_script(*arguments):
    """In a process of its own: here the kernels are the interpreter's."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which the script must not fall for
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def report_of(tmp_path, *arguments):
    output = tmp_path / "report.json"
    process = run_script("--output", str(output), *arguments)
    assert output.exists(), process.stderr
    return process, json.loads(output.read_text())["kernels"]


@pytest.mark.parametrize(("kernel", "variant"), [("diag_forward", "no lrpe"), ("norm_sum", "identity")])
def test_subset_for_all_default_targets(tmp_path, kernel, variant):
    process, rows = report_of(
        tmp_path, "--kernels", kernel, "--variants", variant, "--dtypes", "bf16", "--head_dims", "32", "--jobs", "1"
    )
    assert process.returncode == 0, process.stdout
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    for row in rows:
        assert row["kernel"].startswith(kernel)
        assert row["spill_bytes"] == 0
        assert row["registers"] > 0
        assert row["tensor_core"] is True
        assert (row["dtype"], row["head_dim"]) == ("bf16", 32)
        assert row["config"]["num_warps"] in (1, 2, 4, 8)
    assert kernel in process.stdout
    assert f"{len(rows)}/{len(rows)}" in process.stderr  # the progress bar


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_everything_that_ships(tmp_path, target, dtype):
    """Every row of the tables, in the variant that takes the most registers: half an hour of one core in all."""
    process, rows = report_of(tmp_path, "--targets", target, "--dtypes", dtype, "--head_dims", "64,128,200", "--quick")
    assert {row["kernel"] for row in rows} == {spec.name for spec in compile_kernels.KERNELS}
    assert process.returncode == 0, process.stdout[-3000:]
    assert all(row["tensor_core"] for row in rows if row["has_dot"])


def test_every_kernel_is_listed():
    """For each target, dtype and head_dim, in variants that a launch could ask for."""
    jobs = list(compile_kernels.list_jobs(["sm_80", "sm_90"], ["bf16"], [64, 256]))
    assert {job.kernel for job in jobs} == {spec.name for spec in compile_kernels.KERNELS}
    assert len(set(jobs)) == len(jobs)


def test_quick_is_the_last_variant_of_each():
    every, quick = (list(compile_kernels.list_jobs(["sm_80"], ["bf16"], [64], quick=quick)) for quick in (False, True))
    assert len({(job.kernel, job.head_dim) for job in quick}) == len(quick) < len(every)
    last = {job.kernel: job for job in every}
    assert quick == list(last.values())


@pytest.mark.parametrize("kernel", ["norm_sum", "diag_forward"])
def test_heads_of_any_width_are_read_16_bytes_at_a_time(kernel):
    """A head of 24 channels begins at a multiple of 8 elements, which is no multiple of 16."""
    code = (
        "import triton, compile_kernels as script\n"
        f"spec = next(spec for spec in script.KERNELS if spec.name == {kernel!r})\n"
        "variant = next(spec.variants('sm_80', 'bf16', 24))\n"
        "source = script.ASTSource(spec.function, *script.compile_arguments(spec, variant))\n"
        "gpu = script.TARGETS['sm_80'].gpu\n"
        "print(triton.compile(source, target=gpu, options=variant.options).asm['ptx'])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    assembly = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    widths = re.findall(r"ld\.global\.(v4\.b32|b16)", assembly.stdout)
    assert set(widths) == {"v4.b32"}


def test_summary_has_the_worst_of_each():
    rows = [
        {**ROW, "seconds": 1.0},
        {**ROW, "registers": 255, "spill_bytes": 8, "seconds": 2.0},
        {**ROW, "target": "sm_90", "dtype": "fp32", "tensor_core": False, "seconds": 4.0},
    ]
    lines = compile_kernels.summary(rows).splitlines()
    assert "| sm_86 | 2 | 1 | 255 | 8 | 8.0 | 0 | 3 |" in lines
    assert "| sm_90 | 1 | 0 | 128 | 0 | 8.0 | 1 | 4 |" in lines
    assert "| diag_forward | bf16 | 255 / 8 / 8.0 | not compiled |" in lines
    assert "| diag_forward | fp32 | not compiled | 128 / 0 / 8.0 |" in lines


def test_problems():
    assert compile_kernels.problems(ROW) == []
    assert "spills 8 bytes" in compile_kernels.problems({**ROW, "spill_bytes": 8})[0]
    assert "shared memory" in compile_kernels.problems({**ROW, "shared_bytes": 120 * 1024})[0]
    assert compile_kernels.problems({**ROW, "target": "sm_90", "shared_bytes": 120 * 1024}) == []
    assert "does not compile" in compile_kernels.problems({**ROW, "error": "CompilationError: ..."})[0]


def test_failure_is_the_exit_status(tmp_path, monkeypatch, capsys):
    class Here:
        """A pool that is this process."""

        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(compile_kernels, "ProcessPoolExecutor", Here)
    arguments = ["--targets", "sm_86", "--kernels", "norm_scan", "--output", str(tmp_path / "report.json")]
    for spill_bytes, status in ((0, 0), (16, 1)):
        monkeypatch.setattr(
            compile_kernels, "compile_job", lambda job, known, spill=spill_bytes: {**ROW, "spill_bytes": spill}
        )
        assert compile_kernels.main(arguments) == status
    assert "spills 16 bytes" in capsys.readouterr().out


def test_resume_compiles_only_what_has_changed(tmp_path):
    arguments = ["--kernels", "norm_scan", "--variants", "identity", "--targets", "sm_80,gfx942"]
    arguments += ["--dtypes", "bf16", "--head_dims", "32"]
    _, first = report_of(tmp_path, *arguments)
    report = tmp_path / "report.json"
    first[0] |= {"registers": 7}  # a mark that only a row that was kept still has
    first[1] |= {"registers": 7, "source": "of another kernel"}
    report.write_text(json.dumps({"kernels": [*first, {**first[0], "target": "sm_120"}]}))
    process, rows = report_of(tmp_path, "--resume", *arguments)
    assert process.returncode == 0, process.stdout
    assert rows[0]["registers"] == 7
    assert rows[1]["registers"] != 7
    assert rows[1]["source"] != first[1]["source"]
    assert [row["target"] for row in rows] == ["sm_80", "gfx942", "sm_120"]  # what was not asked for stays


def test_kernels_that_are_alike_are_each_reported(tmp_path):
    """The scan is float32 for both dtypes: the compiler's cache must not answer for the second."""
    arguments = ["--kernels", "norm_scan", "--variants", "identity", "--targets", "sm_80"]
    arguments += ["--dtypes", "fp16,fp32", "--head_dims", "32"]
    process, rows = report_of(tmp_path, "--jobs", "1", *arguments)
    assert process.returncode == 0, process.stdout
    assert [row["registers"] > 0 for row in rows] == [True, True]


def test_resume_from_something_else(tmp_path):
    report = tmp_path / "report.json"
    report.write_text("[]")
    with pytest.raises(SystemExit, match="not a report of this script"):
        compile_kernels.read_report(report)
    assert report.read_text() == "[]"
    assert compile_kernels.read_report(tmp_path / "none.json") == []


def test_registers_of_nvidia():
    log = "ptxas info: 0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\nptxas info: Used 255 registers"
    assert compile_kernels.read_ptxas(log) == (255, 16)
    with pytest.raises(RuntimeError, match="nothing about registers"):
        compile_kernels.read_ptxas("")


def test_amd_metadata():
    assembly = "\n".join(
        (
            "    .private_segment_fixed_size: 0",
            "    .sgpr_spill_count: 3",
            "    .vgpr_count:     128",
            "    .vgpr_spill_count: 2",
        )
    )
    assert compile_kernels.read_amdgcn(assembly) == (128, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "sm_75"], ["--targets=sm_75", "sm_80", "gfx942"]),
        (["--targets", ""], ["nothing", "sm_80"]),
        (["--dtypes", "fp8"], ["fp8", "bf16"]),
        (["--head_dims", "12"], ["12", "8", "256"]),
        (["--jobs", "0"], ["--jobs=0", "at least 1"]),
        (["--output", "/nowhere/report.json"], ["/nowhere", "create it first"]),
        (["--summary", "/nowhere/report.md"], ["--summary=/nowhere", "create it first"]),
    ],
)
def test_wrong_arguments_say_what_works(arguments, words, capsys):
    with pytest.raises(SystemExit):
        compile_kernels.parse_arguments(arguments)
    message = capsys.readouterr().err
    assert all(word in message for word in words)
