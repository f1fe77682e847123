"""What a model of transformers computes, its TransNormer computes, wherever softmax attention is what both have."""

import pytest
import torch
import transformers

from transnormer_hf.linearize import SourceError, transfer

ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "classifier_dropout": 0.2,
    "pad_token_id": 1,
    "num_labels": 3,
}
DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TASKS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
TASKS += ["ForMultipleChoice"]
DECODER_TASKS = ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]

# name: (prefix of the classes, configuration, heads)
SOURCES = {
    "bert": ("Bert", ENCODER, TASKS),
    "roberta": ("Roberta", ENCODER, TASKS),
    # their multiple choice has no pooler, and fails, before transformers 5.14
    "xlm-roberta": ("XLMRoberta", ENCODER, TASKS[:-1]),
    "camembert": ("Camembert", ENCODER, TASKS[:-1]),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 40,
            "dim": 16,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 20,
            "pad_token_id": 1,
            "num_labels": 3,
        },
        TASKS,
    ),
    "electra": ("Electra", ENCODER | {"embedding_size": 16}, TASKS),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 20,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "num_labels": 3,
        },
        ["Model", "LMHeadModel", *DECODER_TASKS[1:]],
    ),
    "gpt2, head of its own": (
        "GPT2",
        {
            "n_embd": 16,
            "n_head": 2,
            "n_layer": 3,
            "vocab_size": 40,
            "n_positions": 20,
            "n_inner": 24,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        },
        ["LMHeadModel"],
    ),
    "llama": ("Llama", DECODER, DECODER_TASKS),
    "llama, tied head, biases, scaled RoPE": (
        "Llama",
        DECODER | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        ["ForCausalLM"],
    ),
    "mistral": ("Mistral", DECODER | {"sliding_window": None}, DECODER_TASKS),
    "qwen2": ("Qwen2", DECODER, DECODER_TASKS),
}


def make_source(name, task, **options):
    """A model whose weights are all random, gains and biases of norms included."""
    prefix, fields, _ = SOURCES[name]
    if task == "ForQuestionAnswering":
        fields = fields | {"num_labels": 2}  # where an answer begins and ends
    config = getattr(transformers, f"{prefix}Config")(**fields | options)
    model = getattr(transformers, prefix + task)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and parameter_name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if is_norm else 0))
    return model


