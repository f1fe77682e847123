"""The four golden models of the released code, through the converter and the Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from transnormer_hf import TransNormerConfig
from transnormer_hf.hub.conversion import RENAMES, convert_checkpoint, convert_state_dict

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


class Golden:
    """One golden file: its tensors by group, and the configuration its metadata describes."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.about = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        self.weights = {key.removeprefix("weights/"): v for key, v in tensors.items() if key.startswith("weights/")}
        self.grads = {key.removeprefix("grads/"): v for key, v in tensors.items() if key.startswith("grads/")}
        self.hidden_states = [tensors["hidden_states/1"], tensors["hidden_states/2"]]
        self.input_ids, self.logits, self.loss = tensors["input_ids"], tensors["logits"], tensors["loss"]
        self.is_causal = self.about["kind"] == "lm"
        self.labels = self.input_ids if self.is_causal else tensors["labels"]

    def config(self, **overrides) -> TransNormerConfig:
        fields = {
            name: self.about[name]
            for name in ("variant", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        }
        fields |= {
            "block_size": self.about["block_size"],
            "pad_token_id": self.about["pad_token_id"],
            "intermediate_size": self.about["glu_size"],
            "hidden_act": {"identity": "linear", "silu": "silu"}[self.about["glu_activation"]],
            "norm_placement": self.about["norm_position"],
        }
        if self.is_causal:
            fields |= {
                "is_causal": True,
                "position_embedding": "sinusoidal",
                "scale_embedding": True,
                "embedding_norm": "none",
                "final_norm": "simple_rms",
            }
        else:
            fields["max_position_embeddings"] = (
                self.weights["encoder.sentence_encoder.embed_positions.weight"].shape[0] - 2
            )
        return TransNormerConfig(**fields | overrides)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("name", ["lm_t1", "lm_t2", "mlm_t1", "mlm_t2"])
def test_released_numbers_are_reproduced(name, backend, tmp_path):
    golden = Golden(name)
    torch.save({"model": golden.weights, "args": None}, tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted", golden.config())
    auto_class = AutoModelForCausalLM if golden.is_causal else AutoModelForMaskedLM
    model = auto_class.from_pretrained(tmp_path / "converted", backend=backend).eval()

    after_layers = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: after_layers.append(output))
    outputs = model(golden.input_ids, labels=golden.labels)
    outputs.loss.backward()

    errors = {"logits": relative_error(outputs.logits, golden.logits)}
    errors["loss"] = relative_error(outputs.loss, golden.loss[0])
    for index, (actual, expected) in enumerate(zip(after_layers, golden.hidden_states, strict=True)):
        errors[f"hidden_states/{index + 1}"] = relative_error(actual, expected)
    expected_grads = convert_state_dict_of_grads(golden, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(expected_grads) == trained
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in trained:
            errors[f"grad {parameter_name}"] = relative_error(parameter.grad, expected_grads[parameter_name])
    worst = max(errors, key=errors.get)
    print(f"{name}, {backend}: worst relative error {errors[worst]:.1e} ({worst}) of {len(errors)} tensors")
    assert errors[worst] < TOLERANCE, errors


def convert_state_dict_of_grads(golden: Golden, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under our names: they have the names and shapes of the weights, without the frozen vectors."""
    frozen = {name: value for name, value in golden.weights.items() if name.endswith("urpe.v")}
    converted = convert_state_dict(golden.grads | frozen, model)
    return {name: value for name, value in converted.items() if not name.endswith("householder")}


def test_every_rename_is_used_by_a_golden_model():
    import re

    names = [name for file in ("lm_t1", "mlm_t1") for name in Golden(file).weights]
    assert [old for old, _ in RENAMES if not any(re.fullmatch(old, name) for name in names)] == []
