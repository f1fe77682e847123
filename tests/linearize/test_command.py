"""`scripts/linearize.py` on tiny models in a folder: from the source to a TransNormer that loads anywhere."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from transnormer_hf import TransNormerConfig
from transnormer_hf.hub.push import plan_upload
from transnormer_hf.hub.remote_code import check_remote_code
from transnormer_hf.linearize import command
from transnormer_hf.linearize.command import hold_out, linearize, read_rows

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
SIZES |= {"initializer_range": 0.4, "max_position_embeddings": 32, "pad_token_id": 0}
SOURCES = {
    "bert": lambda: BertModel(BertConfig(**SIZES, intermediate_size=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, bos_token_id=0, eos_token_id=0)),
}


@pytest.fixture
def make_source(byte_tokenizer, tmp_path):
    """The folder of a tiny source, with a tokenizer."""

    def make(name: str, model=None):
        torch.manual_seed(0)
        folder = tmp_path / f"tiny-{name}"
        (SOURCES[name]() if model is None else model).save_pretrained(folder)
        AutoTokenizer.from_pretrained(byte_tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def arguments(make_source, articles, tmp_path):
    """Command line of a short run; keyword arguments replace or (None) remove options."""
    text = tmp_path / "texts.txt"
    text.write_text(articles)

    def build(source="bert", **changes) -> list[str]:
        options = {
            "model_name_or_path": make_source(source) if isinstance(source, str) else source,
            "train_file": text,
            "output_dir": tmp_path / "out",
            "max_seq_length": 24,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "eval_steps": 4,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        options |= changes
        return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]

    return build


@pytest.mark.parametrize("source", ["bert", "gpt2", "llama"])
def test_a_run_ends_with_a_folder_that_loads_as_any_other(source, arguments, tmp_path):
    results = linearize(arguments(source, joint_steps=4, num_linear_layers=1, block_size=32))
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()) == results
    assert not list(out.glob("*.pt"))
    assert not list(tmp_path.glob(".out*"))

    first, second = results["attention"]["0"], results["attention"]["1"]
    assert set(first) == {"copied"}
    assert first["copied"] < 1e-8  # softmax in blocks that no text exceeds
    assert second["trained"] < second["scaled"]
    whole = results["whole"]
    assert set(whole) == {"teacher", "copied", "scaled", "trained", "joint"}
    assert whole["teacher"]["hidden_states"] == 0
    assert ("perplexity" in whole["joint"]) == (source != "bert")
    assert results["steps"] == {"trained": 12, "joint": 4}

    loaded = check_remote_code(out)  # in a process without the package
    assert loaded["class"] == ("TransNormerModel" if source == "bert" else "TransNormerForCausalLM")
    assert loaded["tokenizer"] is not None
    model = (AutoModel if source == "bert" else AutoModelForCausalLM).from_pretrained(out, trust_remote_code=True)
    assert model.config.layer_types == ["chunked_attention", "linear_attention"]
    text = AutoTokenizer.from_pretrained(out)("A cat sleeps .", return_tensors="pt")
    output = model(**{name: text[name] for name in ("input_ids", "attention_mask")})
    assert output[0].isfinite().all()


def test_the_card_says_what_was_made_of_what_and_measured(arguments, make_source, tmp_path):
    source = make_source("bert")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    results = linearize(arguments(source))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model is None  # a folder is no name on the Hub
    assert {"custom_code", "transnormer_hf"} <= set(card.data.tags)
    assert "the licence of tiny-bert, mit, holds" in card.text
    assert "file texts.txt" in card.text
    assert str(tmp_path) not in card.text
    for figure in (
        results["whole"]["trained"]["hidden_states"],
        *results["attention"]["1"].values(),
        results["attention"]["0"]["copied"],
    ):
        assert f"{figure:.4g}" in card.text
    plan = plan_upload(tmp_path / "out", "someone/tiny")  # nothing is missing, no secrets, valid metadata
    assert {"README.md", "all_results.json", "tokenizer.json"} <= set(plan.files)
    assert not plan.left_out


def test_a_classifier_stays_one(arguments, make_source, tmp_path):
    labels = {0: "rotten", 1: "fresh"}
    classifier = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=32, id2label=labels))
    linearize(arguments(make_source("bert", classifier), layer_types="full_attention,chunked_attention"))
    config = TransNormerConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["TransNormerForSequenceClassification"]
    assert config.id2label == labels


def test_a_source_can_be_loaded_without_its_head(arguments, tmp_path):
    linearize(arguments("gpt2", architecture="GPT2Model", max_steps=0))
    assert TransNormerConfig.from_pretrained(tmp_path / "out").architectures == ["TransNormerModel"]


def test_layers_may_keep_softmax_and_t1_has_none_that_is_exact(arguments, tmp_path):
    results = linearize(arguments(softmax_layers="1", variant="t1", block_size=32))
    assert set(results["attention"]["0"]) == {"copied", "scaled", "trained"}  # a relu block
    assert set(results["attention"]["1"]) == {"copied"}
    config = TransNormerConfig.from_pretrained(tmp_path / "out")
    assert (config.layer_types, config.variant) == (["chunked_attention", "full_attention"], "t1")


def test_positions_beyond_the_source_s_are_measured_on_a_long_text(arguments, make_source, tmp_path):
    source = make_source("bert")
    AutoTokenizer.from_pretrained(source, model_max_length=32).save_pretrained(source)
    options = {"max_position_embeddings": 100, "position_extension": "interpolate"}
    results = linearize(arguments(source, **options, max_steps=2))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 100
    long = results["long"]
    assert 32 < long["tokens"] <= 100
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"On one text of {long['tokens']} tokens" in card
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model(torch.arange(100)[None] % 300).last_hidden_state.shape == (1, 100, 16)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "first"),  # two: that of a model without
    ],
)
def test_a_sentence_encoder_keeps_its_other_modules(pooling, expected, arguments, make_source, tmp_path):
    source = make_source("bert")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("not a module")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}, {"path": str(Path("..", "outside"))}]
    (source / "modules.json").write_text(json.dumps(modules))
    linearize(arguments(source, max_steps=0))
    out = tmp_path / "out"
    assert (out / "modules.json").read_text() == (source / "modules.json").read_text()
    assert (out / "1_Pooling" / "config.json").exists()
    assert not (out / "outside").exists()
    assert TransNormerConfig.from_pretrained(out).pooling == expected  # of a classification head to come


# ---- Resume ----


@pytest.mark.parametrize("calls", [3, 8, 16])  # in the first steps, after a checkpoint, in joint distillation
def test_an_interrupted_run_goes_on_and_ends_with_the_same_model(calls, arguments, tmp_path, monkeypatch):
    options = {"joint_steps": 4, "eval_steps": 2}
    monkeypatch.setattr(command, "SCALE_TOKENS", 1)  # takes one batch
    expected = linearize(arguments(output_dir=tmp_path / "whole", **options))
    batch, left = command.TextBatches.batch, calls

    def interrupted(self, step):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(command.TextBatches, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            linearize(arguments(**options))
    results = linearize(arguments(**options))
    for key in ("attention", "whole", "steps"):
        assert results[key] == expected[key]
    ours, theirs = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---- Refusals ----


def test_nothing_that_lies_there_is_overwritten(arguments, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letters.txt").write_text("not a model")
    with pytest.raises(ValueError, match=r"--output_dir .*out holds letters\.txt, and nothing is overwritten"):
        linearize(arguments())
    assert [path.name for path in out.iterdir()] == ["letters.txt"]


def test_a_finished_folder_is_not_overwritten_either(arguments, tmp_path):
    linearize(arguments(max_steps=0))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        linearize(arguments(max_steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": None}, "--train_file None and --dataset_name None: give one"),
        ({"dataset_name": "a/b"}, "--dataset_name a/b: give one"),
        ({"train_file": "missing.txt"}, "--train_file missing.txt: no such file"),
        ({"train_file": "texts.pdf"}, r"--train_file texts.pdf: unknown extension, expected one of \.txt"),
        ({"max_steps": -1}, "--max_steps -1 must be at least 0"),
        ({"joint_steps": -1}, "--joint_steps -1 must be at least 0"),
        ({"max_minutes": 0}, "--max_minutes 0.0 must be more than 0"),
        ({"learning_rate": "nan"}, "--learning_rate nan must be more than 0"),
        ({"max_seq_length": 4}, "--max_seq_length 4 must be at least 8"),
        ({"max_seq_length": 64}, "--max_seq_length 64 is more than the 32 tokens that the model takes"),
        ({"softmax_layers": "a"}, "--softmax_layers 'a' must be whole numbers with commas between them"),
        ({"softmax_layers": "2"}, "softmax_layers holds 2; the source's layers are 0 to 1"),
        ({"layer_types": "linear_attention"}, "--layer_types linear_attention names 1 layers, and .* has 2"),
        ({"num_linear_layers": 3}, "num_linear_layers=3 must be from 0 to 2"),
        ({"max_position_embeddings": 64}, "choose position_extension='interpolate' or 'tile'"),
        ({"model_name_or_path": "nowhere"}, "nowhere: no tokenizer could be loaded"),
        ({"model_name_or_path": "nowhere", "tokenizer_name": "source"}, "nowhere: no model could be loaded"),
        ({"architecture": "NoSuchModel"}, "'NoSuchModel' is no model of transformers: give --architecture"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, message, arguments, make_source, tmp_path):
    if changes.get("tokenizer_name"):
        changes = {**changes, "tokenizer_name": make_source("bert")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        linearize(arguments(**changes))
    assert not (tmp_path / "out").exists()


def test_a_file_without_two_texts_is_refused(arguments, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("One text.\n\n \n")
    with pytest.raises(ValueError, match="Got 1 texts: there must be at least 2"):
        linearize(arguments(train_file=file))


# ---- Texts ----


def test_rows_have_the_tokenizer_s_frame_and_lose_no_token(byte_tokenizer):
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    texts = ["A cat.", "The owl is an animal, and every owl sleeps for five hours."]
    bare = [tokenizer(text)["input_ids"] for text in texts]
    assert list(read_rows(texts, tokenizer, 1000)) == bare
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <mask> <mask>", special_tokens=[("<|endoftext|>", 0), ("<mask>", 1)]
    )
    rows = list(read_rows(texts, tokenizer, 10))
    assert max(map(len, rows)) == 10
    assert all((row[0], row[-2:]) == (0, [1, 1]) for row in rows)
    assert [token for row in rows for token in row[1:-2]] == [token for row in bare for token in row]


@pytest.mark.parametrize(("texts", "number", "expected"), [(2, 10, 1), (100, 256, 10), (1000, 10, 10)])
def test_texts_are_held_out_evenly_and_no_more_than_a_tenth(texts, number, expected):
    everything = [str(place) for place in range(texts)]
    train, held_out = hold_out(everything, number)
    assert len(held_out) == expected
    assert sorted(train + held_out, key=int) == everything
    gaps = {int(after) - int(before) for before, after in pairwise(held_out)}
    assert len(gaps) <= 1
