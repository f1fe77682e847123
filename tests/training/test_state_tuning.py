"""State tuning: O = Norm(phi(Q) (S + phi(K)^T V)) in every form of a forward, in training, generation and on disk."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from transnormer_hf import (
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
    norm_attention,
)
from transnormer_hf.model import modeling_transnormer
from transnormer_hf.training.state_tuning import add_states, load_states, save_states, states_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "block_size": 4}
SIZES |= {"position_embedding": "none", "initializer_range": 0.4, "hidden_dropout_prob": 0.0}
LAYERS = {"layer_types": ["chunked_attention", "linear_attention", "hybrid"]}


def make_model(model_class=TransNormerForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class(TransNormerConfig(**SIZES, **LAYERS | fields)).eval()


def tuned(model, scale=1.0):
    """The model with random initial states."""
    for state in add_states(model):
        state.data.normal_(std=scale)
    return model


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("model_class", [TransNormerForCausalLM, TransNormerForMaskedLM])
def test_the_states_are_the_initial_states_of_norm_attention(model_class, variant, backend, monkeypatch):
    model = tuned(make_model(model_class, variant=variant, backend=backend))
    input_ids = torch.randint(3, 40, (2, 11))
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    remaining = iter(states_of(model).values())

    def with_initial_state(*args, initial_state=None, **kwargs):
        assert initial_state is None
        state = next(remaining).detach().expand(2, -1, -1, -1)
        return norm_attention(*args, initial_state=state, **kwargs)

    plain = make_model(model_class, variant=variant, backend=backend)
    monkeypatch.setattr(modeling_transnormer, "norm_attention", with_initial_state)
    with torch.no_grad():
        expected = plain(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert next(remaining, None) is None


def test_zeros_change_nothing_and_all_else_is_frozen():
    model, input_ids = make_model(), torch.randint(3, 40, (2, 11))
    with torch.no_grad():
        before = model(input_ids).logits
        states = add_states(model)
        assert torch.equal(model(input_ids).logits, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(state) for state in states] == [id(parameter) for parameter in trained]
    assert sum(parameter.numel() for parameter in trained) == 2 * 2 * 8 * 8  # layers, heads, head_dim, head_dim


def test_padding_packing_and_a_state_see_the_same():
    model, texts = tuned(make_model()), [torch.randint(3, 40, (1, length)) for length in (9, 6)]
    with torch.no_grad():
        alone = [model(text).logits for text in texts]
        row = torch.cat(texts, 1)
        packed = model(row, position_ids=torch.cat((torch.arange(9), torch.arange(6)))[None], use_cache=False).logits
        padded = torch.cat((torch.full((1, 3), 1), texts[1]), 1)
        mask = (torch.arange(9) >= 3).long()[None]
        left_padded = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left_padded, alone[1], rtol=1e-4, atol=1e-5)


def test_generation_with_a_state_is_that_without():
    model, prompt = tuned(make_model()), torch.randint(3, 40, (2, 7))
    plain = make_model().generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fast = model.generate(prompt, **options)
    assert torch.equal(fast, model.generate(prompt, use_cache=False, **options))
    assert not torch.equal(fast, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_lowers_the_loss_by_the_states_alone(tmp_path, checkpointing):
    model = make_model()
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = add_states(model)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 40, (2, 16))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, learning_rate=0.1, per_device_train_batch_size=2, logging_steps=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert all(state.abs().max() > 0.1 for state in states)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_states_are_saved_alone_and_loaded_into_the_same_model(tmp_path):
    model, input_ids = tuned(make_model(TransNormerForSequenceClassification)), torch.randint(3, 40, (2, 11))
    file = save_states(model, tmp_path)
    assert file.stat().st_size < 2 * 4 * 2 * 8 * 8 + 1000
    loaded = make_model(TransNormerForSequenceClassification)
    load_states(loaded, tmp_path)
    load_states(loaded, tmp_path)  # again, over those that are there
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    other = make_model(TransNormerForSequenceClassification, layer_types=["linear_attention"] * 3)
    with pytest.raises(ValueError, match="are of another model"):
        load_states(other, tmp_path)
    assert states_of(other) == {}


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no NormAttention"):
        add_states(make_model(layer_types=["chunked_attention"] * 3))
    with pytest.raises(ValueError, match="add_states gives it some"):
        save_states(make_model(), tmp_path)
    with pytest.raises(ValueError, match="already"):
        add_states(tuned(make_model()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("model_class", "task"), [(TransNormerForCausalLM, "CAUSAL_LM"), (TransNormerForSequenceClassification, "SEQ_CLS")]
)
def test_prefix_tuning_of_peft_names_what_there_is_instead(model_class, task):
    model = get_peft_model(make_model(model_class), PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"transnormer_hf\.training\.state_tuning"):
        model(torch.randint(3, 40, (1, 6)))
