"""The GLUE benchmark: its tasks, its files, its metrics and its submission format.

`TASKS` is the table everything else reads. Column names, label names and label order are those of the Hub's
`nyu-mll/glue`, whatever file the rows come from, so a model trained on one source can be evaluated on another.
Only numpy is needed to import this file: `datasets`, scikit-learn, scipy and `evaluate` are imported where they are
used.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..training.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
FILE_FORMATS = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
# The official QQP and MNLI releases hold a few lines with too few fields; the Hub's copy leaves them out as well.
TOLERATED_BROKEN_SHARE = 1e-3


@dataclass(frozen=True)
class GlueTask:
    """One task of the benchmark.

    Attributes:
        name: Configuration name on the Hub, the value of `--task_name`.
        title: Name in the benchmark.
        texts: The one or two text columns.
        labels: Label names in the Hub's order; empty for regression on a score from 0 to 5.
        metrics: Names of the figures that `evaluate.load("glue", name)` gives; empty where no labels are published.
        official_columns: Other names that a column has in the official TSV files.
        headerless: Columns of an official file that has no header line.
        eval_files: Evaluation split -> official file; the first one steers training.
        test_files: Test split -> official file.
        submissions: Test split -> file name of a submission.
        submits_names: Whether a submission holds label names rather than label numbers.
        skips_broken_rows: Whether the official release is known to hold lines with missing fields.
    """

    name: str
    title: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    official_columns: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    eval_files: Mapping[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})
    test_files: Mapping[str, str] = field(default_factory=lambda: {"test": "test.tsv"})
    submissions: Mapping[str, str] = field(default_factory=dict)
    submits_names: bool = False
    skips_broken_rows: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the target is a score and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Number of outputs of a model for this task."""
        return len(self.labels) or 1

    @property
    def best_metric(self) -> str:
        """The figure that chooses the best checkpoint: GLUE's own task score, the mean where a task has two."""
        return "combined_score" if len(self.metrics) > 1 else self.metrics[0]

    @property
    def files(self) -> dict[str, str]:
        """Every split of the task and the official file that holds it."""
        train = {"train": "train.tsv"} if self.eval_files else {}
        return {**train, **self.eval_files, **self.test_files}


_NLI = ("entailment", "neutral", "contradiction")
_NLI_COLUMNS = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_TWO_WAY_NLI = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            "CoLA",
            texts=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            headerless=("source", "label", "original_judgment", "sentence"),
            submissions={"test": "CoLA.tsv"},
        ),
        GlueTask(
            "sst2",
            "SST-2",
            texts=("sentence",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            submissions={"test": "SST-2.tsv"},
        ),
        GlueTask(
            "mrpc",
            "MRPC",
            texts=_SENTENCES,
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            official_columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
            submissions={"test": "MRPC.tsv"},
        ),
        GlueTask(
            "qqp",
            "QQP",
            texts=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            official_columns={"label": "is_duplicate"},
            submissions={"test": "QQP.tsv"},
            skips_broken_rows=True,
        ),
        GlueTask(
            "stsb",
            "STS-B",
            texts=_SENTENCES,
            labels=(),
            metrics=("pearson", "spearmanr"),
            official_columns={"label": "score"},
            submissions={"test": "STS-B.tsv"},
        ),
        GlueTask(
            "mnli",
            "MNLI",
            texts=("premise", "hypothesis"),
            labels=_NLI,
            metrics=("accuracy",),
            official_columns=_NLI_COLUMNS,
            eval_files={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
            test_files={
                "test_matched": "test_matched.tsv",
                "test_mismatched": "test_mismatched.tsv",
                "ax": "diagnostic.tsv",
            },
            submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "ax": "AX.tsv"},
            submits_names=True,
            skips_broken_rows=True,
        ),
        GlueTask(
            "qnli",
            "QNLI",
            texts=("question", "sentence"),
            labels=_TWO_WAY_NLI,
            metrics=("accuracy",),
            submissions={"test": "QNLI.tsv"},
            submits_names=True,
        ),
        GlueTask(
            "rte",
            "RTE",
            texts=_SENTENCES,
            labels=_TWO_WAY_NLI,
            metrics=("accuracy",),
            submissions={"test": "RTE.tsv"},
            submits_names=True,
        ),
        GlueTask(
            "wnli",
            "WNLI",
            texts=_SENTENCES,
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            submissions={"test": "WNLI.tsv"},
        ),
        GlueTask(
            "ax",
            "AX",
            texts=("premise", "hypothesis"),
            labels=_NLI,
            metrics=(),
            official_columns=_NLI_COLUMNS,
            eval_files={},
            test_files={"test": "diagnostic.tsv"},
            submissions={"test": "AX.tsv"},
            submits_names=True,
        ),
    )
}


