"""From text to rows of a fixed length: documents, their tokens, and rows in which documents do not see each other.

A row of `length` tokens holds pieces of one or more documents. The positions restart with each piece, which tells
TransNormer, and the causal models of transformers, where one ends. Labels are aligned with the inputs: the label of a
column is what the model has to say there, the next token or the masked one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .losses import IGNORED
from .text_files import LINES, TABLES, BrokenRow, read_lines, read_table

FILE_FORMATS = (*LINES, *TABLES)
# A line that begins an article of WikiText: one equals sign on each side, its sections have more.
WIKITEXT_TITLE = r"^ ?= [^=].* = ?$"

Row = dict[str, np.ndarray]


# ---- Text ----


@dataclass(frozen=True)
class TextSource:
    """Where the text of one split lies: a file, or a split of a data set on the Hub.

    Attributes:
        file: A text file, or tsv, json lines, csv or parquet with a text column, by the rules of `text_files`.
        dataset: Name and configuration of a data set on the Hub, the latter or None.
        split: Its split.
        text_column: The column with the text.
        document_start: Regular expression of a line that begins a document; None where each row is a document.
        streaming: Whether to read a data set of the Hub row by row and not to keep a copy; a file always is.
        options: Keyword arguments of `datasets.load_dataset`, for a data set on the Hub.
    """

    file: str | None
    dataset: tuple[str, str | None] | None
    split: str
    text_column: str = "text"
    document_start: str | None = None
    streaming: bool = False
    options: Mapping[str, Any] | None = None

    def documents(self) -> Iterator[str]:
        """The documents in the order of the source.

        Raises:
            ValueError, ConnectionError: the column is missing, the file is not text, or the Hub is out of reach.
        """
        texts = self._texts()
        return texts if self.document_start is None else join_lines(texts, self.document_start)

    def _texts(self) -> Iterator[str]:
        if self.file is not None and Path(self.file).suffix.lower() in LINES:
            for _, line in read_lines(self.file):
                yield line + "\n"
            return
        for where, row in self._rows():
            if isinstance(row, BrokenRow):
                raise ValueError(f"{self.describe()}, {where}: {row.reason}.")
            if self.text_column not in row:
                raise ValueError(
                    f"{self.describe()}, {where}: no text in column {self.text_column!r}, found"
                    f" {', '.join(map(str, row))}; name it with --text_column."
                )
            text = row[self.text_column]
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.describe()}, {where}, column {self.text_column!r}: expected a text, got {text!r}."
                )
            yield text

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRow]]:
        if self.dataset is None:
            yield from read_table(self.file or "")
            return
        from datasets import load_dataset

        options: dict[str, Any] = {"split": self.split, "streaming": self.streaming, **(self.options or {})}
        try:
            rows = load_dataset(*self.dataset, **options)
        except Exception as error:  # connection, proxy, offline mode and cache errors share no base class
            raise ConnectionError(
                f"Could not load {self.describe()}: {error}. Text on this machine is given with --train_file,"
                " --validation_file and --test_file."
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row

    def describe(self) -> str:
        """The source in words, without a path."""
        if self.dataset is None:
            return f"file {Path(self.file or '').name}"
        name, config = self.dataset
        return f"split {self.split} of {name}{f' ({config})' if config else ''}"


def join_lines(lines: Iterable[str], document_start: str) -> Iterator[str]:
    """Join lines to documents, each beginning with a line that matches; what stands before the first is one as well."""
    pattern = re.compile(document_start)
    document: list[str] = []
    for line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        if document and pattern.search(text):
            yield "".join(document)
            document = []
        document.append(text + "\n")
    if document:
        yield "".join(document)


def count_words(text: str) -> int:
    """Words between blanks, and one end of sentence a line: what published word-level perplexities are divided by."""
    return len(text.split()) + text.count("\n")


# ---- Tokens ----


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], line_end: int, batch_size: int = 32
) -> Iterator[list[int]]:
    """The tokens of each document, without special ones.

    Where the tokenizer drops line ends, as one of whole words does, `line_end` stands for them.
    """
    has_line_ends = _encode(tokenizer, ["a\nb"]) != _encode(tokenizer, ["a b"])
    documents = iter(documents)
    while batch := list(islice(documents, batch_size)):
        if has_line_ends:
            yield from _encode(tokenizer, batch)
            continue
        for document in batch:
            *lines, rest = document.split("\n")
            tokens = [token for line in _encode(tokenizer, lines) for token in (*line, line_end)]
            yield tokens + (_encode(tokenizer, [rest])[0] if rest else [])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return (
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if texts
        else []
    )


# ---- Rows ----


@dataclass(frozen=True)
class Packing:
    """How the tokens of documents become rows.

    Attributes:
        length: Tokens per row.
        causal: Whether a label is the next token. Otherwise it is the token itself where it may be masked.
        pad: Token that fills the last row.
        first: Tokens in front of each piece of a document; causal pieces have none.
        last: Tokens behind each piece.
        together: Whether documents share rows, with positions that restart. Otherwise each row holds one piece and
            padding, for models that would look across.
    """

    length: int
    causal: bool
    pad: int
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    together: bool = True

    def rows(self, documents: Iterable[Sequence[int]]) -> Iterator[Row]:
        """Rows of `input_ids`, `labels`, and `position_ids` or `attention_mask`, each (length,) int64.

        No token is lost. A causal document brings the token that comes before its first label.
        """
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        filled, frame = 0, len(self.first) + len(self.last)
        for document in documents:
            tokens = np.asarray(document, dtype=np.int64)
            inputs, labels = (tokens[:-1], tokens[1:]) if self.causal else (tokens, tokens)
            start = 0
            while start < len(inputs):
                room = self.length - filled - frame
                if room > 0:
                    piece = self._frame(inputs[start : start + room], labels[start : start + room])
                    pieces.append(piece)
                    filled, start = filled + len(piece[0]), start + room
                if room <= 0 or filled == self.length or not self.together:
                    yield self._row(pieces)
                    pieces, filled = [], 0
        if pieces:
            yield self._row(pieces)

    def _frame(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.array(self.first, dtype=np.int64), np.array(self.last, dtype=np.int64)
        return (
            np.concatenate((first, inputs, last)),
            np.concatenate((np.full_like(first, IGNORED), labels, np.full_like(last, IGNORED))),
        )

    def _row(self, pieces: list[tuple[np.ndarray, np.ndarray]]) -> Row:
        filled = sum(len(inputs) for inputs, _ in pieces)
        if missing := self.length - filled:
            pieces = [*pieces, (np.full(missing, self.pad), np.full(missing, IGNORED))]
        row = {
            "input_ids": np.concatenate([inputs for inputs, _ in pieces]),
            "labels": np.concatenate([labels for _, labels in pieces]),
        }
        if self.together:
            row["position_ids"] = np.concatenate([np.arange(len(inputs)) for inputs, _ in pieces])
        else:
            row["attention_mask"] = (np.arange(self.length) < filled).astype(np.int64)
        return row


@dataclass(frozen=True)
class Masking:
    """BERT's masking: of the tokens chosen, 80 % become the mask, 10 % a random token, 10 % stay.

    What is chosen depends on the seed, the epoch and the number of the row only, so a run that was resumed sees the
    same as one that was not. `DataCollatorForLanguageModeling(seed=...)` draws from one generator all the time: with
    it a resumed run, a second worker and a second evaluation of the same model see other masks.
    """

    mask: int
    vocab_size: int
    probability: float = 0.15
    seed: int = 0

    def __call__(self, row: Row, epoch: int, number: int) -> Row:
        """The row with masked `input_ids`, and `labels` only where a token was chosen: at least one if one can be."""
        rng = np.random.default_rng((self.seed, epoch, number))
        candidates = np.flatnonzero(row["labels"] != IGNORED)
        wanted = int(self.probability * len(candidates) + rng.random())
        chosen = rng.choice(candidates, min(max(wanted, 1), len(candidates)), replace=False)
        draw = rng.random(len(chosen))
        input_ids, labels = row["input_ids"].copy(), np.full_like(row["labels"], IGNORED)
        labels[chosen] = row["labels"][chosen]
        input_ids[chosen[draw < 0.8]] = self.mask
        is_random = (draw >= 0.8) & (draw < 0.9)
        input_ids[chosen[is_random]] = rng.integers(self.vocab_size, size=is_random.sum())
        return {**row, "input_ids": input_ids, "labels": labels}


class PackedRows(Dataset):
    """Rows in memory. `words` is the number of words in the text that they hold, where it is known.

    The epoch lies in memory that the workers of a DataLoader share, for with `persistent_workers` they keep the copy of
    the rows that they were started with.
    """

    def __init__(self, rows: Iterable[Row], masking: Masking | None = None, words: int | None = None):
        rows = list(rows)
        narrow = {name: [row[name].astype(np.int32) for row in rows] for name in (rows[0] if rows else ())}
        self.columns = {name: np.stack(values) for name, values in narrow.items()}  # (rows, length)
        self.masking, self.words = masking, words
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, number: int) -> Row:
        row = {name: values[number].astype(np.int64) for name, values in self.columns.items()}
        return row if self.masking is None else self.masking(row, int(self._epoch), number)

    def with_masking(self, masking: Masking) -> "PackedRows":
        """The same rows, masked in their own way and with an epoch of their own."""
        rows = PackedRows((), masking, self.words)
        rows.columns = self.columns
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Choose other tokens to mask in each epoch, in the workers as well."""
        self._epoch.fill_(epoch)


