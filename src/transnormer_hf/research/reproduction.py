"""The tables of "The Devil in Linear Transformer" at laptop scale: what each cell trains, and where its result is kept.

A cell is one row and column of a table, with one seed. Its settings are all that its figures depend on, and nothing
about the machine; cells with equal settings share one run across tables. Every cell has a file,
`cells/<table>/<row>-<column>-seed<k>.json`.

`scripts/reproduce.py` runs the cells, `reproduction_report.py` draws their tables.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..model.configuration_transnormer import TransNormerConfig
from ..tasks import lra
from ..training.files import write_atomically
from . import paper
from .ablations import VANILLA_BACKBONE, ablation_config, find_ablations
from .baselines import BaselineConfig
from .baselines.modeling import backbone_fields

ABLATION_TABLES = ("1", "3", "8", "9", "10", "11", "12")
TABLES = ("1", "2", "3", "4", "4b", "5", "6", "7", "8", "9", "10", "11", "12", "long", "long2", "fig2", "lln")

LAYERS, HEADS = 4, 4
WIDTH, STEPS = 96, 2500  # of a budget of 1; 0.25 is some five minutes a cell on one core
VOCAB_SIZE = 1024
EVALUATION_ROWS, TASK_ROWS = 256, 1000  # of text, and of a task of Tables 5 and 6
ARENA_LAYERS = 2
INPUT_SCALES = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]

# Our small encoders are pre-norm, like the released decoder. The paper's encoder, post-norm with learned positions,
# learns little more than word frequencies for thousands of steps, unless blocks make it look nearby.
ENCODER: dict[str, Any] = {
    "norm_placement": "pre",
    "final_norm": "layer",
    "position_embedding": "sinusoidal",
    "scale_embedding": True,
}
# How the released decoder differs from the encoder.
DECODER: dict[str, Any] = {
    "is_causal": True,
    "norm_placement": "pre",
    "embedding_norm": "none",
    "final_norm": "simple_rms",
    "position_embedding": "sinusoidal",
    "scale_embedding": True,
    "initializer": "xavier",
    "pooling": "last",
}
MASKED_ONLY = ("max_seq_length", "mlm_probability")

Data = Mapping[str, Mapping[str, Any]]  # task -> what its settings say about its data


class Scale(NamedTuple):
    width: int
    steps: int


class Rows(NamedTuple):
    """Rows of text: as many times shorter than the paper's 512 tokens as blocks are than its 32, 64 and 128."""

    shrink: int
    batch_size: int

    @property
    def length(self) -> int:
        return 512 // self.shrink


# 2,048 tokens a step. Rows of 64 tokens are enough to tell attentions inside a layer apart, but nearly all that helps
# there is nearby: where models are compared as a whole, rows are longer.
ABLATION_ROWS, ENCODER_ROWS, CAUSAL_ROWS = Rows(8, 32), Rows(4, 16), Rows(2, 8)
# Where distance has to count: rows as long as the paper's, and blocks that see a 32nd of them, not an eighth.
LONG_ROWS, LONG_BLOCK = Rows(1, 4), 16
LONGER = 3  # times the steps of Table 4, in Table 4b: softmax is slow to find the neighbours in rows of 256


def scale(budget: float) -> Scale:
    """Width and steps for a budget: steps grow with its square root, and so does the work of a step, width².

    Raises ValueError unless the budget is positive.
    """
    if not budget > 0:
        raise ValueError(f"--budget {budget} must be greater than 0; 0.25 is some five minutes a cell on one core.")
    narrowest = 8 * HEADS  # heads of 8 channels
    width = narrowest * max(1, round(WIDTH * budget**0.25 / narrowest))
    return Scale(width, max(2, round(STEPS * budget**0.5)))


# ---- Cells ----


@dataclass(frozen=True)
class Cell:
    """One figure of a table, and the training behind it.

    Attributes:
        table: One of `TABLES`.
        row, column: Its place there; the column is "" in a table of one column.
        paper: The paper's figure, None if we do not know it.
        settings: All that the figures depend on, as JSON: task, seed, model, training, data.
    """

    table: str
    row: str
    column: str
    paper: float | None
    settings: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def place(self) -> dict[str, Any]:
        return {"table": self.table, "row": self.row, "column": self.column, "seed": self.seed}

    @property
    def name(self) -> str:
        return f"{self.table}/{slug(self.row)}{'-' + self.column if self.column else ''}-seed{self.seed}"


