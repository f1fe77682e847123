"""State tuning beside peft's prefix tuning of a Llama: both learn by what stands before the text, and nothing else."""

import pytest
import torch
from test_remote_code import WORDS, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from transnormer_hf import TransNormerForCausalLM
from transnormer_hf.training.state_tuning import add_states, load_states, save_states

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.cell("prefix tuning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # peft's
]


def make_model(kind):
    torch.manual_seed(0)
    if kind == "TransNormer":
        fields = {"position_embedding": "none", "initializer_range": 0.4, "hidden_dropout_prob": 0.0}
        fields["layer_types"] = ["linear_attention"] * 2
        return TransNormerForCausalLM(tiny_config(is_causal=True, **fields)).eval()
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, intermediate_size=32, initializer_range=0.4)).eval()


def generate(model):
    prompt, mask = torch.arange(5, 11)[None], torch.ones(1, 6, dtype=torch.long)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.eval().generate(input_ids=prompt, attention_mask=mask, **options)


@pytest.mark.parametrize("kind", ["TransNormer", "Llama"])
def test_the_loss_falls_and_what_is_saved_generates_the_same(kind, tmp_path, record_property):
    model = make_model(kind)
    if kind == "TransNormer":
        add_states(model)
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        model = peft.get_peft_model(model, config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, len(WORDS), (2, 16))]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=100, learning_rate=0.1, per_device_train_batch_size=2, logging_steps=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    if kind == "TransNormer":
        save_states(model, tmp_path / "saved")
        loaded = make_model(kind)
        load_states(loaded, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
        loaded = peft.PeftModel.from_pretrained(make_model(kind), tmp_path / "saved")
    assert torch.equal(generate(loaded), generate(model))
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    record_property("measured", f"{kind}: loss {losses[0]:.2f} to {losses[-1]:.2f} by {number} parameters")