def make_batch(source):
    """(2, 9) tokens, the second row padded on the right; one row of two choices for multiple choice."""
    input_ids = torch.randint(3, 40, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    batch = {"input_ids": input_ids.where(attention_mask == 1, 1), "attention_mask": attention_mask}
    return {key: value[None] for key, value in batch.items()} if "MultipleChoice" in type(source).__name__ else batch


@torch.no_grad()
def compare(source, target, batch):
    """Outputs and hidden states of the real tokens agree to 1e-5 of their size."""
    expected = source(**batch, output_hidden_states=True)
    actual = target(**batch, output_hidden_states=True)
    is_real = batch["attention_mask"].flatten(0, -2).bool()

    def check(ours, theirs):
        if ours.shape[:2] == is_real.shape:
            ours, theirs = ours[is_real], theirs[is_real]
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    outputs = [key for key in expected if key.endswith("logits") or key == "last_hidden_state"]
    assert outputs
    for key in outputs:
        check(actual[key], expected[key])
    # the last one of a decoder is after a norm, whose gain is in the head here
    last = -1 if source.config.model_type in ("llama", "mistral", "qwen2") else None
    assert len(actual.hidden_states) == len(expected.hidden_states) == source.config.num_hidden_layers + 1
    for ours, theirs in list(zip(actual.hidden_states, expected.hidden_states, strict=True))[:last]:
        check(ours, theirs)


EVERY_HEAD = [(name, task) for name, (_, _, tasks) in SOURCES.items() for task in tasks]


@pytest.mark.parametrize(("name", "task"), EVERY_HEAD)
def test_texts_of_one_block_come_out_as_from_the_source(name, task):
    source = make_source(name, task)
    target = transfer(source, num_linear_layers=0, block_size=16)
    assert type(target).__name__ == "TransNormer" + task.replace("LMHeadModel", "ForCausalLM")
    assert set(target.config.layer_types) == {"chunked_attention"}
    compare(source, target, make_batch(source))


@pytest.mark.parametrize(("name", "task"), [(name, row[2][0]) for name, row in SOURCES.items()])
def test_full_attention_computes_what_the_source_does_for_any_text(name, task):
    source = make_source(name, task)
    target = transfer(source, softmax_layers=[0, 1, 2], block_size=2)
    compare(source, target, make_batch(source))


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "distilbert", "electra"])
def test_a_head_of_its_own_stays_one(name):
    source = make_source(name, "ForMaskedLM", tie_word_embeddings=False)
    target = transfer(source, num_linear_layers=0)
    assert not target.config.tie_word_embeddings
    compare(source, target, make_batch(source))


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "electra"])
def test_token_types_come_along(name):
    source = make_source(name, "Model", type_vocab_size=3)
    batch = make_batch(source)
    types = torch.randint(0, 3, batch["input_ids"].shape)
    target = transfer(source, num_linear_layers=0)
    compare(source, target, batch | {"token_type_ids": types})
    outputs = [target(**batch, token_type_ids=given).last_hidden_state for given in (types, types * 0)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, tied head, biases, scaled RoPE"])
def test_decoders_write_what_the_source_writes(name):
    source = make_source(name, SOURCES[name][2][0] if name != "gpt2" else "LMHeadModel")
    target = transfer(source, layer_types=["chunked_attention", "full_attention", "chunked_attention"], block_size=16)
    source.generation_config.eos_token_id = target.generation_config.eos_token_id = None
    batch = make_batch(source)  # generate wants padding on the left
    batch = {key: value.flip(1) for key, value in batch.items()}
    expected = source.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(target.generate(**batch, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("name", SOURCES)
def test_half_of_the_layers_are_linear_unless_told_otherwise(name):
    source = make_source(name, SOURCES[name][2][0])
    target = transfer(source)
    assert target.config.layer_types == ["chunked_attention", "linear_attention", "linear_attention"]
    assert target(**make_batch(source))[0].isfinite().all()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"num_linear_layers": 1}, "CCN"),
        ({"num_linear_layers": 3}, "NNN"),
        ({"num_linear_layers": 2, "softmax_layers": [2]}, "CNF"),
        ({"softmax_layers": [0]}, "FNN"),
        ({"layer_types": ["linear_attention", "chunked_attention", "full_attention"]}, "NCF"),
    ],
)
def test_the_choices_of_layers(choice, expected):
    kinds = {"C": "chunked_attention", "N": "linear_attention", "F": "full_attention"}
    target = transfer(make_source("bert", "Model"), **choice)
    assert target.config.layer_types == [kinds[letter] for letter in expected]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_linear_layers": 4}, "num_linear_layers=4 must be from 0 to 3"),
        ({"num_linear_layers": 1, "layer_types": ["linear_attention"] * 3}, "layer_types and num_linear_layers=1"),
        ({"softmax_layers": [3]}, "softmax_layers holds 3; the source's layers are 0 to 2"),
        ({"layer_types": ["hybrid"] * 3}, "layer_types holds 'hybrid'"),
        ({"position_extension": "stretch"}, "position_extension='stretch' is not known; choose 'none', 'interpolate'"),
        (
            {"max_position_embeddings": 30},
            "max_position_embeddings=30 and the source learned 20.*'interpolate' or 'tile'",
        ),
    ],
)
def test_arguments_that_do_not_fit(choice, message):
    with pytest.raises(ValueError, match=message):
        transfer(make_source("bert", "Model"), **choice)


