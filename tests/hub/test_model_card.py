"""The model card: valid metadata, and a text that says only what was measured."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
)

from transnormer_hf import TransNormerConfig, TransNormerForSequenceClassification
from transnormer_hf.hub import model_card
from transnormer_hf.hub.model_card import EvaluatedSplit, build_glue_card
from transnormer_hf.research.baselines import BaselineConfig, baseline_config
from transnormer_hf.tasks.glue import TASKS

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 32}
RESULTS = {"parameters": 1_234_567, "train_samples": 256, "train_loss": 0.5, "train_runtime": 9.6, "epoch": 2.0}
LABELS = {0: "negative", 1: "positive"}


def tiny_transnormer(**changes) -> torch.nn.Module:
    return TransNormerForSequenceClassification(TransNormerConfig(**TINY, id2label=LABELS, **changes))


def build(task="sst2", *, model=None, output_dir="runs/tiny", evaluated=None, arguments=None, **changes) -> ModelCard:
    figures = dict.fromkeys(TASKS[task].metrics, 0.8123456)
    if evaluated is None:
        evaluated = [EvaluatedSplit("validation", "official dev.tsv", 872, False, figures)]
    options = {
        "model": model or tiny_transnormer(),
        "training_args": TrainingArguments(output_dir=str(output_dir), use_cpu=True, seed=3, **(arguments or {})),
        "max_seq_length": 128,
        "base_model": None,
        "train_source": "official train.tsv",
        "official_data": True,
        "evaluated": evaluated,
        "results": RESULTS,
    }
    return build_glue_card(TASKS[task], **{**options, **changes})


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.metrics])
def test_the_metadata_survive_writing_and_loading(task, tmp_path):
    card = build(task)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.datasets == ["nyu-mll/glue"]
    assert {"custom_code", "glue", "transnormer_hf"} <= set(data.tags)
    assert data.model_name == "tiny"
    assert [result.metric_value for result in data.eval_results] == [0.812346] * len(TASKS[task].metrics)
    assert {(result.dataset_type, result.dataset_config, result.dataset_split) for result in data.eval_results} == {
        ("nyu-mll/glue", task, "validation")
    }


def test_the_metadata_have_the_form_that_the_hub_asks_for():
    header = re.fullmatch(r"---\n(.*?)\n---\n\n# .*", str(build()), flags=re.DOTALL)
    assert header is not None
    data = yaml.safe_load(header.group(1))
    assert set(data) == {"datasets", "language", "library_name", "metrics", "pipeline_tag", "tags", "model-index"}
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert set(result) == {"task", "dataset", "metrics"}
    assert result["task"]["type"] == data["pipeline_tag"]
    assert re.fullmatch(r"[\w-]+/[\w-]+", result["dataset"]["type"])
    assert isinstance(result["metrics"][0]["value"], float)


def test_the_text_has_every_section_in_order():
    sections = re.findall(r"^## (.*)$", str(build()), flags=re.MULTILINE)
    assert sections == ["Results", "How to load", "Intended use and limits", "Training"]


def test_the_text_tells_figures_hyperparameters_and_versions():
    text = str(build("mrpc", arguments={"learning_rate": 3e-4, "weight_decay": 0.1}))
    assert "# tiny: TransNormer T2 for MRPC" in text
    assert "1.23 M parameters, trained from scratch on MRPC" in text
    assert "| official dev.tsv | 872 | 0.8123 | 0.8123 |" in text
    assert "Trained on 256 rows (official train.tsv) for 2.00 epochs, mean training loss 0.5000, 10 s." in text
    assert "| learning_rate | 0.0003 |" in text
    assert "| weight_decay | 0.1 |" in text
    assert "| seed | 3 |" in text
    # a wheel from PyPI calls itself 2.13.0 in its metadata and 2.13.0+cu130 in Python
    assert re.search(rf"\| torch \| {re.escape(torch.__version__.partition('+')[0])}(\+\w+)? \|", text)
    assert "{{" not in text
    assert "None" not in text


def test_loading_custom_code_is_pinned_and_says_why():
    text = str(build())
    assert "trust_remote_code=True" in text
    assert 'revision="COMMIT"' in text
    assert "a branch may change after you looked at it" in text


def test_a_model_of_transformers_needs_no_trust():
    card = build(model=BertForSequenceClassification(BertConfig(**TINY, id2label=LABELS)))
    assert "custom_code" not in card.data.tags
    assert "trust_remote_code" not in str(card)
    assert "# tiny: BERT for SST-2" in str(card)


def test_a_baseline_is_loaded_with_the_package_that_has_its_code():
    """Its code does not lie beside its weights, so there is nothing to trust or to pin."""
    config = BaselineConfig(**TINY, id2label=LABELS, mixer="performer")
    glue = build(model=AutoModelForSequenceClassification.from_config(config))
    pretraining = build_training(AutoModelForMaskedLM.from_config(config), pipeline_tag="fill-mask")
    for card in (glue, pretraining):
        (code,) = re.findall(r"```python\n(.*?)```", str(card), flags=re.DOTALL)
        compile(code, "card", "exec")
        assert code.startswith(
            "import transnormer_hf.research.baselines  # the model's code: pip install transnormer-hf\n"
        )
        assert "custom_code" not in card.data.tags
        assert "trust_remote_code" not in str(card)


@pytest.mark.parametrize("task", ["sst2", "rte", "stsb"])
def test_the_loading_code_compiles_and_calls_what_the_task_has(task):
    (code,) = re.findall(r"```python\n(.*?)```", str(build(task)), flags=re.DOTALL)
    compile(code, "card", "exec")
    assert ("text_pair" in code) == (task != "sst2")
    assert ('function_to_apply="none"' in code) == (task == "stsb")


def test_a_cut_evaluation_is_marked_as_one():
    split = EvaluatedSplit("validation", "official dev.tsv", 100, True, {"accuracy": 0.5})
    card = build(evaluated=[split])
    assert "official dev.tsv (first rows only) | 100 | 0.5000" in str(card)
    assert card.data.eval_results[0].dataset_args == {"first_rows": 100}


def test_rows_of_other_files_are_not_filed_under_glue():
    split = EvaluatedSplit("validation", "file heldout.jsonl", 10, False, {"accuracy": 0.5})
    card = build(evaluated=[split], official_data=False)
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_type == "other"
    assert card.data.eval_results[0].dataset_name == "SST-2, file heldout.jsonl"


def test_without_an_evaluation_no_figure_is_claimed():
    card = build(evaluated=[])
    assert "This model has not been evaluated." in str(card)
    assert card.data.eval_results is None
    assert "model-index" not in card.data.to_dict()


def test_a_checkpoint_chosen_on_the_same_data_is_told():
    arguments = {
        "load_best_model_at_end": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "accuracy",
    }
    assert "The checkpoint was chosen by accuracy on the first of these data sets" in str(build(arguments=arguments))
    assert "chosen by" not in str(build())


def test_only_a_base_model_on_the_hub_is_named_in_the_metadata(tmp_path):
    assert build(base_model="org/base").data.base_model == "org/base"
    local = build(base_model=str(tmp_path / "secret" / "base"), output_dir=tmp_path / "secret" / "out")
    assert local.data.base_model is None
    assert "trained fine-tuned" not in str(local)
    assert "fine-tuned from base" in str(local)
    assert "secret" not in str(local)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_adapters_are_loaded_with_peft():
    from peft import LoraConfig, TaskType, get_peft_model

    model = get_peft_model(tiny_transnormer(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2))
    card = build(model=model, base_model="org/base")
    assert card.data.library_name == "peft"
    assert "AutoPeftModelForSequenceClassification" in str(card)
    assert "| LoRA | r 2, alpha 8, dropout 0.0, on " in str(card)
    assert "custom_code" in card.data.tags


def test_a_run_of_one_seed_is_named_after_its_sweep(tmp_path):
    assert build(output_dir=tmp_path / "sweep" / "seed_3").data.model_name == "sweep-seed_3"


def test_the_packaged_template_is_the_one_among_the_cards():
    packaged = Path(model_card.__file__).with_name("model_card_template.md")
    assert packaged.is_symlink()
    assert not os.path.isabs(os.readlink(packaged))
    assert packaged.resolve() == Path(__file__).parents[2] / "model_cards" / "template.md"


# ---- Pre-training and other tasks ----


def build_training(model=None, **changes) -> ModelCard:
    options = {
        "model": model or tiny_transnormer(),
        "training_args": TrainingArguments(output_dir="runs/tiny", use_cpu=True, seed=3),
        "task": "causal language modelling",
        "pipeline_tag": "text-generation",
        "dataset": "Salesforce/wikitext",
        "base_model": None,
        "train_source": "split train of Salesforce/wikitext",
        "max_seq_length": 512,
        "metric_titles": {"token_perplexity": "Perplexity per token", "word_perplexity": "Perplexity per word"},
        "evaluated": [
            EvaluatedSplit("test", "split test", 9, False, {"token_perplexity": 30.5, "word_perplexity": 99.0})
        ],
        "notes": ["Windows do not overlap."],
        "sample": "The end ``` of it.",
        "results": RESULTS,
    }
    return model_card.build_training_card(**{**options, **changes})


def test_a_pretraining_card_has_the_metadata_of_its_task():
    data = build_training().data
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["Salesforce/wikitext"]
    assert set(data.tags) == {"custom_code", "transnormer_hf"}
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in data.eval_results] == [
        ("perplexity", "Perplexity per token", 30.5),
        ("perplexity", "Perplexity per word", 99.0),
    ]


def test_a_pretraining_card_tells_figures_how_they_were_measured_and_a_sample():
    text = str(build_training())
    assert "| split test | 9 | 30.5000 | 99.0000 |" in text
    assert "with seed 3. Windows do not overlap." in text
    assert "```text\nThe end  of it.\n```" in text
    assert 'AutoModelForCausalLM.from_pretrained(\n    "tiny",\n    revision="COMMIT"' in text
    assert "Trained on 256 rows (split train of Salesforce/wikitext)" in text


def test_a_card_of_a_stream_names_no_number_of_rows():
    results = {name: value for name, value in RESULTS.items() if name != "train_samples"}
    assert "Trained on a stream of rows (split train" in str(build_training(results=results))


def test_the_architecture_is_named():
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    config = TransNormerConfig(**fields, variant="t1")
    assert model_card.describe_architecture(config) == "TransNormer T1"
    assert model_card.describe_architecture(BertConfig()) == "BERT"
    performer = baseline_config(config, "performer")
    assert model_card.describe_architecture(performer) == "TransNormer's backbone with performer attention"
    mixed = BaselineConfig(**fields, layer_types=["softmax", "linear_attention"])
    described = model_card.describe_architecture(mixed)
    assert described == "TransNormer's backbone with softmax attention and NormAttention"
