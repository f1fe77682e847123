"""Tools that read attention maps, on models that mix both attentions."""

import pytest
import torch
from transformers import AutoModel, Trainer, TrainingArguments

from transnormer_hf import TransNormerConfig, TransNormerForSequenceClassification, TransNormerModel

pytestmark = pytest.mark.ecosystem


@pytest.fixture
def folder(tmp_path):
    config = TransNormerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, block_size=4, initializer_range=0.3
    )
    TransNormerForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.cell("bertviz")
def test_bertviz_shows_every_layer(folder, record_property):
    bertviz = pytest.importorskip("bertviz")
    util = pytest.importorskip("bertviz.util")
    model = AutoModel.from_pretrained(folder, output_attentions=True)  # as its examples load a model
    attentions = model(torch.arange(3, 12)[None]).attentions
    assert util.format_attention(attentions).shape == (4, 2, 9, 9)
    tokens = list("abcdefghi")
    for view in (bertviz.model_view, bertviz.head_view):
        page = view(attentions, tokens, html_action="return").data
        assert all(f'"{token}"' in page for token in tokens)
    record_property("measured", f"maps of {len(attentions)} of {model.config.num_hidden_layers} layers")


@pytest.mark.cell("attention maps")
def test_eager_and_sdpa_give_the_same_states_and_maps(folder, record_property):
    input_ids, found = torch.randint(3, 50, (2, 23)), []
    for name in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        with torch.no_grad():
            attentions = model(input_ids, output_attentions=True).attentions
            found.append([model(input_ids).last_hidden_state, *attentions])
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found, strict=True))
    assert len(found[0]) == 5
    assert difference < 1e-5
    with pytest.raises(ValueError, match="flash_attention_2"):
        AutoModel.from_pretrained(folder, attn_implementation="flash_attention_2")
    record_property("measured", f"largest difference, relative {difference:.0e}; others are refused")


@pytest.mark.cell("captum")
def test_captum_attributes_a_class_to_tokens(folder, record_property):
    attr = pytest.importorskip("captum.attr")
    model = TransNormerForSequenceClassification.from_pretrained(folder).eval()
    input_ids, baseline = torch.arange(3, 12)[None], torch.full((1, 9), model.config.pad_token_id)

    def score(ids):
        return model(ids).logits[:, 1]

    method = attr.LayerIntegratedGradients(score, model.get_input_embeddings())
    attributions, delta = method.attribute(input_ids, baseline, n_steps=200, return_convergence_delta=True)
    assert attributions.shape == (1, 9, 16)
    with torch.no_grad():
        gap = float(score(input_ids) - score(baseline))
    assert abs(float(delta)) < 0.02 * abs(gap)  # the attributions sum to the difference of the scores
    record_property("measured", f"gap {abs(float(delta)) / abs(gap):.0e} of the difference")


@pytest.mark.cell("attention maps")
def test_trainer_gathers_the_maps_of_every_layer(folder, tmp_path, record_property):
    model = TransNormerForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    model.config.output_attentions = True
    rows = [{"input_ids": list(range(3, 12)), "labels": 0} for _ in range(5)]
    arguments = TrainingArguments(tmp_path / "out", per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    logits, attentions = Trainer(model, arguments).predict(rows).predictions
    assert logits.shape == (5, 2)
    assert [weights.shape for weights in attentions] == [(5, 2, 9, 9)] * 4
    record_property("measured", f"{len(attentions)} of {model.config.num_hidden_layers} layers")


@pytest.mark.cell("attention maps")
def test_our_report_sees_the_same_layers(folder, record_property):
    from transnormer_hf.research.diagnostics import attention_report

    model, batch = TransNormerModel.from_pretrained(folder), {"input_ids": torch.arange(3, 12)[None]}
    attentions = model(**batch, output_attentions=True).attentions
    report = attention_report(model, batch)
    assert [layer["layer"] for layer in report.layers] == [0, 1, 2, 3]
    for layer, of_report, weights in zip(report.layers, report.maps, attentions, strict=True):
        scores = weights[0].abs()
        normalised = (scores / scores.sum(-1, keepdim=True)).mean(0)
        torch.testing.assert_close(of_report, normalised)
        is_block = layer["kind"] == "chunked_attention"
        assert bool((weights[..., :4, 4:] == 0).all()) == is_block
    record_property("measured", f"{len(report.layers)} of {model.config.num_hidden_layers} layers")