def get_task(name: str | None) -> GlueTask:
    """The task called `name` on the Hub.

    Raises:
        ValueError: if there is none.
    """
    task = TASKS.get(name or "")
    if task is None:
        raise ValueError(f"--task_name {name!r} is not a GLUE task: choose one of {', '.join(TASKS)}.")
    return task


# ---- Files ----


def load_glue(
    task: GlueTask,
    splits: Sequence[str],
    *,
    data_dir: str | os.PathLike | None = None,
    files: Mapping[str, str | os.PathLike] | None = None,
    cache_dir: str | None = None,
) -> dict[str, "Dataset"]:
    """Load splits of a task: from `files`, else from the official TSVs in `data_dir`, else from the Hub.

    Args:
        task: The task.
        splits: Names of the splits wanted, as in `task.files`.
        data_dir: Folder that holds the official TSV files directly.
        files: Split -> file (tsv, csv, json lines or parquet).
        cache_dir: Where the Hub's data are cached.

    Returns:
        Split -> dataset with the task's text columns and `label` (a class number, a score, or absent in test splits).

    Raises:
        FileNotFoundError, ValueError: a file is missing, or holds something else than the task needs.
        ConnectionError: the Hub is out of reach.
    """
    from datasets import Dataset

    if data_dir is None and not files:
        return {split: _load_from_hub(task, split, cache_dir) for split in splits}
    paths = {split: Path(files[split]) for split in splits} if files else _official_files(task, splits, data_dir)
    return {
        split: Dataset.from_dict(read_glue_file(path, task, labelled=split not in task.test_files))
        for split, path in paths.items()
    }


def _official_files(task: GlueTask, splits: Sequence[str], data_dir: str | os.PathLike | None) -> dict[str, Path]:
    folder = Path(data_dir or "")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data_dir {folder} is not a folder: give the one that holds {task.title}'s TSV files."
        )
    paths = {split: folder / task.files[split] for split in splits}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        present = sorted(path.name for path in folder.iterdir() if path.suffix == ".tsv")
        nested = folder / task.title
        hint = f" Did you mean --data_dir {nested}?" if nested.is_dir() else ""
        raise FileNotFoundError(
            f"--data_dir {folder} has no {', '.join(missing)}, which this run of --task_name {task.name} needs"
            f" (TSV files there: {', '.join(present) or 'none'}).{hint} Other files can be given with --train_file,"
            " --validation_file and --test_file."
        )
    return paths


def _load_from_hub(task: GlueTask, split: str, cache_dir: str | None) -> "Dataset":
    from datasets import load_dataset

    config, hub_split = ("ax", "test") if split == "ax" else (task.name, split)
    try:
        dataset = load_dataset(HUB_DATASET, config, split=hub_split, cache_dir=cache_dir)
    except Exception as error:  # connection, proxy, offline mode and cache errors share no base class
        raise ConnectionError(
            f"Could not load {HUB_DATASET} ({config}, {hub_split}) from the Hub: {error}. With the files on this"
            " machine, give their folder with --data_dir, or single files with --train_file, --validation_file and"
            " --test_file."
        ) from error
    columns = [*task.texts] if split in task.test_files else [*task.texts, "label"]
    return dataset.select_columns(columns)


