"""scripts/benchmark_ops.py: it runs, reports what it promises, and times nothing that is wrong."""

import json

import pytest
import torch

import benchmark_ops


def test_quick_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--device", "cpu", "--quick", "--output", str(output), "--plot", str(plot)]
    assert benchmark_ops.main(arguments) == 0
    report = json.loads(output.read_text())
    assert report["copy_bytes_per_second"] > 0
    timed = [row for row in report["results"] if "skipped" not in row]
    assert {row["op"] for row in timed} == {"norm", "diag"}
    assert {row["contender"] for row in timed} >= {"torch", "eager", "sdpa"}
    assert {row["direction"] for row in timed} == {"forward", "forward+backward"}
    assert {row["causal"] for row in timed} == {True, False}
    for row in timed:
        low, high = row["quartile_seconds"]
        assert 0 < low <= row["median_seconds"] <= high
        assert row["floor_share"] == pytest.approx(1 / row["times_floor"])
        assert row["floor_share"] == pytest.approx(row["achieved_bytes_per_second"] / report["copy_bytes_per_second"])
        units = 4 if row["direction"] == "forward" else 11
        assert row["floor_bytes"] == units * 2 * row["seq_len"] * 16 * 4
    assert plot.stat().st_size > 1000
    assert "x floor" in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch):
    """A backend of ours ends the run, a peer is left out with the reason."""
    right = benchmark_ops.diag_by("eager", True)

    def wrong(query, key, value):
        return right(query, key, value) + 0.1 * value

    candidates = [benchmark_ops.Contender("peer", wrong, right, 0, is_ours=False)]
    ready, skipped = benchmark_ops.check(candidates, torch.device("cpu"), torch.float32)
    assert not ready
    assert "differs from the definition" in skipped[0][1]
    with pytest.raises(SystemExit, match="nothing was timed"):
        benchmark_ops.check([benchmark_ops.Contender("ours", wrong, right, 0)], torch.device("cpu"), torch.float32)


def test_skips_say_why():
    options = benchmark_ops.parse_arguments(["--device", "cpu"])
    shape = benchmark_ops.Shape("long", 1, 12, 65536, 64)
    eager = benchmark_ops.Contender("eager", lambda *_: None, None, 12)
    assert "--gigabytes" in benchmark_ops.too_much(eager, "forward", shape, options, {})
    known = {("torch", "forward"): 100 / benchmark_ops.shape_work(shape)}
    linear = benchmark_ops.Contender("torch", lambda *_: None, None, 0)
    assert "--seconds" in benchmark_ops.too_much(linear, "forward", shape, options, known)
    assert benchmark_ops.too_much(linear, "forward", shape, options, {}) is None


def test_shapes_of_a_full_run():
    names = [shape.name for shape in benchmark_ops.parse_arguments(["--device", "cpu"]).shapes]
    assert {"B1_T8192_H96_D128", "B4_T2048_H16_D128", "B8_T1024_H8_D64"} <= set(names)
    assert [shape.seq_len for shape in benchmark_ops.parse_arguments(["--lengths", "512,65536"]).shapes[:2]] == [
        512,
        65536,
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ops", "dense"],
        ["--lengths", "many"],
        ["--lengths", "0"],
        ["--repeats", "1"],
        ["--device", "tpu"],
        ["--output", "/nowhere/bench.json"],
        ["--plot", "/nowhere/bench.png"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark_ops.parse_arguments(arguments)
    assert arguments[1] in capsys.readouterr().err
