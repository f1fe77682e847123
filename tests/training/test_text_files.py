"""One set of rules for text files, whoever reads them."""

import csv
import json
from pathlib import Path

import pytest

from transnormer_hf.tasks import lra
from transnormer_hf.tasks.glue import get_task, read_glue_file
from transnormer_hf.training.packing import TextSource
from transnormer_hf.training.text_files import BrokenRow, check_file, parse_class, read_lines, read_table

# Texts that a reader with types, missing values or rules of its own would change.
TEXTS = [
    "007",
    "1e5",
    "NA",
    "null",
    "nan",
    "None",
    "True",
    "",
    "  blanks around  ",
    'a "quoted" word',
    "naïve 日本",
    "a\u2028b\x85c",
    "\ufeffmark",
    "x" * 200_000,
]


def write_table(folder: Path, suffix: str, columns: dict[str, list], mark: bool = False, end: str = "\n") -> Path:
    file = folder / f"table{suffix}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_dict(columns).to_parquet(file)
        return file
    with file.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as stream:
        if suffix == ".csv":
            writer = csv.DictWriter(stream, list(columns), lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
        elif suffix == ".tsv":
            lines = ["\t".join(columns), *("\t".join(map(str, row.values())) for row in rows)]
            stream.write("".join(line + end for line in lines))
        else:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + end for row in rows))
    return file


def glue_texts(file: Path) -> list[str]:
    return read_glue_file(file, get_task("sst2"))["sentence"]


def lra_texts(file: Path) -> list[str]:
    rows = lra.read_rows(lra.TASKS["text"], str(file))
    return [bytes((ids - lra.FIRST).astype("uint8")).decode() for (ids,), _ in rows]


def language_model_texts(file: Path) -> list[str]:
    return list(TextSource(str(file), None, "train").documents())


READERS = {"sentence": glue_texts, "text": lra_texts}


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl", ".parquet", ".TSV"])
@pytest.mark.parametrize(("mark", "end"), [(False, "\n"), (True, "\n"), (True, "\r\n")])
def test_every_script_reads_the_same_texts_from_every_format(suffix, mark, end, tmp_path):
    labels = [number % 2 for number in range(len(TEXTS))]
    for column, read in READERS.items():
        file = write_table(tmp_path, suffix.lower(), {column: TEXTS, "label": labels}, mark, end)
        assert read(file.rename(file.with_suffix(suffix))) == TEXTS
    file = write_table(tmp_path, suffix.lower(), {"text": TEXTS, "label": labels}, mark, end)
    assert language_model_texts(file) == TEXTS


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_blank_line_of_a_single_column_is_an_empty_text(suffix, tmp_path):
    file = tmp_path / f"test{suffix}"
    for end in ("\n", "\r\n"):
        file.write_text(end.join(["sentence", "good film", "", "bad film", "", ""]), newline="")
        rows = read_glue_file(file, get_task("sst2"), labelled=False)["sentence"]
        assert rows == ["good film", "", "bad film", ""]
    file.write_text("text\ngood film\n\nbad film\n")
    assert language_model_texts(file) == ["good film", "", "bad film"]


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".tsv", "sentence\tlabel\na\t1\n\nb\t0\n", r"table\.tsv.*line 3: blank, expected 2 \(sentence, label\)"),
        (".csv", "sentence,label\na,1\n\nb,0\n", r"table\.csv.*line 3: blank, expected 2 \(sentence, label\)"),
        (".jsonl", '{"sentence": "a", "label": 1}\n\n', r"table\.jsonl.*line 2: blank, expected one JSON object"),
        (".csv", 'sentence,label\n"a\nb",1\nc\n', r"line 4: 1 fields, expected 2 \(sentence, label\)"),
        (".csv", 'sentence,label\n"a" b,1\n', r"line 2: expected UTF-8 csv with a header, got"),
        (".tsv", "sentence\tsentence\na\tb\n", r"line 1: the column 'sentence' stands there twice"),
        (".tsv", "sentence\tlabel\na\t\n", r"line 2, column 'label': unknown label ''"),
        (".jsonl", '{"sentence": "a", "label": null}\n', r"line 1, column 'label': unknown label None"),
        (
            ".jsonl",
            '{"sentence": "\\ud800", "label": 1}\n',
            r"line 1: expected one JSON object a line, got .*surrogates",
        ),
    ],
)
def test_a_row_that_is_not_whole_is_named(suffix, text, expected, tmp_path):
    file = tmp_path / f"table{suffix}"
    file.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_glue_file(file, get_task("sst2"))


def test_breaks_inside_of_quotes_stay_as_written(tmp_path):
    file = tmp_path / "table.csv"
    file.write_bytes(b'text,label\r\n"a\r\nb\nc\rd",1\r\n"say ""x""",0\r\n')
    rows = list(read_table(file))
    assert rows == [
        ("line 2", {"text": "a\r\nb\nc\rd", "label": "1"}),
        ("line 5", {"text": 'say "x"', "label": "0"}),
    ]


def test_a_tsv_has_no_quotes_and_may_have_no_header(tmp_path):
    file = tmp_path / "table.tsv"
    file.write_text('1\t"a\n0\tb"\n2\n')
    rows = list(read_table(file, lambda first: ("label", "text") if first[0].isdecimal() else None))
    assert rows[:2] == [("line 1", {"label": "1", "text": '"a'}), ("line 2", {"label": "0", "text": 'b"'})]
    assert rows[2][0] == "line 3"
    assert isinstance(rows[2][1], BrokenRow)


def test_lines_keep_everything_but_their_end(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffa \n\r\n b\r\r\nc\x0bd\x85e".encode())
    assert list(read_lines(file)) == [("line 1", "a "), ("line 2", ""), ("line 3", " b\r"), ("line 4", "c\x0bd\x85e")]
    documents = list(TextSource(str(file), None, "train", document_start="^ b").documents())
    assert documents == ["a \n\n", " b\nc\x0bd\x85e\n"]


@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".csv", ".jsonl"])
def test_other_encodings_are_refused_with_their_line(suffix, tmp_path):
    file = tmp_path / f"table{suffix}"
    file.write_bytes(b'{"text": "a"}\nna\xefve\n')
    with pytest.raises(ValueError, match=rf"table\{suffix}, line 2: expected UTF-8 text"):
        list(read_lines(file) if suffix == ".txt" else read_table(file))


def test_the_limit_of_the_csv_module_stays_that_of_the_process(tmp_path):
    limit = csv.field_size_limit()
    rows = read_table(write_table(tmp_path, ".csv", {"text": ["x" * 300_000, "y"], "label": [0, 1]}))
    assert len(next(rows)[1]["text"]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("value", [1, "1", 1.0, "1.0", "yes"])
def test_a_class_is_given_by_number_or_name(value):
    assert parse_class(value, ("no", "yes")) == 1


@pytest.mark.parametrize("value", [2, -1, True, None, "", "²", 0.5, "Yes", float("nan")])
def test_anything_else_is_no_class(value):
    with pytest.raises(ValueError, match=r"unknown label .*, expected one of no \(0\), yes \(1\)"):
        parse_class(value, ("no", "yes"))


def test_a_file_is_checked_with_the_argument_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--train_file .*none\.tsv: no such file"):
        check_file(tmp_path / "none.tsv", argument="train_file")
    with pytest.raises(ValueError, match=r"--train_file a\.doc: unknown extension, expected one of \.tsv, \.csv"):
        check_file("a.doc", argument="train_file")
