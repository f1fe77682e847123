"""The results of the cells of `reproduction.py` as Markdown and figures: tables, the order of rows, conclusions.

Every sentence about a figure is derived from the cells' files. With several seeds, a difference within the spread
between them decides nothing; with one seed, a difference of less than 2 %.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..hub.model_card import markdown_table
from ..training.files import replacing, write_atomically
from . import paper
from .ablations import find_ablations
from .reproduction import (
    ABLATION_TABLES,
    ARENA_MODELS,
    CAUSAL_MODELS,
    CURVES,
    GLUE_MODELS,
    GRADIENT_ROWS,
    LONG_BLOCK,
    LONG_GRADIENT_ROWS,
    LONG_MODELS,
    LONG_ROWS,
    LONGER,
    TABLES,
    read_cells,
)

Result = Mapping[str, Any]

TITLES = {
    "1": "Table 1: the scaling of linear attention removed",
    "2": "Table 2: relative standard deviation of gradients over training",
    "3": "Table 3: 1+elu and softmax in early and late layers",
    "4": "Table 4: causal language modelling",
    "4b": f"Table 4, trained {LONGER} times as long",
    "5": "Table 5: GLUE, fine-tuned from masked language models (perplexities below)",
    "6": "Table 6: Long-Range Arena",
    "7": "Table 7: speed",
    "8": "Table 8: share of DiagAttention layers",
    "9": "Table 9: order of DiagAttention and NormAttention",
    "10": "Table 10: FFN against GLU",
    "11": "Table 11: block size",
    "12": "Table 12: both attentions in one layer",
    "long": f"Tables 8 to 10 again: causal models, rows of {LONG_ROWS.length} tokens, blocks of {LONG_BLOCK}",
    "long2": f"Table 2 again: causal models, rows of {LONG_ROWS.length} tokens",
    "fig2": "Figure 2: locally accumulated attention",
    "lln": "Linear Log-Normal Attention",
}


class Figure(NamedTuple):
    """What a table shows: the figure's name in a cell's file, its title, and whether more is better."""

    name: str
    title: str
    higher_is_better: bool = False
    factor: float = 1


MASKED = Figure("perplexity", "validation perplexity per masked token")
FIGURES = {
    **dict.fromkeys(ABLATION_TABLES, MASKED),
    "2": Figure("relative_deviation", "standard deviation of the gradient's norm over all steps, by its mean"),
    **dict.fromkeys(("4", "4b"), Figure("perplexity", "validation perplexity per token")),
    "long": Figure("perplexity", "validation perplexity per token"),
    "long2": Figure(
        "local_deviation", "standard deviation of the gradient's norm by its mean, the median over windows of 50 steps"
    ),
    "5": Figure("score", "accuracy, F1 for MRPC, Matthews correlation for CoLA, in percent", True, 100),
    "6": Figure("accuracy", "accuracy in percent", True, 100),
}


ALSO_SHOWN = {
    "5": {"pretrained_perplexity": "Perplexity of the masked language models"},
    "long2": {
        "relative_deviation": "The same over the whole run at once",
        "largest_score_gradient": "Largest gradient of an attention weight by a score, of the trained model",
        "median_score_gradient": "Median over tokens of the largest such gradient",
        "perplexity": "Perplexity",
    },
}


class Claim(NamedTuple):
    """A conclusion of the paper: in this table, one row is better than another, by `factor` where that is claimed.

    column: The only column that it is about; None for each.
    """

    text: str
    table: str
    better: str
    worse: str
    factor: float = 1
    column: str | None = None


AVERAGED = ("5", "6")  # tables whose columns are tasks
MEAN = "mean"
CAUSAL_RIVALS = ("Vanilla", "LS", "FLASH-quad", "FLASH", "1+elu", "Performer")
GLUE_PAIRS = [("T1", row) for row in ("Vanilla", "LS", "FLASH-quad", "FLASH", "1+elu", "Performer", "T2")]
ARENA_PAIRS = [("T2", row) for row in ("Transformer", "Performer", "cosFormer", "FLASH", "T1")]
CLAIMS = (
    Claim("Removing the scaling without a norm blows up", "1", "1+elu with scaling", "1+elu, scaling removed", 2),
    Claim("NormAttention repairs it", "1", "NormAttention, RMSNorm", "1+elu, scaling removed", 2),
    Claim("NormAttention is better than scaling", "1", "NormAttention, RMSNorm", "1+elu with scaling"),
    Claim("NormAttention's gradients are steadier than 1+elu's", "2", "NormAttention", "1+elu"),
    Claim("Vanilla attention's gradients are steadier than 1+elu's", "2", "Vanilla", "1+elu"),
    Claim("Vanilla layers help 1+elu, early", "3", "vanilla early, 1+elu late", "1+elu early, 1+elu late"),
    Claim("Vanilla early is better than late", "3", "vanilla early, 1+elu late", "1+elu early, vanilla late"),
    *(Claim(f"T2 is better than {row} as a causal model", "4", "T2", row) for row in CAUSAL_RIVALS),
    *(Claim(f"T2 is better than {row}, trained {LONGER} times as long", "4b", "T2", row) for row in CAUSAL_RIVALS),
    *(Claim(f"{mine} is better than {row} on GLUE", "5", mine, row, column=MEAN) for mine, row in GLUE_PAIRS),
    *(Claim(f"{mine} is better than {row} on long texts", "6", mine, row, column=MEAN) for mine, row in ARENA_PAIRS),
    Claim("Half Diag is better than none", "8", "50 % Diag", "0 % Diag"),
    Claim("Half Diag is better than Diag alone", "8", "50 % Diag", "100 % Diag"),
    Claim("Diag to Norm beats Norm to Diag", "9", "Diag early, Norm late", "Norm early, Diag late"),
    Claim("GLU beats FFN", "10", "GLU", "FFN"),
    Claim("Larger blocks help, 64 over 32", "11", "block 64", "block 32"),
    Claim("Larger blocks help, 128 over 64", "11", "block 128", "block 64"),
    Claim("In turn by depth is better than chained", "12", "in turn by depth", "chained, Diag to Norm"),
    Claim("Parallel is better than in turn by depth", "12", "parallel", "in turn by depth"),
    Claim("Half Diag is better than none, in long rows", "long", "50 % Diag", "0 % Diag"),
    Claim("Half Diag is better than Diag alone, in long rows", "long", "50 % Diag", "100 % Diag"),
    Claim("Diag to Norm beats Norm to Diag, in long rows", "long", "50 % Diag", "Norm early, Diag late"),
    Claim("GLU beats FFN, in long rows", "long", "50 % Diag", "FFN"),
    Claim("NormAttention's gradients are steadier than 1+elu's, in long rows", "long2", "NormAttention", "1+elu"),
    Claim("Vanilla attention's gradients are steadier than 1+elu's, in long rows", "long2", "Vanilla", "1+elu"),
)


TOO_SMALL = 0.02  # relative difference that decides nothing with one seed


# ---- Numbers ----


def value_of(result: Result) -> float | None:
    """A cell's figure; infinite (or 0 if more is better) for a run that diverged, None for one that failed."""
    figure = FIGURES[result["table"]]
    if result["status"] == "failed":
        return None
    value = result["figures"].get(figure.name)
    if value is None:
        return 0.0 if figure.higher_is_better else math.inf
    return figure.factor * value