def read_glue_file(path: str | os.PathLike, task: GlueTask, *, labelled: bool = True) -> dict[str, list[Any]]:
    """Read one file of a task: an official TSV, or tsv, csv, json lines or parquet with the Hub's column names.

    TSV files are read with quoting off (GLUE's hold unbalanced quote marks), csv files with the usual quoting. A label
    may be a number or a name; the column names of the official TSVs are accepted in every format.

    Args:
        path: The file; its extension tells the format.
        task: The task.
        labelled: Whether to read labels. A test split has none, and none of its rows may be left out.

    Returns:
        Column -> values: the task's texts, and `label` where `labelled`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: wrong extension, missing column, broken row or unknown label; names file, line and expectation.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown extension {path.suffix!r}, expected one of {', '.join(FILE_FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")

    columns: dict[str, list[Any]] = {name: [] for name in (*task.texts, *(["label"] if labelled else []))}
    broken: list[tuple[int, str]] = []
    undecided = rows = 0
    for line, row in reader(path, task):
        rows += 1
        if isinstance(row, str):
            broken.append((line, row))
            continue
        names = _column_names(row, task, columns, f"{path}, line {line}")
        if labelled and task.labels == _NLI and row[names["label"]] == "-":
            undecided += 1
            continue
        for name, values in columns.items():
            value = row[names[name]]
            try:
                values.append(_parse_label(value, task) if name == "label" else _parse_text(value))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}, column {names[name]!r}: {error}") from None

    if broken:
        tolerated = labelled and task.skips_broken_rows and len(broken) <= TOLERATED_BROKEN_SHARE * rows
        where = "; ".join(f"line {line}: {reason}" for line, reason in broken[:5]) + ("; ..." if broken[5:] else "")
        if not tolerated:
            raise ValueError(f"{path}: {len(broken)} of {rows} rows are broken ({where}).")
        logger.warning("%s: left out %d of %d rows that are broken (%s).", path, len(broken), rows, where)
    if undecided:
        logger.warning("%s: left out %d of %d rows without a gold label ('-').", path, undecided, rows)
    if not any(columns.values()):
        raise ValueError(f"{path}: no rows of task {task.name}.")
    return columns


def _column_names(row: Mapping[str, Any], task: GlueTask, wanted: Mapping[str, Any], where: str) -> dict[str, str]:
    names = {}
    for name in wanted:
        official = task.official_columns.get(name, name)
        if name not in row and official not in row:
            choices = [
                f"{column} (or {task.official_columns[column]})" if column in task.official_columns else column
                for column in wanted
            ]
            raise ValueError(
                f"{where}: no column {name!r} for task {task.name}, which needs {', '.join(choices)};"
                f" found {', '.join(map(str, row))}."
            )
        names[name] = name if name in row else official
    return names


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}.")
    return value


def _parse_label(value: Any, task: GlueTask) -> int | float:
    if task.is_regression:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = float("nan")
        if not 0.0 <= score <= 5.0:
            raise ValueError(f"unknown score {value!r}, expected a number from 0 to 5.")
        return score
    if value in task.labels:
        return task.labels.index(value)
    numbers = {str(number): number for number in range(task.num_labels)}
    if str(value) not in numbers:
        known = ", ".join(f"{name} ({number})" for number, name in enumerate(task.labels))
        raise ValueError(f"unknown label {value!r}, expected one of {known}.")
    return numbers[str(value)]


# A reader yields (line number, row); a string in the place of a row says what is wrong with it.
_Rows = Iterator[tuple[int, dict[str, Any] | str]]


def _read_tsv(path: Path, task: GlueTask) -> _Rows:
    header: Sequence[str] | None = None
    for number, text in _numbered_lines(path):
        fields = text.split("\t")
        if header is None:
            if task.headerless and not set(task.texts) <= set(fields):
                header = task.headerless
            else:
                header = fields
                continue
        if len(fields) == len(header):
            yield number, dict(zip(header, fields, strict=True))
        elif header is task.headerless:
            yield number, f"{len(fields)} fields, expected {len(header)} ({', '.join(header)}) as there is no header"
        else:
            yield number, f"{len(fields)} fields, expected {len(header)} ({', '.join(header)})"


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines of a UTF-8 file. Only a line feed ends a line: other separators occur inside GLUE's texts."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected UTF-8 text, got {error}.") from None
            if text:
                yield number, text


def _read_csv(path: Path, task: GlueTask) -> _Rows:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    header = reader.fieldnames or []
                    yield reader.line_num, f"expected {len(header)} fields ({', '.join(header)})"
                else:
                    yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, line {reader.reader.line_num}: expected UTF-8 csv with a header, got {error}."
            ) from None


def _read_json_lines(path: Path, task: GlueTask) -> _Rows:
    for number, text in _numbered_lines(path):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected one JSON object a line, got {error}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected one JSON object a line, got {text[:40]!r}.")
        yield number, row


def _read_parquet(path: Path, task: GlueTask) -> _Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a parquet file, got {error}.") from None
    yield from enumerate(table.to_pylist(), start=1)


_READERS: dict[str, Callable[[Path, GlueTask], _Rows]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".json": _read_json_lines,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


# ---- Metrics ----


def compute_glue_metrics(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The task's figures by the names that `evaluate` gives them, and `combined_score`, their mean, where it has two.

    A figure that is undefined (a correlation with constant or non-finite predictions) counts as 0, what a model that
    tells nothing deserves, so that one bad evaluation does not end a training run.

    Args:
        task: The task.
        predictions: Class numbers in the task's order, or scores. Shape (rows,).
        references: The same for the labels.

    Raises:
        ImportError: scikit-learn or scipy is missing and the Hub is out of reach.
    """
    if not np.isfinite(predictions).all():
        logger.warning("%s: some predictions are not finite numbers; has the training diverged?", task.title)
        return dict.fromkeys((*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])), 0.0)
    raw = _load_metric(task.name)(predictions, references)
    metrics = {name: float(raw[name]) if np.isfinite(raw[name]) else 0.0 for name in task.metrics}
    if len(metrics) > 1:
        metrics["combined_score"] = sum(metrics.values()) / len(metrics)
    return metrics


