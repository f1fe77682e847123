"""The tasks of the GLUE benchmark: names, columns, labels, metrics, and the official files.

`TASKS` is the table everything else reads. Column names, label names and label order are those of the Hub's
`nyu-mll/glue`, whatever file the rows come from, so a model trained on one source can be evaluated on another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


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


NLI_LABELS = ("entailment", "neutral", "contradiction")
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
            labels=NLI_LABELS,
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
            labels=NLI_LABELS,
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