def values_by_seed(results: Iterable[Result], table: str, row: str, column: str) -> dict[int, float]:
    """Seed -> figure, for the cells of one row and column."""
    place = (table, row, column)
    found = {result["seed"]: value_of(result) for result in results if _place(result) == place}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def _place(result: Result) -> tuple[str, str, str]:
    return result["table"], result["row"], result["column"]


def time_of(result: Result) -> float:
    """Seconds that a run took: of work, or by the clock where the cell does not tell the former."""
    return result.get("cpu_seconds", result["seconds"])


def with_means(results: Sequence[Result]) -> list[Result]:
    """The results, and the mean over its columns for each row and seed of Tables 5 and 6 that has all of them.

    The paper's mean is that of the same columns, where all of its figures are known.
    """
    added: list[Result] = []
    for table in AVERAGED:
        mine = [result for result in results if result["table"] == table]
        columns = set(dict.fromkeys(result["column"] for result in mine))
        for row, seed in dict.fromkeys((result["row"], result["seed"]) for result in mine):
            cells = [result for result in mine if (result["row"], result["seed"]) == (row, seed)]
            values = [value for result in cells if (value := value_of(result)) is not None]
            if len(values) < len(columns) or len(columns) < 2:
                continue
            figure, papers = FIGURES[table], [result["paper"] for result in cells]
            known = None if None in papers else round(mean(papers), 2)
            place = {"table": table, "row": row, "column": MEAN, "seed": seed, "paper": known, "status": "done"}
            added.append({**place, "figures": {figure.name: mean(values) / figure.factor}, "settings": {}})
    return [*results, *added]


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest; 0 if all are infinite."""
    return 0.0 if max(values) == min(values) else max(values) - min(values)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties sharing their rank; NaN if all values of one side are equal."""
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return (values > values[:, None]).sum(0) + ((values == values[:, None]).sum(0) - 1) / 2


