"""The script for causal pre-training: its arguments, and whole runs on a text that a tiny model can learn."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm
from transnormer_hf.training import pretraining

ALL_STEPS = ("--do_train", "--do_eval", "--do_predict")


@pytest.fixture
def arguments(pretraining_arguments):
    def build(*flags: str, **changes) -> list[str]:
        return pretraining_arguments(*flags, **{"block_size": 32, "max_new_tokens": 4, **changes})

    return build


def losses(folder: Path) -> list[float]:
    """The logged training losses of a run, in order."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_a_run_learns_measures_writes_and_reloads(arguments, articles, tmp_path):
    results = run_clm.main(arguments(*ALL_STEPS, max_steps=60, learning_rate=2e-2, max_new_tokens=8, prompt="The"))
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()) == results
    assert results["eval_token_perplexity"] < 20  # of 300 tokens
    assert results["eval_token_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["eval_words"] == results["test_words"] == len(articles.split()) + articles.count("\n")
    nll = results["eval_loss"] * results["eval_tokens"]
    assert results["eval_word_perplexity"] == pytest.approx(math.exp(nll / results["eval_words"]))
    assert results["test_word_perplexity"] == pytest.approx(results["eval_word_perplexity"])  # the same text
    assert results["sample"].startswith("The")
    assert results["train_tokens"] == 60 * 2 * 32
    assert results["train_tokens_per_second"] == pytest.approx(results["train_tokens"] / results["train_minutes"] / 60)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.use_cache
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(articles)["input_ids"]]])
    total = 0.0
    with torch.no_grad():  # window by window, with the labels that transformers shifts
        for start in range(0, tokens.shape[1] - 1, 32):
            window = tokens[:, start : start + 33]
            total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    assert total / (tokens.shape[1] - 1) == pytest.approx(results["eval_loss"], rel=0.02)

    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert {result.metric_name for result in card.data.eval_results} == {"Perplexity per token", "Perplexity per word"}
    assert results["sample"] in card.text
    assert str(tmp_path) not in str(card)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_goes_on_to_the_same_losses(streaming, arguments, tmp_path):
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2, "learning_rate": 1e-2}
    options |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    flags = ("--do_train", "--streaming") if streaming else ("--do_train",)
    run_clm.main(arguments(*flags, max_steps=6, output_dir=tmp_path / "whole", **options))
    for steps in (3, 6):  # the second call finds the checkpoint of the first
        run_clm.main(arguments(*flags, max_steps=steps, output_dir=tmp_path / "parts", **options))
    assert len(losses(tmp_path / "whole")) == 6
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"),
        ("gpt2", "n_embd=16,n_layer=1,n_head=2,n_positions=64"),
        ("opt", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,ffn_dim=32,word_embed_proj_dim=16"),
    ],
)
def test_stock_models_are_trained_by_the_same_call(model_type, overrides, arguments, tmp_path):
    results = run_clm.main(arguments(*ALL_STEPS, model_type=model_type, config_overrides=overrides))
    assert results["eval_token_perplexity"] < 400
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained(\n    "out",\n)' in card
    assert "trust_remote_code" not in card


def test_a_checkpoint_is_trained_further(arguments, tmp_path):
    run_clm.main(arguments("--do_train", output_dir=tmp_path / "base"))
    base = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "base"}
    before = run_clm.main(arguments("--do_eval", **base, output_dir=tmp_path / "eval"))
    after = run_clm.main(arguments("--do_train", "--do_eval", **base, learning_rate=1e-2, max_steps=10))
    assert after["eval_loss"] < before["eval_loss"]
    assert "trained further from base" in (tmp_path / "out" / "README.md").read_text()


def test_seeds_are_summarised(arguments, tmp_path):
    results = run_clm.main(arguments("--do_train", "--do_eval", seeds="1,2", max_steps=1))
    assert results["eval_loss"] == pytest.approx(sum(results["eval_loss_values"]) / 2)
    assert results["eval_word_perplexity_std"] > 0
    assert (tmp_path / "out" / "seed_2" / "README.md").is_file()


def test_training_stops_at_the_time_limit(arguments):
    results = run_clm.main(arguments("--do_train", max_steps=1000, max_minutes=1e-6))
    assert results["train_tokens"] == 2 * 32
    assert results["train_minutes"] > 0


