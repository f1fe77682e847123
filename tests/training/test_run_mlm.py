"""The script for masked pre-training: whole runs, packed and padded, resumed, and its own arguments."""

import json
import math

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM

import run_mlm
from transnormer_hf.training import pretraining

BERT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.fixture
def arguments(pretraining_arguments):
    def build(*flags: str, **changes) -> list[str]:
        return pretraining_arguments(*flags, **{"max_seq_length": 32, "fill": "The <mask> eats .", **changes})

    return build


def test_a_run_learns_measures_fills_and_reloads(arguments, tmp_path):
    flags = ("--do_train", "--do_eval", "--do_predict")
    results = run_mlm.main(arguments(*flags, max_steps=60, learning_rate=1e-2))
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()) == results
    assert results["eval_token_perplexity"] < 60  # of 300 tokens
    assert results["eval_token_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert "eval_word_perplexity" not in results
    assert results["eval_tokens"] == pytest.approx(0.15 * 32 * results["eval_samples"], rel=0.2)  # the masked ones
    assert results["test_loss"] == pytest.approx(results["eval_loss"])  # the same text under the same masks
    text, filled = results["sample"].splitlines()
    assert text == "The <mask> eats ."
    assert len(filled.split(", ")) == 5
    assert isinstance(AutoModelForMaskedLM.from_pretrained(out), torch.nn.Module)
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert {result.metric_name for result in card.data.eval_results} == {"Perplexity per masked token"}


@pytest.mark.parametrize(("workers", "flag"), [(1, None), (2, None), (2, "--streaming")])
def test_persistent_workers_mask_the_same_as_one_process(workers, flag, arguments, tmp_path):
    model = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,hidden_dropout_prob=0.0"
    model += ",attention_probs_dropout_prob=0.0"  # loaders draw from the generator that dropout draws from
    options = {"logging_steps": 1, "per_device_train_batch_size": 8, "seed": 3, "config_overrides": model}
    in_workers = {"dataloader_num_workers": workers, "dataloader_persistent_workers": True}
    in_workers |= {"save_strategy": "steps", "save_steps": 3}
    runs = {"alone": [({}, 6)], "workers": [(in_workers, 6)], "resumed": [(in_workers, 3), (in_workers, 6)]}
    histories = []
    for name, calls in runs.items():
        for changes, steps in calls:
            run_mlm.main(
                arguments(
                    *("--do_train", *([flag] if flag else [])),
                    output_dir=tmp_path / name,
                    **{**options, **changes, "max_steps": steps},
                    lr_scheduler_type="constant",
                )
            )
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        histories.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(histories[0]) == 6
    assert histories[1] == histories[2]
    if flag is None:  # workers of a stream fill batches of their own
        assert histories[0] == histories[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_masks_the_same_and_goes_on_to_the_same_losses(streaming, arguments, tmp_path):
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}  # so that it meets a second epoch
    flags = ("--do_train", "--streaming") if streaming else ("--do_train",)
    run_mlm.main(arguments(*flags, max_steps=6, output_dir=tmp_path / "whole", **options))
    for steps in (3, 6):
        run_mlm.main(arguments(*flags, max_steps=steps, output_dir=tmp_path / "parts", **options))
    histories = [
        [
            entry["loss"]
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for name in ("whole", "parts")
    ]
    assert len(histories[0]) == 6
    assert histories[0] == histories[1]


def test_bert_is_trained_by_the_same_call_on_rows_of_one_document(arguments, caplog):
    with caplog.at_level("INFO"):
        results = run_mlm.main(arguments("--do_train", "--do_eval", model_type="bert", config_overrides=BERT))
    assert "BertForMaskedLM sees across packed documents: each row holds one and padding" in caplog.text
    assert results["eval_token_perplexity"] < 400


def test_evaluation_does_not_depend_on_the_seed_of_the_run(arguments, tmp_path):
    run_mlm.main(arguments("--do_train", output_dir=tmp_path / "base"))
    base = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "base"}
    figures = [
        run_mlm.main(arguments("--do_eval", **base, seed=seed, output_dir=tmp_path / f"eval{seed}"))["eval_loss"]
        for seed in (1, 2)
    ]
    assert figures[0] == figures[1]


def test_the_preset_gives_the_released_hyperparameters(arguments):
    changes = {"preset": "wikitext103-mlm", "max_seq_length": None, "max_steps": None, "per_device_train_batch_size": 8}
    argv = arguments("--do_train", **changes)
    _, data_args, _, training_args = pretraining.parse_pretraining_arguments(run_mlm.MLM, run_mlm.DataArguments, argv)
    assert (data_args.max_seq_length, data_args.mlm_probability) == (512, 0.15)
    assert training_args.gradient_accumulation_steps == 64  # x 8 = 512 rows
    assert (training_args.max_steps, training_args.warmup_steps, training_args.adam_epsilon) == (50_000, 3000, 1e-6)
    assert training_args.lr_scheduler_type == "polynomial"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_probability": 0}, r"--mlm_probability 0\.0 must lie between 0 and 1"),
        ({"fill": "no gap"}, r"--fill 'no gap' must hold <mask> once"),
        ({"max_seq_length": 600}, r"--max_seq_length 600 is more than the 512 tokens"),
        ({"preset": "wikitext103-clm"}, r"--preset wikitext103-clm is not one for mlm: choose wikitext103-mlm"),
        ({"fill": "a " * 600 + "<mask>"}, r"--fill .*: a text of \d+ is more than the 512 tokens that the model takes"),
        ({"num_train_epochs": 0, "max_steps": None}, r"--num_train_epochs 0\.0 must be more than 0"),
        ({"metric_for_best_model": "word_perplexity"}, r"is not a figure of mlm: choose one of loss, token_perplexity"),
    ],
)
def test_a_bad_argument_is_named_with_what_would_work(changes, message, arguments, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_mlm.main(arguments("--do_train", **changes))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_mask_is_refused(arguments, byte_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"has no mask_token: give one made for masked models"):
        run_mlm.main(arguments("--do_train", tokenizer_name=tmp_path / "tokenizer"))


@pytest.mark.parametrize("mixer", ["softmax", "performer"])
def test_a_baseline_is_trained_by_the_same_command(mixer, arguments, tmp_path):
    overrides = f"mixer={mixer},hidden_size=16,num_hidden_layers=2,num_attention_heads=2"
    model = {"model_type": "transnormer_hf_baseline", "config_overrides": overrides}
    results = run_mlm.main(arguments("--do_train", "--do_eval", **model, max_steps=30, learning_rate=1e-2))
    assert results["eval_token_perplexity"] < 200  # of 300 tokens
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert again.config.layer_types == [mixer] * 2


def test_a_diverged_model_is_named_and_fills_nothing(arguments, tmp_path):
    run_mlm.main(arguments("--do_train", output_dir=tmp_path / "base"))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    model.lm_head.dense.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    base = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "base"}
    with pytest.raises(ValueError, match=r"Evaluation \(eval\): .* rows \(row 1, 2.*\): it has diverged"):
        run_mlm.main(arguments("--do_eval", **base))
    with pytest.raises(ValueError, match=r"A sample: .* it has diverged"):
        run_mlm.main(arguments("--do_train", **base))
    assert not (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "all_results.json").exists()