# ---- Sentences ----


def judge(claim: Claim, column: str, results: Sequence[Result]) -> str | None:
    """A sentence on whether a conclusion holds in a column; None if one of its rows has not been run."""
    better, worse = (values_by_seed(results, claim.table, row, column) for row in (claim.better, claim.worse))
    seeds = sorted(set(better) & set(worse))
    if not seeds:
        return None
    ours, theirs = [better[seed] for seed in seeds], [worse[seed] for seed in seeds]
    higher = FIGURES[claim.table].higher_is_better
    margin = mean(ours) - mean(theirs) if higher else mean(theirs) - mean(ours)
    if math.isnan(margin):  # infinite on both sides
        verdict = "not decided: both diverged"
    elif len(seeds) > 1 and abs(margin) <= (noise := max(spread(ours), spread(theirs))) < math.inf:
        verdict = f"not decided: the difference of {margin:.3g} is within the spread between seeds of {noise:.3g}"
        if len({mine < other for mine, other in zip(ours, theirs, strict=True)}) == 1:
            verdict += ", though it has the same sign with each"
    elif len(seeds) == 1 and abs(margin) < TOO_SMALL * max(mean(ours), mean(theirs)) < math.inf:
        verdict = f"not decided: one seed, and a difference of less than {TOO_SMALL:.0%}"
    elif margin <= 0:
        verdict = "does not hold"
    elif claim.factor > 1 and mean(theirs) < claim.factor * mean(ours):
        verdict = f"does not hold: better, but by less than a factor of {claim.factor:g}"
    else:
        verdict = "holds"
    detail = f"{claim.better} {number(mean(ours))}, {claim.worse} {number(mean(theirs))}"
    if len(seeds) == 1 and "one seed" not in verdict:
        detail += "; one seed"
    return f"{claim.text}{f' ({column.upper()})' if column else ''}: **{verdict}** ({detail})."


def conclusions(results: Sequence[Result]) -> list[str]:
    """A sentence for every conclusion and column, also for conclusions whose rows have not been run."""
    sentences = []
    for claim in CLAIMS:
        columns = dict.fromkeys(result["column"] for result in results if result["table"] == claim.table)
        if claim.column is not None:
            columns = dict.fromkeys(column for column in columns if column == claim.column)
        judged = [sentence for column in columns if (sentence := judge(claim, column, results)) is not None]
        sentences += judged or [f"{claim.text}: not run."]
    return sentences


def describe_order(table: str, column: str, results: Sequence[Result]) -> str | None:
    """Our order of the rows and the paper's, best first; None unless the paper's figures of two rows are known."""
    rows = {}
    for result in results:
        if (result["table"], result["column"]) == (table, column) and result["paper"] is not None:
            values = values_by_seed(results, table, result["row"], column)
            if values:
                rows[result["row"]] = (mean(values.values()), result["paper"])
    if len(rows) < 2:
        return None
    text = f"{column.upper()}: " if column else ""
    if len({ours for ours, _ in rows.values()}) == 1:
        return f"{text}there is no order here, all {len(rows)} rows have the same figure."
    sign = -1 if FIGURES[table].higher_is_better else 1
    ours = sorted(rows, key=lambda row: sign * rows[row][0])
    papers = sorted(rows, key=lambda row: sign * rows[row][1])
    text += "the order of the rows is the paper's" if ours == papers else "the order of the rows is not the paper's"
    text += f": {' < '.join(ours)}" if sign > 0 else f": {' > '.join(ours)}"
    if ours != papers:
        text += f"; the paper's: {(' < ' if sign > 0 else ' > ').join(papers)}"
    if len(rows) >= 3:
        text += f". Rank correlation {spearman(*zip(*rows.values(), strict=True)):.2f} over {len(rows)} rows"
    return text + "."


