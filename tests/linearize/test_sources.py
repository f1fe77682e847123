"""What a model of transformers computes, its TransNormer computes, wherever softmax attention is what both have."""

import pytest
import torch
import transformers

from transnormer_hf import TransNormerConfig
from transnormer_hf.linearize import transfer

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
    "xlm-roberta": ("XLMRoberta", ENCODER, TASKS),
    "camembert": ("Camembert", ENCODER, TASKS),
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
            "n_layer": 2,
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


def make_batch(task):
    """(2, 9) tokens, the second row padded on the right; one row of two choices for multiple choice."""
    input_ids = torch.randint(3, 40, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    batch = {"input_ids": input_ids.where(attention_mask == 1, 1), "attention_mask": attention_mask}
    return {key: value[None] for key, value in batch.items()} if task == "ForMultipleChoice" else batch


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


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, row in SOURCES.items() for task in row[2]])
def test_texts_of_one_block_come_out_as_from_the_source(name, task):
    if not hasattr(TransNormerConfig, "classifier_activation") and task in (
        "ForSequenceClassification",
        "ForMultipleChoice",
    ):
        pytest.skip("the model's head has one activation until branch `model` arrives")
    source = make_source(name, task)
    target = transfer(source, num_linear_layers=0, block_size=16)
    assert type(target).__name__ == "TransNormer" + task.replace("LMHeadModel", "ForCausalLM")
    assert set(target.config.layer_types) == {"chunked_attention"}
    compare(source, target, make_batch(task))


@pytest.mark.parametrize("name", SOURCES)
def test_half_of_the_layers_are_linear_unless_told_otherwise(name):
    task = SOURCES[name][2][0]
    source = make_source(name, task)
    target = transfer(source)
    num_layers = source.config.num_hidden_layers
    expected = ["chunked_attention"] * (num_layers // 2) + ["linear_attention"] * (num_layers - num_layers // 2)
    assert target.config.layer_types == expected
    assert target(**make_batch(task))[0].isfinite().all()