def test_a_cut_evaluation_has_no_perplexity_per_word(arguments, tmp_path):
    results = run_clm.main(arguments("--do_train", "--do_eval", max_eval_samples=2, max_train_samples=3))
    assert (results["eval_samples"], results["train_samples"], results["eval_tokens"]) == (2, 3, 64)
    assert "eval_word_perplexity" not in results
    assert "text.txt, first rows only" in (tmp_path / "out" / "README.md").read_text()


# ---- Arguments ----


def parse(argv: list[str]):
    return pretraining.parse_pretraining_arguments(run_clm.CLM, run_clm.DataArguments, argv)


def test_a_preset_gives_the_released_hyperparameters(arguments):
    changes = {"preset": "wikitext103-clm", "block_size": None, "max_steps": None, "per_device_train_batch_size": 4}
    _, data_args, _, training_args = parse(arguments("--do_train", **changes))
    assert (data_args.block_size, data_args.warmup_init_lr) == (512, 1e-7)
    assert training_args.gradient_accumulation_steps == 32  # x 4 rows x 512 tokens = 65,536
    expected = {
        "learning_rate": 5e-4,
        "warmup_steps": 8000,
        "max_steps": 100_000,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
    }
    assert {name: getattr(training_args, name) for name in expected} == expected
    assert training_args.lr_scheduler_type == "inverse_sqrt"


def test_explicit_arguments_override_a_preset(arguments):
    changes = {"preset": "wikitext103-clm", "learning_rate": 0.01, "gradient_accumulation_steps": 3, "block_size": 64}
    _, data_args, _, training_args = parse(arguments("--do_train", **changes))
    assert (training_args.learning_rate, training_args.gradient_accumulation_steps) == (0.01, 3)
    assert (data_args.block_size, training_args.max_steps, training_args.warmup_steps) == (64, 2, 8000)


