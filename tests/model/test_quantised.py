"""torch's own quantisation: no projection stays in float, and the logits move no further than a stock model's."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM, TransNormerForMaskedLM


def make_pair(is_causal, variant, width=64):
    """A TransNormer and a stock model of the same sizes, both with tied embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 2 * width}
    config = TransNormerConfig(**sizes, variant=variant)
    if is_causal:
        return TransNormerForCausalLM(config), LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    return TransNormerForMaskedLM(config), BertForMaskedLM(BertConfig(**sizes))


@torch.no_grad()
def relative_error(quantised, model):
    input_ids = torch.arange(3, 163).view(2, 80)
    expected = model.eval()(input_ids).logits
    return float((quantised.eval()(input_ids).logits - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_dynamic_quantisation_leaves_no_projection_in_float(is_causal, variant):
    errors = []
    for model in make_pair(is_causal, variant):
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        assert [name for name, module in quantised.named_modules() if isinstance(module, torch.nn.Linear)] == []
        assert torch.equal(quantised.get_input_embeddings().weight, model.get_input_embeddings().weight)
        errors.append(relative_error(quantised, model))
    of_ours, of_stock = errors
    assert 0 < of_ours <= 1.5 * of_stock
