"""scripts/reproduce.py: cells run once, whatever becomes of them, and sentences that follow the numbers."""

import argparse
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import reproduce
from transnormer_hf.research import paper, reproduction, reproduction_report
from transnormer_hf.research.ablations import VANILLA_BACKBONE
from transnormer_hf.research.reproduction import plan_cells, scale
from transnormer_hf.research.reproduction_report import conclusions, describe_order, judge, markdown

DATA = {
    "mlm": {"train": "a"},
    "glue": {"sst2": {}},
    "lra": {"listops": {"generated": True}, "retrieval": {"generated": True}, "image": {}},
}


@pytest.fixture
def run(articles, tmp_path, monkeypatch):
    """Runs the script on a tiny text, with models of two steps; returns its folder."""
    text = tmp_path / "text.txt"
    text.write_text(articles * 4)
    monkeypatch.setattr(reproduction, "LAYERS", 2)
    monkeypatch.setattr(reproduction, "EVALUATION_ROWS", 4)
    monkeypatch.setattr(reproduce, "VOCAB_SIZE", 300)
    out = tmp_path / "out"

    def call(*flags, files=("--train_file", str(text), "--validation_file", str(text))):
        reproduce.main(["--budget", "1e-6", "--output_dir", str(out), *files, *flags])
        return out

    return call


@pytest.fixture
def trainings(monkeypatch):
    """The settings of the masked language models that are asked for; nothing is trained."""
    asked = []

    def pretend(options, settings, tokenizer, folder):
        folder.mkdir(parents=True)
        asked.append(settings)
        return {"status": "done", "figures": {"perplexity": 100.0 + len(asked)}}

    monkeypatch.setitem(reproduce.RUNNERS, "mlm", pretend)
    return asked


def read(out, name):
    return json.loads((out / "cells" / f"{name}.json").read_text())


# ---- Running ----


def test_a_table_is_run_measured_and_drawn(run):
    out = run("--table", "10")
    assert len(list(out.glob("cells/*/*"))) == 4  # FFN and GLU, T1 and T2
    cell = read(out, "10/glu-t1-seed1")
    assert (cell["status"], cell["paper"], cell["seed"]) == ("done", 3.82, 1)
    figures = cell["figures"]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["relative_deviation"] > 0
    assert [len(layer["curve"]) for layer in figures["attention"]["layers"]] == [21] * 2
    assert figures["training_losses"][-1][0] == cell["settings"]["training"]["max_steps"]
    assert cell["settings"]["data"]["train"]["file"] == "text.txt"
    assert str(out.parent) not in json.dumps(cell)  # nothing about this machine
    report = (out / "results.md").read_text()
    assert f"{figures['perplexity']:.1f} | 3.82 |" in report
    assert "GLU beats FFN (T1): **" in report
    assert "Larger blocks help, 64 over 32: not run." in report


def test_cells_are_run_once_and_a_killed_one_again(run, trainings, monkeypatch):
    pretend = reproduce.RUNNERS["mlm"]

    def killed(*args):
        pretend(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        write = reproduce.write_cell
        # the second training is cut off in its middle
        patch.setattr(
            reproduce, "write_cell", lambda *a: (write(*a), patch.setitem(reproduce.RUNNERS, "mlm", killed))[0]
        )
        with pytest.raises(KeyboardInterrupt):
            run("--table", "9")
    assert len(trainings) == 2
    out = run("--table", "9")
    assert len(trainings) == 5  # the first is kept, the second begins again
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*")}
    assert len(before) == 4
    run("--table", "9")
    assert len(trainings) == 5
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*")} == before
    assert not list(out.glob("runs/.*"))


def test_equal_rows_of_several_tables_are_trained_once(run, trainings):
    out = run("--table", "9", "10")
    assert len(trainings) == 6
    shared = read(out, "10/glu-t2-seed1")
    assert shared["trained_for"] == "9: Diag early, Norm late"
    assert shared["figures"] == read(out, "9/diag-early-norm-late-t2-seed1")["figures"]
    assert shared["row"] == "GLU"


def test_a_training_that_diverges_is_a_result(run, monkeypatch):
    settings = reproduction.masked_settings

    def too_fast(*args):
        found = settings(*args)
        return {**found, "training": {**found["training"], "max_steps": 50, "warmup_steps": 0, "learning_rate": 1e30}}

    monkeypatch.setattr(reproduction, "masked_settings", too_fast)
    out = run("--table", "3")
    cell = read(out, "3/1+elu-early-1+elu-late-seed1")
    assert cell["status"] == "diverged"
    assert cell["figures"]["perplexity"] is None
    assert cell["diverged"]["step"] < 50
    assert f"diverged at step {cell['diverged']['step']}, seed 1" in (out / "results.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*")}
    run("--table", "3")
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*")} == before


