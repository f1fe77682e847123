"""A saved folder is complete: where only transformers is installed it loads, computes the same and saves again."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining, PreTrainedTokenizerFast
from transformers.pipelines import SUPPORTED_TASKS

from transnormer_hf import AUTO_CLASSES, TransNormerConfig, TransNormerForCausalLM, TransNormerForMaskedLM
from transnormer_hf.hub.remote_code import check_remote_code
from transnormer_hf.model.configuration_transnormer import AUTO_MAP

SOURCE = Path(importlib.import_module("transnormer_hf").__file__).parent / "model"
SHIPPED = sorted(file.name for file in SOURCE.glob("*_transnormer.py"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "good", "bad", "what"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def tiny_config(**overrides) -> TransNormerConfig:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return TransNormerConfig(block_size=4, **sizes, **tokens, **overrides)


@pytest.fixture(scope="module")
def saved_heads(tmp_path_factory) -> Path:
    """One folder per Auto class, with model, code, tokenizer, and what the model answers."""
    root = tmp_path_factory.mktemp("saved") / "heads"
    for auto_class, model_class in AUTO_CLASSES.items():
        torch.manual_seed(0)
        model = model_class(tiny_config(is_causal="CausalLM" in model_class.__name__)).eval()
        folder = root / auto_class.__name__
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        shape = (2, 3, 7) if "MultipleChoice" in model_class.__name__ else (2, 7)
        input_ids = torch.randint(5, len(WORDS), shape)
        with torch.no_grad():
            output = model(input_ids)[0]
        save_file({"input_ids": input_ids, "output": output}, folder / "recorded.safetensors")
    return root


@pytest.fixture(scope="module")
def report(saved_heads, tmp_path_factory) -> dict:
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    probe = Path(__file__).with_name("remote_code_probe.py")
    result = subprocess.run(
        [sys.executable, str(probe), str(saved_heads)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_head_loads_without_the_package_and_answers_the_same(report):
    assert report["imported"] == []
    assert set(report["differences"]) == {auto_class.__name__ for auto_class in AUTO_CLASSES}
    assert all(module.startswith("transformers_modules") for module in report["modules"].values())
    assert max(report["differences"].values()) < 1e-6


def test_saving_again_carries_the_code_along(report):
    assert all(files == SHIPPED for files in report["resaved_files"].values()), report["resaved_files"]
    assert max(report["resaved_differences"].values()) < 1e-6


@pytest.mark.parametrize(
    ("task", "part"),
    [
        ("text-classification", "LABEL_"),
        ("fill-mask", "token_str"),
        ("text-generation", "generated_text"),
        ("token-classification", "entity"),
        ("question-answering", "answer"),
    ],
)
def test_pipelines_run_from_the_folder(report, task, part):
    if task not in SUPPORTED_TASKS:
        pytest.skip(f"transformers {transformers.__version__} has no {task} pipeline")
    assert part in report["pipelines"][task]


def test_folder_holds_every_shipped_file_and_the_map_of_all_heads(saved_heads):
    for folder in saved_heads.iterdir():
        assert sorted(file.name for file in folder.glob("*.py")) == SHIPPED
        for file in SHIPPED:
            assert (folder / file).read_bytes() == (SOURCE / file).read_bytes()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_auto_map_names_every_auto_class_of_the_package():
    assert set(AUTO_MAP) == {"AutoConfig"} | {auto_class.__name__ for auto_class in AUTO_CLASSES}
    for auto_class, reference in AUTO_MAP.items():
        module, name = reference.split(".")
        assert hasattr(importlib.import_module(f"transnormer_hf.model.{module}"), name), auto_class


def test_with_the_package_the_same_folder_loads_without_a_question(saved_heads):
    for auto_class, model_class in AUTO_CLASSES.items():
        folder = saved_heads / auto_class.__name__
        assert type(AutoConfig.from_pretrained(folder)) is TransNormerConfig
        assert type(getattr(transformers, auto_class.__name__).from_pretrained(folder)) is model_class


@pytest.mark.parametrize("model_class", [TransNormerForMaskedLM, TransNormerForCausalLM])
def test_a_pretraining_model_is_the_one_that_was_saved(model_class, tmp_path):
    model_class(tiny_config(is_causal=model_class is TransNormerForCausalLM)).save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is model_class


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_folder_of_a_saved_configuration_and_weights_loads(is_installed, tmp_path):
    """As mergekit writes them: it reads configuration and tensors, and never makes a model."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(TransNormerForCausalLM(tiny_config(is_causal=True)).eval())
        models[-1].save_pretrained(tmp_path / str(seed))
    code = f"""
import {"transnormer_hf" if is_installed else "remote_code_probe"}  # with the latter, the package cannot be imported
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
root = Path({str(tmp_path)!r})
AutoConfig.from_pretrained(root / "0", trust_remote_code=True).save_pretrained(root / "merged")
weights = [load_file(root / name / "model.safetensors") for name in "01"]
merged = {{name: (weights[0][name] + weights[1][name]) / 2 for name in weights[0]}}
save_file(merged, root / "merged" / "model.safetensors", {{"format": "pt"}})
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(SOURCE.parents[1])])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.py")) == SHIPPED
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert check_remote_code(tmp_path / "merged")["class"] == "TransNormerForCausalLM"
    averaged, other = ([*model.parameters(), *model.buffers()] for model in models)
    for tensor, of_other in zip(averaged, other, strict=True):
        tensor.data.add_(of_other.data).div_(2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    input_ids = torch.randint(5, len(WORDS), (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, models[0](input_ids).logits)
