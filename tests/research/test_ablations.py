"""The ablations: every row builds and learns, and is what it says it is."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from transnormer_hf import TransNormerConfig
from transnormer_hf.research.ablations import ABLATIONS, ablation_config, find_ablations
from transnormer_hf.research.baselines import BaselineConfig

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 160,
}
of_each_row = pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
DIAG, NORM = "chunked_attention", "linear_attention"


def configure(name, variant="t1", **fields):
    (ablation,) = (ablation for ablation in ABLATIONS if ablation.name == name)
    return ablation_config(TransNormerConfig(**BASE | fields, variant=variant), ablation)


@of_each_row
@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_every_row_builds_and_runs(ablation, variant):
    config = ablation_config(TransNormerConfig(**BASE, variant=variant), ablation)
    model = AutoModelForMaskedLM.from_config(config)
    ids = torch.randint(3, 40, (2, 140))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(config.layer_types) == 4


@of_each_row
def test_every_row_survives_its_folder(ablation, tmp_path):
    config = ablation_config(TransNormerConfig(**BASE), ablation)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again).__name__ == type(config).__name__
    assert again.layer_types == config.layer_types
    assert again.intermediate_size == config.intermediate_size


@of_each_row
def test_rows_that_are_the_model_itself_change_nothing(ablation):
    """What the paper reports with the perplexity of T1, is T1."""
    base = TransNormerConfig(**BASE, variant="t1")
    is_model = ablation.perplexity.get("t1") == 3.82
    assert (ablation_config(base, ablation).to_dict() == base.to_dict()) == is_model


def test_table_1_removes_scaling_and_norm():
    scaled, removed, rms, layer = (
        configure(f"table 1: {row}")
        for row in (
            "1+elu with scaling",
            "1+elu, scaling removed",
            "NormAttention, RMSNorm",
            "NormAttention, LayerNorm",
        )
    )
    assert isinstance(scaled, BaselineConfig)
    assert scaled.layer_types == ["1+elu"] * 4
    for config, norm in ((removed, "none"), (rms, "simple_rms"), (layer, "layer")):
        assert (config.layer_types, config.feature_map, config.attention_norm_type) == ([NORM] * 4, "1+elu", norm)
    for config in (scaled, removed, rms, layer):  # the same backbone
        assert (config.lrpe, config.feed_forward, config.norm_type) == (False, "ffn", "layer")
        assert config.intermediate_size == 4 * config.hidden_size


def test_layers_of_each_table():
    assert configure("table 3: vanilla early, 1+elu late").layer_types == ["softmax"] * 2 + ["1+elu"] * 2
    assert configure("table 8: 25 % Diag").layer_types == [DIAG] + [NORM] * 3
    assert configure("table 8: 75 % Diag", num_hidden_layers=12).layer_types == [DIAG] * 9 + [NORM] * 3
    assert configure("table 9: Norm early, Diag late").layer_types == [NORM] * 2 + [DIAG] * 2
    assert configure("table 12: parallel").layer_types == ["hybrid"] * 4
    assert configure("table 12: chained, Norm to Diag").hybrid_combination == "norm_then_diag"


def test_only_what_the_row_names_is_changed():
    changed = configure("table 11: block 32", "t2", initializer_range=0.1)
    assert (changed.block_size, changed.variant, changed.initializer_range) == (32, "t2", 0.1)
    ffn = configure("table 10: FFN")
    assert (ffn.feed_forward, ffn.intermediate_size, ffn.feature_map) == ("ffn", 64, "elu")


def test_names_are_unique_and_tables_are_found():
    assert len({ablation.name for ablation in ABLATIONS}) == len(ABLATIONS)
    assert [ablation.row for ablation in find_ablations(10)] == ["FFN", "GLU"]
    assert len(find_ablations()) == len(ABLATIONS)
    with pytest.raises(ValueError, match="table=7 is no table of ablations; choose from 1, 3, 8"):
        find_ablations(7)