def test_interpolated_positions_lie_on_lines_between_learned_ones():
    source = make_source("roberta", "Model")
    learned = source.embeddings.position_embeddings.weight[2:]  # 18 rows behind those of padding
    target = transfer(source, max_position_embeddings=52, position_extension="interpolate")
    positions = target.embed_positions.embedding.weight[2:]
    assert target.config.max_position_embeddings == len(positions) == 52  # three steps in place of one
    torch.testing.assert_close(positions[::3], learned)
    torch.testing.assert_close(positions[1::3], (2 * learned[:-1] + learned[1:]) / 3)
    assert target(torch.randint(3, 40, (1, 52))).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_tiled_positions_repeat_and_leave_short_texts_as_they_were(name):
    source = make_source(name, "Model")
    target = transfer(source, num_linear_layers=0, max_position_embeddings=50, position_extension="tile")
    compare(source, target, make_batch(source))
    positions = target.embed_positions.embedding.weight[2:]
    learned = 18 if name == "roberta" else 20
    assert len(positions) == 50
    assert torch.equal(positions[learned:], positions[: 50 - learned])
    assert target(torch.randint(3, 40, (1, 50))).last_hidden_state.isfinite().all()


def test_fewer_positions_are_the_first_ones():
    source = make_source("bert", "Model")
    target = transfer(source, num_linear_layers=0, max_position_embeddings=10)
    compare(source, target, make_batch(source))
    with pytest.raises(ValueError, match="11 tokens and max_position_embeddings=10"):
        target(torch.randint(3, 40, (1, 11)))


def test_rotations_exist_for_every_position():
    source = make_source("llama", "ForCausalLM")
    target = transfer(source, num_linear_layers=0, max_position_embeddings=1000)
    assert target.config.max_position_embeddings == 1000
    batch = {"input_ids": torch.randint(3, 40, (1, 60)), "attention_mask": torch.ones(1, 60, dtype=torch.long)}
    compare(source, target, batch)
    with pytest.raises(ValueError, match="position_extension='tile': llama has no table of positions"):
        transfer(source, position_extension="tile")


def test_the_angles_of_every_layer_are_the_sources():
    source = make_source("llama, tied head, biases, scaled RoPE", "ForCausalLM")
    target = transfer(source)
    assert len(source.model.rotary_emb.inv_freq.unique()) == 4
    for layer in target.model.layers:
        assert torch.equal(layer.self_attn.lrpe.theta, source.model.rotary_emb.inv_freq)
        assert not layer.self_attn.lrpe.householder.any()


def test_settings_come_along():
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "num_labels": 2}
    source = make_source("bert", "ForSequenceClassification", problem_type="multi_label_classification", **labels)
    config = transfer(source, block_size=8, variant="t1").config
    assert (config.block_size, config.diag_activation, config.feature_map) == (8, "relu", "elu")
    for field in ("id2label", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "classifier_dropout"):
        assert getattr(config, field) == getattr(source.config, field)

    source = make_source("gpt2", "LMHeadModel", resid_pdrop=0.3, attn_pdrop=0.2)
    source.generation_config.eos_token_id = [2, 3]
    target = transfer(source)
    assert target.generation_config.eos_token_id == [2, 3]
    assert (target.config.hidden_dropout_prob, target.config.attention_probs_dropout_prob) == (0.3, 0.2)
    assert target.config.is_causal
    assert target.config.tie_word_embeddings
    assert not transfer(make_source("gpt2, head of its own", "LMHeadModel")).config.tie_word_embeddings


