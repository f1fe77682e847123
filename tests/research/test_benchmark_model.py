"""scripts/benchmark_model.py: it runs, reports what it promises, and times nothing that is wrong."""

import json
import math

import pytest
import torch

import benchmark_model
from benchmarking import checks, contenders, runs
from transnormer_hf.model import modeling_transnormer

FEW = "transnormer-t2,t2-identity,llama,bert"
SETTING = runs.Setting(contenders.Size(64, 2, 2, 128), "cpu", torch.float32, 1)
MEASURES = ("median_seconds", "steps_per_second", "tokens_per_second", "microseconds_per_token")


def numbers_in(row):
    for value in row.values():
        yield from value if isinstance(value, list) else [value] if isinstance(value, int | float) else []


def test_quick_run_writes_json_tables_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = benchmark_model.main(["--quick", "--models", FEW, "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "benchmark_model.json").read_text()) == report
    assert report["complete"]
    assert report["vocab_size"] == 128
    rows = report["results"]
    assert len(rows) == 4 * 2 * 2 + 2 * 2  # models x tasks x lengths, and two that decode after two contexts
    for row in rows:
        assert "skipped" not in row
        assert all(math.isfinite(number) for number in numbers_in(row))
        assert all(row[measure] > 0 for measure in MEASURES)
        low, high = row["quartile_seconds"]
        assert low <= row["median_seconds"] <= high
        assert ("state_bytes" if row["task"] == "decoding" else "peak_bytes") in row

    tables = (tmp_path / "benchmark_model.md").read_text()
    for text in (
        "vocabulary 128",
        "without an optimizer",
        "µs per token",
        "peak memory",
        "Share of attention",
        "State",
    ):
        assert text in tables
    assert "| bert |" not in tables.partition("### Decoding")[2]
    assert "Skipped" not in tables
    assert tables in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()} - {"memory.png"}  # peaks of tiny models may be nothing
    assert written == {"benchmark_model.json", "benchmark_model.md", "time_per_token.png", "decode_latency.png"}


def test_state_is_of_constant_size_and_a_key_value_cache_is_not(tmp_path):
    arguments = ["--quick", "--models", "transnormer-t1,transnormer-t2,llama", "--contexts", "64,256"]
    options = benchmark_model.parse_arguments(arguments)
    rows = benchmark_model.time_decoding(options.models, SETTING, options, deadline=math.inf)
    state_bytes = {(row["model"], row["length"]): row["state_bytes"] for row in rows}
    for variant in ("transnormer-t1", "transnormer-t2"):
        assert state_bytes[variant, 64] == state_bytes[variant, 256] > 0
    assert state_bytes["llama", 64] == 2 * 2 * 64 * 64 * 4  # layers, keys and values, width, tokens, bytes
    assert state_bytes["llama", 256] == 4 * state_bytes["llama", 64]


def test_products_are_counted_in_every_model():
    """Per token two FLOPs for each weight, six in training, and what attention does."""
    size = contenders.Size(64, 2, 2, 128)
    flops = {}
    for name in (contenders.FLOOR, "transnormer-t2", "llama"):
        model, batch = runs.build(contenders.EVERYTHING[name], SETTING, 256), runs.make_batch(SETTING, 256, 1)
        matrices = [
            weight.numel() for key, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in key
        ]
        for task in runs.TASKS:
            with runs.ProductCounter() as counter:
                runs.run_once(task, model, batch)
            tied = 0 if name == "llama" else size.vocab_size * size.hidden_size
            factor, with_labels = (2, 256) if task == "inference" else (6, 255)  # the last token has no label
            flops[name, task] = counter.flops - factor * (256 * sum(matrices) + with_labels * tied)
    assert flops[contenders.FLOOR, "inference"] == flops[contenders.FLOOR, "training"] == 0
    # one layer of blocks of 64 and one of chunks of 64 with states of 32 x 32: two products of each, then five more
    assert flops["transnormer-t2", "inference"] == 2 * 256 * 64 * (64 + 64 + 32) * 2
    assert flops["transnormer-t2", "training"] == 2 * 256 * 64 * (64 + 64 + 32) * 7
    assert flops["llama", "inference"] == pytest.approx(2 * 2 * 256**2 * 64 * 2 / 2, rel=0.01)  # half of the map, twice


def test_an_attention_of_unknown_flops_is_named():
    with pytest.raises(NotImplementedError, match="The FLOPs of band_forward are not known"):
        runs.attention_flops("band_forward", torch.zeros(1, 1, 4, 8))


def test_compiled_models_stand_beside_the_eager_ones(tmp_path, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: real(model, backend="eager", **options))
    arguments = ["--quick", "--compile", "--models", "transnormer-t2", "--lengths", "96,128", "--contexts", "16"]
    report = benchmark_model.main([*arguments, "--output_dir", str(tmp_path)])
    names = {row["model"] for row in report["results"] if row["task"] == "training"}
    assert names == {"transnormer-t2", "transnormer-t2 compiled"}
    assert not any("skipped" in row for row in report["results"])
    products = (
        (tmp_path / "benchmark_model.md").read_text().partition("Training, time over that of its own products")[2]
    )
    assert products.count("| transnormer-t2 compiled | ") >= 1


def test_table7_gives_steps_per_second(tmp_path):
    report = benchmark_model.main(["--quick", "--table7", "--lengths", "128", "--output_dir", str(tmp_path)])
    assert {row["model"] for row in report["results"]} == set(contenders.TABLE7)
    assert all(row["steps_per_second"] > 0 for row in report["results"])
    tables = (tmp_path / "table7.md").read_text()
    assert "Training, steps per second" in tables
    assert "Inference, steps per second" in tables


def off_by_a_tenth(output):
    """Factors per channel: one factor for all would vanish in the norm."""
    return torch.linspace(0.9, 1.1, output.shape[-1])


@pytest.mark.parametrize("name", ["transnormer-t1", "transnormer-t2-bidirectional"])
def test_wrong_result_is_refused(name, monkeypatch, tmp_path):
    right = modeling_transnormer.norm_attention

    def wrong(query, key, value, backend, **options):
        output, state = right(query, key, value, backend=backend, **options)
        return output if backend == "eager" else output * off_by_a_tenth(output), state

    monkeypatch.setattr(modeling_transnormer, "norm_attention", wrong)
    with pytest.raises(SystemExit, match=f"{name}: logits differ from the definition by .*; nothing was timed"):
        benchmark_model.main(["--quick", "--models", name, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_wrong_gradient_is_refused(monkeypatch):
    right = contenders.IdentityOnValue.backward
    monkeypatch.setattr(
        contenders.IdentityOnValue, "backward", lambda ctx, gradient: tuple(0.9 * g for g in right(ctx, gradient))
    )
    with pytest.raises(SystemExit, match="gradients differ from the definition"):
        checks.check([contenders.FLOOR], SETTING)


def test_wrong_decoding_is_refused(monkeypatch):
    right = modeling_transnormer.TransNormerNormAttention.step

    def wrong(*inputs):
        output = right(*inputs)
        return output * off_by_a_tenth(output)

    monkeypatch.setattr(modeling_transnormer.TransNormerNormAttention, "step", wrong)
    with pytest.raises(SystemExit, match="decoding differs from the full forward"):
        checks.check(["transnormer-t2"], SETTING)


@pytest.mark.parametrize(("name", "claims"), [("bert", "causal"), ("llama", "bidirectional")])
def test_peers_that_are_not_what_they_claim_are_left_out(name, claims, monkeypatch):
    contender = contenders.CONTENDERS[name]._replace(causal=claims == "causal", cache=None)
    monkeypatch.setitem(contenders.EVERYTHING, name, contender)
    right, skipped = checks.check([name], SETTING)
    assert not right
    assert f"it is meant to be {claims}" in skipped[0]["skipped"]


def test_skipped_cells_are_listed_with_the_reason(tmp_path, monkeypatch):
    arguments = [
        "--quick",
        "--models",
        "llama,nystromformer",
        "--lengths",
        "100,128",
        "--output_dir",
        str(tmp_path),
    ]
    real = runs.probe

    def probe(cell, setting):  # as if llama became slow
        for task, found in real(cell, setting):
            is_slow = cell.name == "llama" and cell.length == 100 and task == "training"
            yield task, found | {"seconds": 1000.0} if is_slow else found

    monkeypatch.setattr(benchmark_model, "probe", probe)
    monkeypatch.setattr(benchmark_model, "MAX_GROWING_CONTEXT", 128)
    report = benchmark_model.main(arguments)
    skipped = {
        (row["model"], row["task"], row["length"]): row["skipped"] for row in report["results"] if "skipped" in row
    }
    assert set(skipped) == {
        ("llama", "decoding", 256),
        ("llama", "training", 100),
        ("llama", "training", 128),
        ("nystromformer", "inference", 100),  # not a multiple of its landmarks
        ("nystromformer", "training", 100),
    }
    assert "its cache grows" in skipped["llama", "decoding", 256]
    assert "over --max_seconds_per_cell 40 (at length 100)" in skipped["llama", "training", 100]
    assert skipped["llama", "training", 128] == skipped["llama", "training", 100]  # not tried again
    assert "it raised" in skipped["nystromformer", "training", 100]
    tables = (tmp_path / "benchmark_model.md").read_text().partition("### Skipped")[2]
    for (model, task, length), reason in skipped.items():
        assert any(
            f"{model}, {task}" in line and str(length) in line and reason in line for line in tables.splitlines()
        )


def test_nothing_starts_after_the_time_is_up():
    options = benchmark_model.parse_arguments(["--quick"])
    rows = benchmark_model.time_length(["bert"], 128, SETTING, options, deadline=0, too_slow={})
    assert all("no time left of --max_minutes" in row["skipped"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt5"], "--models gpt5: no such model; choose from transnormer-t2"),
        (["--table7", "--models", "bert"], "--models bert: no such model; choose from vanilla"),
        (["--lengths", "512,many"], "--lengths 512,many: give whole numbers"),
        (["--contexts", "0"], "--contexts 0: give whole numbers"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--max_minutes", "0"], "--max_minutes 0.0: must be greater than 0"),
        (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_model.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    """The peak grows with the length, and a process that is too slow is ended and says so."""
    size = contenders.Size(128, 2, 2, 4096)
    setting = SETTING._replace(size=size)
    short, long = (
        runs.probe_alone(runs.Cell("transnormer-t2", length, 1), setting, max_seconds=60.0) for length in (1024, 4096)
    )
    logits_bytes = 4 * 4096 * 4096
    assert logits_bytes <= long["inference"]["peak_bytes"] < long["training"]["peak_bytes"]
    assert short["training"]["peak_bytes"] < 0.5 * long["training"]["peak_bytes"]
    broken = runs.probe_alone(runs.Cell("nystromformer", 100, 1), setting, max_seconds=60.0)
    assert all("it raised" in found["skipped"] for found in broken.values())


@pytest.mark.slow
def test_peak_of_training_does_not_depend_on_a_run_before_it():
    """What inference has freed stays with its process, where a training step would take it unseen."""
    setting = SETTING._replace(size=contenders.Size(64, 2, 4, 256))
    alone, after_inference = (
        runs.probe_alone(runs.Cell("performer", 4096, 1, tasks), setting, max_seconds=60.0)["training"]["peak_bytes"]
        for tasks in (("training",), runs.TASKS)
    )
    assert after_inference == pytest.approx(alone, rel=0.05)


@pytest.mark.slow
def test_peak_is_that_of_the_tensors_and_not_of_gaps_between_them():
    """Twice the length takes twice the memory: with the gaps of a heap it would not."""
    setting = SETTING._replace(size=contenders.Size(256, 3, 4, 256))
    short, long = (
        runs.probe_alone(runs.Cell("performer", length, 1), setting, max_seconds=60.0) for length in (4096, 8192)
    )
    for task in runs.TASKS:
        assert long[task]["peak_bytes"] == pytest.approx(2 * short[task]["peak_bytes"], rel=0.06)


def test_resumed_run_keeps_what_it_has_and_times_the_rest(tmp_path):
    few = ["--quick", "--models", "transnormer-t2,bert", "--contexts", "64", "--output_dir", str(tmp_path)]
    first = benchmark_model.main([*few, "--lengths", "64"])
    report = benchmark_model.main([*few, "--lengths", "64,128", "--resume"])
    assert report["results"][: len(first["results"])] == first["results"]
    assert len(report["results"]) == len(first["results"]) + 2 * 2
    with pytest.raises(SystemExit, match="vocab_size=128, this run 64"):
        benchmark_model.main([*few, "--lengths", "64", "--vocab_size", "64", "--resume"])


def test_long_runs_are_repeated_less_often_and_hopeless_ones_not_tried(tmp_path, monkeypatch):
    taken = {"transnormer-t2": 6.0, "llama": 40.0}  # seconds of one run at length 64

    def run_once(task, model, batch):
        length = batch["input_ids"].shape[1]
        return taken["llama" if model.config.model_type == "llama" else "transnormer-t2"] * length / 64, True

    for module in (benchmark_model, runs):
        monkeypatch.setattr(module, "run_once", run_once)
    arguments = ["--models", "transnormer-t2,llama", "--quick", "--lengths", "64,128", "--contexts", "16"]
    arguments += ["--max_seconds_per_cell", "50", "--output_dir", str(tmp_path)]
    rows = benchmark_model.main(arguments)["results"]
    timed = {(row["model"], row["length"]): row for row in rows if row["task"] == "training"}
    assert timed["transnormer-t2", 64]["seconds"] == [6.0] * 2
    assert timed["llama", 64]["seconds"] == [40.0]
    assert timed["transnormer-t2", 128]["seconds"] == [12.0] * 2
    assert "at the cost per token of length 64 a run takes 80 s" in timed["llama", 128]["skipped"]
    assert "| llama | 6.67 |" in (tmp_path / "benchmark_model.md").read_text()  # the turn that both have
