"""The configuration: what it refuses, what it keeps, and that the paper's models and ablations are all expressible."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM, TransNormerForMaskedLM, TransNormerModel
from transnormer_hf.model.configuration_transnormer import ANY_LENGTH

PRESETS = Path(__file__).parents[2] / "model_cards"
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "block_size": 4,
    "max_position_embeddings": 24,
}


# (wrong fields, what the error must say): the field, the value it got and what would work.
WRONG = [
    ({"num_attention_heads": 5}, ["num_attention_heads=5", "hidden_size=768", "choose one of 1, 2, 3, 4, 6"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
    ({"num_attention_heads": "12"}, ["'num_attention_heads'", "expected int", "'12'|str"]),
    ({"hidden_size": 0}, ["hidden_size=0", "at least 1"]),
    ({"hidden_size": 60, "num_attention_heads": 4}, ["hidden_size=60", "head_dim=15", "even head_dim, or lrpe=False"]),
    ({"hidden_size": 768.0}, ["'hidden_size'", "expected int", "768.0"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    ({"vocab_size": 0, "pad_token_id": None}, ["vocab_size=0", "at least 1"]),
    ({"intermediate_size": -1}, ["intermediate_size=-1", "at least 1"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings=0", "at least 1"]),
    ({"block_size": 0}, ["block_size=0", "at least 1"]),
    ({"block_size": 64.0}, ["'block_size'", "expected int", "64.0"]),
    ({"attention_chunk_size": -64}, ["block_size=-64", "at least 1"]),
    ({"layer_types": ["linear_attention"] * 3}, ["layer_types has 3 entries", "num_hidden_layers=12", "one per layer"]),
    (
        {"layer_types": ["linear_attention"] * 11 + ["sliding_attention"]},
        [r"layer_types\[11\]='sliding_attention'", "hybrid"],
    ),
    ({"layer_types": "linear_attention"}, ["'layer_types'", "expected a list", "linear_attention"]),
    ({"variant": "t3"}, ["variant='t3'", "'t1', 't2'"]),
    ({"variant": None}, ["'variant'", "expected str", "None"]),
    ({"feature_map": "relu"}, ["feature_map='relu'", "'identity', 'elu', '1\\+elu'"]),
    ({"diag_activation": "elu"}, ["diag_activation='elu'", "'relu', 'softmax'"]),
    ({"norm_type": "none"}, ["norm_type='none'", "'simple_rms', 'rms', 'layer'"]),
    ({"attention_norm_type": "group"}, ["attention_norm_type='group'", "'none'"]),
    ({"embedding_norm": "group"}, ["embedding_norm='group'", "'batch', 'none'"]),
    ({"final_norm": "group"}, ["final_norm='group'", "'batch', 'none'"]),
    ({"norm_placement": "sandwich"}, ["norm_placement='sandwich'", "'pre', 'post'"]),
    ({"position_embedding": "rotary"}, ["position_embedding='rotary'", "'learned', 'sinusoidal', 'none'"]),
    (
        {"position_embedding": "sinusoidal", "hidden_size": 7, "num_attention_heads": 1, "lrpe": False},
        ["hidden_size=7", "'sinusoidal'", "even"],
    ),
    ({"feed_forward": "moe"}, ["feed_forward='moe'", "'glu', 'ffn'"]),
    ({"type_vocab_size": -1}, ["type_vocab_size=-1", "0 \\(no token types\\) or more"]),
    ({"classifier_activation": "softplus"}, ["classifier_activation='softplus'", "'tanh'"]),
    ({"hidden_act": "swiglu"}, ["hidden_act='swiglu'", "'linear'", "'silu'"]),
    ({"hybrid_combination": "sum"}, ["hybrid_combination='sum'", "'parallel'", "'diag_then_norm'"]),
    ({"pooling": "cls"}, ["pooling='cls'", "'first', 'mean', 'last'"]),
    ({"initializer": "zeros"}, ["initializer='zeros'", "'normal', 'xavier'"]),
    ({"initializer_range": 0.0}, ["initializer_range=0.0", "greater than 0"]),
    ({"layer_norm_eps": float("nan")}, ["layer_norm_eps=nan", "greater than 0"]),
    ({"backend": "cuda"}, ["backend='cuda'", "'auto', 'eager', 'torch', 'triton'"]),
    ({"hidden_dropout_prob": 1.5}, ["hidden_dropout_prob=1.5", "from 0 to 1"]),
    ({"attention_probs_dropout_prob": -0.1}, ["attention_probs_dropout_prob=-0.1", "from 0 to 1"]),
    ({"classifier_dropout": "0.1"}, ["'classifier_dropout'", "expected float", "str"]),
    ({"lrpe": "no"}, ["'lrpe'", "expected bool", "'no'|str"]),
    ({"is_causal": 1}, ["'is_causal'", "expected bool", "1"]),
    ({"pad_token_id": 50265}, ["pad_token_id=50265", "vocab_size=50265", "0 to 50264, or None"]),
    ({"pad_token_id": -1}, ["pad_token_id=-1", "0 to 50264, or None"]),
    ({"vocab_size": 2}, ["eos_token_id=2", "vocab_size=2", "0 to 1"]),
    ({"eos_token_id": [2, 60000]}, [r"eos_token_id=\[2, 60000\]", "0 to 50264"]),
]


@pytest.mark.parametrize(
    ("fields", "said"), WRONG, ids=lambda value: str(value)[:60] if isinstance(value, dict) else ""
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(fields, said):
    with pytest.raises(StrictDataclassError) as error:
        TransNormerConfig(**fields)
    for part in said:
        assert error.match(part)


def test_a_wrong_type_is_refused_on_assignment_too():
    config = TransNormerConfig(**TINY)
    with pytest.raises(StrictDataclassError, match="block_size"):
        config.block_size = "4"


def test_a_wrong_assignment_is_found_before_saving(tmp_path):
    config = TransNormerConfig(**TINY)
    config.num_attention_heads = 3
    with pytest.raises(StrictDataclassError, match="num_attention_heads=3 does not divide hidden_size=16"):
        config.save_pretrained(tmp_path)


def test_defaults_follow_the_paper():
    config = TransNormerConfig()
    assert config.layer_types == ["chunked_attention"] * 6 + ["linear_attention"] * 6
    assert (config.intermediate_size, config.head_dim, config.block_size) == (2048, 64, 64)
    assert (config.feature_map, config.diag_activation, config.attention_norm_type) == (
        "1+elu",
        "softmax",
        "simple_rms",
    )
    assert TransNormerConfig(hidden_size=512, num_attention_heads=8).intermediate_size == 1365
    assert TransNormerConfig(feed_forward="ffn").intermediate_size == 4 * 768
    t1 = TransNormerConfig(variant="t1")
    assert (t1.feature_map, t1.diag_activation) == ("elu", "relu")
    mixed = TransNormerConfig(variant="t1", feature_map="1+elu", norm_type="layer")
    assert (mixed.feature_map, mixed.diag_activation, mixed.attention_norm_type) == ("1+elu", "relu", "layer")


def test_an_odd_number_of_layers_has_the_smaller_half_first():
    assert TransNormerConfig(num_hidden_layers=1).layer_types == ["linear_attention"]
    assert TransNormerConfig(num_hidden_layers=3).layer_types == ["chunked_attention"] + ["linear_attention"] * 2


def test_block_size_is_what_transformers_calls_attention_chunk_size():
    config = TransNormerConfig(attention_chunk_size=32)
    assert config.block_size == config.attention_chunk_size == 32


ROUND_TRIP = {
    "every default": {},
    "nothing default": {
        **TINY,
        "variant": "t1",
        "layer_types": ["linear_attention", "hybrid"],
        "feature_map": "identity",
        "norm_type": "rms",
        "attention_norm_type": "none",
        "norm_placement": "pre",
        "embedding_norm": "none",
        "final_norm": "layer",
        "position_embedding": "none",
        "scale_embedding": True,
        "lrpe": False,
        "feed_forward": "ffn",
        "hidden_act": "linear",
        "hybrid_combination": "diag_then_norm",
        "hidden_dropout_prob": 0,
        "classifier_dropout": 0.3,
        "initializer": "xavier",
        "is_causal": True,
        "pooling": "mean",
        "pad_token_id": None,
        "eos_token_id": [2, 3],
        "num_labels": 7,
    },
}


@pytest.mark.parametrize("fields", ROUND_TRIP.values(), ids=ROUND_TRIP.keys())
def test_saving_and_loading_keeps_every_field(fields, tmp_path):
    config = TransNormerConfig(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (TransNormerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is TransNormerConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert {name: getattr(loaded, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 512),
        ({"max_position_embeddings": 40}, 40),
        ({"position_embedding": "sinusoidal"}, ANY_LENGTH),
        ({"position_embedding": "none"}, ANY_LENGTH),
        ({"position_embedding": "none", "max_position_embeddings": 40}, 40),
    ],
)
def test_a_model_without_a_table_of_positions_says_that_it_takes_any_length(fields, length, tmp_path):
    config = TransNormerConfig(**fields)
    assert config.max_position_embeddings == length
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == length
    is_chosen = "max_position_embeddings" in fields
    other = AutoConfig.from_pretrained(tmp_path, position_embedding="learned")
    assert other.max_position_embeddings == (40 if is_chosen else 512)


@pytest.mark.parametrize("release", [None, "0.2.0", "0.3.0"])
def test_the_length_that_earlier_releases_wrote_is_not_taken_for_a_choice(release, tmp_path):
    torch.manual_seed(0)
    fields = {**TINY, "position_embedding": "sinusoidal", "is_causal": True}
    model = TransNormerForCausalLM(TransNormerConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"max_position_embeddings": 512, "transnormer_version": release}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == ANY_LENGTH
    input_ids = torch.randint(TINY["vocab_size"], (1, 600))
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    written["max_position_embeddings"] = 600  # somebody's choice
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 600


def test_auto_map_serves_every_head(tmp_path):
    TransNormerConfig(**TINY).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 9
    assert auto_map["AutoModelForMaskedLM"] == "modeling_transnormer.TransNormerForMaskedLM"


class TestOverrides:
    """Fields given to from_pretrained are part of the configuration, not patched on behind its back."""

    @pytest.fixture
    def folder(self, tmp_path):
        TransNormerConfig(**TINY).save_pretrained(tmp_path)
        return tmp_path

    def test_derived_fields_follow(self, folder):
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=4, variant="t1", hidden_size=32, norm_type="rms")
        assert config.layer_types == ["chunked_attention"] * 2 + ["linear_attention"] * 2
        assert (config.feature_map, config.diag_activation) == ("elu", "relu")
        assert (config.intermediate_size, config.attention_norm_type) == (85, "rms")

    def test_fields_that_were_chosen_stay(self, folder):
        config = TransNormerConfig(**TINY, feature_map="identity", layer_types=["hybrid"] * 2, intermediate_size=10)
        config.save_pretrained(folder)
        loaded = AutoConfig.from_pretrained(folder, variant="t1", hidden_size=32)
        assert (loaded.feature_map, loaded.layer_types, loaded.intermediate_size) == ("identity", ["hybrid"] * 2, 10)
        with pytest.raises(StrictDataclassError, match="layer_types has 2 entries for num_hidden_layers=4"):
            AutoConfig.from_pretrained(folder, num_hidden_layers=4)

    def test_a_wrong_one_is_refused(self, folder):
        with pytest.raises(StrictDataclassError, match="num_attention_heads=3 does not divide"):
            AutoConfig.from_pretrained(folder, num_attention_heads=3)

    def test_what_is_not_a_field_is_handed_back(self, folder):
        config, unused = AutoConfig.from_pretrained(
            folder, block_size=8, num_labels=5, no_such_field=1, return_unused_kwargs=True
        )
        assert (config.block_size, config.num_labels, unused) == (8, 5, {"no_such_field": 1})

    def test_models_load_with_them(self, folder):
        TransNormerModel(TransNormerConfig(**TINY)).save_pretrained(folder)
        model = AutoModel.from_pretrained(folder, block_size=8, backend="eager", hidden_dropout_prob=0.0)
        assert model.layers[0].self_attn.options["block_size"] == 8
        assert (model.config.backend, model.dropout.p) == ("eager", 0.0)


# The tables of the paper, as far as TransNormer has a part in them, each row a configuration. Vanilla attention
# (Table 3) is one block as long as the input.
DIAG, NORM = "chunked_attention", "linear_attention"
ABLATIONS = {
    "Table 1, scaling removed": {"attention_norm_type": "none"},
    "Table 1, NormAttention": {"layer_types": [NORM] * 4},
    "Table 1, NormAttention with Eq. 14": {"layer_types": [NORM] * 4, "norm_type": "rms"},
    "Table 1, NormAttention with LayerNorm": {"attention_norm_type": "layer"},
    "Table 3, vanilla early": {"layer_types": [DIAG, DIAG, NORM, NORM], "block_size": 24},
    "Table 3, vanilla late": {"layer_types": [NORM, NORM, DIAG, DIAG], "block_size": 24},
    "Table 8, 0 % Diag": {"layer_types": [NORM] * 4},
    "Table 8, 25 % Diag": {"layer_types": [DIAG, NORM, NORM, NORM]},
    "Table 8, 50 % Diag": {"layer_types": [DIAG, DIAG, NORM, NORM]},
    "Table 8, 75 % Diag": {"layer_types": [DIAG, DIAG, DIAG, NORM]},
    "Table 8, 100 % Diag": {"layer_types": [DIAG] * 4},
    "Table 9, Norm early": {"layer_types": [NORM, NORM, DIAG, DIAG]},
    "Table 10, FFN": {"feed_forward": "ffn", "hidden_act": "gelu"},
    "Table 10, GLU": {"feed_forward": "glu"},
    "Table 11, block 2": {"block_size": 2},
    "Table 11, block 8": {"block_size": 8},
    "Table 12, alternating": {"layer_types": [DIAG, NORM, DIAG, NORM]},
    "Table 12, parallel": {"layer_types": ["hybrid"] * 4},
    "Table 12, D -> N in a layer": {"layer_types": ["hybrid"] * 4, "hybrid_combination": "diag_then_norm"},
    "Table 12, N -> D in a layer": {"layer_types": ["hybrid"] * 4, "hybrid_combination": "norm_then_diag"},
    "no LRPE": {"lrpe": False},
    "identity feature map": {"feature_map": "identity"},
}


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("fields", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_every_ablation_of_the_paper_is_a_configuration(fields, variant):
    model = TransNormerForMaskedLM(TransNormerConfig(**{**TINY, "num_hidden_layers": 4, "variant": variant, **fields}))
    input_ids = torch.randint(TINY["vocab_size"], (2, 11))
    outputs = model(input_ids, labels=input_ids, skip_logits=False)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 11, TINY["vocab_size"])
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


RELEASED_COUNTS = {
    "transnormer-t1-wikitext103": (AutoModelForCausalLM, 155_988_540, "155.99 M"),
    "transnormer-t2-wikitext103": (AutoModelForCausalLM, 155_988_540, "155.99 M"),
    "transnormer-t1-base": (AutoModelForMaskedLM, 124_673_241, "124.67 M"),
    "transnormer-t2-base": (AutoModelForMaskedLM, 124_673_241, "124.67 M"),
}


@pytest.mark.parametrize("preset", RELEASED_COUNTS)
def test_presets_have_the_released_parameter_counts(preset):
    auto_class, released, in_paper = RELEASED_COUNTS[preset]
    config = AutoConfig.from_pretrained(PRESETS / preset)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    trained = sum(parameter.numel() for parameter in model.parameters())
    # the released code counts the vectors of the reflections, frozen parameters there and buffers here
    frozen = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("householder"))
    print(f"{preset}: {(trained + frozen) / 1e6:.2f} M parameters ({trained:,} learned, {frozen:,} frozen)")
    assert frozen == config.num_hidden_layers * config.head_dim
    assert trained + frozen == released
    assert f"{released / 1e6:.2f} M" == in_paper
    assert [type(model).__name__] == config.architectures


@pytest.mark.parametrize("preset", RELEASED_COUNTS)
def test_presets_can_be_made_smaller(preset):
    config = AutoConfig.from_pretrained(PRESETS / preset, num_hidden_layers=4, hidden_size=32, num_attention_heads=4)
    assert config.layer_types == ["chunked_attention"] * 2 + ["linear_attention"] * 2
    assert config.intermediate_size == 85
    assert config.variant == preset.split("-")[1]
