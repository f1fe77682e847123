"""Rows of GLUE: from the official files, from other tables, or from the Hub.

`datasets` is imported where it is used.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.text_files import BrokenRow, check_file, parse_class, read_table
from .glue_tasks import NLI_LABELS, GlueTask

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
# The official QQP and MNLI releases hold a few lines with too few fields; the Hub's copy leaves them out as well.
TOLERATED_BROKEN_SHARE = 1e-3


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

    The rules are those of `text_files`. A label may be a number or a name; the column names of the official TSVs are
    accepted in every format.

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
    check_file(path)
    columns: dict[str, list[Any]] = {name: [] for name in (*task.texts, *(["label"] if labelled else []))}
    broken: list[str] = []
    undecided: list[str] = []
    rows = 0
    for where, row in read_table(path, partial(_official_header, task)):
        rows += 1
        if isinstance(row, BrokenRow):
            broken.append(f"{where}: {row.reason}")
            continue
        names = _column_names(row, task, columns, f"{path}, {where}")
        if labelled and task.labels == NLI_LABELS and row[names["label"]] == "-":
            undecided.append(where)
            continue
        for name, values in columns.items():
            value = row[names[name]]
            try:
                values.append(_parse_label(value, task) if name == "label" else _parse_text(value))
            except ValueError as error:
                raise ValueError(f"{path}, {where}, column {names[name]!r}: {error}") from None

    if broken:
        tolerated = labelled and task.skips_broken_rows and len(broken) <= TOLERATED_BROKEN_SHARE * rows
        if not tolerated:
            raise ValueError(f"{path}: {len(broken)} of {rows} rows are broken ({_first_of(broken, '; ')}).")
        logger.warning(
            "%s: left out %d of %d rows that are broken (%s).", path, len(broken), rows, _first_of(broken, "; ")
        )
    if undecided:
        logger.warning(
            "%s: left out %d of %d rows without a gold label ('-'): %s.",
            *(path, len(undecided), rows, _first_of(undecided, ", ")),
        )
    if not any(columns.values()):
        raise ValueError(f"{path}: no rows of task {task.name}.")
    return columns


def _official_header(task: GlueTask, first: Sequence[str]) -> Sequence[str] | None:
    """The columns of an official file that has no header line."""
    return task.headerless if task.headerless and not set(task.texts) <= set(first) else None


def _first_of(places: Sequence[str], separator: str) -> str:
    return separator.join([*places[:5], *(["..."] if places[5:] else [])])


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
    return parse_class(value, task.labels)
