"""Packed rows as different tools describe them: what a text gets in a row of several is what it gets by itself."""

import pytest
import torch
from test_remote_code import WORDS, tiny_config
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from transnormer_hf import TransNormerForCausalLM

pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("packed rows")]
LENGTHS = (9, 6, 12)


def make_model(kind):
    torch.manual_seed(0)
    if kind == "TransNormer":
        return TransNormerForCausalLM(tiny_config(position_embedding="none", initializer_range=0.3)).eval()
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "initializer_range": 0.3, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@torch.no_grad()
def leak(kind, **fields):
    """The largest change of a logit when three texts share a row that these arguments describe."""
    model, generator = make_model(kind), torch.Generator().manual_seed(1)
    texts = [torch.randint(5, len(WORDS), (1, length), generator=generator) for length in LENGTHS]
    alone = torch.cat([model(text, use_cache=False).logits for text in texts], 1)
    return (model(torch.cat(texts, 1), use_cache=False, **fields).logits - alone).abs().max().item()


def restarting_positions():
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens_q"])
def test_texts_stay_apart_beside_a_mask_of_ones(given, record_property):
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    fields = {"position_ids": restarting_positions()} if given == "position_ids" else {"cu_seq_lens_q": boundaries}
    change = leak("TransNormer", attention_mask=torch.ones(1, sum(LENGTHS), dtype=torch.long), **fields)
    assert change < 1e-5
    record_property("measured", f"{given}: logits move by {change:.0e}")
    if given == "position_ids":
        ones = torch.ones(1, sum(LENGTHS), dtype=torch.long)
        of_llama = leak("Llama", position_ids=restarting_positions(), attention_mask=ones)
        record_property("measured", f"{given}, Llama: by {of_llama:.1g}")


@pytest.mark.parametrize("kind", ["TransNormer", "Llama"])
def test_the_flattening_collator_has_the_loss_of_the_same_texts_apart(kind, record_property):
    model, generator = make_model(kind), torch.Generator().manual_seed(1)
    texts = [torch.randint(5, len(WORDS), (length,), generator=generator).tolist() for length in LENGTHS]
    batch = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    with torch.no_grad():
        together = model(**batch, use_cache=False).loss
        rows = [torch.tensor([text]) for text in texts]
        apart = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    expected = sum(apart) / sum(length - 1 for length in LENGTHS)
    difference = (together - expected).abs().item()
    assert difference < 1e-5
    record_property("measured", f"{kind}: loss within {difference:.0e}")
