"""Long-Range Arena: its five tasks, their data as token ids, and the models that the authors trained on them.

The hyperparameters are those of the authors' scripts (github.com/OpenNLPLab/Transnormer, script_lra.py, over
github.com/OpenNLPLab/lra). Token id 0 is padding and 1 the class token of models that read an answer there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from ..model.configuration_transnormer import TransNormerConfig
from ..model.modeling_transnormer import pool
from ..training.losses import aligned_loss
from ..training.text_files import BrokenRow, check_file, parse_class, read_table
from . import listops, pathfinder

PAD, CLS, FIRST = 0, 1, 2  # FIRST is the id of the first token of a task
LISTOPS_IDS = {token: FIRST + number for number, token in enumerate(listops.TOKENS)}


@dataclass(frozen=True)
class LraTask:
    """One task, and the hyperparameters published with it.

    Attributes:
        name: Value of `--task_name`.
        title: Name in the benchmark.
        num_labels, vocab_size: Classes, and token ids with the two special ones.
        length: Tokens of a sequence.
        pairs: Whether a row is a pair of texts, for two passes of one encoder.
        hub: Data set on the Hub, the split of each step, and columns; None where there is none.
        pooling: "mean" or "last".
        hidden_size, num_hidden_layers, feed_forward_ratio, dropout: The model's.
        batch_size, learning_rate, warmup_steps, epochs: The training's.
    """

    name: str
    title: str
    num_labels: int
    vocab_size: int
    length: int
    num_hidden_layers: int
    feed_forward_ratio: int
    dropout: float
    batch_size: int
    learning_rate: float
    warmup_steps: int
    epochs: int
    pooling: str = "mean"
    hidden_size: int = 128
    pairs: bool = False
    hub: tuple[str, Mapping[str, str], Mapping[str, str]] | None = None
    full_sizes: Mapping[str, int] = field(default_factory=dict)

    def training_defaults(self) -> dict[str, Any]:
        """Training arguments by name: AdamW without weight decay, a cosine over `SCHEDULE_STEPS` updates."""
        return {
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "num_train_epochs": self.epochs,
            "weight_decay": 0.0,
            "lr_scheduler_type": "cosine",
            "seed": 2222,
            "max_length": self.length,
        }

    def config(self, variant: str, **overrides: Any) -> TransNormerConfig:
        """The authors' model: FFN instead of GLU, batch norm in the place of every norm, added sines, pre-norm.

        Three things differ from theirs: all attentions have 8 heads (theirs have 4 in DiagAttention for Image and
        Retrieval), LRPE is that of the language models (theirs rotates by fixed angles and does not reflect), and the
        embeddings have the dropout of the layers (theirs is 0.1).
        """
        fields = {
            "variant": variant,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": 8,
            "intermediate_size": self.feed_forward_ratio * self.hidden_size,
            "feed_forward": "ffn",
            "hidden_act": "gelu",
            "norm_type": "batch",
            "norm_placement": "pre",
            "embedding_norm": "none",
            "final_norm": "batch",
            "position_embedding": "sinusoidal",
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": 0.0,
            "pooling": self.pooling,
            **self.config_fields(),
        }
        return TransNormerConfig(**{**fields, **overrides})

    def config_fields(self) -> dict[str, Any]:
        """What the data fix in any configuration."""
        return {
            "vocab_size": self.vocab_size,
            "num_labels": self.num_labels,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
        }


SCHEDULE_STEPS = 50_000
_BYTES = FIRST + 256
TASKS: dict[str, LraTask] = {
    task.name: task
    for task in (
        LraTask(
            "listops", "ListOps", 10, FIRST + len(listops.TOKENS), 2048, 4, 4, 0.0, 128, 1e-4, 1000, 40,
            full_sizes=listops.FULL_SIZES,
        ),
        LraTask(
            "text", "Text", 2, _BYTES, 4096, 4, 4, 0.0, 64, 1e-3, 80, 32,
            hub=("stanfordnlp/imdb", {"train": "train", "validation": "test", "test": "test"}, {}),
        ),
        LraTask("retrieval", "Retrieval", 2, _BYTES, 4000, 4, 4, 0.0, 64, 1e-3, 800, 20, pairs=True),
        LraTask(
            "pathfinder", "Pathfinder", 2, _BYTES, 1024, 4, 1, 0.0, 128, 5e-4, 312, 200, pooling="last",
            full_sizes=pathfinder.FULL_SIZES,
        ),
        LraTask(
            "image", "Image", 10, _BYTES, 1024, 12, 2, 0.2, 200, 1e-3, 175, 200,
            hub=("uoft-cs/cifar10", {"train": "train", "validation": "test", "test": "test"}, {"img": "pixels"}),
        ),
    )
}  # fmt: skip


def get_task(name: str | None) -> LraTask:
    """The task of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in TASKS:
        raise ValueError(
            f"--task_name {name!r} is not a task of the Long-Range Arena: choose one of {', '.join(TASKS)}."
        )
    return TASKS[name]