def describe_blocks(results: Sequence[Result]) -> str:
    """Tokens per block here, by the row's name in the paper."""
    tokens = {result["row"]: result["settings"]["model"]["block_size"] for result in results}
    listed = sorted(tokens.items(), key=lambda item: item[1])
    return f"Tokens of a block here: {', '.join(f'{row}: {count}' for row, count in listed)}."


def describe_skyformer(results: Sequence[Result]) -> list[str]:
    """The figures of the rows that another paper has, by column."""
    rows = dict.fromkeys(result["row"] for result in results)
    lines = []
    for column in dict.fromkeys(result["column"] for result in results if result["column"] != MEAN):
        known = paper.SKYFORMER_TABLE_1[column]
        lines += [f"{column.upper()} {', '.join(f'{row} {known[row]:g}' for row in rows if row in known)}"]
    if not set(rows) & set(known):
        return []
    return [f"In Table 1 of Skyformer's paper, with models of its own: {'; '.join(lines)}."]


def describe_chance(results: Sequence[Result]) -> list[str]:
    """For each task, the share of the largest class, and the rows that are within two standard errors of it."""
    lines = []
    for column in dict.fromkeys(result["column"] for result in results):
        here = [result for result in results if result["column"] == column and "largest_class" in result["figures"]]
        if not here:
            continue
        share, count = (here[0]["figures"][name] for name in ("largest_class", "rows"))
        limit = 100 * (share + 2 * math.sqrt(share * (1 - share) / count))
        rows = row_order("6", here)
        low = [row for row in rows if max(values_by_seed(here, "6", row, column).values()) < limit]
        text = f"{column.upper()}: the largest class has {100 * share:.1f} % of {count} rows"
        if low:
            listed = "all" if low == rows else ", ".join(low)
            text += f"; at its level, below {limit:.1f} %: {listed}"
        lines.append(f"- {text}.")
    return ["\n".join(lines)] if lines else []


def describe_figure(results: Sequence[Result], name: str, title: str) -> list[str]:
    """Another figure of a table's runs by row, its mean over seeds."""
    rows = {}
    for row in row_order(results[0]["table"], results):
        by_seed = {
            r["seed"]: r["figures"][name] for r in results if r["row"] == row and r["figures"].get(name) is not None
        }
        if by_seed:
            rows[row] = number(mean(by_seed.values()))
    return [f"{title}: {', '.join(f'{row} {value}' for row, value in rows.items())}."] if rows else []


def describe_missing(table: str, results: Sequence[Result]) -> list[str]:
    """The rows of a table that have not been run, or not in every column of the others."""
    columns = {result["column"] for result in results} - {MEAN}
    found = {(result["row"], result["column"]) for result in results}
    missing = [row for row in ROWS[table] if any((row, column) not in found for column in columns)]
    return [f"Not run, or not in every column: {', '.join(missing)}."] if missing else []


def describe_tasks(results: Sequence[Result]) -> list[str]:
    """Tokens of a row in each task of Table 6, and where the rows come from if they are no files."""
    lines = []
    for column in dict.fromkeys(result["column"] for result in results if result["settings"]):
        settings = next(result["settings"] for result in results if result["column"] == column)
        origin = settings["data"].get("dataset", "generated" if "generated" in settings["data"] else "")
        lines.append(f"{column.upper()} {settings['training']['max_length']}{origin and f' ({origin})'}")
    text = f"Tokens of a row at most: {', '.join(lines)}."
    if any(result["column"] == "retrieval" for result in results):
        text += " Retrieval is a stand-in for the Arena's, pairs of texts of invented words."
    if any(result["column"] == "pathfinder" for result in results):
        text += " Part of Pathfinder's labels can be told from the distance between its dots."
    return [text]


def describe_time(results: Sequence[Result]) -> str:
    """Core-hours of all runs, each counted once, by table."""
    hours: dict[str, float] = {}
    for result in results:
        if "trained_for" not in result:
            hours[result["table"]] = hours.get(result["table"], 0.0) + time_of(result) / 3600
    listed = ", ".join(f"{table} {hours[table]:.2f}" for table in TABLES if table in hours)
    return f"Core-hours by table: {listed}; together {sum(hours.values()):.1f}."