class PackedStream(IterableDataset):
    """Rows made while they are read, again and again, shuffled within a buffer; the same ones for the same seed.

    There is no end, so for the Trainer all is one epoch, and a resumed run finds its place by reading up to it.
    `datasets.IterableDataset` would repeat the rows in one order, and give all of a source to one worker.
    """

    def __init__(
        self,
        make_rows: Callable[[], Iterator[Row]],
        masking: Masking | None = None,
        buffer_size: int = 1,
        seed: int = 0,
    ):
        self.make_rows, self.masking, self.buffer_size, self.seed = make_rows, masking, buffer_size, seed

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        for epoch in count():
            number = -1
            for number, row in self._shuffle(enumerate(self.make_rows()), np.random.default_rng((self.seed, epoch))):
                if worker is None or number % worker.num_workers == worker.id:
                    yield row if self.masking is None else self.masking(row, epoch, number)
            if number < 0:
                raise ValueError("The stream holds no text to make a row of.")

    def with_masking(self, masking: Masking) -> "PackedStream":
        """The same rows, masked in their own way."""
        return PackedStream(self.make_rows, masking, self.buffer_size, self.seed)

    def _shuffle(self, rows: Iterator[tuple[int, Row]], rng: np.random.Generator) -> Iterator[tuple[int, Row]]:
        buffer: list[tuple[int, Row]] = []
        for row in rows:
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            place = int(rng.integers(self.buffer_size))
            yield buffer[place]
            buffer[place] = row
        for place in rng.permutation(len(buffer)):
            yield buffer[place]


@torch.no_grad()
def keeps_sequences_apart(model: PreTrainedModel) -> bool:
    """Whether what a model says about a sequence is free of the one in front of it, where `position_ids` restart.

    It is tried: the tokens of the first sequence change, what is said about the second must not. There is no cache, as
    in training: with one, the models of transformers do not look for where positions restart.
    """
    was_training, had_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if had_cache is not None:
        model.config.use_cache = False
    size = min(4, getattr(model.config, "max_position_embeddings", None) or 4)
    first, second = torch.arange(2 * size, device=model.device).view(2, size) % model.config.vocab_size
    changed = (first + size + 1) % model.config.vocab_size
    position_ids = torch.arange(size, device=model.device).repeat(2)[None]  # (1, 2 * size)
    try:
        before, after = (
            model(input_ids=torch.cat((tokens, second))[None], position_ids=position_ids).logits[0, size:]
            for tokens in (first, changed)
        )  # (size, vocab_size)
    except TypeError:  # it takes no position_ids
        return False
    finally:
        model.train(was_training)
        if had_cache is not None:
            model.config.use_cache = had_cache
    return bool((before - after).abs().max() <= 1e-5 * before.std())
