"""Gradients of attention weights in a model: the closed form against autograd."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from transnormer_hf.model.reference_transnormer import AttentionMetadata
from transnormer_hf.research.baselines import MIXERS, BaselineConfig
from transnormer_hf.research.diagnostics.score_gradients import score_gradients

TOKENS, CHANNELS = 5, 4


class OneHead(nn.Module):
    """A mixer alone, on queries and keys that it holds."""

    def __init__(self, name, causal, shift):
        super().__init__()
        config = BaselineConfig(hidden_size=CHANNELS, num_attention_heads=1, num_hidden_layers=1, is_causal=causal)
        self.mixer, self.causal = MIXERS[name](config), causal
        self.query, self.key = (torch.randn(1, 1, TOKENS, CHANNELS) + shift for _ in range(2))

    def forward(self, input_ids):
        metadata = AttentionMetadata(torch.arange(TOKENS), None)
        return self.mixer(self.query, self.key, self.key, metadata, self.causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [0.0, -4.0])  # below, features and sums are small and gradients large
@pytest.mark.parametrize("name", ["1+elu", "softmax"])
def test_the_largest_gradient_is_that_of_autograd(name, shift, causal):
    model = OneHead(name, causal, shift).eval()
    query, key = model.query[0, 0].double(), model.key[0, 0].double()
    if name == "softmax":
        scores = query @ key.T / CHANNELS**0.5
    else:
        scores = (nn.functional.elu(query) + 1) @ (nn.functional.elu(key) + 1).T

    def weights(row):
        return row.softmax(-1) if name == "softmax" else row / row.sum()

    largest = []
    for i in range(TOKENS):
        visible = scores[i, : i + 1] if causal else scores[i]
        if len(visible) > 1:
            largest.append(torch.autograd.functional.jacobian(weights, visible).abs().max().item())
    found = score_gradients(model, torch.zeros(1, 1, dtype=torch.long))
    assert found["largest"] == pytest.approx(max(largest), rel=1e-4)
    assert found["median"] == pytest.approx(torch.tensor(largest).double().quantile(0.5).item(), rel=1e-4)
    assert (found["largest"] > 0.25) == (name == "1+elu" and shift < 0)


def test_a_models_layers_are_looked_at_and_left_as_they_were():
    config = BaselineConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=11, is_causal=True, mixer="1+elu"
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    found = score_gradients(model, ids)
    assert 0 < found["median"] < found["largest"]
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match=r"Linear has no softmax and no mixer with features"):
        score_gradients(nn.Linear(1, 1), ids)