def describe_steps(results: Sequence[Result]) -> str | None:
    """How long each row of a table was trained; None if all rows of each column were trained equally long."""
    steps: dict[str, set[int]] = {}
    by_column: dict[str, set[int]] = {}
    for result in results:
        if "training" in result["settings"]:
            count = result["settings"]["training"]["max_steps"]
            steps.setdefault(result["row"], set()).add(count)
            by_column.setdefault(result["column"], set()).add(count)
    if all(len(counts) < 2 for counts in by_column.values()):
        return None
    listed = (f"{row}: {' and '.join(map(str, sorted(counts)))}" for row, counts in steps.items())
    return f"Rows differ in their steps of training: {', '.join(listed)}."


def number(value: float) -> str:
    if math.isinf(value):
        return "diverged"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


# ---- Markdown ----


def draw(folder: Path) -> None:
    """Write `results.md` and the figures from the cells in a folder. Raises FileNotFoundError if there are none."""
    results = read_cells(folder)
    if not results:
        raise FileNotFoundError(f"--output_dir {folder} holds no cells to draw: run some first.")
    images = draw_figures(results, folder)
    write_atomically(folder / "results.md", markdown(results, images))


def markdown(results: Sequence[Result], images: Sequence[str] = ()) -> str:
    """The report. `images` are the names of the figures beside it."""
    parts = ["# The tables of the paper at laptop scale", INTRODUCTION, *describe_settings(results)]
    parts += [describe_time(results)]
    averaged = with_means(results)
    parts += ["## Conclusions", "\n".join(f"- {sentence}" for sentence in conclusions(averaged))]
    for table in TABLES:
        mine = [result for result in averaged if result["table"] == table]
        if not mine:
            continue
        parts.append(f"## {TITLES[table]}")
        if table in FIGURES:
            parts += [f"{FIGURES[table].title.capitalize()}.", draw_table(table, mine)]
            columns = dict.fromkeys(result["column"] for result in mine)
            orders = [text for column in columns if (text := describe_order(table, column, mine)) is not None]
            parts += ["\n".join(f"- {text}" for text in orders)] if orders else []
            parts += [describe_blocks(mine)] if table == "11" else []
            parts += [*describe_tasks(mine), *describe_chance(mine), *describe_skyformer(mine)] if table == "6" else []
            parts += describe_missing(table, mine)
            for name, title in ALSO_SHOWN.get(table, {}).items():
                parts += describe_figure(mine, name, title)
        else:
            parts += OTHER_TABLES[table](mine)
        if (steps := describe_steps(mine)) is not None:
            parts.append(steps)
        parts += [f"![{TITLES[table]}]({image})" for image in images if image.startswith(f"{IMAGES.get(table)}")]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """Made by `scripts/reproduce.py` from the files in `cells/`, sentences included. The paper's figures are
of models a hundred times as large, on other data and tokens: their sizes cannot be compared with ours, but the order of
the rows can, and whether a conclusion holds at this scale. Rows are named as in the paper, blocks by their size there.
Where a cell was run with several seeds, the table has the mean, and what each seed found in brackets; a difference
within the spread between the seeds decides nothing, nor does one of less than 2 % where there is one seed."""


