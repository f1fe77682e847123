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


def test_bertviz_shows_every_layer(folder):
    bertviz = pytest.importorskip("bertviz")
    util = pytest.importorskip("bertviz.util")
    model = AutoModel.from_pretrained(folder, output_attentions=True)  # as its examples load a model
    attentions = model(torch.arange(3, 12)[None]).attentions
    assert util.format_attention(attentions).shape == (4, 2, 9, 9)
    tokens = list("abcdefghi")
    for view in (bertviz.model_view, bertviz.head_view):
        page = view(attentions, tokens, html_action="return").data
        assert all(f'"{token}"' in page for token in tokens)


def test_captum_attributes_a_class_to_tokens(folder):
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


def test_trainer_gathers_the_maps_of_every_layer(folder, tmp_path):
    model = TransNormerForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    model.config.output_attentions = True
    rows = [{"input_ids": list(range(3, 12)), "labels": 0} for _ in range(5)]
    arguments = TrainingArguments(tmp_path / "out", per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    logits, attentions = Trainer(model, arguments).predict(rows).predictions
    assert logits.shape == (5, 2)
    assert [weights.shape for weights in attentions] == [(5, 2, 9, 9)] * 4


def test_our_report_sees_the_same_layers(folder):
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