def slug(text: str) -> str:
    """ "NormAttention, RMSNorm" as "normattention-rmsnorm"."""
    return re.sub(r"[^a-z0-9+]+", "-", text.lower()).strip("-")


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short name for the settings; equal settings have equal names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


_LEFT_OUT = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "backend"}


def model_settings(config: TransNormerConfig) -> dict[str, Any]:
    """The fields of a configuration that define the model, without those that follow from the tokenizer."""
    names = (*TransNormerConfig.__annotations__, *(("mixer", "mixer_options") if hasattr(config, "mixer") else ()))
    fields = {name: getattr(config, name) for name in names if name not in _LEFT_OUT}
    return {"model_type": config.model_type, **fields}


def masked_config(size: Scale, variant: str, rows: Rows = ABLATION_ROWS) -> TransNormerConfig:
    """A small encoder, without dropout, since training sees the text hardly more than once.

    Its initializer_range gives outputs of the same size at this width as the released 0.02 does at width 768.
    """
    spread = round(0.02 * math.sqrt(768 / size.width), 4)
    return TransNormerConfig(**_sizes(size, rows.length), **ENCODER, variant=variant, initializer_range=spread)


def _sizes(size: Scale, length: int) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": length,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def masked_settings(
    config: TransNormerConfig, size: Scale, seed: int, data: Mapping[str, Any], rows: Rows = ABLATION_ROWS
) -> dict[str, Any]:
    """Masked language modelling as in the authors' script, except for lengths, batch, steps and learning rate."""
    return {
        "task": "mlm",
        "seed": seed,
        "model": model_settings(config) | {"block_size": config.block_size // rows.shrink},
        "training": {
            "max_steps": size.steps,
            "per_device_train_batch_size": rows.batch_size,
            "max_seq_length": rows.length,
            "mlm_probability": 0.15,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": size.steps // 10,
            "adam_beta1": 0.9,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-6,
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "max_eval_samples": EVALUATION_ROWS,
        },
        "data": dict(data),
    }


def plan_cells(tables: Sequence[str], seeds: Sequence[int], size: Scale, data: Data) -> list[Cell]:
    """The cells of these tables: all those of the first seed, then those of the next.

    data: for each task, what the settings say about its data.
    """
    return [cell for seed in seeds for table in tables for cell in _PLANS[table](table, seed, size, data)]


def _ablation_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    variants = ("t2",) if table in ("1", "3") else ("t1", "t2")
    return [
        Cell(
            table,
            ablation.row,
            variant if len(variants) > 1 else "",
            ablation.perplexity.get(variant),
            masked_settings(ablation_config(masked_config(size, variant), ablation), size, seed, data["mlm"]),
        )
        for ablation in find_ablations(int(table))
        for variant in variants
    ]


class ArenaSize(NamedTuple):
    """A task of Table 6 in small: tokens of a row, rows and number of steps per step of the budget, how many times
    shorter blocks and landmarks are than for texts of full length, and options of `run_lra.py`."""

    length: int
    batch_size: int
    steps: float
    shrink: int
    options: dict[str, Any]


# A minute or less each, at lengths where some attention learns more than the classes' shares.
ARENA = {
    "text": ArenaSize(512, 16, 0.2, 2, {}),
    "listops": ArenaSize(
        128, 32, 0.24, 4,
        {"listops_min_length": 24, "listops_max_length": 128, "listops_max_depth": 4, "listops_max_args": 8},
    ),
    "retrieval": ArenaSize(256, 16, 0.16, 4, {}),
    "pathfinder": ArenaSize(144, 64, 0.16, 8, {}),
    "image": ArenaSize(256, 32, 0.16, 4, {}),
}  # fmt: skip
# What reproduction_tasks.py makes: pictures of fewer pixels, and pairs of texts.
ARENA_DATA: dict[str, dict[str, Any]] = {
    "image": {"side": 16},
    "pathfinder": {"drawn": 24, "side": 12},
    "retrieval": {"bytes": 256, "subject_share": 0.6},
}


# Row -> the mixer in the vanilla backbone, or T1 or T2. Not in the paper's tables: log-normal attention, Nystromformer
# outside of Table 6, and a local band.
GRADIENT_ROWS = {"1+elu": "1+elu", "Performer": "performer", "Vanilla": "softmax", "NormAttention": "norm"}
CAUSAL_MODELS = {
    "Vanilla": "softmax", "LS": "transformer_ls", "FLASH-quad": "flash_quad", "FLASH": "flash", "1+elu": "1+elu",
    "Performer": "performer", "T1": "t1", "T2": "t2", "LLN": "lln", "LLN + Diag": "lln_diag", "Local": "local",
}  # fmt: skip
GLUE_MODELS = CAUSAL_MODELS | {"Nystromformer": "nystromformer"}
CURVES = {name: GLUE_MODELS[name] for name in ("Vanilla", "1+elu", "T1", "T2", "LLN", "LLN + Diag", "Nystromformer")}
ARENA_MODELS = {
    "Transformer": "softmax", "Kernelized": "kernelized", "Nystromformer": "nystromformer", "Linformer": "linformer",
    "Informer": "informer", "Performer": "performer", "Reformer": "reformer", "BigBird": "bigbird",
    "Skyformer": "skyformer", "LS": "transformer_ls", "cosFormer": "cosformer", "FLASH-quad": "flash_quad",
    "FLASH": "flash", "T1": "t1", "T2": "t2", "LLN": "lln", "LLN + Diag": "lln_diag", "Local": "local",
}  # fmt: skip
# Row -> the table and row of the ablation; None is softmax in the backbone of Tables 1 and 3.
LONG_MODELS: dict[str, tuple[int, str | None]] = {
    "50 % Diag": (8, "50 % Diag"),
    "100 % Diag": (8, "100 % Diag"),
    "0 % Diag": (8, "0 % Diag"),
    "Norm early, Diag late": (9, "Norm early, Diag late"),
    "FFN": (10, "FFN"),
}
LONG_GRADIENT_ROWS: dict[str, tuple[int, str | None]] = {
    "1+elu": (3, "1+elu early, 1+elu late"),
    "Vanilla": (3, None),
    "NormAttention": (1, "NormAttention, RMSNorm"),
}
# What the originals' models have for texts of full length.
TEXT_SIZES: dict[str, dict[str, int]] = {
    "bigbird": {"block_size": 64},
    "flash": {"chunk_size": 64},
    "linformer": {"projected_length": 128},
    "nystromformer": {"num_landmarks": 128},
    "reformer": {"chunk_size": 64},
    "skyformer": {"num_samples": 128},
    "transformer_ls": {"num_landmarks": 32, "chunk_size": 32},
}
# Layers of FLASH, which are attention and feed-forward in one, per layer of the others, bidirectional and causal.
FLASH_LAYERS = {False: 2, True: 10 / 6}
GLUE_STEPS = 0.16  # per step of the masked language model
GLUE_TASKS = ("mnli", "qnli", "qqp", "sst2", "mrpc", "cola")  # MNLI is the matched one


def in_vanilla_backbone(config: TransNormerConfig, attention: str, shrink: int) -> TransNormerConfig:
    """T1 or T2 as they are; a baseline or NormAttention alone in the backbone of Tables 1 and 3."""
    if attention in ("t1", "t2"):
        return config
    if attention == "norm":
        (row,) = (row for row in find_ablations(1) if row.row == "NormAttention, RMSNorm")
        return ablation_config(config, row)
    return in_backbone(config, attention, shrink, **VANILLA_BACKBONE)


def in_backbone(config: TransNormerConfig, mixer: str, shrink: int, **changes: Any) -> BaselineConfig:
    """A baseline in the backbone of `config` with these changes, its blocks and landmarks for texts `shrink` times as
    short as the original's."""
    fields = backbone_fields(config) | changes
    options = {name: max(2, size // shrink) for name, size in TEXT_SIZES.get(mixer, {}).items()}
    if mixer == "transformer_ls":
        options["window"] = max(2, (64 if config.is_causal else 8) // shrink)
    elif mixer in ("flash", "flash_quad"):
        fields["num_hidden_layers"] = round(FLASH_LAYERS[config.is_causal] * config.num_hidden_layers)
        options["query_size"] = config.hidden_size // 8 * 2  # 128 of 512 channels
    return BaselineConfig(**fields, mixer=mixer, mixer_options={mixer: options} if options else None)


def pretrained_settings(
    attention: str, size: Scale, seed: int, data: Data, rows: Rows = ABLATION_ROWS
) -> dict[str, Any]:
    """The masked language model with this attention; some are shared by Table 2 with 1, 3 and 8 to 12."""
    config = masked_config(size, attention if attention == "t1" else "t2", rows)
    if rows == ENCODER_ROWS:  # to be fine-tuned: the first token tells little after so few steps
        config.pooling = "mean"
    return masked_settings(in_vanilla_backbone(config, attention, rows.shrink), size, seed, data["mlm"], rows)


def _gradient_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    return [
        Cell(table, row, "", paper.TABLE_2[row], pretrained_settings(attention, size, seed, data))
        for row, attention in GRADIENT_ROWS.items()
    ]


def _curve_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    return [
        Cell(table, row, "", None, pretrained_settings(attention, size, seed, data))
        for row, attention in CURVES.items()
    ]


def _causal_config(size: Scale, rows: Rows, variant: str) -> TransNormerConfig:
    return TransNormerConfig(**_sizes(size, rows.length), **DECODER, variant=variant)


def causal_settings(
    config: TransNormerConfig, size: Scale, seed: int, data: Mapping[str, Any], rows: Rows
) -> dict[str, Any]:
    """Causal language modelling; otherwise as `masked_settings`."""
    settings = masked_settings(config, size, seed, data, rows)
    training = {name: value for name, value in settings["training"].items() if name not in MASKED_ONLY}
    return {**settings, "task": "clm", "training": {**training, "block_size": rows.length}}


def _causal_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    cells, rows = [], CAUSAL_ROWS
    if table == "4b":
        size = size._replace(steps=LONGER * size.steps)
    for row, attention in CAUSAL_MODELS.items():
        config = _causal_config(size, rows, attention if attention == "t1" else "t2")
        config = in_vanilla_backbone(config, attention, rows.shrink)
        settings = causal_settings(config, size, seed, data["mlm"], rows)
        cells.append(Cell(table, row, "", paper.TABLE_4["validation"].get(row), settings))
    return cells


def _long_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    """Conclusions of Tables 8 to 10, or 2, again, where distance has to count: causal models, as small encoders need
    too long to find the neighbours of a masked token in such rows."""
    cells = []
    for row, (ablated, name) in (LONG_MODELS if table == "long" else LONG_GRADIENT_ROWS).items():
        for variant in ("t1", "t2") if table == "long" else ("t2",):
            config = _causal_config(size, LONG_ROWS, variant)
            if name is None:
                config = in_backbone(config, "softmax", LONG_ROWS.shrink, **VANILLA_BACKBONE)
            else:
                (ablation,) = (found for found in find_ablations(ablated) if found.row == name)
                config = ablation_config(config, ablation)
            settings = causal_settings(config, size, seed, data["mlm"], LONG_ROWS)
            settings["model"]["block_size"] = LONG_BLOCK
            known = ablation.perplexity.get(variant) if table == "long" else paper.TABLE_2[row]
            cells.append(Cell(table, row, variant if table == "long" else "", known, settings))
    return cells


def _glue_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    steps = max(2, round(GLUE_STEPS * size.steps))
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "max_seq_length": ENCODER_ROWS.length,
        "max_train_samples": 32 * steps,
        "max_eval_samples": TASK_ROWS,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // 10,
        "weight_decay": 0.01,
    }
    return [
        Cell(
            table,
            row,
            name,
            paper.TABLE_5[name].get(row),
            {
                "task": "glue",
                "name": name,
                "seed": seed,
                "pretrained": pretrained_settings(attention, size, seed, data, ENCODER_ROWS),
                "training": training,
                "data": source,
            },
        )
        for name, source in data["glue"].items()
        for row, attention in GLUE_MODELS.items()
    ]


def _arena_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    cells = []
    for name, source in data["lra"].items():
        task, small = lra.TASKS[name], ARENA[name]
        steps = max(2, round(small.steps * size.steps))
        training = {
            "max_steps": steps,
            "schedule_steps": steps,
            "per_device_train_batch_size": small.batch_size,
            "learning_rate": 2e-3,
            "warmup_steps": steps // 10,
            "max_length": small.length,
            "max_eval_samples": TASK_ROWS,
            **small.options,
            **({"max_train_samples": small.batch_size * steps} if "generated" in source else {}),
        }
        for row, attention in ARENA_MODELS.items():
            settings = {
                "task": "lra",
                "name": name,
                "seed": seed,
                "model": model_settings(_arena_config(name, attention, size)) | {"num_labels": task.num_labels},
                "training": training,
                "data": {**source, **ARENA_DATA.get(name, {})},
            }
            cells.append(Cell(table, row, name, paper.TABLE_6[name].get(row), settings))
    return cells


def _arena_config(name: str, attention: str, size: Scale) -> TransNormerConfig:
    """A model of `ARENA_LAYERS` layers, as Skyformer's, in the authors' backbone for the task. But in Pathfinder, too,
    the answer is read from the mean of the tokens: from the last one, as theirs, T2 learned nothing in 200 steps."""
    small = ARENA[name]
    sizes = _sizes(size, small.length) | {"num_hidden_layers": ARENA_LAYERS, "intermediate_size": 2 * size.width}
    sizes["pooling"] = "mean"
    variant = attention if attention == "t1" else "t2"
    config = lra.TASKS[name].config(variant, **sizes, block_size=64 // small.shrink)
    return config if attention in ("t1", "t2") else in_backbone(config, attention, small.shrink)


def _speed_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    lengths = [1024, 2048, 3072, 4096, 5120]
    settings = {"task": "speed", "seed": seed, "lengths": lengths, "repeats": 1, "max_minutes": 90}
    return [Cell(table, "steps per second", "", None, settings)]


def _log_normal_cells(table: str, seed: int, size: Scale, data: Data) -> list[Cell]:
    settings = {"task": "lln", "seed": seed, "head_dim": 64, "tokens": 512, "input_scales": INPUT_SCALES}
    settings["lengths"] = [256, 512, 1024, 2048, 4096]
    return [Cell(table, "concentration and memory", "", None, settings)]


_PLANS: dict[str, Callable[[str, int, Scale, Data], list[Cell]]] = {
    **dict.fromkeys(ABLATION_TABLES, _ablation_cells),
    "2": _gradient_cells,
    "fig2": _curve_cells,
    "4": _causal_cells,
    "4b": _causal_cells,
    "5": _glue_cells,
    "long": _long_cells,
    "long2": _long_cells,
    "6": _arena_cells,
    "7": _speed_cells,
    "lln": _log_normal_cells,
}


# ---- Files ----


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The contents of all cells' files, models with the fields that configurations have today."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cells/*/*.json"))]
    for result in results:
        for settings in (result["settings"], result["settings"].get("pretrained", {})):
            if "model" in settings:
                settings["model"] = {**_new_fields(settings["model"]), **settings["model"]}
    return results


def _new_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a model lacks and their defaults, with which they change nothing."""
    names = set(TransNormerConfig.__annotations__) - _LEFT_OUT - set(model)
    return {name: getattr(TransNormerConfig, name) for name in names}


def find_result(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result of a run with these settings; a failed run does not count, it is tried again."""
    for result in results:
        if result["settings"] == settings and result["status"] != "failed":
            return result
    return None


def check_folder(folder: Path, cells: Sequence[Cell], results: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a cell's file holds the result of other settings, which would be overwritten."""
    for cell in cells:
        for result in results:
            if place_of(result) == cell.place and result["settings"] != cell.settings:
                difference = ", ".join(_differences(result["settings"], cell.settings))
                raise ValueError(
                    f"--output_dir {folder} holds {cell.name} with other settings ({difference}): give the same"
                    " --budget, --max_steps and data as before, or another folder."
                )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} {before}, now {after}")
    return found


def place_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The place of a result, as `Cell.place`."""
    return {name: result[name] for name in ("table", "row", "column", "seed")}


def without_place(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result that holds for any cell with the same settings."""
    return {name: value for name, value in result.items() if name not in (*place_of(result), "paper")}


def write_cell(folder: Path, cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a cell's file and return its content.

    result: "status" ("done", "diverged" or "failed"), "figures", "seconds" by the clock and "cpu_seconds" of work (not
        in the first cells), "versions", and anything worth noting.
    """
    content = {**cell.place, "paper": cell.paper, **result, "settings": cell.settings}
    write_atomically(cell_file(folder, cell), json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content