def describe_settings(results: Sequence[Result]) -> list[str]:
    """One line per kind of training, with the settings of its cells."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["settings"]["task"], []).append(result["settings"])
    lines = []
    for kind, settings in kinds.items():
        values: dict[str, list[str]] = {}
        for name, value in (pair for mine in settings for pair in _flat(mine)):
            if str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
        shown = [f"{name.rpartition('.')[2]} {' or '.join(values[name])}" for name in SHOWN if name in values]
        seconds = [time_of(result) for result in results if result["settings"]["task"] == kind]
        lines.append(f"- {KINDS[kind]}: {', '.join([*shown, f'{statistics.median(seconds):.0f} s a cell'])}.")
    return ["\n".join(lines)]


KINDS = {
    "mlm": "Masked language models",
    "clm": "Causal language models",
    "glue": "GLUE",
    "lra": "Long-Range Arena",
    "speed": "Speed",
    "lln": "Linear Log-Normal Attention",
}
SHOWN = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    *(f"training.{name}" for name in ("max_steps", "per_device_train_batch_size", "max_seq_length", "learning_rate")),
    *(f"data.{name}" for name in ("dataset", "train.file", "tokenizer.vocab_size", "tokenizer.name")),
)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


ROWS: dict[str, Iterable[str]] = {
    **{table: [row.row for row in find_ablations(int(table))] for table in ABLATION_TABLES},
    "2": GRADIENT_ROWS,
    "4": CAUSAL_MODELS,
    "4b": CAUSAL_MODELS,
    "5": GLUE_MODELS,
    "6": ARENA_MODELS,
    "long": LONG_MODELS,
    "long2": LONG_GRADIENT_ROWS,
    "fig2": CURVES,
}


def row_order(table: str, results: Sequence[Result]) -> list[str]:
    """The rows of a table, in the order of the paper."""
    present = {result["row"] for result in results}
    return [row for row in ROWS[table] if row in present]


def draw_table(table: str, results: Sequence[Result]) -> str:
    """Rows by columns, our figure and the paper's in each."""
    columns = list(dict.fromkeys(result["column"] for result in results))
    header = ["", *(name for column in columns for name in (f"{column.upper()} ours".strip(), "paper"))]
    lines = []
    for row in row_order(table, results):
        cells = [row]
        for column in columns:
            here = [result for result in results if (result["row"], result["column"]) == (row, column)]
            cells += [describe_cells(here), next((f"{r['paper']:g}" for r in here if r["paper"] is not None), "–")]
        lines.append(cells)
    return markdown_table(header, lines)


def describe_cells(results: Sequence[Result]) -> str:
    """The mean over seeds, each seed's figure, and where a run diverged."""
    values = [value for result in results if (value := value_of(result)) is not None]
    notes = [f"failed: {result['error'].splitlines()[0]}" for result in results if result["status"] == "failed"]
    notes += [
        f"diverged at step {result['diverged']['step']}, seed {result['seed']}, loss {result['diverged']['loss']}"
        for result in results
        if result["status"] == "diverged"
    ]
    finite = [value for value in values if math.isfinite(value)]
    texts = []
    if len(finite) == 1:
        texts.append(number(finite[0]))
    elif finite:
        texts.append(f"{number(mean(finite))} ({', '.join(map(number, finite))})")
    return "; ".join([*texts, *notes]) or "–"


def draw_speed(results: Sequence[Result]) -> list[str]:
    """Steps per second and peak memory by length, and how both grow.

    The paper's figures are a GPU's: only ratios between rows can be compared.
    """
    parts = []
    for task, rows in results[0]["figures"].items():
        lengths = sorted({row["length"] for row in rows})
        papers = paper.TABLE_7 if task == "training" else {}
        lines = [
            [model, *(f"{steps[n]:.3g}" if n in steps else "–" for n in lengths), exponent(steps, -1)]
            for model, steps in by_length(rows, "steps_per_second").items()
        ]
        for model, steps in papers.items():
            lines.append([f"{model}, paper (A6000)", *(f"{steps[n]:g}" if n in steps else "–" for n in lengths), "–"])
        parts += [
            f"{task.capitalize()}, steps per second, and the power of the length n by which a step's time grows.",
            markdown_table(["", *map(str, lengths), "time"], lines),
            "\n".join(f"- {sentence}" for sentence in describe_speed(rows, task)),
        ]
        lines = [
            [model, *(f"{peak[n] / 1e6:,.0f}" if n in peak else "–" for n in lengths), exponent(peak)]
            for model, peak in by_length(rows, "peak_bytes").items()
        ]
        parts += [
            f"{task.capitalize()}, peak memory in MB without the weights, and the power of n by which it grows.",
            markdown_table(["", *map(str, lengths), "memory"], lines),
        ]
    return parts


FASTER_THAN = {"Transformer": "vanilla", "Performer": "performer", "FLASH": "flash", "1+elu": "1+elu"}


