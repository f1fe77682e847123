"""GLUE's tasks, files, metrics and submissions."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transnormer_hf.tasks import glue
from transnormer_hf.tasks.glue import TASKS, compute_glue_metrics, get_task, load_glue, read_glue_file, write_submission

HUB_LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "stsb": [],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
    "ax": ["entailment", "neutral", "contradiction"],
}

# Three lines in the form of each official training file, and what they mean.
OFFICIAL = {
    "cola": (
        'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tThe more.\n',
        {"sentence": ['He said "no.', "The more."], "label": [1, 0]},
    ),
    "sst2": ('sentence\tlabel\na "fine film \t1\nbad \t0\n', {"sentence": ['a "fine film ', "bad "], "label": [1, 0]}),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA " b\tB\n0\t9\t9\tC\tD\n',
        {"sentence1": ['A " b', "C"], "sentence2": ["B", "D"], "label": [1, 0]},
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\tWhy?\tWhy not?\t0\n2\t3\t4\tHow?\tHow?\t1\n",
        {"question1": ["Why?", "How?"], "question2": ["Why not?", "How?"], "label": [0, 1]},
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\tnone\tnone\tA\tB\t5.000\n1\tg\tf\t2012\t2\tnone\tnone\tC\tD\t0.25\n",
        {"sentence1": ["A", "C"], "sentence2": ["B", "D"], "label": [5.0, 0.25]},
    ),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\tx\tA\tB\tneutral\tcontradiction\n1\tx\tC\tD\tneutral\tentailment\n",
        {"premise": ["A", "C"], "hypothesis": ["B", "D"], "label": [2, 0]},
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n1\tWhen?\tNow.\tentailment\n",
        {"question": ["Who?", "When?"], "sentence": ["He.", "Now."], "label": [1, 0]},
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tnot_entailment\n1\tC\tD\tentailment\n",
        {"sentence1": ["A", "C"], "sentence2": ["B", "D"], "label": [1, 0]},
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n1\tC\tD\t0\n",
        {"sentence1": ["A", "C"], "sentence2": ["B", "D"], "label": [1, 0]},
    ),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


# ---- Tasks ----


def test_tasks_have_the_label_order_of_the_hub():
    assert {name: list(task.labels) for name, task in TASKS.items()} == HUB_LABELS


def test_the_metric_that_chooses_a_checkpoint_is_the_task_score():
    assert {name: task.best_metric for name, task in TASKS.items() if task.metrics} == {
        "cola": "matthews_correlation",
        "sst2": "accuracy",
        "mrpc": "combined_score",
        "qqp": "combined_score",
        "stsb": "combined_score",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
        "wnli": "accuracy",
    }


@pytest.mark.parametrize("name", ["SST-2", "sst-2", None])
def test_an_unknown_task_names_the_known_ones(name):
    with pytest.raises(ValueError, match=r"--task_name .* is not a GLUE task: choose one of cola, sst2, mrpc"):
        get_task(name)


def test_importing_needs_no_optional_package():
    code = (
        "import sys, importlib, types\n"
        "for name in ('sklearn', 'scipy', 'evaluate', 'datasets', 'pyarrow'): sys.modules[name] = None\n"
        "package = types.ModuleType('transnormer_hf'); sys.modules['transnormer_hf'] = package\n"
        f"package.__path__ = [{str(Path(glue.__file__).parents[1])!r}]\n"
        "module = importlib.import_module('transnormer_hf.tasks.glue')\n"
        "module._hub_is_reachable = lambda: False\n"
        "import numpy as np\n"
        "try: module.compute_glue_metrics(module.TASKS['sst2'], np.array([1]), np.array([1]))\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'transnormer-hf[train]'" in done.stdout


# ---- Files ----


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_training_files_are_read(name, tmp_path):
    text, expected = OFFICIAL[name]
    assert read_glue_file(write(tmp_path / "train.tsv", text), TASKS[name]) == expected


@pytest.mark.parametrize("name", OFFICIAL)
def test_files_with_windows_line_ends_are_read(name, tmp_path):
    text, expected = OFFICIAL[name]
    path = write(tmp_path / "train.tsv", text.replace("\n", "\r\n"))
    assert read_glue_file(path, TASKS[name]) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cola", "index\tsentence\n0\tA\n1\tB\n", {"sentence": ["A", "B"]}),
        (
            "mrpc",
            "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tA\tB\n",
            {"sentence1": ["A"], "sentence2": ["B"]},
        ),
        ("qqp", "id\tquestion1\tquestion2\n0\tA\tB\n", {"question1": ["A"], "question2": ["B"]}),
        ("ax", "index\tsentence1\tsentence2\n0\tA\tB\n", {"premise": ["A"], "hypothesis": ["B"]}),
    ],
)
def test_test_files_without_labels_are_read(name, text, expected, tmp_path):
    assert read_glue_file(write(tmp_path / "test.tsv", text), TASKS[name], labelled=False) == expected


@pytest.mark.parametrize("extension", ["tsv", "csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("label", [0, "not_duplicate"])
def test_every_format_gives_the_same_rows(extension, label, tmp_path):
    rows = [
        {"question1": 'Is "a" b?', "question2": "Is a, b?", "is_duplicate": label},
        {"question1": "Déjà vu?", "question2": "", "is_duplicate": 1},
    ]
    path = tmp_path / f"rows.{extension}"
    if extension == "parquet":
        from datasets import Dataset

        Dataset.from_list([{**row, "is_duplicate": str(row["is_duplicate"])} for row in rows]).to_parquet(path)
    elif extension.startswith("json"):
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    elif extension == "csv":
        write(path, f'question1,question2,is_duplicate\n"Is ""a"" b?","Is a, b?",{label}\nDéjà vu?,"",1\n')
    else:
        write(path, f'question1\tquestion2\tis_duplicate\nIs "a" b?\tIs a, b?\t{label}\nDéjà vu?\t\t1\n')
    assert read_glue_file(path, TASKS["qqp"]) == {
        "question1": ['Is "a" b?', "Déjà vu?"],
        "question2": ["Is a, b?", ""],
        "label": [0, 1],
    }


def test_only_a_line_feed_ends_a_row(tmp_path):
    path = write(tmp_path / "train.tsv", "sentence\tlabel\na\u2028b\x85c\x0bd\t1\n")
    assert read_glue_file(path, TASKS["sst2"])["sentence"] == ["a\u2028b\x85c\x0bd"]


BAD_FILES = [
    (
        "sst2",
        "x.tsv",
        "sentence\tlabel\ngood\t2\n",
        r"x\.tsv, line 2, column 'label': unknown label '2', expected .*negative \(0\)",
    ),
    ("sst2", "x.tsv", "sentence\tlabel\ngood\t-1\n", r"unknown label '-1'"),
    (
        "rte",
        "x.jsonl",
        '{"sentence1": "a", "sentence2": "b", "label": "maybe"}\n',
        r"line 1, .*'maybe'.* entailment \(0\)",
    ),
    ("qqp", "x.jsonl", '{"question1": "a", "question2": "b", "is_duplicate": true}\n', r"unknown label True"),
    ("sst2", "x.tsv", "text\tlabel\ngood\t1\n", r"no column 'sentence' .* needs sentence, label; found text, label"),
    ("mnli", "x.tsv", "premise\thypothesis\na\tb\n", r"no column 'label' .* label \(or gold_label\)"),
    ("sst2", "x.tsv", "sentence\tlabel\na\t1\nb\n", r"1 of 2 rows are broken \(line 3: 1 fields, expected 2"),
    ("sst2", "x.tsv", "sentence\tlabel\na\tb\t1\n", r"line 2: 3 fields, expected 2 \(sentence, label\)"),
    ("cola", "x.tsv", "good\t1\n", r"2 fields, expected 4 \(source, label, .*as there is no header"),
    ("qqp", "x.tsv", "question1\tquestion2\tis_duplicate\na\tb\t1\na\n", r"1 of 2 rows are broken"),
    ("sst2", "x.csv", "sentence,label\na,1,2\n", r"line 2: 3 fields, expected 2 \(sentence, label\)"),
    ("sst2", "x.csv", 'sentence,label\n"a,1\n', r"x\.csv, line 2: expected UTF-8 csv"),
    ("stsb", "x.csv", "sentence1,sentence2,score\na,b,5.5\n", r"column 'score': unknown score '5.5', .* from 0 to 5"),
    ("stsb", "x.csv", "sentence1,sentence2,score\na,b,high\n", r"unknown score 'high'"),
    ("sst2", "x.jsonl", '{"sentence": null, "label": 1}\n', r"line 1, column 'sentence': expected a text, got None"),
    ("sst2", "x.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', r"line 2: no column 'label'"),
    ("sst2", "x.json", '[{"sentence": "a", "label": 1}]\n', r"line 1: expected one JSON object a line"),
    ("sst2", "x.json", "sentence\n", r"line 1: expected one JSON object a line"),
    ("sst2", "x.parquet", "sentence\n", r"x\.parquet: expected a parquet file"),
    ("sst2", "x.tsv", "sentence\tlabel\n", r"x\.tsv: no rows of task sst2"),
    ("sst2", "x.txt", "sentence\n", r"x\.txt: unknown extension, expected one of \.tsv, \.csv"),
]


@pytest.mark.parametrize(("name", "file", "text", "message"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_line(name, file, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_glue_file(write(tmp_path / file, text), TASKS[name])


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\nna\xefve\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: expected UTF-8"):
        read_glue_file(path, TASKS["sst2"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv: no such file"):
        read_glue_file(tmp_path / "nothing.tsv", TASKS["sst2"])


def qqp_file(path: Path, rows: int) -> Path:
    lines = [f"{number}\ta\tb\t1" for number in range(rows)]
    lines[3] = "3\ta question that"
    return write(path, "\n".join(["id\tquestion1\tquestion2\tis_duplicate", *lines, ""]))


def test_the_few_broken_rows_of_official_qqp_are_left_out_aloud(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = read_glue_file(qqp_file(tmp_path / "train.tsv", 2000), TASKS["qqp"])
    assert len(rows["label"]) == 1999
    assert "left out 1 of 2000 rows that are broken (line 5: 2 fields, expected 4" in caplog.text


def test_no_row_of_a_test_file_is_left_out(tmp_path):
    with pytest.raises(ValueError, match="1 of 2000 rows are broken"):
        read_glue_file(qqp_file(tmp_path / "test.tsv", 2000), TASKS["qqp"], labelled=False)


def test_nli_rows_without_a_gold_label_are_left_out_aloud(tmp_path, caplog):
    path = write(tmp_path / "x.tsv", "sentence1\tsentence2\tgold_label\na\tb\t-\nc\td\tneutral\n")
    with caplog.at_level(logging.WARNING):
        assert read_glue_file(path, TASKS["mnli"])["label"] == [1]
    assert "left out 1 of 2 rows without a gold label" in caplog.text


# ---- Loading ----


def test_official_folders_hold_every_split(tmp_path):
    header, rows = "index\tsentence1\tsentence2\tgold_label\n", "0\tA\tB\tneutral\n"
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.tsv", header + rows)
    for name in ("test_matched", "test_mismatched", "diagnostic"):
        write(tmp_path / f"{name}.tsv", "index\tsentence1\tsentence2\n0\tA\tB\n")
    splits = load_glue(TASKS["mnli"], list(TASKS["mnli"].files), data_dir=tmp_path)
    assert {name: split.column_names for name, split in splits.items()} == {
        "train": ["premise", "hypothesis", "label"],
        "validation_matched": ["premise", "hypothesis", "label"],
        "validation_mismatched": ["premise", "hypothesis", "label"],
        "test_matched": ["premise", "hypothesis"],
        "test_mismatched": ["premise", "hypothesis"],
        "ax": ["premise", "hypothesis"],
    }


def test_a_folder_without_the_file_says_what_it_holds(tmp_path):
    (tmp_path / "SST-2").mkdir()
    write(tmp_path / "train.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(
        FileNotFoundError, match=r"has no dev\.tsv, .*sst2 needs \(.*train\.tsv\)\. Did you mean .*SST-2"
    ):
        load_glue(TASKS["sst2"], ["train", "validation"], data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--data_dir .*nowhere is not a folder"):
        load_glue(TASKS["sst2"], ["train"], data_dir=tmp_path / "nowhere")


def test_the_hub_is_asked_for_glue_by_its_full_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split, cache_dir):
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"premise": ["A"], "hypothesis": ["B"], "label": [-1], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_glue(TASKS["mnli"], ["validation_matched", "ax"])
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched"), ("nyu-mll/glue", "ax", "test")]
    assert splits["validation_matched"].column_names == ["premise", "hypothesis", "label"]
    assert splits["ax"].column_names == ["premise", "hypothesis"]


def test_without_the_hub_the_error_names_data_dir(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"nyu-mll/glue \(sst2, train\).*offline.*--data_dir"):
        load_glue(TASKS["sst2"], ["train"])


# ---- Metrics ----


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(glue, "_hub_is_reachable", lambda: False)
    glue._load_metric.cache_clear()
    yield
    glue._load_metric.cache_clear()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cola", {"matthews_correlation": 1 / 3}),
        ("sst2", {"accuracy": 4 / 6}),
        ("mrpc", {"accuracy": 4 / 6, "f1": 2 / 3, "combined_score": 2 / 3}),
        ("qqp", {"accuracy": 4 / 6, "f1": 2 / 3, "combined_score": 2 / 3}),
    ],
)
def test_classification_metrics_have_the_names_and_values_of_evaluate(name, expected):
    predictions, references = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 0])
    assert compute_glue_metrics(TASKS[name], predictions, references) == pytest.approx(expected)


@pytest.mark.usefixtures("offline")
def test_regression_metrics_have_the_names_and_values_of_evaluate():
    predictions, references = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 4.0, 3.0])
    metrics = compute_glue_metrics(TASKS["stsb"], predictions, references)
    pearson = np.corrcoef(predictions, references)[0, 1]
    assert metrics == pytest.approx({"pearson": pearson, "spearmanr": 0.8, "combined_score": (pearson + 0.8) / 2})


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.metrics])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_predictions_have_a_defined_value(name, value):
    task = TASKS[name]
    references = np.linspace(0, 5, 6) if task.is_regression else np.array([0, 1, 0, 1, 0, 1])
    metrics = compute_glue_metrics(task, np.full(6, value), references)
    assert set(metrics) >= set(task.metrics)
    assert all(np.isfinite(list(metrics.values())))


@pytest.mark.parametrize("name", ["stsb", "sst2"])
def test_predictions_that_are_no_numbers_are_neither_scored_nor_written(name, tmp_path):
    predictions = np.array([1.0, np.nan, 1.0])
    with pytest.raises(ValueError, match=r"in 1 of 3 rows \(row 2\)"):
        compute_glue_metrics(TASKS[name], predictions, np.array([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"in 1 of 3 rows \(row 2\)"):
        write_submission(tmp_path, TASKS[name], "test", predictions)
    assert not list(tmp_path.iterdir())


def test_evaluate_is_used_where_the_hub_is_reachable(monkeypatch):
    import evaluate

    class Module:
        def compute(self, predictions, references):
            return {"accuracy": 0.25, "f1": float("nan")}

    asked = []
    monkeypatch.setattr(glue, "_hub_is_reachable", lambda: True)
    monkeypatch.setattr(evaluate, "load", lambda *names, **_: asked.append(names) or Module())
    glue._load_metric.cache_clear()
    metrics = compute_glue_metrics(TASKS["mrpc"], np.array([1]), np.array([0]))
    glue._load_metric.cache_clear()
    assert asked == [("evaluate-metric/glue", "mrpc")]
    assert metrics == {"accuracy": 0.25, "f1": 0.0, "combined_score": 0.125}


def test_a_metric_that_evaluate_cannot_load_is_computed_here(monkeypatch):
    import evaluate

    def load(*args, **kwargs):
        raise FileNotFoundError("no such metric")

    monkeypatch.setattr(glue, "_hub_is_reachable", lambda: True)
    monkeypatch.setattr(evaluate, "load", load)
    glue._load_metric.cache_clear()
    metrics = compute_glue_metrics(TASKS["sst2"], np.array([1, 0]), np.array([1, 1]))
    glue._load_metric.cache_clear()
    assert metrics == {"accuracy": 0.5}


def test_the_hub_is_out_of_reach_in_offline_mode(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not glue._hub_is_reachable()


# ---- Submission ----


@pytest.mark.parametrize(
    ("name", "split", "predictions", "file", "lines"),
    [
        ("cola", "test", [1, 0], "CoLA.tsv", ["0\t1", "1\t0"]),
        ("sst2", "test", [1, 0], "SST-2.tsv", ["0\t1", "1\t0"]),
        ("mrpc", "test", [1, 0], "MRPC.tsv", ["0\t1", "1\t0"]),
        ("qqp", "test", [1, 0], "QQP.tsv", ["0\t1", "1\t0"]),
        ("wnli", "test", [1, 0], "WNLI.tsv", ["0\t1", "1\t0"]),
        ("stsb", "test", [5.7, -1.0, 2.34567], "STS-B.tsv", ["0\t5.000", "1\t0.000", "2\t2.346"]),
        ("mnli", "test_matched", [0, 2], "MNLI-m.tsv", ["0\tentailment", "1\tcontradiction"]),
        ("mnli", "test_mismatched", [1], "MNLI-mm.tsv", ["0\tneutral"]),
        ("mnli", "ax", [1], "AX.tsv", ["0\tneutral"]),
        ("ax", "test", [1], "AX.tsv", ["0\tneutral"]),
        ("qnli", "test", [1, 0], "QNLI.tsv", ["0\tnot_entailment", "1\tentailment"]),
        ("rte", "test", [1, 0], "RTE.tsv", ["0\tnot_entailment", "1\tentailment"]),
    ],
)
def test_submissions_have_the_format_of_glue(name, split, predictions, file, lines, tmp_path):
    path = write_submission(tmp_path, TASKS[name], split, np.array(predictions))
    assert path == tmp_path / file
    assert path.read_text() == "\n".join(["index\tprediction", *lines]) + "\n"


def test_every_test_split_has_a_submission_file():
    assert all(set(task.submissions) == set(task.test_files) for task in TASKS.values())