def test_a_training_that_raises_is_recorded_and_tried_again(run, trainings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(reproduce.RUNNERS, "mlm", lambda *_: 1 / 0)
        out = run("--table", "3")
    cell = read(out, "3/1+elu-early-1+elu-late-seed1")
    assert (cell["status"], cell["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert "failed: ZeroDivisionError" in (out / "results.md").read_text()
    run("--table", "3")
    assert read(out, "3/1+elu-early-1+elu-late-seed1")["status"] == "done"


def test_what_is_there_is_not_overwritten_by_other_settings(run, trainings):
    run("--table", "3")
    with pytest.raises(ValueError, match=r"late-seed1 with other settings \(training\.max_steps 2, now 25"):
        run("--table", "3", "--budget", "1e-4")


def test_no_cell_begins_after_the_time_is_over(run, trainings, capsys):
    out = run("--table", "10", "--max_minutes", "1e-9")
    assert not trainings
    assert "are over before 10/ffn-t1-seed1; the same command goes on there" in capsys.readouterr().out
    assert not (out / "results.md").exists()


def test_the_list_says_what_is_done_and_how_long_the_rest_takes(run, trainings, capsys):
    run("--table", "10")
    capsys.readouterr()
    run("--table", "10", "11", "--list")
    text = capsys.readouterr().out
    assert "10/glu-t1-seed1: perplexity" in text
    assert "11/block-64-t1-seed1: perplexity" in text  # the same training
    assert "11/block-32-t1-seed1: to do" in text
    assert "4 trainings to do, some 0 minutes" in text


def test_what_reads_no_text_asks_for_none(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "INPUT_SCALES", [1.0])
    reproduce.main(["--table", "lln", "--output_dir", str(tmp_path)])
    assert (tmp_path / "cells/lln/concentration-and-memory-seed1.json").is_file()
    assert not list(tmp_path.glob("tokenizer-*"))


def test_log_normal_attention_is_measured_without_training(run, trainings, monkeypatch):
    monkeypatch.setattr(reproduction, "INPUT_SCALES", [1.0])
    out = run("--table", "lln")
    figures = read(out, "lln/concentration-and-memory-seed1")["figures"]
    assert not trainings
    assert figures["error"] < 1e-4
    at = {row["scale"]: row for row in figures["concentration"]}
    # computed on its own for 512 tokens and 64 channels: 8.29 and 7.90 bits, gaps 0.94 and 0.89
    assert at[1.0]["entropy"]["softmax"] == pytest.approx(8.29, abs=0.05)
    assert at[1.0]["entropy"]["lln"] == pytest.approx(7.90, abs=0.15)
    short, *_, long = figures["memory"]
    growth = {name: long[name] / short[name] for name in ("softmax map", "softmax", "lln")}
    assert growth["lln"] == pytest.approx(16, rel=0.05)  # tokens grow 16 times
    assert growth["softmax map"] > 60
    assert "LLN" in (out / "results.md").read_text()


@pytest.mark.slow  # some 160 trainings, of two steps each
def test_every_other_table_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "TASK_ROWS", 8)
    sentences = tmp_path / "glue" / "SST-2"
    sentences.mkdir(parents=True)
    for file in ("train.tsv", "dev.tsv"):
        (sentences / file).write_text("sentence\tlabel\n" + "a good film\t1\na bad film\t0\n" * 8)
    pixels = tmp_path / "image.jsonl"
    pixels.write_text("".join(json.dumps({"pixels": [n] * 1024, "label": n}) + "\n" for n in range(10)))
    reviews = tmp_path / "text.jsonl"
    reviews.write_text("".join(json.dumps({"text": "good " * n, "label": n % 2}) + "\n" for n in range(1, 40)))
    tables = ("--table", "2", "4", "5", "6", "long", "long2", "fig2")
    files = ("--image_files", str(pixels), str(pixels), "--text_files", str(reviews), str(reviews))
    out = run(*tables, "--glue_dir", str(tmp_path / "glue"), *files)
    for path in out.glob("cells/*/*"):
        assert json.loads(path.read_text())["status"] == "done", path
    report = (out / "results.md").read_text()
    assert "Vanilla attention is more local than 1+elu" in report
    for title in ("Table 2", "Table 4", "Table 5", "Table 6", "Tables 8 to 10 again", "Table 2 again", "Figure 2"):
        assert f"## {title}" in report
    assert "failed" not in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "13"], "--table 13: no such table; choose from 1, 2, 3"),
        (["--table", "9", "9"], "--table 9 9: names one twice"),
        (["--seeds", "1", "1"], "--seeds 1 1: names one twice"),
        (["--table", "10", "--rows", "GLU", "GLU"], "--rows GLU GLU: names one twice"),
        (["--budget", "0"], "--budget 0.0: must be greater than 0"),
        (["--max_steps", "1"], "--max_steps 1: must be at least 2"),
        (["--max_minutes", "0"], "--max_minutes 0.0: must be greater than 0"),
        (["--train_file", "no.txt"], "--train_file and --validation_file belong together"),
        (["--train_file", "no.txt", "--validation_file", "no.txt"], "--train_file no.txt: no such file"),
        (["--listops_files", "a.tsv", "b.tsv"], "--listops_files a.tsv: no such file"),
        (["--text_files", "a.tsv", "b.tsv"], "--text_files a.tsv: no such file"),
        (["--glue_files", "rte", "a", "b"], "--glue_files rte: not a task of Table 5; choose from mnli, qnli"),
        (["--glue_files", "qnli", "a", "b"], "--glue_files qnli a: no such file"),
        (["--glue_dir", "."], "--glue_dir .: no folder with train.tsv and dev.tsv, such as SST-2"),
    ],
)
def test_bad_arguments_are_named_with_what_would_work(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        reproduce.main(flags)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_there_must_be_something_to_draw(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cells to draw: run some first"):
        reproduce.main(["--only_draw", "--output_dir", str(tmp_path)])


def test_pairs_of_texts_are_framed_as_robertas_are(tmp_path):
    plain = reproduce.train_tokenizer(["a good film, a bad film"] * 4)
    plain.save_pretrained(tmp_path / "plain")
    framed = reproduce.AutoTokenizer.from_pretrained(reproduce.write_pair_tokenizer(str(tmp_path / "plain"), tmp_path))
    first, second = (plain(text)["input_ids"] for text in ("a good film", "a bad film"))
    start, end = plain.bos_token_id, plain.eos_token_id
    assert framed("a good film")["input_ids"] == [start, *first, end]
    assert framed("a good film", "a bad film")["input_ids"] == [start, *first, end, end, *second, end]
    assert framed.num_special_tokens_to_add(pair=True) == 4


@pytest.mark.parametrize("given", [True, False])
def test_rows_of_small_pictures_and_pairs_are_written_once(tmp_path, given):
    pixels = tmp_path / "image.jsonl"
    pixels.write_text(json.dumps({"pixels": [4 * (n // 32 % 2) for n in range(1024)], "label": 7}) + "\n")
    options = argparse.Namespace(output_dir=tmp_path, image_files=(pixels, pixels), retrieval_files=None)
    if given:
        options.retrieval_files = (pixels, pixels)
    cells = plan_cells(["6"], [1], scale(0.25), DATA)
    settings = {cell.column: cell.settings for cell in cells if cell.row == "T2"}
    files = reproduce.arena_files(options, settings["image"])
    assert json.loads(files["train_file"].read_text()) == {"pixels": [2] * 256, "label": 7}
    pairs = reproduce.arena_files(options, settings["retrieval"])
    if given:
        assert pairs == {"train_file": pixels, "validation_file": pixels}
        return
    lengths = [len(pairs[name].read_text().splitlines()) for name in ("train_file", "validation_file")]
    assert lengths == [16 * 200, 1000]  # a batch a step
    before = pairs["train_file"].stat().st_mtime_ns
    assert reproduce.arena_files(options, settings["retrieval"]) == pairs
    assert pairs["train_file"].stat().st_mtime_ns == before


# ---- Planning ----


def test_a_budget_scales_steps_and_width():
    assert scale(1) == (reproduction.WIDTH, reproduction.STEPS)
    assert scale(16) == (2 * reproduction.WIDTH, 4 * reproduction.STEPS)
    assert scale(1e-9) == (32, 2)
    with pytest.raises(ValueError, match=r"--budget -1 must be greater than 0"):
        scale(-1)


def test_rows_and_blocks_are_as_many_times_shorter_as_each_other():
    blocks = {cell.row: cell.settings["model"]["block_size"] for cell in plan_cells(["11"], [1], scale(1), DATA)}
    assert blocks == {"block 32": 4, "block 64": 8, "block 128": 16}
    lengths = {cell.settings["training"]["max_seq_length"] for cell in plan_cells(["11"], [1], scale(1), DATA)}
    assert lengths == {512 // 8}  # the paper's 512 tokens


def test_steps_can_be_set_apart_from_the_budget(run, trainings):
    run("--table", "10", "--max_steps", "7")
    assert {settings["training"]["max_steps"] for settings in trainings} == {7}
    assert {settings["model"]["hidden_size"] for settings in trainings} == {32}


def test_rows_of_a_table_can_be_run_apart_and_the_report_says_so(run, trainings):
    run("--table", "10", "--rows", "GLU", "--max_steps", "7")
    assert [settings["model"]["variant"] for settings in trainings] == ["t1", "t2"]
    out = run("--table", "10", "--rows", "FFN")
    assert len(trainings) == 4
    assert "Rows differ in their steps of training: FFN: 2, GLU: 7." in (out / "results.md").read_text()
    with pytest.raises(ValueError, match=r"--rows 'MLP': no row of these tables; choose from 'FFN', 'GLU'"):
        run("--table", "10", "--rows", "MLP")


def test_table_4_is_also_trained_for_longer_and_changes_nothing_else():
    short, longer = (plan_cells([table], [2], scale(0.25)._replace(steps=1600), DATA) for table in ("4", "4b"))
    for before, after in zip(short, longer, strict=True):
        assert (before.row, before.paper) == (after.row, after.paper)
        training = before.settings["training"]
        changes = {"max_steps": 4800, "warmup_steps": 480}
        assert training["max_steps"] == 1600
        assert after.settings == {**before.settings, "training": {**training, **changes}}


def test_cells_of_long_rows_change_one_thing_of_t1_and_t2():
    cells = plan_cells(["long", "long2"], [1], scale(0.25), DATA)
    models = {(cell.row, cell.column): cell.settings["model"] for cell in cells}
    assert len(cells) == len(models) == 13
    whole = models["50 % Diag", "t1"]
    for cell in cells:
        assert (cell.settings["task"], cell.settings["model"]["block_size"]) == ("clm", 16)
        assert cell.settings["training"]["block_size"] == 512  # tokens of a row
        assert cell.settings["model"]["is_causal"]

    def changed(row):
        return {name for name, value in models[row, "t1"].items() if value != whole[name]}

    assert changed("100 % Diag") == changed("Norm early, Diag late") == {"layer_types"}
    assert changed("FFN") == {"feed_forward", "intermediate_size"}
    assert models["Vanilla", ""]["layer_types"] == ["softmax"] * 4
    assert models["1+elu", ""]["layer_types"] == ["1+elu"] * 4
    assert models["NormAttention", ""]["attention_norm_type"] == "simple_rms"
    assert {name: models[row, ""][name] for row in ("Vanilla", "1+elu") for name in ("lrpe", "feed_forward")} == {
        "lrpe": False,
        "feed_forward": "ffn",
    }


def test_steadiness_is_told_apart_from_the_way_down():
    down = [200.0 - step for step in range(150)]  # falls evenly, without noise
    noise = [10.0 + step % 2 for step in range(150)]
    over_all = [torch.tensor(norms).std().item() / torch.tensor(norms).mean().item() for norms in (down, noise)]
    assert over_all[0] > 5 * over_all[1]
    window = torch.tensor(down[50:100])
    assert reproduce.local_deviation(down) == pytest.approx((window.std() / window.mean()).item())
    assert reproduce.local_deviation(noise) == pytest.approx(over_all[1], rel=0.02)
    assert math.isnan(reproduce.local_deviation(down[:49]))
    assert math.isnan(reproduce.local_deviation([*down, math.inf]))


def test_every_table_has_cells_of_its_own_names():
    cells = plan_cells(reproduction.TABLES, [1, 2], scale(0.01), DATA)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.table for cell in cells} == set(reproduction.TABLES)
    masked = {reproduction.settings_key(cell.settings) for cell in cells if cell.settings["task"] == "mlm"}
    # Tables 1, 3 and 2, then 12 distinct ones of T1 and of T2, and 3 of Figure 2
    assert len(masked) == 2 * (4 + 2 + 2 + 2 * 12 + 3)
    for cell in cells:
        assert json.loads(json.dumps(cell.settings)) == cell.settings
        if "model" in cell.settings:
            reproduce.AutoConfig.for_model(**cell.settings["model"])
    tokens = {cell.settings["pretrained"]["seed"] for cell in cells if cell.table == "5"}
    assert tokens == {1, 2}


@pytest.mark.parametrize(
    ("table", "tokens", "rows", "block"), [("11", 64, 32, 8), ("5", 128, 16, 16), ("4", 256, 8, 32)]
)
def test_rows_of_whole_models_are_longer_and_blocks_with_them(table, tokens, rows, block):
    (cell,) = (
        cell
        for cell in plan_cells([table], [1], scale(0.25), DATA)
        if cell.row in ("T2", "block 64") and cell.column in ("", "t2", "sst2")
    )
    settings = cell.settings.get("pretrained", cell.settings)
    training = settings["training"]
    assert training.get("max_seq_length", training.get("block_size")) == tokens
    assert settings["model"]["max_position_embeddings"] == tokens
    assert (training["per_device_train_batch_size"], settings["model"]["block_size"]) == (rows, block)


def test_a_field_that_configurations_have_since_changes_no_old_cell(run, trainings):
    out = run("--table", "3")
    for path in out.glob("cells/3/*"):
        content = json.loads(path.read_text())
        assert content["settings"]["model"].pop("type_vocab_size") == 0
        path.write_text(json.dumps(content))
    run("--table", "3")
    assert len(trainings) == 3


# ---- Drawing ----


def result(table, row, value, column="t1", seed=1, paper=None, **changes):
    name = reproduction_report.FIGURES[table].name
    place = {"table": table, "row": row, "column": column, "seed": seed, "paper": paper}
    found = {"status": "done", "figures": {name: value}, "seconds": 3.0, "settings": {"task": "mlm", "seed": seed}}
    return {**place, **found, **changes}


def of_seeds(better, worse):
    rows = (("GLU", better), ("FFN", worse))
    return [result("10", row, value, seed=seed) for row, values in rows for seed, value in enumerate(values, 1)]


GLU_BEATS_FFN = next(claim for claim in reproduction_report.CLAIMS if claim.better == "GLU")


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([10.0], [12.0], "holds"),
        ([12.0], [10.0], "does not hold"),
        ([10.0, 10.1], [12.0, 12.2], "holds"),
        ([12.0, 12.2], [10.0, 10.1], "does not hold"),
        ([10.0, 11.0], [10.6, 11.2], "not decided"),
        ([10.0, 10.1], [12.0, None], "holds"),
        ([None, None], [None, None], "not decided"),
        ([None, None], [10.0, 10.1], "does not hold"),
        ([10.0], [10.1], "not decided"),
        ([10.1], [10.0], "not decided"),
    ],
)
def test_a_conclusion_follows_the_numbers(better, worse, verdict):
    sentence = judge(GLU_BEATS_FFN, "t1", of_seeds(better, worse))
    assert f"**{verdict}" in sentence
    assert ("one seed" in sentence) == (len(better) == 1)


def test_a_difference_within_the_spread_is_told_with_its_sign():
    judged = (judge(GLU_BEATS_FFN, "t1", of_seeds([10.0, 11.0], worse)) for worse in ([10.6, 11.2], [9.5, 11.6]))
    assert ["though it has the same sign with each" in sentence for sentence in judged] == [True, False]


def test_blowing_up_takes_more_than_being_worse():
    def judged(value):
        rows = {"1+elu with scaling": 10.0, "1+elu, scaling removed": value, "NormAttention, RMSNorm": 9.0}
        results = [result("1", row, value, column="") for row, value in rows.items()]
        return [sentence for sentence in conclusions(results) if "not run" not in sentence]

    assert ["holds" in s and "not hold" not in s for s in judged(None)] == [True, True, True]
    assert ["**does not hold: better, but by less than a factor of 2**" in s for s in judged(11.0)] == [
        True,
        True,
        False,
    ]


def of_table_6(values):
    """Results of Table 6 by row, task and seed."""
    found = []
    for (row, task, seed), value in values.items():
        settings = {"task": "lra", "training": {"max_length": 64, "max_steps": 2}, "data": {}}
        cell = result("6", row, value, task, seed, paper.TABLE_6[task].get(row), settings=settings)
        cell["figures"] |= {"largest_class": 0.5, "rows": 400}
        found.append(cell)
    return found


def test_tables_of_tasks_have_a_mean_and_conclusions_rest_on_it():
    results = of_table_6(
        {
            ("T2", "text", 1): 0.7, ("T2", "image", 1): 0.5, ("T2", "text", 2): 0.8, ("T2", "image", 2): 0.5,
            ("Performer", "text", 1): 0.5, ("Performer", "image", 1): 0.6, ("Performer", "text", 2): 0.5,
        }
    )  # fmt: skip
    means = [cell for cell in reproduction_report.with_means(results) if cell["column"] == "mean"]
    assert [(cell["row"], cell["seed"], cell["figures"]["accuracy"]) for cell in means] == [
        ("T2", 1, pytest.approx(0.6)),
        ("T2", 2, pytest.approx(0.65)),
        ("Performer", 1, pytest.approx(0.55)),  # without the second seed, which lacks a task
    ]
    assert means[0]["paper"] == pytest.approx((72.20 + 49.60) / 2)
    (text,) = (s for s in conclusions([*results, *means]) if s.startswith("T2 is better than Performer on long texts"))
    assert text.endswith("(MEAN): **holds** (T2 60.0, Performer 55.0; one seed).")
    assert "T2 is better than FLASH on long texts: not run." in conclusions(means)
    report = markdown(results)
    assert "| T2 | 75.0 (70.0, 80.0) | 72.2 | 50.0 (50.0, 50.0) | 49.6 | 62.5 (60.0, 65.0) | 60.9 |" in report


def test_a_mean_of_tasks_counts_what_diverged_as_nothing_and_asks_for_all_figures_of_the_paper():
    results = of_table_6({("LLN", "text", 1): None, ("LLN", "image", 1): 0.5})
    mean = reproduction_report.with_means(results)[-1]
    assert (mean["figures"]["accuracy"], mean["paper"]) == (0.25, None)


def test_what_learns_no_more_than_the_classes_shares_is_named():
    # two standard errors of 400 rows in halves: 5 %
    results = of_table_6({("T2", "text", 1): 0.56, ("Performer", "text", 1): 0.54, ("Performer", "text", 2): 0.53})
    (text,) = reproduction_report.describe_chance(results)
    assert text == "- TEXT: the largest class has 50.0 % of 400 rows; at its level, below 55.0 %: Performer."
    (text,) = reproduction_report.describe_chance(results[1:])
    assert text.endswith("at its level, below 55.0 %: all.")
    (text,) = reproduction_report.describe_chance(results[:1])
    assert text == "- TEXT: the largest class has 50.0 % of 400 rows."


def test_other_figures_of_a_run_are_listed_by_row():
    results = [
        result("long2", row, 0.1, column="", seed=seed)
        for row, seed in (("Vanilla", 1), ("1+elu", 1), ("1+elu", 2), ("NormAttention", 1))
    ]
    for cell, largest in zip(results, (0.25, 0.02, 0.03), strict=False):
        cell["figures"]["largest_score_gradient"] = largest
    (text,) = reproduction_report.describe_figure(results, "largest_score_gradient", "Largest")
    assert text == "Largest: 1+elu 0.025, Vanilla 0.25."
    assert text.replace(
        "Largest:", "Largest gradient of an attention weight by a score, of the trained model:"
    ) in markdown(results)
    assert reproduction_report.describe_figure(results, "perplexity", "Perplexity") == []


def test_rows_that_are_missing_are_named():
    values = {(row, "text", 1): 0.5 for row in reproduction.ARENA_MODELS}
    values |= {(row, "image", 1): 0.5 for row in reproduction.ARENA_MODELS if row != "T2"}
    results = of_table_6(values)
    assert reproduction_report.describe_missing("6", results) == ["Not run, or not in every column: T2."]
    whole = of_table_6(values | {("T2", "image", 1): 0.5})
    assert reproduction_report.describe_missing("6", reproduction_report.with_means(whole)) == []


def test_table_6_says_how_long_its_rows_are_and_which_are_generated():
    cells = [cell for cell in plan_cells(["6"], [1], scale(0.25), DATA) if cell.row == "T2"]
    results = [result("6", "T2", 0.5, column=cell.column, settings=cell.settings) for cell in cells]
    (text,) = reproduction_report.describe_tasks(results)
    assert text == (
        "Tokens of a row at most: LISTOPS 128 (generated), RETRIEVAL 256 (generated), IMAGE 256."
        " Retrieval is a stand-in for the Arena's, pairs of texts of invented words."
    )


def test_core_hours_count_each_run_once_and_work_before_the_clock():
    results = of_seeds([1.0], [2.0])  # 3 seconds by the clock each
    results[0] |= {"cpu_seconds": 7200.0}
    results.append({**results[0], "table": "11", "trained_for": "10: GLU"})
    assert reproduction_report.describe_time(results) == "Core-hours by table: 10 2.00; together 2.0."


def test_what_was_not_run_is_said_to_be():
    sentences = conclusions(of_seeds([1.0], [2.0]))
    assert sum("not run" in sentence for sentence in sentences) == len(reproduction_report.CLAIMS) - 1


def test_the_order_of_the_rows_is_held_against_the_papers():
    papers = {"0 % Diag": 4.23, "50 % Diag": 3.82, "100 % Diag": 4.75}

    def order(*values):
        rows = zip(papers.items(), values, strict=True)
        return describe_order("8", "t1", [result("8", row, value, paper=paper) for (row, paper), value in rows])

    same = order(20.0, 10.0, 30.0)
    assert same.startswith("T1: the order of the rows is the paper's: 50 % Diag < 0 % Diag < 100 % Diag")
    assert "Rank correlation 1.00 over 3 rows" in same
    assert "is not the paper's" in (turned := order(20.0, 30.0, 10.0))
    assert "Rank correlation -1.00" in turned
    assert describe_order("8", "t1", [result("8", "0 % Diag", 1.0, paper=4.23)]) is None


def test_more_is_better_where_the_figure_is_an_accuracy():
    results = [
        result("6", row, value, column="listops", paper=paper)
        for row, value, paper in (("Transformer", 0.3, 38.37), ("Performer", 0.2, 38.02), ("T2", 0.4, 41.60))
    ]
    assert "is the paper's: T2 > Transformer > Performer" in describe_order("6", "listops", results)
    same = [result("5", row, 0.0, column="cola", paper=paper) for row, paper in (("T1", 45.4), ("T2", 45.9))]
    assert describe_order("5", "cola", same) == "COLA: there is no order here, all 2 rows have the same figure."


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"perplexity": 47.5712, "loss": 3.9}, "perplexity 47.57"),
        ({"training": [{"model": "vanilla"}], "inference": []}, "training, inference"),
    ],
)
def test_headline_is_the_first_figure_or_what_was_measured(figures, expected):
    assert reproduce.headline({"status": "done", "figures": figures}) == expected


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.randint(5, (2, 12)).double().tolist()
    assert reproduction_report.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_rivals_have_the_size_of_the_others_and_blocks_as_short_as_the_texts():
    cells = plan_cells(["4", "5", "6"], [1], scale(1), DATA)
    models = {
        (cell.table, cell.row, cell.column): cell.settings.get("pretrained", cell.settings)["model"] for cell in cells
    }
    layers = {place: model["num_hidden_layers"] for place, model in models.items()}
    assert (layers["4", "FLASH", ""], layers["5", "FLASH", "sst2"], layers["4", "LS", ""]) == (7, 8, 4)
    options = {place: (model.get("mixer_options") or {}) for place, model in models.items()}
    assert options["4", "FLASH", ""]["flash"] == {"chunk_size": 32, "query_size": 24}  # rows half as long
    assert options["4", "LS", ""]["transformer_ls"] == {"num_landmarks": 16, "chunk_size": 16, "window": 32}
    assert options["5", "LS", "sst2"]["transformer_ls"] == {"num_landmarks": 8, "chunk_size": 8, "window": 2}
    assert options["6", "BigBird", "image"]["bigbird"] == {"block_size": 16}
    assert options["6", "Linformer", "listops"]["linformer"] == {"projected_length": 32}
    assert models["6", "T2", "image"]["block_size"] == models["6", "Local", "image"]["block_size"] == 16
    assert (layers["6", "FLASH", "image"], layers["6", "T2", "image"]) == (4, 2)
    weights = {}
    for row in ("Vanilla", "LS", "FLASH-quad", "FLASH"):
        config = reproduce.AutoConfig.for_model(**models["4", row, ""], vocab_size=8, pad_token_id=1)
        with torch.device("meta"):
            weights[row] = AutoModelForCausalLM.from_config(config).num_parameters()
    assert all(0.9 < weights[row] / weights["Vanilla"] < 1.25 for row in weights)


@pytest.mark.parametrize("table", ["4", "5", "6"])
def test_rows_of_whole_models_differ_in_their_attention_and_what_the_paper_puts_around_it(table):
    of_the_row = {"variant", "feature_map", "diag_activation", "attention_norm_type", "layer_types", "lm_head_bias"}
    of_the_row |= {"model_type", "mixer", "mixer_options", "num_hidden_layers"}  # FLASH has more layers
    of_the_row |= set(VANILLA_BACKBONE)  # Tables 4 and 5: that of Tables 1 and 3
    cells = plan_cells([table], [1], scale(1), DATA)
    models = {(cell.column, cell.row): cell.settings.get("pretrained", cell.settings)["model"] for cell in cells}
    for (column, _), model in models.items():
        reference = models[column, "T2"]
        changed = {name for name in model.keys() | reference.keys() if model.get(name) != reference.get(name)}
        assert changed <= of_the_row


def test_growth_is_a_power_of_the_length():
    lengths = (1024, 2048, 3072, 5120)
    assert reproduction_report.growth_exponent({n: 3e-6 * n**2 for n in lengths}) == pytest.approx(2)
    assert reproduction_report.growth_exponent(dict.fromkeys(lengths, 7.0)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(reproduction_report.growth_exponent({1024: 1.0}))
    figures = {
        task: [
            {"model": model, "length": n, "steps_per_second": 1e6 / n**power, "peak_bytes": 1e3 * n**power}
            for model, power in (("vanilla", 2), ("1+elu", 1))
            for n in lengths
        ]
        for task in ("training", "inference")
    }
    text = "\n".join(reproduction_report.draw_speed([{"figures": figures}]))
    assert text.count("| vanilla | 0.954 | 0.238 | 0.106 | 0.0381 | n^2.00 |") == 2
    assert text.count("| 1+elu | 1 | 2 | 3 | 5 | n^1.00 |") == 2
    assert text.count("| T2, paper (A6000) | 29.41 | – | 12.95 |") == 1


def test_speed_is_judged_at_every_length():
    def rows(**models):
        return [
            {"model": model, "length": n, "steps_per_second": steps}
            for model, values in models.items()
            for n, steps in zip((1024, 5120), values, strict=True)
        ]

    t2 = {"transnormer-t2-bidirectional": (2.0, 0.5)}
    text = reproduction_report.describe_speed(
        rows(**t2, vanilla=(1.0, 0.1), performer=(1.6, 0.6), flash=(4, 1)), "training"
    )
    assert text == [
        "T2 is faster than Transformer in training: **holds** (ratio 2.00 at 1024, 5.00 at 5120).",
        "T2 is faster than Performer in training: **depends on the length** (ratio 1.25 at 1024, 0.83 at 5120).",
        "T2 is faster than FLASH in training: **does not hold** (ratio 0.50 at 1024, 0.50 at 5120).",
    ]
    (text,) = reproduction_report.describe_speed(rows(**t2, vanilla=(1.99, 0.1)), "inference")
    assert "**depends on the length**" in text  # a ratio of 1.005 says nothing


def test_another_papers_figures_are_named_as_such():
    results = [result("6", row, 0.5, column="listops") for row in ("Skyformer", "T2")]
    (text,) = reproduction_report.describe_skyformer(results)
    assert text.endswith("LISTOPS Skyformer 38.69.")
    assert reproduction_report.describe_skyformer(results[1:]) == []


def test_tables_have_the_mean_the_seeds_and_the_paper():
    results = [result("10", "GLU", value, seed=seed, paper=3.82) for seed, value in ((1, 101.0), (2, 103.0))]
    results.append(result("10", "FFN", None, paper=3.93, status="diverged", diverged={"step": 7, "loss": None}))
    text = markdown(results)
    assert "| FFN | diverged at step 7, seed 1, loss None | 3.93 |" in text
    assert "| GLU | 102.0 (101.0, 103.0) | 3.82 |" in text
    assert text.index("| FFN") < text.index("| GLU")  # the paper's rows