# ---- Data ----


class LraRows(Dataset):
    """Token ids and labels in memory; a row of a task of pairs has two sequences.

    An empty text is the class token alone, as a model needs a token to say something about.
    """

    def __init__(self, rows: Iterator[tuple[tuple[np.ndarray, ...], int]], length: int, has_cls: bool):
        only_cls = np.array([CLS], dtype=np.int16)
        first = only_cls if has_cls else only_cls[:0]
        self.sequences: list[tuple[np.ndarray, ...]] = []
        self.labels: list[int] = []
        for sequences, label in rows:
            whole = (np.concatenate((first, sequence.astype(np.int16))) for sequence in sequences)
            self.sequences.append(tuple(sequence[:length] if len(sequence) else only_cls for sequence in whole))
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"sequences": self.sequences[number], "labels": self.labels[number]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (batch, seq), or (batch, 2, seq) for pairs, padded on the right; labels (batch,)."""
    sequences = [torch.from_numpy(sequence).long() for row in rows for sequence in row["sequences"]]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=PAD)
    if (per_row := len(rows[0]["sequences"])) > 1:
        input_ids = input_ids.unflatten(0, (-1, per_row))
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}


def encode_text(text: str) -> np.ndarray:
    """A text as the ids of its bytes."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int16) + FIRST


def encode_listops(source: str, where: str = "") -> np.ndarray:
    """A ListOps sequence as ids; the brackets of the original release that only group tokens in pairs are left out.

    Raises:
        ValueError: there is no token, or one that is not of ListOps.
    """
    tokens = [token for token in source.split() if token not in "()"]
    if not tokens:
        raise ValueError(f"{where}: {source!r} is no ListOps sequence, such as [MAX 2 9 ].")
    unknown = sorted({token for token in tokens if token not in LISTOPS_IDS})
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not a token of ListOps, which has {', '.join(LISTOPS_IDS)}.")
    return np.array([LISTOPS_IDS[token] for token in tokens], dtype=np.int16)


def encode_pixels(pixels: Any, where: str = "") -> np.ndarray:
    """Grey values row by row as ids: bytes, numbers, an array (rows, columns), or a picture, which turns to grey.

    Raises:
        ValueError: they are not grey values from 0 to 255.
    """
    if hasattr(pixels, "convert"):
        pixels = pixels.convert("L")
    values = np.frombuffer(pixels, dtype=np.uint8) if isinstance(pixels, bytes) else np.asarray(pixels).reshape(-1)
    if not len(values) or values.dtype.kind not in "ui" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"{where}: expected grey values from 0 to 255, got {str(pixels)[:40]}.")
    return values.astype(np.int16) + FIRST


def read_rows(task: LraTask, file: str) -> Iterator[tuple[tuple[np.ndarray, ...], int]]:
    """The rows of a local file, by the rules of `text_files`, as token ids and labels.

    tsv, csv, json lines or parquet with `label` and `text`, `text1` and `text2`, `source`, or `pixels`. ListOps also as
    the tsv of the Long-Range Arena, with the header `Source, Target`, or of the original release, `label, source`
    without a header; Retrieval also as the Arena's tsv of label, two ids and two texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or a row is wrong; names file, line and what was expected.
    """
    check_file(file)
    columns = (*row_columns(task), "label")
    for place, row in read_table(file, partial(_arena_header, task)):
        where = f"{file}, {place}"
        if isinstance(row, BrokenRow):
            raise ValueError(f"{where}: {row.reason}.")
        if task.name == "listops":
            row = {{"source": "source", "target": "label"}.get(name.lower(), name): row[name] for name in row}
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            found = ", ".join(map(str, row))
            raise ValueError(f"{where}: no {missing[0]!r}; {task.title} needs {', '.join(columns)}, found {found}.")
        yield encode_row(task, row, where)