def test_the_source_stays_as_it_is_and_bfloat16_becomes_float32():
    source = make_source("llama", "ForCausalLM").bfloat16()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target = transfer(source, num_linear_layers=0)
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_a_saved_transfer_loads_as_it_was(tmp_path):
    source = make_source("llama", "ForCausalLM")
    transfer(source, num_linear_layers=0).save_pretrained(tmp_path)
    compare(source, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), make_batch(source))


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSED = [
    ("bert", "Model", {"is_decoder": True}, "bert: is_decoder=True .*load the source with is_decoder=False"),
    ("bert", "Model", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ("bert", "ForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu' .*'gelu'; load the source with AutoModel"),
    ("bert", "ForNextSentencePrediction", {}, "BertForNextSentencePrediction .*AutoModel"),
    ("distilbert", "ForMaskedLM", {"activation": "relu"}, "activation='relu' .*'gelu'"),
    ("electra", "Model", {"embedding_size": 8}, "embedding_size=8 .*hidden_size=16"),
    ("electra", "ForPreTraining", {}, "ElectraForPreTraining .*AutoModel"),
    ("electra", "ForMultipleChoice", {"summary_type": "mean"}, "summary_type='mean' .*first token"),
    ("gpt2", "Model", {"scale_attn_weights": False}, "scale_attn_weights=False .*sqrt"),
    ("gpt2", "Model", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True .*sqrt"),
    ("gpt2", "Model", {"add_cross_attention": True}, "add_cross_attention=True .*without it"),
    ("gpt2", "DoubleHeadsModel", {}, "GPT2DoubleHeadsModel .*GPT2LMHeadModel"),
    ("llama", "ForCausalLM", {"head_dim": 16}, "head_dim=16 .*num_attention_heads=4 .*hidden_size=32"),
    ("llama", "ForCausalLM", {"rope_parameters": LONG}, "'rope_type'.='longrope' .*'linear' or 'llama3'"),
    (
        "llama",
        "ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "attention_scaling of RoPE=1.1.* 'yarn' scales",
    ),
    ("mistral", "ForCausalLM", {"sliding_window": 8}, "mistral: sliding_window=8 .*sliding_window=None"),
    ("qwen2", "ForCausalLM", {"use_sliding_window": True, "sliding_window": 8}, "qwen2: sliding_window=8"),
    ("llama", "Model", {}, r"LlamaModel .*1 tensors.*\n  left over: norm.weight \(32,\), a gain that no linear"),
]


@pytest.mark.parametrize(("name", "task", "options", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name, task, options, message):
    with pytest.raises(SourceError, match=f"(?s){message}"):
        transfer(make_source(name, task, **options))


def test_other_architectures_are_refused_by_name():
    with pytest.raises(SourceError, match=r"model_type='qwen3' normalises queries and keys .*Qwen2"):
        transfer(transformers.Qwen3Model(transformers.Qwen3Config(**DECODER | {"head_dim": 8})))
    with pytest.raises(SourceError, match="model_type='albert' is not known; known are 'bert', "):
        transfer(transformers.AlbertModel(transformers.AlbertConfig(**ENCODER | {"embedding_size": 16})))


def test_quantised_weights_are_refused():
    source = make_source("bert", "Model")
    source.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SourceError, match=r"quantization_config={'quant_method': 'gptq'.*load the source without it"):
        transfer(source)


def test_tensors_that_do_not_fit_are_all_listed():
    source = make_source("bert", "Model")
    layer = source.encoder.layer[1]
    layer.adapter = torch.nn.Linear(16, 4)
    layer.attention.self.query = torch.nn.Linear(16, 8)
    del layer.output.LayerNorm
    with pytest.raises(SourceError) as error:
        transfer(source)
    assert str(error.value).splitlines()[:-1] == [
        "BertModel does not fit (6 tensors):",
        "  left over: encoder.layer.1.adapter.weight (4, 16)",
        "  left over: encoder.layer.1.adapter.bias (4,)",
        "  wrong shape: model.layers.1.self_attn.q_proj.weight is (8, 16), the model has (16, 16)",
        "  wrong shape: model.layers.1.self_attn.q_proj.bias is (8,), the model has (16,)",
        "  missing: model.layers.1.feed_forward_norm.weight (16,)",
        "  missing: model.layers.1.feed_forward_norm.bias (16,)",
    ]