def describe_speed(rows: Sequence[Mapping[str, Any]], task: str) -> list[str]:
    """Whether T2 is faster than a row, as in the paper, by length; ratios within 2 % of 1 count for neither."""
    steps = by_length(rows, "steps_per_second")
    mine = steps.get("transnormer-t2-bidirectional", {})
    sentences = []
    for name, model in FASTER_THAN.items():
        ratios = {n: mine[n] / steps[model][n] for n in sorted(mine) if n in steps.get(model, {})}
        if not ratios:
            continue
        signs = [(ratio > 1 + TOO_SMALL) - (ratio < 1 - TOO_SMALL) for ratio in ratios.values()]
        verdict = "holds" if min(signs) > 0 else "does not hold" if max(signs) < 0 else "depends on the length"
        listed = ", ".join(f"{ratio:.2f} at {n}" for n, ratio in ratios.items())
        sentences.append(f"T2 is faster than {name} in {task}: **{verdict}** (ratio {listed}).")
    return sentences


def by_length(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[int, float]]:
    """Model -> length -> figure."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["length"]] = row[name]
    return found


def growth_exponent(values: Mapping[int, float]) -> float:
    """The slope of log(figure) over log(length), by least squares; NaN with fewer than two lengths."""
    if len(values) < 2:
        return math.nan
    logs = [[math.log(number) for number in numbers] for numbers in (values.keys(), values.values())]
    return statistics.linear_regression(*logs).slope


def exponent(values: Mapping[int, float], sign: int = 1) -> str:
    slope = sign * growth_exponent(values)
    return "–" if math.isnan(slope) else f"n^{slope:.2f}"


def draw_curves(results: Sequence[Result]) -> list[str]:
    """Accumulated attention at several r, mean over layers, and whether vanilla attention is the more local one."""
    curves = {row: accumulated_curve(results, row) for row in row_order("fig2", results)}
    known = {row: curve for row, curve in curves.items() if curve is not None}
    lines = [[row, *(f"{dict(zip(*curve, strict=True))[r]:.3f}" for r in SHOWN_RATIOS)] for row, curve in known.items()]
    text = (
        "Share of the attention within a window of r times the text about a token, mean over layers, heads and texts."
    )
    parts = [text, markdown_table(["", *(f"r = {r}" for r in SHOWN_RATIOS)], lines)]
    if {"Vanilla", "1+elu"} <= set(known):
        vanilla, linear = (dict(zip(*known[row], strict=True))[0.4] for row in ("Vanilla", "1+elu"))
        verdict = "holds" if vanilla > linear else "does not hold"
        if abs(vanilla - linear) < TOO_SMALL:
            verdict = "not decided"
        parts.append(
            f"- Vanilla attention is more local than 1+elu (the paper: 0.8 against 0.4 at r = 0.4): **{verdict}**"
            f" ({vanilla:.2f} against {linear:.2f}; a uniform map has 0.40)."
        )
    return parts


SHOWN_RATIOS = (0.1, 0.2, 0.4, 0.8)


def accumulated_curve(results: Sequence[Result], row: str) -> tuple[list[float], list[float]] | None:
    """Ratios and accumulated attention of a row, mean over seeds and layers; None if nothing was measured."""
    measured = [r["figures"]["attention"] for r in results if r["row"] == row and "attention" in r["figures"]]
    curves = [layer["curve"] for attention in measured for layer in attention["layers"] if None not in layer["curve"]]
    if not curves:
        return None
    ratios = [round(ratio, 6) for ratio in measured[0]["ratios"]]
    return ratios, [mean(values) for values in zip(*curves, strict=True)]


def draw_log_normal(results: Sequence[Result]) -> list[str]:
    figures = results[0]["figures"]
    concentration = markdown_table(
        ["scale of q and k", "entropy, softmax", "entropy, LLN", "gap, softmax", "gap, LLN"],
        (
            [
                f"{row['scale']:g}",
                *(f"{row[kind][name]:.3f}" for kind in ("entropy", "gap") for name in ("softmax", "lln")),
            ]
            for row in figures["concentration"]
        ),
    )
    memory = markdown_table(
        ["tokens", "softmax by its map", "softmax, fused", "LLN"],
        (
            [str(row["length"]), *(f"{row[name] / 1e6:.2f}" for name in ("softmax map", "softmax", "lln"))]
            for row in figures["memory"]
        ),
    )
    settings = results[0]["settings"]
    return [
        f"Entropy of the rows in bits and spectral gap of the maps of {settings['tokens']} tokens, queries and keys of"
        f" {settings['head_dim']} Gaussian channels with this standard deviation.",
        concentration,
        "Megabytes that one head keeps for the backward pass.",
        memory,
        f"The fast form of LLN differs from its definition by {figures['error']:.1e} of the largest output.",
    ]


OTHER_TABLES = {"7": draw_speed, "fig2": draw_curves, "lln": draw_log_normal}


# ---- Figures ----

IMAGES = {
    "fig2": "accumulated_attention",
    "lln": "log_normal",
    "7": "speed",
    **{table: f"table{table}." for table in (*ABLATION_TABLES, "4", "4b", "long")},
}


def draw_figures(results: Sequence[Result], folder: Path) -> list[str]:
    """Draw a figure for each table with results and return the names; none without matplotlib."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        print("no figures: matplotlib is not installed (pip install 'transnormer-hf[plot]').")
        return []
    drawn = []
    for table in TABLES:
        mine = [result for result in results if result["table"] == table and result["status"] != "failed"]
        if not mine or table not in IMAGES:
            continue
        canvas = Canvas(figsize=(7, 3.2), layout="constrained")
        if table == "fig2":
            _plot_curves(canvas, mine)
        elif table == "lln":
            _plot_log_normal(canvas, mine[0]["figures"])
        elif table == "7":
            _plot_speed(canvas, mine[0]["figures"]["training"])
        else:
            _plot_rows(canvas, table, mine)
        name = f"{IMAGES[table].removesuffix('.')}.png"
        with replacing(folder / name) as path:
            canvas.savefig(path, dpi=90, format="png")
        drawn.append(name)
    return drawn


def _plot_curves(canvas: Any, results: Sequence[Result]) -> None:
    axes = canvas.add_subplot()
    for row in row_order("fig2", results):
        if (curve := accumulated_curve(results, row)) is not None:
            axes.plot(*curve, marker=".", label=row)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":", label="uniform")
    axes.set(xlabel="share of the text, r", ylabel="accumulated attention", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_rows(canvas: Any, table: str, results: Sequence[Result]) -> None:
    """A line per row: a point per seed, a colour per column, the worst at the right."""
    axes = canvas.add_subplot()
    rows = row_order(table, results)
    for number_of_column, column in enumerate(dict.fromkeys(result["column"] for result in results)):
        points = [
            (value, rows.index(result["row"]) + 0.15 * number_of_column)
            for result in results
            if result["column"] == column and (value := value_of(result)) is not None and math.isfinite(value)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=column.upper() or None, alpha=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set(xlabel=FIGURES[table].title)
    axes.grid(alpha=0.3, axis="x", which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _plot_speed(canvas: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time and memory of a training step by length, on logarithmic axes: a power of the length is a straight line."""
    canvas.set_size_inches(9, 4.5)
    time_axes, memory_axes = canvas.subplots(1, 2)
    for number_of_model, (model, steps) in enumerate(by_length(rows, "steps_per_second").items()):
        style = {"label": model, "linestyle": ("-", "--")[number_of_model // 10 % 2], "marker": "."}
        time_axes.plot(list(steps), [1 / value for value in steps.values()], **style)
        peak = by_length(rows, "peak_bytes")[model]
        memory_axes.plot(list(peak), [value / 1e6 for value in peak.values()], **style)
    time_axes.set(ylabel="seconds per training step")
    memory_axes.set(ylabel="peak memory, MB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="tokens", xscale="log", yscale="log")
        lengths = sorted({row["length"] for row in rows})
        axes.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.grid(alpha=0.3, which="both")
    memory_axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _plot_log_normal(canvas: Any, figures: Mapping[str, Any]) -> None:
    for axes, kind, label in zip(
        canvas.subplots(1, 3),
        ("entropy", "gap", "memory"),
        ("entropy, bits", "spectral gap", "bytes kept"),
        strict=True,
    ):
        if kind == "memory":
            for name in ("softmax map", "softmax", "lln"):
                axes.plot(
                    *zip(*((row["length"], row[name]) for row in figures["memory"]), strict=True), ".-", label=name
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(xlabel="tokens", ylabel=label)
        else:
            for name in ("softmax", "lln"):
                rows = figures["concentration"]
                axes.plot([row["scale"] for row in rows], [row[kind][name] for row in rows], ".-", label=name)
            axes.set(xlabel="scale of q and k", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