def _arena_header(task: LraTask, first: Sequence[str]) -> Sequence[str] | None:
    """The columns of the published tsv files that have no header line."""
    if task.name == "listops" and len(first) == 2 and (first[0].isdecimal() or first[1].isdecimal()):
        return ("label", "source") if first[0].isdecimal() else ("source", "label")
    if task.pairs and len(first) == 5 and "label" not in first:
        return ("label", "id1", "id2", "text1", "text2")
    return None


def row_columns(task: LraTask) -> tuple[str, ...]:
    """The columns of a task's rows, without `label`."""
    if task.pairs:
        return ("text1", "text2")
    return ({"listops": "source", "text": "text"}.get(task.name, "pixels"),)


def encode_row(task: LraTask, row: Mapping[str, Any], where: str) -> tuple[tuple[np.ndarray, ...], int]:
    """The token ids and the label of one row."""
    try:
        label = parse_class(row["label"], (), task.num_labels)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    values = [row[name] for name in row_columns(task)]
    if task.name not in ("listops", "text", "retrieval"):
        return (encode_pixels(values[0], where),), label
    for name, value in zip(row_columns(task), values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{where}, column {name!r}: expected a text, got {value!r}.")
    if task.name == "listops":
        return (encode_listops(values[0], where),), label
    return tuple(map(encode_text, values)), label


def generate_rows(
    task: LraTask, split: str, number: int, seed: int, limits: listops.ListOpsLimits, image_size: int
) -> Iterator[tuple[tuple[np.ndarray, ...], int]]:
    """Generated rows of ListOps or Pathfinder; each split has a seed of its own."""
    seed = 3 * seed + ("train", "validation", "test").index(split)
    if task.name == "listops":
        for tokens, value in listops.generate_listops(number, seed, limits):
            yield (np.array([LISTOPS_IDS[token] for token in tokens], dtype=np.int16),), value
    else:
        for image, label in pathfinder.generate_pathfinder(number, seed, image_size):
            yield (encode_pixels(image),), label


# ---- Dual encoder ----


class DualEncoder(nn.Module):
    """Two texts through one encoder, and a classifier on (u, v, u · v, u - v) of what they pool to.

    encoder: any model of AutoModel. pooling: "first", "mean" or "last".
    """

    accepts_loss_kwargs = True

    def __init__(self, config: PreTrainedConfig, pooling: str):
        super().__init__()
        self.config, self.pooling = config, pooling
        self.encoder = AutoModel.from_config(config, dtype=torch.float32)
        width = config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, config.num_labels))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask: (batch, 2, seq); labels: (batch,); num_items_in_batch: labels of the update."""
        mask = attention_mask.flatten(0, 1)  # (2 * batch, seq)
        hidden_states = self.encoder(input_ids.flatten(0, 1), attention_mask=mask).last_hidden_state
        first, second = pool(hidden_states, mask, self.pooling).unflatten(0, (-1, 2)).unbind(1)  # (batch, hidden_size)
        logits = self.classifier(torch.cat((first, second, first * second, first - second), -1))  # (batch, num_labels)
        outputs = SequenceClassifierOutput(logits=logits)
        return (
            outputs
            if labels is None
            else SequenceClassifierOutput(loss=aligned_loss(outputs, labels, num_items_in_batch), logits=logits)
        )

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's, which `--neftune_noise_alpha` adds noise to."""
        return self.encoder.get_input_embeddings()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The encoder's, for `--activation_checkpointing`; before transformers 5.23, `--gradient_checkpointing`."""
        enable = getattr(self.encoder, "activation_checkpointing_enable", None)
        (enable or self.encoder.gradient_checkpointing_enable)(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable
