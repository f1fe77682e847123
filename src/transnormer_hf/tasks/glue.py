"""The GLUE benchmark: the figures of a labelled split and the submission of a test split.

The tasks are in `glue_tasks`, their rows in `glue_rows`; the public names of both can be had from here. Only numpy is
needed to import this file: `datasets`, scikit-learn, scipy and `evaluate` are imported where they are used.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..training.files import write_atomically
from ..training.predictions import check_finite
from .glue_rows import HUB_DATASET, load_glue, read_glue_file
from .glue_tasks import TASKS, GlueTask, get_task

__all__ = [
    "HUB_DATASET",
    "TASKS",
    "GlueTask",
    "compute_glue_metrics",
    "get_task",
    "load_glue",
    "read_glue_file",
    "write_submission",
]

logger = logging.getLogger(__name__)


def compute_glue_metrics(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The task's figures by the names that `evaluate` gives them, and `combined_score`, their mean, where it has two.

    A figure that is undefined (a correlation with constant predictions) counts as 0, what a model that tells nothing
    deserves, so that one bad evaluation does not end a training run.

    Args:
        task: The task.
        predictions: Class numbers in the task's order, or scores. Shape (rows,).
        references: The same for the labels.

    Raises:
        ValueError: a prediction is not a finite number, or there is none.
        ImportError: scikit-learn or scipy is missing and the Hub is out of reach.
    """
    check_finite(predictions, task.title)
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


def write_submission(output_dir: str | os.PathLike, task: GlueTask, split: str, predictions: np.ndarray) -> Path:
    """Write the predictions of a test split as GLUE wants them: a header, then one `index<TAB>prediction` a row.

    Args:
        output_dir: Folder to write into.
        task: The task.
        split: A key of `task.test_files`; tells the file name.
        predictions: Class numbers in the task's order, or scores (cut to 0..5). Shape (rows,).

    Raises:
        ValueError: a prediction is not a finite number; nothing is written.
    """
    check_finite(predictions, f"{task.title} {split}")
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
