"""A causal model evaluates through the stock `hf` model of lm-evaluation-harness, from the task file in scripts/."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_remote_code import tiny_config, word_tokenizer
from tokenizers import processors

from transnormer_hf import TransNormerForCausalLM

ROOT = Path(__file__).parents[2]
TASK = ROOT / "scripts" / "lm_eval"


@pytest.mark.slow
def test_bits_per_byte_are_those_of_the_model(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # the task file names its data from here
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = TransNormerForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "[CLS]"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # adds nothing, as with GPT-2
    tokenizer.save_pretrained(tmp_path / "model")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32,device=cpu",
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(TASK)),
        batch_size=2,
        bootstrap_iters=0,
    )
    bits = results["results"]["local_text"]["bits_per_byte,none"]

    texts = [json.loads(line)["text"] for line in (TASK / "local_text.jsonl").read_text().splitlines()]
    total = 0.0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        inputs = torch.tensor([[tokenizer.bos_token_id, *ids]])  # lm-eval starts every document from bos
        with torch.no_grad():
            scores = model(inputs).logits.log_softmax(-1)[0]  # (seq, vocab)
        total += scores[range(len(ids)), ids].sum().item()
    size = sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(-total / size / math.log(2), rel=1e-5)
