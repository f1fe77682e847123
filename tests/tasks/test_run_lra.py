"""The Long-Range Arena script: whole runs of every task at small sizes, and its arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

import run_lra
from transnormer_hf.tasks import lra

SMALL = "hidden_size=16,num_hidden_layers=2,intermediate_size=16,block_size=8"
SMALL_BERT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,max_position_embeddings=64"
# transformers renamed it in 5.23
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
STEPS = ("--do_train", "--do_eval", "--do_predict")


def write_text(folder: Path) -> Path:
    file = folder / "text.jsonl"
    rows = [{"text": "good film" if number % 2 else "bad one", "label": number % 2} for number in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_retrieval(folder: Path) -> Path:
    file = folder / "retrieval.jsonl"
    rows = [{"text1": "aaaa", "text2": "aaaa" if number % 2 else "zzz", "label": number % 2} for number in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_image(folder: Path) -> Path:
    from datasets import Dataset

    file = folder / "image.parquet"
    pixels = [np.full(64, 20 * (number % 4), dtype=np.uint8).tobytes() for number in range(16)]
    Dataset.from_dict({"pixels": pixels, "label": [number % 4 for number in range(16)]}).to_parquet(file)
    return file


FILES = {"text": write_text, "retrieval": write_retrieval, "image": write_image}


@pytest.fixture
def arguments(tmp_path):
    """Command line of a short run; keyword arguments replace or (None) remove options."""

    def build(*flags: str, task_name="listops", **changes) -> list[str]:
        options = {
            "task_name": task_name,
            "variant": "t2",
            "config_overrides": SMALL,
            "max_length": 64,
            "max_train_samples": 16,
            "max_eval_samples": 8,
            "listops_min_length": 8,
            "listops_max_length": 40,
            "image_size": 24,
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "warmup_steps": 0,
            "output_dir": tmp_path / "out",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if task_name in FILES:
            file = FILES[task_name](tmp_path)
            options |= {"train_file": file, "validation_file": file, "test_file": file}
        options |= changes
        pairs = ((f"--{name}", str(value)) for name, value in options.items() if value is not None)
        return [*flags, *(part for pair in pairs for part in pair)]

    return build


@pytest.mark.parametrize("task_name", lra.TASKS)
@pytest.mark.parametrize("variant", ["t1", "t2", "bert"])
def test_every_task_runs_with_every_model(task_name, variant, arguments, tmp_path):
    model = {"variant": variant} if variant != "bert" else {"variant": None, "model_type": "bert"}
    if variant == "bert":
        model["config_overrides"] = SMALL_BERT
    results = run_lra.main(arguments(*STEPS, task_name=task_name, **model))
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results
    assert (results["train_steps"], results["train_samples"], results["eval_samples"]) == (2, 16, 8)
    assert 0 <= results["eval_accuracy"] <= 1
    assert 0 <= results["test_accuracy"] <= 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == lra.TASKS[task_name].vocab_size
    if task_name != "retrieval":
        assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("task_name", ["text", "retrieval", "image"])
def test_a_model_learns_an_easy_task_and_reloads(task_name, arguments, tmp_path):
    options = {"max_steps": 60, "learning_rate": 1e-2, "max_eval_samples": None}
    results = run_lra.main(arguments("--do_train", "--do_eval", task_name=task_name, **options))
    assert results["eval_accuracy"] == 1.0
    out = tmp_path / "out"
    batch = lra.collate(
        list(lra.LraRows(lra.read_rows(lra.TASKS[task_name], str(FILES[task_name](tmp_path))), 64, False))
    )
    if task_name == "retrieval":
        from safetensors.torch import load_file
        from transformers import AutoConfig

        model = lra.DualEncoder(AutoConfig.from_pretrained(out), "mean")
        model.load_state_dict(load_file(out / "model.safetensors"))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(out)
    with torch.no_grad():
        predictions = model.eval()(**batch).logits.argmax(-1)
    assert predictions.tolist() == batch["labels"].tolist()


def test_a_resumed_run_goes_on_to_the_same_losses(arguments, tmp_path):
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    run_lra.main(arguments("--do_train", max_steps=6, output_dir=tmp_path / "whole", **options))
    for steps in (3, 6):
        run_lra.main(arguments("--do_train", max_steps=steps, output_dir=tmp_path / "parts", **options))
    histories = [
        [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (tmp_path / name / "trainer_state.json" for name in ("whole", "parts"))
    ]
    assert len(histories[0]) == 6
    assert histories[0] == histories[1]


@pytest.mark.parametrize("option", ["--task_name", "--task-name", "--task_n"])
def test_published_hyperparameters_are_the_defaults_and_may_be_overridden(option, tmp_path):
    argv = [option, "pathfinder", "--variant", "t1", "--do_train", "--output_dir", str(tmp_path)]
    _, data_args, _, training_args = run_lra.parse_arguments([*argv, "--learning_rate", "0.1"])
    assert (training_args.per_device_train_batch_size, training_args.num_train_epochs) == (128, 200)
    assert (training_args.learning_rate, training_args.warmup_steps, training_args.seed) == (0.1, 312, 2222)
    assert (data_args.max_length, data_args.schedule_steps) == (1024, 50_000)


def test_the_cosine_ends_after_its_own_number_of_steps_and_stays_there(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1.0, warmup_steps=10, lr_scheduler_type="cosine", use_cpu=True
    )
    model = AutoModelForSequenceClassification.from_config(lra.TASKS["listops"].config("t2", hidden_size=16))
    trainer = run_lra.LraTrainer(model=model, args=args)
    trainer.schedule_steps = 110
    trainer.create_optimizer()
    factor = trainer.create_scheduler(1000).lr_lambdas[0]
    assert [factor(step) for step in (0, 5, 10, 60, 110, 500)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_seeds_are_summarised(arguments):
    results = run_lra.main(arguments("--do_train", "--do_eval", seeds="1,2"))
    assert results["eval_accuracy"] == pytest.approx(sum(results["eval_accuracy_values"]) / 2)


@pytest.mark.parametrize("task_name", ["text", "retrieval"])
@pytest.mark.parametrize("variant", ["t2", "bert"])
def test_empty_texts_are_rows_as_well(task_name, variant, arguments, tmp_path):
    file = tmp_path / "empty.jsonl"
    texts = {"text": ""} if task_name == "text" else {"text1": "", "text2": ""}
    file.write_text((json.dumps({**texts, "label": 1}) + "\n") * 8)
    model = {"variant": variant} if variant == "t2" else {"variant": None, "model_type": "bert"}
    if variant == "bert":
        model["config_overrides"] = SMALL_BERT
    files = {"train_file": file, "validation_file": file, "test_file": file}
    results = run_lra.main(arguments(*STEPS, task_name=task_name, **model, **files, learning_rate=1e-2, max_steps=4))
    assert (results["train_samples"], results["eval_samples"]) == (8, 8)
    assert results["eval_accuracy"] in (0.0, 1.0)


@pytest.mark.parametrize("task_name", ["listops", "retrieval"])
def test_a_diverged_model_is_named_with_its_rows(task_name, arguments, tmp_path, monkeypatch):
    build = run_lra.make_model

    def make_model(*args):
        model = build(*args)
        model.get_input_embeddings().weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(run_lra, "make_model", make_model)
    message = r"the model's outputs are not finite numbers in 8 of 8 rows \(row 1, 2, 3, 4, 5, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        run_lra.main(arguments("--do_eval", task_name=task_name))
    assert not list((tmp_path / "out").glob("*results.json"))


@pytest.mark.parametrize("task_name", ["listops", "retrieval"])
@pytest.mark.parametrize(
    "options",
    [
        {"eval_do_concat_batches": False},
        {"label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True},
        {"neftune_noise_alpha": 5.0},
        {CHECKPOINTING: True},
    ],
)
def test_the_trainers_arguments_work_for_every_kind_of_task(task_name, options, arguments):
    results = run_lra.main(arguments(*STEPS, task_name=task_name, per_device_eval_batch_size=3, **options))
    assert (results["eval_samples"], results["test_samples"]) == (8, 8)
    assert (8 * results["eval_accuracy"]).is_integer()


TRAIN = ("--do_train",)
BAD_ARGUMENTS = [
    (TRAIN, {"task_name": "sst2"}, r"--task_name 'sst2' is not a task of the Long-Range Arena"),
    (TRAIN, {"task_name": None}, r"--task_name None is not a task of the Long-Range Arena"),
    ((), {}, r"Nothing to do: give at least one of --do_train"),
    (TRAIN, {"variant": "t3"}, r"--variant t3 is not known: choose t1 or t2"),
    (TRAIN, {"variant": None, "config_overrides": None}, r"Got --model_name_or_path None, .*: give one"),
    (TRAIN, {"model_type": "bert"}, r"--variant makes a model of its own: leave --model_type out"),
    (TRAIN, {"config_overrides": "width=3"}, r"'width=3': TransNormerConfig has no field 'width'"),
    (TRAIN, {"task_name": "retrieval", "train_file": None}, r"--do_train needs --train_file, as --validation_file is"),
    (
        TRAIN,
        {"task_name": "retrieval", "train_file": None, "validation_file": None, "test_file": None},
        r"--do_train needs --train_file, as Retrieval has no other source",
    ),
    (
        TRAIN,
        {"task_name": "retrieval", "variant": None, "config_overrides": None, "model_name_or_path": "m"},
        r"--model_name_or_path: Retrieval trains two passes of a new encoder",
    ),
    (TRAIN, {"train_file": "none.tsv"}, r"--train_file none\.tsv: no such file"),
    (TRAIN, {"train_file": "rows.txt"}, r"--train_file rows\.txt: unknown extension, expected one of \.tsv"),
    (TRAIN, {"max_length": 0}, r"--max_length 0 must be at least 1"),
    (TRAIN, {"schedule_steps": 0}, r"--schedule_steps 0 must be at least 1"),
    (TRAIN, {"listops_min_length": 99}, r"--min_length 99 and --max_length 40 must lie between"),
    (TRAIN, {"task_name": "pathfinder", "image_size": 8}, r"--image_size 8 must be at least 24"),
    (
        TRAIN,
        {"variant": None, "model_type": "bert", "config_overrides": SMALL_BERT, "max_length": 65},
        r"--max_length 65 is more than the 64 tokens that the model takes",
    ),
    (TRAIN, {"output_dir": "{tmp}"}, r"--output_dir .* holds files but no checkpoint to go on from"),
    (TRAIN, {"num_train_epochs": 0, "max_steps": None}, r"--num_train_epochs 0\.0 must be more than 0"),
    (TRAIN, {"train_sampling_strategy": "group_by_length"}, r"--train_sampling_strategy group_by_length is not suppor"),
    (TRAIN, {"remove_unused_columns": True}, r"--remove_unused_columns True is not supported"),
    (
        TRAIN,
        {"metric_for_best_model": "f1"},
        r"--metric_for_best_model f1 is not a figure of listops: .* accuracy",
    ),
    (("--do_train", "--dataloader_drop_last"), {"per_device_train_batch_size": 17}, r"leaves nothing of 16 training r"),
]


@pytest.mark.parametrize(("flags", "changes", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_would_work(flags, changes, message, arguments, tmp_path):
    (tmp_path / "note").write_text("a file")
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_lra.main(arguments(*flags, **changes))
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_said_with_what_works_without_it(arguments):
    files = dict.fromkeys(("train_file", "validation_file", "test_file"))
    with pytest.raises(ConnectionError, match=r"Could not load stanfordnlp/imdb from the Hub: .*--train_file"):
        run_lra.main(arguments("--do_train", task_name="text", **files))
