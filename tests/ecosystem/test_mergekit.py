"""mergekit, without this package: it takes folders apart and writes one that loads by its own code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_remote_code import WORDS, tiny_config, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from transnormer_hf import TransNormerForCausalLM
from transnormer_hf.hub.remote_code import check_remote_code

pytest.importorskip("mergekit")
pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("mergekit")]


def make_model(kind, seed):
    torch.manual_seed(seed)
    if kind == "TransNormer":
        return TransNormerForCausalLM(tiny_config(is_causal=True, initializer_range=0.3)).eval()
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=3)).eval()


@pytest.mark.parametrize("kind", ["TransNormer", "Llama"])
def test_a_linear_merge_is_the_model_of_the_mean_weights(kind, tmp_path, record_property):
    models = [make_model(kind, seed) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
        word_tokenizer().save_pretrained(tmp_path / str(seed))
    half = [{"model": str(tmp_path / str(seed)), "parameters": {"weight": 0.5}} for seed in range(2)]
    recipe = {"merge_method": "linear", "dtype": "float32", "models": half}
    (tmp_path / "merge.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "merge.yaml", "merged", "--trust-remote-code"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    if kind == "TransNormer":
        assert check_remote_code(tmp_path / "merged")["class"] == "TransNormerForCausalLM"
    mean, other = ([*model.parameters(), *model.buffers()] for model in models)
    for tensor, of_other in zip(mean, other, strict=True):
        tensor.data.add_(of_other.data).div_(2)
    input_ids = torch.randint(5, len(WORDS), (2, 7))
    with torch.no_grad():
        expected = models[0](input_ids).logits
        found = type(models[0]).from_pretrained(tmp_path / "merged").eval()(input_ids).logits
    difference = (found - expected).abs().max().item()
    assert difference < 1e-5
    record_property("measured", f"{kind}: logits within {difference:.0e}")
