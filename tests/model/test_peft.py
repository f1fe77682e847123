"""Adapters: peft finds the modules to adapt, merges them without a change, and loads them onto their base model."""

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, IA3Config, LoraConfig
from test_heads import SEQ, make_ids, make_inputs, make_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from transnormer_hf import TransNormerForCausalLM, TransNormerForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's

HEADS = {
    TransNormerForCausalLM: ("CAUSAL_LM", AutoModelForCausalLM, AutoPeftModelForCausalLM),
    TransNormerForSequenceClassification: (
        "SEQ_CLS",
        AutoModelForSequenceClassification,
        AutoPeftModelForSequenceClassification,
    ),
}
# Where nothing is trained an adapter changes nothing, so these start away from that.
ADAPTERS = {
    "LoRA": (LoraConfig, {"init_lora_weights": False}),
    "IA3": (IA3Config, {"init_ia3_weights": False}),
    "all-linear": (LoraConfig, {"init_lora_weights": False, "target_modules": "all-linear"}),
}
LINEAR = {"q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTED = {"LoRA": {"q_proj", "v_proj"}, "IA3": {"k_proj", "v_proj", "down_proj"}, "all-linear": LINEAR}

of_each_head = pytest.mark.parametrize("model_class", HEADS, ids=["causal LM", "sequences"])
of_each_adapter = pytest.mark.parametrize("name", ADAPTERS)


def adapt(model, name):
    adapter, options = ADAPTERS[name]
    torch.manual_seed(1)
    return peft.get_peft_model(model, adapter(task_type=HEADS[type(model)][0], **options))


@of_each_head
@of_each_adapter
def test_the_default_modules_are_adapted_and_train_alone(model_class, name):
    model = adapt(make_model(model_class, num_labels=3), name).train()
    adapted = {part.rpartition(".")[2] for part in model.targeted_module_names}
    assert adapted == ADAPTED[name]
    model(**make_inputs(model_class)).loss.backward()
    trained = [part for part, parameter in model.named_parameters() if parameter.grad is not None]
    adapters = [part for part in trained if "lora_" in part or "ia3_" in part]
    assert len(adapters) >= 4
    assert all("classifier" in part for part in set(trained) - set(adapters))


@of_each_head
@of_each_adapter
def test_merging_changes_no_output(model_class, name):
    base = make_model(model_class, num_labels=3)
    input_ids = make_ids(2, SEQ)
    before = base(input_ids).logits
    model = adapt(base, name).eval()
    adapted = model(input_ids=input_ids).logits
    assert (adapted - before).abs().max() > 1e-2
    if name == "IA3" and model_class is TransNormerForSequenceClassification:
        # peft's IA3 cannot unload next to a head of several layers (it asks the head for a weight), but it merges
        model.merge_adapter()
        merged = model
    else:
        merged = model.merge_and_unload()
        assert type(merged) is model_class
    torch.testing.assert_close(merged(input_ids=input_ids).logits, adapted, rtol=1e-4, atol=1e-5)


@of_each_head
@of_each_adapter
def test_a_saved_adapter_loads_onto_its_base_model(model_class, name, tmp_path):
    _, auto_class, auto_peft_class = HEADS[model_class]
    make_model(model_class, num_labels=3).save_pretrained(tmp_path / "base")
    model = adapt(auto_class.from_pretrained(tmp_path / "base"), name).eval()
    input_ids = make_ids(2, SEQ)
    expected = model(input_ids=input_ids).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = auto_peft_class.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert type(loaded.get_base_model()) is model_class
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-5)
