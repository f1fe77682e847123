"""Long-Range Arena: the published models, every form in which the data come, and the dual encoder."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from transnormer_hf.model.modeling_transnormer import TransNormerBatchNorm
from transnormer_hf.tasks.listops import ListOpsLimits
from transnormer_hf.tasks.lra import (
    CLS,
    FIRST,
    LISTOPS_IDS,
    PAD,
    TASKS,
    DualEncoder,
    LraRows,
    collate,
    encode_listops,
    encode_pixels,
    encode_text,
    generate_rows,
    get_task,
    read_rows,
)

# batch, hidden size, layers, feed-forward width, learning rate, length, epochs, warm-up, dropout, pooling
PUBLISHED = {
    "image": (200, 128, 12, 256, 1e-3, 1024, 200, 175, 0.2, "mean"),
    "text": (64, 128, 4, 512, 1e-3, 4096, 32, 80, 0.0, "mean"),
    "listops": (128, 128, 4, 512, 1e-4, 2048, 40, 1000, 0.0, "mean"),
    "pathfinder": (128, 128, 4, 128, 5e-4, 1024, 200, 312, 0.0, "last"),
    "retrieval": (64, 128, 4, 512, 1e-3, 4000, 20, 800, 0.0, "mean"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_task_has_the_published_hyperparameters(name):
    task, training = TASKS[name], TASKS[name].training_defaults()
    config = task.config("t2")
    found = (
        training["per_device_train_batch_size"],
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        training["learning_rate"],
        training["max_length"],
        training["num_train_epochs"],
        training["warmup_steps"],
        config.hidden_dropout_prob,
        config.pooling,
    )
    assert found == PUBLISHED[name]
    assert (training["weight_decay"], training["lr_scheduler_type"], training["seed"]) == (0.0, "cosine", 2222)
    assert (config.norm_type, config.attention_norm_type, config.final_norm) == ("batch", "batch", "batch")
    assert (config.feed_forward, config.hidden_act, config.norm_placement) == ("ffn", "gelu", "pre")
    assert (config.position_embedding, config.block_size) == ("sinusoidal", 64)


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"--task_name 'aan' is not a task of the Long-Range Arena: choose one of list"
    ):
        get_task("aan")


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_the_batch_norm_model_trains_and_survives_saving(variant, tmp_path):
    config = TASKS["listops"].config(variant, hidden_size=16, num_hidden_layers=2, intermediate_size=16)
    model = AutoModelForSequenceClassification.from_config(config)
    norms = [module for module in model.modules() if isinstance(module, TransNormerBatchNorm)]
    assert len(norms) == {"t1": 2 * 2 + 2 + 1, "t2": 2 * 2 + 1 + 1}[variant]  # T2's softmax block has no inner norm
    batch = collate([{"sequences": (np.arange(FIRST, FIRST + length),), "labels": 3} for length in (5, 15, 9)])
    for _ in range(3):
        model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = (each.eval()(**batch).logits for each in (model, loaded))
    torch.testing.assert_close(found, expected)
    assert norms[0].running_mean.abs().max() > 0


def test_batch_norm_runs_over_all_tokens():
    norm = TransNormerBatchNorm(4)
    output = norm(torch.randn(3, 5, 4) * 7 + 2)
    assert output.shape == (3, 5, 4)
    torch.testing.assert_close(output.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var((0, 1), correction=0), torch.ones(4), atol=1e-3, rtol=0)


# ---- Data ----


def test_texts_are_their_bytes():
    assert encode_text("aé").tolist() == [FIRST + 97, FIRST + 0xC3, FIRST + 0xA9]


def test_pixels_may_be_bytes_numbers_or_a_picture():
    pixels = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
    expected = (pixels.reshape(-1).astype(int) + FIRST).tolist()
    forms = [pixels, pixels.tobytes(), pixels.reshape(-1).tolist()]
    image = pytest.importorskip("PIL.Image")
    forms.append(image.fromarray(pixels))
    assert all(encode_pixels(form).tolist() == expected for form in forms)
    with pytest.raises(ValueError, match=r"row 3: expected grey values from 0 to 255, got \[256\]"):
        encode_pixels([256], "row 3")


def test_listops_ignores_the_brackets_of_the_original_release():
    expected = [LISTOPS_IDS[token] for token in ("[MAX", "2", "9", "]")]
    assert encode_listops("( ( ( [MAX 2 ) 9 ) ] )").tolist() == expected
    with pytest.raises(ValueError, match=r"row 1: '\[SUM' is not a token of ListOps, which has \[MIN"):
        encode_listops("[SUM 1 ]", "row 1")


LISTOPS_ROWS = [("[MIN 4 2 ]", 2), ("[SM 9 4 ]", 3)]


@pytest.mark.parametrize("form", ["arena.tsv", "original.tsv", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_every_form_of_listops_gives_the_same_rows(form, tmp_path):
    from datasets import Dataset

    file = tmp_path / form
    table = Dataset.from_dict({"source": [row[0] for row in LISTOPS_ROWS], "label": [row[1] for row in LISTOPS_ROWS]})
    if form == "arena.tsv":
        file.write_text("Source\tTarget\n" + "".join(f"{source}\t{label}\n" for source, label in LISTOPS_ROWS))
    elif form == "original.tsv":
        file.write_text("".join(f"{label}\t{source}\n" for source, label in LISTOPS_ROWS))
    else:
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[form.rpartition(".")[2]](file)
    rows = [(ids.tolist(), label) for (ids,), label in read_rows(TASKS["listops"], str(file))]
    assert rows == [(encode_listops(source).tolist(), label) for source, label in LISTOPS_ROWS]


def test_retrieval_reads_the_arena_file_and_json_lines(tmp_path):
    arena, lines = tmp_path / "new_aan_pairs.tsv", tmp_path / "rows.jsonl"
    arena.write_text("1.0\t12\t13\tfirst text\tsecond text\n")
    lines.write_text(json.dumps({"text1": "first text", "text2": "second text", "label": 1}) + "\n")
    for file in (arena, lines):
        ((sequences, label),) = read_rows(TASKS["retrieval"], str(file))
        assert [bytes((ids - FIRST).astype("uint8")).decode() for ids in sequences] == [
            "first text",
            "second text",
        ]
        assert label == 1


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("text", "a.jsonl", '{"label": 1}', r"a\.jsonl, line 1: no 'text'; Text needs text, label, found label"),
        ("text", "a.jsonl", '{"text": "a", "label": 2}', r"a\.jsonl, line 1: unknown label 2, expected 0 to 1"),
        ("text", "a.jsonl", '{"text": "a", "label": "²"}', r"a\.jsonl, line 1: unknown label '²', expected 0 to 1"),
        ("text", "a.jsonl", '{"text": 7, "label": 1}', r"a\.jsonl, line 1, column 'text': expected a text, got 7"),
        ("text", "a.jsonl", '{"text": "a", "label": 1}\n', r"a\.jsonl, line 2: blank, expected one JSON object"),
        ("image", "a.jsonl", '{"pixels": "", "label": 1}', r"a\.jsonl, line 1: expected grey values"),
        ("text", "a.tsv", "1\ttext\n0\tother", r"a\.tsv, line 2: no 'label'; Text needs text, label, found 1, text"),
        ("retrieval", "a.tsv", "1\ta\tb\n1\tc\td", r"a\.tsv, line 2: no 'text1'; Retrieval needs text1, text2, label"),
        ("retrieval", "a.tsv", "1\t2\t3\ta\tb\n1\tc", r"a\.tsv, line 2: 2 fields, expected 5 \(label, id1, id2, text1"),
        ("listops", "a.tsv", "3\t[SUM 1 2 ]", r"a\.tsv, line 1: '\[SUM' is not a token of ListOps"),
        ("listops", "a.tsv", "3\t[SM 1 2 ]\n\n4\t[SM 1 3 ]", r"a\.tsv, line 2: blank, expected 2 \(label, source\)"),
        ("listops", "a.tsv", "3\t( )", r"a\.tsv, line 1: '\( \)' is no ListOps sequence"),
    ],
)
def test_a_broken_row_is_named_with_what_was_expected(task, name, content, message, tmp_path):
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_rows(TASKS[task], str(tmp_path / name)))


@pytest.mark.parametrize("task", ["listops", "pathfinder"])
def test_each_generated_split_has_other_rows_than_the_next_seed_as_well(task):
    limits = ListOpsLimits(min_length=20, max_length=60)
    splits = ("train", "validation", "test")
    drawn = [
        [ids.tobytes() for (ids,), _ in generate_rows(TASKS[task], split, 4, seed, limits, 32)]
        for seed in (0, 1)
        for split in splits
    ]
    assert len({row for rows in drawn for row in rows}) == 4 * 6


def test_rows_are_cut_and_padded_and_may_begin_with_a_class_token():
    source = [((np.arange(FIRST, FIRST + length),), label) for length, label in ((3, 1), (9, 0))]
    batch = collate([LraRows(iter(source), 5, has_cls=True)[number] for number in range(2)])
    assert batch["input_ids"].tolist() == [[CLS, 2, 3, 4, PAD], [CLS, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [1, 0]


# ---- Dual encoder ----


@pytest.mark.parametrize("kind", ["t1", "bert"])
def test_the_dual_encoder_treats_both_texts_alike_and_ignores_padding(kind):
    task = TASKS["retrieval"]
    small = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = (
        BertConfig(**small, num_attention_heads=2, **task.config_fields())
        if kind == "bert"
        else task.config("t1", **small)
    )
    model = DualEncoder(config, getattr(config, "pooling", "first")).eval()
    first, second = encode_text("a text"), encode_text("another, longer text")
    rows = [{"sequences": pair, "labels": 1} for pair in ((first, second), (second, first), (first, first))]
    with torch.no_grad():
        whole = model(**collate(rows))
        alone = model(**collate(rows[2:]))
    torch.testing.assert_close(whole.logits[2], alone.logits[0], atol=1e-5, rtol=1e-4)
    assert (whole.logits[0] - whole.logits[1]).abs().max() > 1e-6  # u - v tells them apart
    assert whole.loss == pytest.approx(float(torch.nn.functional.cross_entropy(whole.logits, torch.ones(3).long())))
