"""The GLUE script: its arguments, and whole runs on a task that a tiny model can learn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import run_glue

WORDS = {"positive": ["good", "fine", "great"], "negative": ["bad", "poor", "awful"]}
TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TINY_TRANSNORMER = {"model_type": "transnormer_hf", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def sentence(label: str, number: int) -> str:
    return f"a {WORDS[label][number % 3]} film number {number % 7} indeed"


def write_sst2(folder: Path, rows: int = 48) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    labels = ["negative", "positive"]
    lines = [f"{sentence(labels[number % 2], number)} \t{number % 2}" for number in range(rows)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines[:16], ""]))
    test = [f"{number}\t{sentence('positive', number)}" for number in range(5)]
    (folder / "test.tsv").write_text("\n".join(["index\tsentence", *test, ""]))
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [sentence(label, number) for label in WORDS for number in range(21)]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sst2(tmp_path_factory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("data") / "SST-2")


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (("bert", TINY_BERT), ("transnormer", TINY_TRANSNORMER)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def arguments(configs, tokenizer_dir, sst2, tmp_path):
    """Command line of a short run from scratch; keyword arguments replace or (None) remove options."""

    def build(*flags: str, **changes) -> list[str]:
        options = {
            "task_name": "sst2",
            "data_dir": sst2,
            "config_name": configs["bert"],
            "tokenizer_name": tokenizer_dir,
            "output_dir": tmp_path / "out",
            "max_seq_length": 32,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        options |= changes
        pairs = ((f"--{name}", str(value)) for name, value in options.items() if value is not None)
        return [*flags, *(part for pair in pairs for part in pair)]

    return build


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    from transnormer_hf.tasks import glue

    monkeypatch.setattr(glue, "_hub_is_reachable", lambda: False)


# ---- Whole runs ----


def test_a_run_trains_evaluates_predicts_and_reloads(arguments, configs, tmp_path):
    flags = ("--do_train", "--do_eval", "--do_predict")
    results = run_glue.main(arguments(*flags, config_name=configs["transnormer"], num_train_epochs=10))
    out = tmp_path / "out"
    assert results["eval_accuracy"] == 1.0
    assert json.loads((out / "all_results.json").read_text()) == results
    assert {"train_loss", "eval_loss", "train_samples", "eval_samples", "seed", "parameters"} <= set(results)
    assert (out / "SST-2.tsv").read_text() == "index\tprediction\n" + "".join(f"{index}\t1\n" for index in range(5))

    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        logits = model(**tokenizer(sentence("negative", 4), return_tensors="pt", return_token_type_ids=False)).logits
    assert model.config.id2label[int(logits.argmax())] == "negative"
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    card = (out / "README.md").read_text()
    assert "TransNormer T2" in card
    assert "custom_code" in card
    assert str(tmp_path) not in card


def test_a_second_call_goes_on_from_the_last_whole_checkpoint(arguments, tmp_path, caplog):
    out = tmp_path / "out"
    run_glue.main(arguments("--do_train", save_strategy="steps", save_steps=2, max_steps=4))
    (out / "checkpoint-9").mkdir()  # killed while it was being written
    with caplog.at_level("INFO"):
        run_glue.main(arguments("--do_train", save_strategy="steps", save_steps=2, max_steps=6))
    assert f"Going on from {out / 'checkpoint-4'}" in caplog.text
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6


def test_overwriting_starts_anew_and_removes_stale_checkpoints(arguments, tmp_path):
    out = tmp_path / "out"
    run_glue.main(arguments("--do_train", save_strategy="steps", save_steps=4, max_steps=4))
    run_glue.main(arguments("--do_train", "--overwrite_output_dir", save_strategy="steps", save_steps=2, max_steps=2))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_seeds_are_summarised_by_mean_and_deviation(arguments, tmp_path):
    results = run_glue.main(arguments("--do_train", "--do_eval", seeds="1,2", save_strategy="no", max_steps=1))
    singles = [json.loads((tmp_path / "out" / f"seed_{seed}" / "all_results.json").read_text()) for seed in (1, 2)]
    losses = [single["eval_loss"] for single in singles]
    assert [single["seed"] for single in singles] == [1, 2]
    assert losses[0] != losses[1]
    assert results["eval_loss"] == pytest.approx(sum(losses) / 2)
    assert results["eval_loss_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert results["eval_loss_values"] == losses
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results


def test_the_same_seed_gives_the_same_model(arguments, tmp_path):
    losses = [
        run_glue.main(arguments("--do_train", "--do_eval", seed=7, max_steps=2, output_dir=tmp_path / name))[
            "eval_loss"
        ]
        for name in ("a", "b")
    ]
    assert losses[0] == losses[1]


def test_training_stops_early_and_keeps_the_best_model(arguments, tmp_path):
    results = run_glue.main(
        arguments(
            "--do_train",
            "--do_eval",
            "--load_best_model_at_end",
            early_stopping_patience=2,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            learning_rate=0,
            num_train_epochs=3,
        )
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # the first evaluation is the best one: nothing is learned at rate 0
    assert state["best_metric"] == results["eval_accuracy"]
    assert "chosen by accuracy" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_lora_trains_and_saves_adapters_and_the_head(arguments, configs, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    run_glue.main(
        arguments("--do_train", config_name=configs["transnormer"], max_steps=1, output_dir=base, save_strategy="no")
    )
    from_base = arguments(
        "--do_train",
        "--do_eval",
        "--use_lora",
        model_name_or_path=base,
        config_name=None,
        tokenizer_name=None,
        lora_r=2,
        num_train_epochs=3,
    )
    results = run_glue.main(from_base)
    assert results["trainable_parameters"] < results["parameters"] / 2

    from peft import AutoPeftModelForSequenceClassification
    from safetensors.torch import load_file

    names = load_file(out / "adapter_model.safetensors")
    assert any("lora_A" in name for name in names)
    assert any("classifier" in name for name in names)
    assert "peft" in (out / "README.md").read_text()
    model = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=2)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_a_checkpoint_keeps_its_own_label_order(arguments, tokenizer_dir, tmp_path):
    out, swapped = tmp_path / "out", tmp_path / "swapped"
    expected = run_glue.main(arguments("--do_train", "--do_eval", "--do_predict", num_train_epochs=4))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    model.config.label2id = {"POSITIVE": 0, "NEGATIVE": 1}
    model.save_pretrained(swapped)
    results = run_glue.main(
        arguments("--do_eval", "--do_predict", model_name_or_path=swapped, config_name=None, output_dir=swapped)
    )
    assert results["eval_accuracy"] == expected["eval_accuracy"]
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert (swapped / "SST-2.tsv").read_text() == (out / "SST-2.tsv").read_text()


def test_mnli_covers_both_dev_sets_and_ax(arguments, tmp_path):
    folder = tmp_path / "MNLI"
    folder.mkdir()
    labels = ["entailment", "neutral", "contradiction"]
    rows = [f"{number}\ta good film\ta bad film\t{labels[number % 3]}" for number in range(9)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        (folder / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tgold_label", *rows, ""]))
    for name in ("test_matched", "test_mismatched", "diagnostic"):
        (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td\n")
    flags = ("--do_train", "--do_eval", "--do_predict")
    results = run_glue.main(
        arguments(*flags, task_name="mnli", data_dir=folder, max_steps=1, max_train_samples=6, max_predict_samples=1)
    )
    assert {"eval_accuracy", "eval_accuracy_mm"} <= set(results)
    assert results["train_samples"] == 6
    for name in ("MNLI-m", "MNLI-mm", "AX"):
        header, row = (tmp_path / "out" / f"{name}.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        assert row.split("\t")[1] in labels


def test_regression_on_json_lines_reports_correlations(arguments, tmp_path):
    rows = [{"sentence1": "a good film", "sentence2": "a bad film", "score": number % 6} for number in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--do_train", "--do_eval", "--do_predict")
    files = {"train_file": file, "validation_file": file, "test_file": file}
    results = run_glue.main(arguments(*flags, task_name="stsb", data_dir=None, max_steps=1, **files))
    assert {"eval_pearson", "eval_spearmanr", "eval_combined_score"} <= set(results)
    assert len((tmp_path / "out" / "STS-B.tsv").read_text().splitlines()) == 13


def test_tensorboard_logs_are_written(arguments, tmp_path):
    pytest.importorskip("tensorboard")
    run_glue.main(arguments("--do_train", report_to="tensorboard", max_steps=1))
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_pushing_uploads_this_card_and_not_a_draft(arguments, tmp_path, monkeypatch):
    from transformers import trainer

    uploaded = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, folder_path, **_):
            uploaded.append((Path(folder_path) / "README.md").read_text() if uploaded else "")

    monkeypatch.setattr(trainer, "hf_api", Hub)
    run_glue.main(
        arguments("--do_train", "--do_eval", "--push_to_hub", hub_model_id="tiny", save_strategy="no", max_steps=1)
    )
    assert 'model="tiny"' in uploaded[-1]
    assert "model-index" in uploaded[-1]


# ---- Rows and predictions ----


def test_every_row_of_a_test_file_is_predicted_in_order(arguments, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    run_glue.main(arguments("--do_train", num_train_epochs=8))
    file = tmp_path / "test.tsv"
    texts = [sentence("negative", 1), "", sentence("positive", 2), sentence("negative", 3), ""]
    file.write_text("\n".join(["sentence", *texts]) + "\n")
    base = {"model_name_or_path": out, "config_name": None, "data_dir": None, "test_file": file}
    for changes in ({}, {"per_device_eval_batch_size": 2}, {"dataloader_drop_last": True}):
        run_glue.main(arguments("--do_predict", **base, **changes))
        labels = [line.split("\t")[1] for line in (out / "SST-2.tsv").read_text().splitlines()[1:]]
        assert len(labels) == len(texts)
        assert (labels[0], labels[2], labels[3]) == ("0", "1", "0")
        assert labels[1] == labels[4]


@pytest.mark.parametrize("pad_to_max_length", [False, True])
def test_a_text_of_no_tokens_is_the_end_of_text(pad_to_max_length, arguments, configs, tokenizer_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer._tokenizer.post_processor = None  # which adds [CLS] and [SEP]
    tokenizer.save_pretrained(tmp_path / "bare")
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\n" + "\t1\n" * 3)
    files = {"data_dir": None, "train_file": file, "validation_file": file, "test_file": file}
    files |= {"config_name": configs["transnormer"], "tokenizer_name": tmp_path / "bare", "max_steps": 1}
    flags = ["--do_train", "--do_eval", "--do_predict", *(["--pad_to_max_length"] if pad_to_max_length else [])]
    results = run_glue.main(arguments(*flags, **files))
    assert results["eval_samples"] == 3
    labels = [line.split("\t")[1] for line in (tmp_path / "out" / "SST-2.tsv").read_text().splitlines()[1:]]
    assert len(set(labels)) == 1
    assert len(labels) == 3


def diverged(arguments, configs, folder: Path) -> Path:
    """A checkpoint whose logits are NaN for texts with the word "poor"."""
    run_glue.main(arguments("--do_train", config_name=configs["transnormer"], max_steps=1, output_dir=folder))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("poor")] = float("nan")
    model.save_pretrained(folder)
    return folder


def test_a_diverged_model_is_named_with_its_rows_and_nothing_is_written(arguments, configs, tmp_path):
    base = diverged(arguments, configs, tmp_path / "base")
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"a {word} film\t1\n" for word in ("good", "poor", "bad", "poor")))
    files = {"model_name_or_path": base, "config_name": None, "tokenizer_name": None, "data_dir": None}
    healthy = tmp_path / "train.tsv"
    healthy.write_text("sentence\tlabel\n" + "a good film\t1\n" * 8)
    files |= {"train_file": healthy, "validation_file": file, "test_file": file}
    message = r"SST-2, {}: the model's outputs are not finite numbers in 2 of 4 rows \(row 2, 4\)"
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    for flags, changes, split in (
        (["--do_eval"], {}, "evaluation"),
        (["--do_eval"], {"per_device_eval_batch_size": 1, "eval_do_concat_batches": False}, "evaluation"),
        (["--do_predict"], {}, "test"),
        (["--do_train", "--do_eval", "--load_best_model_at_end"], {**best, "learning_rate": 0}, "evaluation"),
    ):
        with pytest.raises(ValueError, match=message.format(split)):
            run_glue.main(arguments(*flags, **files, **changes))
        assert not list((tmp_path / "out").glob("**/*.tsv"))
        assert not list((tmp_path / "out").glob("**/*results.json"))


def test_a_diverged_loss_is_written_as_such(arguments, configs, tmp_path):
    base = diverged(arguments, configs, tmp_path / "base")
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\n" + "a poor film\t1\n" * 8)
    files = {"model_name_or_path": base, "config_name": None, "tokenizer_name": None, "data_dir": None}
    results = run_glue.main(arguments("--do_train", **files, train_file=file))
    assert results["train_loss"] != results["train_loss"]  # NaN


@pytest.mark.parametrize(
    "options",
    [
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"remove_unused_columns": False},
        {"neftune_noise_alpha": 5.0},
    ],
)
def test_an_evaluation_is_the_same_whatever_the_trainer_is_told(options, arguments, tmp_path):
    flags = ("--do_train", "--do_eval", "--do_predict")
    results = run_glue.main(arguments(*flags, max_steps=2, **options))
    base = {"model_name_or_path": tmp_path / "out", "config_name": None, "output_dir": tmp_path / "eval"}
    plain = run_glue.main(arguments("--do_eval", "--do_predict", **base))
    assert results["eval_accuracy"] == plain["eval_accuracy"]
    if "label_smoothing_factor" not in options:
        assert results["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert (tmp_path / "out" / "SST-2.tsv").read_text() == (tmp_path / "eval" / "SST-2.tsv").read_text()


def test_mismatched_rows_are_evaluated_with_persistent_workers(arguments, tmp_path):
    header = "index\tsentence1\tsentence2\tgold_label\n"
    for name, rows in (("train", 6), ("dev_matched", 6), ("dev_mismatched", 3)):
        (tmp_path / f"{name}.tsv").write_text(header + "0\ta good film\ta bad film\tneutral\n" * rows)
    options = {"task_name": "mnli", "data_dir": tmp_path, "max_steps": 20, "learning_rate": 1e-2}
    (tmp_path / "dev_mismatched.tsv").write_text(header + "0\ta good film\ta bad film\tentailment\n" * 3)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    results = run_glue.main(arguments("--do_train", "--do_eval", **options, **workers))
    assert (results["eval_accuracy"], results["eval_accuracy_mm"]) == (1.0, 0.0)


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_writes(arguments, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    flags = ("--do_train", "--do_eval", "--do_predict")
    script = Path(run_glue.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, str(script), *arguments(*flags)], check=True, env=environment)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["train_samples"], results["eval_samples"]) == (48, 16)
    assert len((tmp_path / "out" / "SST-2.tsv").read_text().splitlines()) == 6
    assert "2 x CPU" in (tmp_path / "out" / "README.md").read_text()


# ---- Configuration ----


def test_what_a_configuration_derives_follows_the_overrides(tokenizer_dir, tmp_path):
    from transnormer_hf import TransNormerConfig

    TransNormerConfig(hidden_size=96, num_hidden_layers=6, variant="t1").save_pretrained(tmp_path)
    args = run_glue.GlueModelArguments(
        config_name=str(tmp_path),
        tokenizer_name=str(tokenizer_dir),
        config_overrides="hidden_size=48,num_hidden_layers=2,variant=t2",
    )
    tokenizer = run_glue.load_tokenizer(args)
    config = run_glue.load_glue_config(args, run_glue.get_task("mnli"), tokenizer)
    expected = TransNormerConfig(hidden_size=48, num_hidden_layers=2, variant="t2")
    for name in ("intermediate_size", "layer_types", "feature_map", "diag_activation"):
        assert getattr(config, name) == getattr(expected, name)
    assert (config.vocab_size, config.pad_token_id) == (len(tokenizer), 0)
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)  # [CLS] and [SEP]
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


# ---- Bad input ----

TRAIN = ("--do_train",)
SMALL_ROBERTA = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"
)
BAD_ARGUMENTS = [
    (TRAIN, {"task_name": "sst"}, r"--task_name 'sst' is not a GLUE task: choose one of cola"),
    (TRAIN, {"task_name": None}, r"--task_name None is not a GLUE task"),
    (TRAIN, {"task_name": "ax"}, r"--task_name ax has no labels: give --do_predict"),
    ((), {}, r"Nothing to do: give at least one of --do_train"),
    (TRAIN, {"config_name": None}, r"Got --model_name_or_path None, --config_name None, .*: give one"),
    (TRAIN, {"model_name_or_path": "m"}, r"Got --model_name_or_path m, --config_name .*: give one"),
    (TRAIN, {"tokenizer_name": None}, r"--config_name .* has no tokenizer: give --tokenizer_name"),
    (TRAIN, {"tokenizer_name": "{tmp}/none"}, r"--tokenizer_name .*none: no tokenizer could be loaded"),
    (TRAIN, {"config_name": "{tmp}/none.json"}, r"--config_name .*none\.json: no configuration could be loaded"),
    (TRAIN, {"config_overrides": "width=8"}, r"--config_overrides 'width=8': BertConfig has no field 'width', only "),
    (TRAIN, {"config_overrides": "hidden_size"}, r"--config_overrides 'hidden_size' must have the form name=value"),
    (
        TRAIN,
        {"config_overrides": "hidden_size=wide"},
        r"--config_name .*config_overrides hidden_size=wide: .*hidden_size",
    ),
    (
        TRAIN,
        {"model_name_or_path": "m", "config_name": None, "config_overrides": "hidden_size=8"},
        r"--config_overrides changes --config_name",
    ),
    (TRAIN, {"data_dir": "{tmp}/none"}, r"--data_dir .*none is not a folder"),
    (TRAIN, {"data_dir": "{tmp}"}, r"--data_dir .* has no train\.tsv, .*Other files can be given with --train_file"),
    (TRAIN, {"train_file": "rows.tsv"}, r"Got --data_dir .* and --train_file: give a folder or single files"),
    (
        TRAIN,
        {"data_dir": None, "train_file": "rows.txt"},
        r"--train_file rows\.txt: unknown extension, expected .*\.tsv",
    ),
    (TRAIN, {"data_dir": None, "train_file": "rows.tsv"}, r"--train_file rows\.tsv: no such file"),
    (
        ("--do_train", "--do_eval"),
        {"data_dir": None, "train_file": "{data}/train.tsv"},
        r"--do_eval needs --validation_file, as --train_file is given",
    ),
    (
        TRAIN,
        {"data_dir": None, "train_file": "{data}/train.tsv", "eval_strategy": "epoch"},
        r"--do_eval needs --validation_file",  # which TrainingArguments sets with --eval_strategy
    ),
    (TRAIN, {"task_name": "rte"}, r"train\.tsv, line 2: no column 'sentence1' for task rte"),
    (TRAIN, {"max_seq_length": 65}, r"--max_seq_length 65 is more than the 64 tokens that the model takes"),
    (TRAIN, {"max_seq_length": 2}, r"--max_seq_length 2 leaves no room beside the tokenizer's 2 special tokens: .* 3"),
    (
        TRAIN,
        {"config_name": None, "model_type": "roberta", "config_overrides": SMALL_ROBERTA, "max_seq_length": 64},
        r"--max_seq_length 64 is more than the 63 tokens that the model takes: its positions begin behind",
    ),
    (TRAIN, {"max_train_samples": 0}, r"--max_train_samples 0 must be at least 1"),
    (TRAIN, {"seeds": "1;2"}, r"--seeds '1;2' must be whole numbers with commas"),
    (TRAIN, {"seeds": "1,1"}, r"--seeds 1,1 names a seed twice"),
    (TRAIN, {"seeds": "1,2", "resume_from_checkpoint": "{data}"}, r"--resume_from_checkpoint belongs to one run"),
    (("--do_train", "--push_to_hub"), {"seeds": "1,2"}, r"--push_to_hub pushes one model: give --seed N"),
    (("--do_train", "--push_to_hub"), {"hub_token": "hf_x"}, r"--hub_token would be published"),
    (TRAIN, {"early_stopping_patience": 2}, r"--early_stopping_patience needs --load_best_model_at_end"),
    (TRAIN, {"metric_for_best_model": "f1"}, r"--metric_for_best_model f1 is not a figure of sst2: .* accuracy, loss"),
    (TRAIN, {"resume_from_checkpoint": "{data}"}, r"--resume_from_checkpoint .* it has no trainer_state\.json"),
    (TRAIN, {"output_dir": "{data}"}, r"--output_dir .* holds files but no checkpoint to go on from"),
    (("--do_train", "--use_lora"), {}, r"--use_lora needs --model_name_or_path"),
    (TRAIN, {"num_train_epochs": 0}, r"--num_train_epochs 0\.0 must be more than 0; to evaluate without training"),
    (TRAIN, {"max_steps": 0}, r"--max_steps 0 must be at least 1; leave it out"),
    (TRAIN, {"per_device_train_batch_size": 0}, r"--per_device_train_batch_size 0 must be at least 1"),
    (("--do_eval", "--prediction_loss_only"), {}, r"--prediction_loss_only True is not supported"),
    (
        TRAIN,
        {"task_name": "stsb", "label_smoothing_factor": 0.1},
        r"--label_smoothing_factor 0\.1 is not supported, as stsb has scores in place of classes: .* or give 0\.0",
    ),
    (
        ("--do_train", "--dataloader_drop_last"),
        {"per_device_train_batch_size": 64},
        r"--dataloader_drop_last leaves nothing of 48 training rows in batches of 64: leave it out, or lower",
    ),
]


@pytest.mark.parametrize(("flags", "changes", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_would_work(flags, changes, message, arguments, sst2, tmp_path):
    changes = {
        name: value.format(tmp=tmp_path, data=sst2) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_glue.main(arguments(*flags, **changes))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(arguments, tokenizer_dir, tmp_path):
    small = AutoModelForSequenceClassification.from_config(BertConfig(**{**TINY_BERT, "vocab_size": 8}))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(
        ValueError, match=r"The tokenizer has \d+ tokens and the model .*small only 8: .*--tokenizer_name"
    ):
        run_glue.main(arguments("--do_train", model_name_or_path=tmp_path / "small", config_name=None))


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as done:
        run_glue.parse_arguments(["--help"])
    assert done.value.code == 0
    assert "--early_stopping_patience" in capsys.readouterr().out


def test_arguments_can_come_from_a_json_file(configs, tokenizer_dir, sst2, tmp_path):
    values = {
        "task_name": "mrpc",
        "data_dir": str(sst2),
        "config_name": str(configs["bert"]),
        "tokenizer_name": str(tokenizer_dir),
        "output_dir": str(tmp_path / "out"),
        "do_eval": True,
    }
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(values))
    *_, training_args = run_glue.parse_arguments([str(file)])
    assert training_args.do_eval
    assert training_args.metric_for_best_model == "combined_score"
    assert training_args.greater_is_better