def test_a_json_file_may_name_a_preset(byte_tokenizer, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "arguments.json"
    text.write_text("some text\n")
    values = {"preset": "wikitext103-clm", "model_type": "gpt2", "tokenizer_name": str(byte_tokenizer)}
    values |= {"train_file": str(text), "do_train": True, "warmup_steps": 5, "output_dir": str(tmp_path / "out")}
    file.write_text(json.dumps(values))
    *_, training_args = parse([str(file)])
    assert (training_args.learning_rate, training_args.warmup_steps) == (5e-4, 5)
    assert training_args.gradient_accumulation_steps == 16  # with the Trainer's 8 rows a batch


TRAIN = ("--do_train",)
BAD_ARGUMENTS = [
    ((), {}, r"Nothing to do: give at least one of --do_train"),
    (TRAIN, {"model_type": None, "config_overrides": None}, r"Got --model_name_or_path None, .*: give one"),
    (TRAIN, {"config_name": "c"}, r"Got --model_name_or_path None, --config_name c, --model_type transnormer_hf: "),
    (TRAIN, {"model_type": "lama"}, r"--model_type lama is not known: give one such as bert, gpt2, llama"),
    (TRAIN, {"tokenizer_name": None}, r"--model_type transnormer_hf has no tokenizer: give --tokenizer_name"),
    (TRAIN, {"config_overrides": "width=8"}, r"'width=8': TransNormerConfig has no field 'width'"),
    (TRAIN, {"preset": "wikitext103-mlm"}, r"--preset wikitext103-mlm is not one for clm: choose wikitext103-clm"),
    (TRAIN, {"preset": "wt103"}, r"--preset wt103 is not one for clm"),
    (TRAIN, {"train_file": None}, r"--do_train needs --train_file, as --validation_file is given"),
    (("--do_eval",), {"validation_file": None}, r"--do_eval needs --validation_file, as --train_file is given"),
    (TRAIN, {"train_file": "{tmp}/none.txt"}, r"--train_file .*none\.txt: no such file"),
    (TRAIN, {"train_file": "{tmp}/text.doc"}, r"--train_file .*text\.doc: unknown extension, expected one of \.txt"),
    (TRAIN, {"dataset_name": "d"}, r"Got --dataset_name d and files: give a data set on the Hub, or text"),
    (
        TRAIN,
        {"train_file": None, "validation_file": None, "test_file": None},
        r"Got --dataset_name None and no file: give a data set on the Hub, or text",
    ),
    (TRAIN, {"block_size": 4}, r"--block_size 4 must be at least 8"),
    (TRAIN, {"block_size": 600}, r"--block_size 600 is more than the 512 tokens that the model takes"),
    (TRAIN, {"max_train_samples": 0}, r"--max_train_samples 0 must be at least 1"),
    (("--do_train", "--streaming"), {"max_steps": None}, r"--streaming needs --max_steps, got -1"),
    (TRAIN, {"tokens_per_update": 100}, r"--tokens_per_update 100 is not a multiple of 64, the tokens of one batch"),
    (
        TRAIN,
        {"tokens_per_update": 64, "gradient_accumulation_steps": 1},
        r"Got --tokens_per_update and --gradient_accumulation_steps: give one",
    ),
    (TRAIN, {"warmup_init_lr": 1.0}, r"--warmup_init_lr 1\.0 must lie between 0 and --learning_rate"),
    (TRAIN, {"max_minutes": 0}, r"--max_minutes 0\.0 must be more than 0"),
    (TRAIN, {"seeds": "1;2"}, r"--seeds '1;2' must be whole numbers"),
    (TRAIN, {"output_dir": "{tmp}"}, r"--output_dir .* holds files but no checkpoint to go on from"),
    (TRAIN, {"num_train_epochs": 0, "max_steps": None}, r"--num_train_epochs 0\.0 must be more than 0; to evaluate"),
    (TRAIN, {"seeds": "1,4294967296"}, r"--seeds 1,4294967296: each must be at most 4294967295"),
    (TRAIN, {"max_steps": 0}, r"--max_steps 0 must be at least 1"),
    (
        TRAIN,
        {"max_new_tokens": 600},
        r"--max_new_tokens 600 and --prompt '': a text of 600 is more than the 512",
    ),
    (TRAIN, {"remove_unused_columns": True}, r"--remove_unused_columns True is not supported, as rows hold exactly"),
    (
        TRAIN,
        {"metric_for_best_model": "bleu"},
        r"--metric_for_best_model bleu is not a figure of clm: choose one",
    ),
    (
        ("--do_train", "--streaming"),
        {"train_sampling_strategy": "group_by_length"},
        r"--train_sampling_strategy group_by_length is not supported, as a stream is shuffled in its buffer",
    ),
    (
        ("--do_train", "--dataloader_drop_last"),
        {"per_device_train_batch_size": 1000},
        r"--dataloader_drop_last leaves nothing of \d+ training rows in batches of 1000",
    ),
]


@pytest.mark.parametrize(("flags", "changes", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_would_work(flags, changes, message, arguments, tmp_path):
    (tmp_path / "text.doc").write_text("some text")
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_clm.main(arguments(*flags, **changes))
    assert not (tmp_path / "out").exists()


def test_an_empty_text_is_refused(arguments, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"file empty\.txt holds no text to make a row of"):
        run_clm.main(arguments("--do_train", train_file=tmp_path / "empty.txt"))


# ---- The Trainer's arguments ----


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
        {"full_determinism": False, "data_seed": 3},
    ],
)
def test_evaluation_is_of_the_plain_loss_whatever_the_trainer_is_told(options, arguments, tmp_path):
    results = run_clm.main(arguments(*ALL_STEPS, max_steps=2, learning_rate=1e-3, **options))
    base = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "out"}
    plain = run_clm.main(arguments("--do_eval", **base, output_dir=tmp_path / "eval"))
    assert results["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert results["test_tokens"] == plain["eval_tokens"]
    assert results["train_tokens"] == 2 * 2 * 32


def test_the_best_checkpoint_by_perplexity_is_the_one_with_the_lowest(arguments, tmp_path):
    _, _, _, training_args = parse(
        arguments(
            *ALL_STEPS,
            "--load_best_model_at_end",
            metric_for_best_model="word_perplexity",
            save_strategy="steps",
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
        )
    )
    assert training_args.greater_is_better is False


def test_a_warm_up_that_the_scheduler_cannot_have_is_refused(arguments):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_init_lr": 1e-7, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=r"--warmup_init_lr 1e-07 has no meaning for --lr_scheduler_type reduce_lr_on"):
        run_clm.main(arguments("--do_train", "--do_eval", **options))


def test_a_table_is_read_by_the_same_call(arguments, tmp_path):
    file = tmp_path / "rows.TSV"
    file.write_text('text\tid\nNA and "so on\t7\na second text\t8\n')
    results = run_clm.main(arguments(*ALL_STEPS, train_file=file, validation_file=file, test_file=file))
    assert results["eval_words"] == 4 + 3 + 2  # with an end of sentence for each text
