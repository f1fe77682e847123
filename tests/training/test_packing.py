"""Packing: no token is lost, no document sees another, and a resumed run sees the same rows."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, LlamaConfig, OPTConfig

from transnormer_hf import TransNormerConfig
from transnormer_hf.training import packing
from transnormer_hf.training.packing import (
    IGNORED,
    WIKITEXT_TITLE,
    Masking,
    PackedRows,
    PackedStream,
    Packing,
    TextSource,
    count_words,
    encode_documents,
    join_lines,
    keeps_sequences_apart,
)

END, PAD, CLS, SEP, MASK = 0, 1, 2, 3, 4
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 32}
TOKENS = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END}


def documents(seed: int, number: int = 7, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 32, size=rng.integers(0, longest)).tolist() for _ in range(number)]


def pieces(row) -> list[slice]:
    """The pieces of a packed row, by where positions restart."""
    starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["position_ids"])]
    return [slice(start, end) for start, end in itertools.pairwise(starts)]


# ---- Text ----


def test_lines_become_articles_at_their_titles(articles):
    found = list(join_lines(articles.splitlines(keepends=True), WIKITEXT_TITLE))
    assert len(found) == 6
    assert "".join(found) == articles
    assert all(" = = Food = = \n" in article for article in found)


def test_what_stands_before_the_first_title_is_kept():
    assert list(join_lines(["a", "b\n", " = T = ", "c"], WIKITEXT_TITLE)) == ["a\nb\n", " = T = \nc\n"]


def test_words_are_counted_as_in_published_perplexities():
    assert count_words(" = A title = \n \n some words . \n") == 4 + 3 + 3


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(suffix, tmp_path, articles):
    from datasets import Dataset

    file = tmp_path / f"text{suffix}"
    expected = list(join_lines(articles.splitlines(), WIKITEXT_TITLE))
    table = Dataset.from_dict({"text": expected})
    if suffix == ".txt":
        file.write_text(articles)
    elif suffix == ".jsonl":
        table.to_json(file)
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_parquet(file)
    start = WIKITEXT_TITLE if suffix == ".txt" else None
    assert list(TextSource(str(file), None, "train", document_start=start).documents()) == expected


def test_a_missing_column_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "a"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: no text in column 'text', found content; .*--text"):
        list(TextSource(str(file), None, "train").documents())


@pytest.mark.parametrize("value", ["null", "7", '["a"]'])
def test_a_value_that_is_no_text_is_named(value, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r"file rows\.jsonl, line 2, column 'text': expected a text, got"):
        list(TextSource(str(file), None, "train").documents())


def test_a_hub_out_of_reach_is_said_with_what_works_without_it():
    source = TextSource(None, ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", streaming=True)
    with pytest.raises(ConnectionError, match=r"split test of Salesforce/wikitext \(wikitext-2-raw-v1\).*--train_file"):
        list(source.documents())


def test_tokens_give_back_the_text(byte_tokenizer, articles):
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    texts = list(join_lines(articles.splitlines(), WIKITEXT_TITLE))
    encoded = list(encode_documents(tokenizer, texts, tokenizer.eos_token_id, batch_size=4))
    assert [tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in encoded] == texts


def test_where_a_tokenizer_drops_line_ends_the_end_token_stands_for_them():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 5, "b": 6, "<unk>": 7}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert list(encode_documents(tokenizer, ["a b \n \n b\n", "a"], line_end=END)) == [[5, 6, 0, 0, 6, 0], [5]]


# ---- Rows ----


@pytest.mark.parametrize("length", [1, 4, 8, 64])
@pytest.mark.parametrize("together", [True, False])
def test_every_causal_label_follows_its_input_and_none_is_lost(length, together):
    docs = [[END, *document, END] for document in documents(seed=length)]
    rows = list(Packing(length, True, PAD, together=together).rows(docs))
    pairs = [
        (int(token), int(label))
        for row in rows
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != IGNORED
    ]
    assert pairs == [pair for document in docs for pair in itertools.pairwise(document)]
    assert all(values.shape == (length,) and values.dtype == np.int64 for row in rows for values in row.values())


def test_causal_windows_of_one_text_do_not_overlap_and_follow_each_other():
    text = [END, *range(5, 25)]
    rows = list(Packing(8, True, PAD).rows([text]))
    assert [row["input_ids"][0] for row in rows] == [END, 12, 20]  # the token before the first label of the window
    assert [row["labels"][0] for row in rows] == [5, 13, 21]
    assert (rows[-1]["labels"] != IGNORED).sum() == 20 - 16


@pytest.mark.parametrize("length", [3, 8, 64])
@pytest.mark.parametrize("together", [True, False])
def test_masked_pieces_stand_between_special_tokens_and_none_is_lost(length, together):
    docs = documents(seed=length)
    rows = list(Packing(length, False, PAD, (CLS,), (SEP,), together).rows(docs))
    kept = [int(token) for row in rows for token in row["labels"] if token != IGNORED]
    assert kept == [token for document in docs for token in document]
    for row in rows:
        special = row["labels"] == IGNORED
        assert set(row["input_ids"][special]) <= {CLS, SEP, PAD}
        parts = pieces(row) if together else [slice(0, row["attention_mask"].sum())]
        for part in parts:
            inside = row["input_ids"][part]
            assert (inside[0], inside[-1]) == (CLS, SEP) or set(inside) == {PAD}


def test_rows_that_are_not_shared_hold_one_piece_and_a_mask():
    rows = list(Packing(8, True, PAD, together=False).rows([[END, 5, 6, END], [END, 7, END]]))
    assert [row["attention_mask"].tolist() for row in rows] == [[1] * 3 + [0] * 5, [1] * 2 + [0] * 6]
    assert all("position_ids" not in row for row in rows)


CAUSAL_CONFIGS = {
    "t1": TransNormerConfig(**SMALL, **TOKENS, variant="t1", block_size=4, is_causal=True),
    "t2": TransNormerConfig(**SMALL, **TOKENS, variant="t2", block_size=4, is_causal=True),
    "llama": LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", [*CAUSAL_CONFIGS, "masked"])
def test_a_document_in_a_row_is_treated_as_if_it_were_alone(name):
    if name == "masked":
        rule = Packing(24, False, PAD, (CLS,), (SEP,))
        model = AutoModelForMaskedLM.from_config(TransNormerConfig(**SMALL, **TOKENS, block_size=4)).eval()
    else:
        rule = Packing(24, True, PAD)
        model = AutoModelForCausalLM.from_config(CAUSAL_CONFIGS[name]).eval()
        model.config.use_cache = False  # as the Trainer does
    rows = list(rule.rows([[END, *document, END] for document in documents(seed=3)]))
    batch = {key: torch.tensor(np.stack([row[key] for row in rows])) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        packed = model(**batch).logits  # (rows, 24, vocab_size)
        for number, row in enumerate(rows):
            for part in pieces(row):
                alone = model(input_ids=batch["input_ids"][number : number + 1, part]).logits[0]
                torch.testing.assert_close(packed[number, part], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "auto_class", "expected"),
    [
        (CAUSAL_CONFIGS["t1"], AutoModelForCausalLM, True),
        (CAUSAL_CONFIGS["llama"], AutoModelForCausalLM, True),
        (TransNormerConfig(**SMALL, **TOKENS), AutoModelForMaskedLM, True),
        (BertConfig(**SMALL, **TOKENS), AutoModelForMaskedLM, False),
        (OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=32, num_attention_heads=2), AutoModelForCausalLM, False),
    ],
    ids=["t1", "llama", "masked", "bert", "opt"],
)
def test_models_that_look_across_documents_are_found_out(config, auto_class, expected):
    model = auto_class.from_config(config).train()
    had_cache = getattr(model.config, "use_cache", None)
    assert keeps_sequences_apart(model) is expected
    assert model.training
    assert getattr(model.config, "use_cache", None) == had_cache


# ---- Masks ----


def masked_rows(number: int, length: int = 64, **changes):
    masking = Masking(MASK, vocab_size=32, **changes)
    rng = np.random.default_rng(1)
    rows = [{"input_ids": ids, "labels": ids} for ids in rng.integers(5, 32, size=(number, length))]
    return masking, rows


def test_masks_follow_the_shares_of_bert():
    masking, rows = masked_rows(400, probability=0.25)
    masked = [masking(row, 0, number) for number, row in enumerate(rows)]
    inputs, outputs, labels = (
        np.concatenate([row[name] for row in source])
        for source, name in ((rows, "input_ids"), (masked, "input_ids"), (masked, "labels"))
    )
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.25, abs=0.01)
    assert (labels[chosen] == inputs[chosen]).all()
    assert (outputs[~chosen] == inputs[~chosen]).all()
    assert (outputs[chosen] == MASK).mean() == pytest.approx(0.8 + 0.1 / 32, abs=0.02)
    assert (outputs[chosen] == inputs[chosen]).mean() == pytest.approx(0.1 + 0.1 / 32, abs=0.02)


def test_masks_depend_on_seed_epoch_and_row_only():
    masking, rows = masked_rows(2)
    first = masking(rows[0], 0, 0)["input_ids"]
    assert (first == masking(rows[0], 0, 0)["input_ids"]).all()
    for epoch, number, seed in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert (first != Masking(MASK, 32, seed=seed)(rows[0], epoch, number)["input_ids"]).any()


def masks_by_epoch(rows: PackedRows, epochs: list[int], **options) -> list[list[int]]:
    """Which columns each epoch masks, with a loader that lives through all of them."""
    loader, masks = DataLoader(rows, batch_size=2, **options), []
    for epoch in epochs:
        rows.set_epoch(epoch)  # what EpochSetter does
        masks.append([(batch["labels"] != IGNORED).nonzero().flatten().tolist() for batch in loader])
    return masks


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "forkserver"},
    ],
)
def test_workers_mask_anew_in_every_epoch_as_one_process_does(options):
    masking, plain = masked_rows(7)
    expected = masks_by_epoch(PackedRows(plain, masking), [0, 1, 2])
    assert len({str(masks) for masks in expected}) == 3
    assert masks_by_epoch(PackedRows(plain, masking), [0, 1, 2], **options) == expected
    assert masks_by_epoch(PackedRows(plain, masking), [2, 1], **options) == [expected[2], expected[1]]  # resumed


def test_rows_with_another_masking_have_an_epoch_of_their_own():
    masking, plain = masked_rows(2)
    train = PackedRows(plain, masking)
    other = train.with_masking(masking)
    train.set_epoch(3)
    assert (train[0]["labels"] != other[0]["labels"]).any()
    assert (other[0]["labels"] == PackedRows(plain, masking)[0]["labels"]).all()


def test_special_tokens_are_never_masked_and_a_short_row_has_a_label():
    row = {"input_ids": np.array([CLS, 9, SEP, PAD]), "labels": np.array([IGNORED, 9, IGNORED, IGNORED])}
    for number in range(20):
        masked = Masking(MASK, 32)(row, 0, number)
        assert masked["labels"].tolist() == row["labels"].tolist()
        assert masked["input_ids"][[0, 2, 3]].tolist() == [CLS, SEP, PAD]
    empty = {name: np.full(4, IGNORED) for name in ("input_ids", "labels")}
    assert (Masking(MASK, 32)(empty, 0, 0)["labels"] == IGNORED).all()


# ---- Data sets ----


def test_a_stream_holds_the_rows_that_memory_holds_in_another_order():
    rows = Packing(8, True, PAD).rows
    docs = [[END, *document, END] for document in documents(seed=5, number=12)]
    memory = PackedRows(rows(docs))
    expected = sorted(tuple(memory[number]["input_ids"]) for number in range(len(memory)))

    def read(**options) -> list[tuple]:
        stream = PackedStream(lambda: rows(docs), **options)
        return [tuple(row["input_ids"]) for row in itertools.islice(stream, 2 * len(memory))]

    assert sorted(read()) == sorted(2 * expected)
    shuffled = read(buffer_size=5, seed=1)
    first, second = shuffled[: len(memory)], shuffled[len(memory) :]
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert shuffled == read(buffer_size=5, seed=1)
    assert shuffled != read(buffer_size=5, seed=2)


def test_a_stream_without_text_says_so():
    with pytest.raises(ValueError, match="The stream holds no text"):
        next(iter(PackedStream(lambda: iter(()))))


def test_the_workers_of_a_stream_share_its_rows(monkeypatch):
    docs = [[END, *document, END] for document in documents(seed=5, number=12)]
    rows = [tuple(row["labels"]) for row in Packing(8, True, PAD).rows(docs)]
    found = []
    for worker in range(2):
        monkeypatch.setattr(packing, "get_worker_info", lambda worker=worker: SimpleNamespace(num_workers=2, id=worker))
        stream = PackedStream(lambda: Packing(8, True, PAD).rows(docs), buffer_size=3)
        share = len(range(worker, len(rows), 2))
        found += [tuple(row["labels"]) for row in itertools.islice(stream, share)]
    assert sorted(found) == sorted(rows)
