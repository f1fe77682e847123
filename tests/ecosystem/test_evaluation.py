"""lm-evaluation-harness: its windows are as long as what the model can take, and its scores those of the model."""

import pytest
import torch
from test_remote_code import WORDS, tiny_config, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from transnormer_hf import TransNormerForCausalLM

pytest.importorskip("lm_eval.api")  # a folder of tasks here has the name of the package
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("lm-eval")]
LENGTH = 1500


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.bos_token = tokenizer.eos_token = "[CLS]"
    return tokenizer


def make_model(kind):
    torch.manual_seed(0)
    if kind == "TransNormer":
        return TransNormerForCausalLM(tiny_config(position_embedding="sinusoidal", initializer_range=0.3)).eval()
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize(("kind", "window"), [("TransNormer", LENGTH), ("Llama of 512 positions", 512)])
def test_windows_are_as_long_as_the_model_says_and_their_scores_are_the_models(
    kind, window, tokenizer, monkeypatch, record_property
):
    model = make_model(kind)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    lengths = []

    def recorded(inputs, *args, call=harness._model_call, **kwargs):
        lengths.append(inputs.shape[1])
        return call(inputs, *args, **kwargs)

    monkeypatch.setattr(harness, "_model_call", recorded)
    ids = torch.randint(5, len(WORDS), (LENGTH,)).tolist()
    monkeypatch.setattr(harness, "tok_encode", lambda *args, **kwargs: ids)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("text",), idx=0)
    (score,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert max(lengths) == window
    record_property("measured", f"{kind}: windows of {max(lengths)} tokens for a text of {LENGTH}")
    if kind == "TransNormer":
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]])).logits.double().log_softmax(-1)[0]
        assert score == pytest.approx(logits[range(LENGTH), ids].sum().item(), rel=1e-5)
