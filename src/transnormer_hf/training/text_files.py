"""Text files and tables, read by one set of rules.

- Text is UTF-8, with or without a byte-order mark. Anything else is an error that names the line.
- Values are text as written: "007", "NA", "null" and "1e5" stay what they are, and a field may be of any length.
- A line ends with a line feed, which a carriage return may precede; other separators occur inside texts.
- tsv has no quoting, as in GLUE, whose files hold lone quote marks. csv has the quotes of RFC 4180, and a header.
- No row is left out. A blank line is an empty text where a row is one text, in a file with one column; elsewhere it is
  a row with too few fields, and named.
- json and jsonl hold one object a line; parquet, columns.

Why not `datasets`, which has readers for all of these formats: it fills up a row with too few fields, drops the first
value of rows with one too many and the second of two columns of one name, leaves out blank lines of json, takes
"rows[1].tsv" for a pattern that no file matches, and names no line in an error (datasets 5.2).

Importing this file needs the standard library only.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
LINES = (".txt",)
LONGEST_FIELD = 2**31 - 1  # of csv; more does not fit into a C long everywhere

Header = Callable[[list[str]], Sequence[str] | None]


@dataclass(frozen=True)
class BrokenRow:
    """Takes the place of a row that has too few or too many fields, and says so."""

    reason: str


def check_file(file: str | os.PathLike, formats: Sequence[str] = TABLES, argument: str | None = None) -> None:
    """Raise unless a file exists and has one of the extensions, in any case; `argument` is the one that names it.

    Raises:
        ValueError: another extension.
        FileNotFoundError: no such file.
    """
    path, where = Path(file), f"{file}" if argument is None else f"--{argument} {file}"
    if path.suffix.lower() not in formats:
        raise ValueError(f"{where}: unknown extension, expected one of {', '.join(formats)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file.")


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Where a line stands, "line 3", and its text without the line end, for every line of a file.

    Raises:
        ValueError: the file is not UTF-8; names file and line.
    """
    for number, line in enumerate(_decoded_lines(Path(path)), start=1):
        yield f"line {number}", line.removesuffix("\n").removesuffix("\r")


def _decoded_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected UTF-8 text, got {error}.") from None


def read_table(
    path: str | os.PathLike, header: Header | None = None
) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    """Where a row stands, "line 3" or in parquet "row 3", and its values by column, for every row of a table.

    Args:
        path: The file; its extension, one of `TABLES`, tells the format.
        header: For tsv, names the columns from the fields of the first line if that line is a row already; gives None
            where the line is the header. Without it the first line is the header.

    Returns:
        Rows; values of tsv and csv are text, those of json and parquet what the file says. A row with a wrong number
        of fields comes as a `BrokenRow`.

    Raises:
        ValueError: the file is not what its extension says; names file and line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        fields = ((where, text.split("\t")) for where, text in read_lines(path))
        return _rows_by_header(path, fields, header)
    if suffix == ".csv":
        return _rows_by_header(path, _read_csv(path), None)
    return _read_parquet(path) if suffix == ".parquet" else _read_json_lines(path)


def _rows_by_header(
    path: Path, lines: Iterator[tuple[str, list[str]]], header: Header | None
) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    names: Sequence[str] | None = None
    note = ""
    for where, fields in lines:
        if names is None:
            names = header(fields) if header is not None else None
            if names is None:
                names = fields
                _check_header(path, names)
                continue
            note = " as there is no header"
        if len(fields) == len(names):
            yield where, dict(zip(names, fields, strict=True))
        else:
            got = "blank" if fields == [""] else f"{len(fields)} fields"
            yield where, BrokenRow(f"{got}, expected {len(names)} ({', '.join(names)}){note}")


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{path}, line 1: the column {twice[0]!r} stands there twice; give each column its own name.")


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(_decoded_lines(path), strict=True)
    while True:
        start = reader.line_num + 1
        limit = csv.field_size_limit(LONGEST_FIELD)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {start}: expected UTF-8 csv with a header, got {error}.") from None
        finally:
            csv.field_size_limit(limit)  # it is that of the whole process
        if fields is None:
            return
        yield f"line {start}", fields or [""]


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    for where, text in read_lines(path):
        if not text.strip():
            yield where, BrokenRow("blank, expected one JSON object a line")
            continue
        try:
            row = json.loads(text)
            if "\\u" in text:
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # UnicodeEncodeError: half of a surrogate pair
            raise ValueError(f"{path}, {where}: expected one JSON object a line, got {error}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where}: expected one JSON object a line, got {text[:40]!r}.")
        yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, got {error}.") from None


def parse_class(value: Any, names: Sequence[str], number_of_classes: int | None = None) -> int:
    """The number of a class that is given by name or by number: 1, "1", 1.0 and "1.0" are one.

    Args:
        value: What the file says.
        names: Names of the classes, by number; may be empty where `number_of_classes` is given.
        number_of_classes: How many there are, where they have no names.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    text = "" if isinstance(value, bool) else str(value).removesuffix(".0")
    count = len(names) if number_of_classes is None else number_of_classes
    numbers = {str(number): number for number in range(count)}
    if text not in numbers:
        known = ", ".join(f"{name} ({number})" for number, name in enumerate(names))
        raise ValueError(f"unknown label {value!r}, expected {f'one of {known}' if known else f'0 to {count - 1}'}.")
    return numbers[text]