@lru_cache
def _load_metric(task_name: str) -> Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]:
    """`evaluate`'s metric of a task where the Hub is reachable, else the same figures computed here."""
    if _hub_is_reachable():
        try:
            import evaluate

            # The full id, as "glue" alone would take a folder of that name in the working directory.
            module = evaluate.load("evaluate-metric/glue", task_name, keep_in_memory=True)
            return lambda predictions, references: module.compute(predictions=predictions, references=references)
        except Exception as error:  # a missing package, a changed script: the figures computed here are the same
            logger.info("evaluate's GLUE metric could not be loaded (%s): computing it here.", error)
    return lambda predictions, references: _local_metrics(TASKS[task_name], predictions, references)


def _hub_is_reachable(timeout: float = 3.0) -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, no network, no proxy, timeout: all of them mean no
        return False
    return True


def _local_metrics(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    try:
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError as error:
        raise ImportError(
            f"The metrics of {task.title} need scikit-learn and scipy: pip install 'transnormer-hf[train]'."
        ) from error

    def correlation(function: Callable[..., Any]) -> float:
        constant = len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0
        return 0.0 if constant else float(function(predictions, references)[0])

    figures: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(references, predictions),
        "f1": lambda: f1_score(references, predictions, zero_division=0.0),
        "matthews_correlation": lambda: matthews_corrcoef(references, predictions),
        "pearson": lambda: correlation(pearsonr),
        "spearmanr": lambda: correlation(spearmanr),
    }
    return {name: float(figures[name]()) for name in task.metrics}


# ---- Submission ----


def write_submission(output_dir: str | os.PathLike, task: GlueTask, split: str, predictions: np.ndarray) -> Path:
    """Write the predictions of a test split as GLUE wants them: a header, then one `index<TAB>prediction` a row.

    Args:
        output_dir: Folder to write into.
        task: The task.
        split: A key of `task.test_files`; tells the file name.
        predictions: Class numbers in the task's order, or scores (cut to 0..5). Shape (rows,).
    """
    if task.is_regression:
        values = [f"{score:.3f}" for score in np.clip(predictions, 0.0, 5.0)]
    elif task.submits_names:
        values = [task.labels[int(number)] for number in predictions]
    else:
        values = [str(int(number)) for number in predictions]
    path = Path(output_dir) / task.submissions[split]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
    write_atomically(path, "\n".join(lines) + "\n")
    return path
