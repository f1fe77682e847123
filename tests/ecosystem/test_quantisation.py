"""torch, torchao and bitsandbytes beside stock models of one size: what stays in float, and how far logits move."""

import copy

import pytest
import torch
from test_quantised import make_pair, relative_error
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from transnormer_hf import TransNormerForCausalLM, TransNormerForMaskedLM

LAYERS = 4

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.parametrize(("is_causal", "variant"), [(True, "t1"), (True, "t2"), (False, "t1"), (False, "t2")]),
]


def left_in_float(model, kind):
    """Names of the Linear layers whose weights are not of this kind."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight).__name__ != kind
    ]


def projections_per_layer(model):
    return 7 if isinstance(model, TransNormerForCausalLM | TransNormerForMaskedLM | LlamaForCausalLM) else 6


def compare(record_property, name, errors):
    """The logits of the quantised TransNormer may move by 1.5 times what those of the quantised stock model do."""
    of_ours, of_stock = errors
    assert 0 < of_ours <= 1.5 * of_stock
    record_property(f"{name}: error over the stock model's", of_ours / of_stock)


@pytest.mark.cell("quantize_dynamic")
class TestTorch:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_quantises_every_projection(self, is_causal, variant, record_property):
        errors = []
        for model in make_pair(is_causal, variant, width=128):
            quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
            left = [name for name, module in quantised.named_modules() if isinstance(module, torch.nn.Linear)]
            assert left == []
            errors.append(relative_error(quantised, model))
        record_property("left in float", len(left))
        compare(record_property, "int8", errors)


@pytest.mark.cell("torchao")
class TestTorchao:
    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            ("Int8WeightOnlyConfig", "Int8Tensor"),
            ("Int8DynamicActivationInt8WeightConfig", "Int8Tensor"),
            ("Float8WeightOnlyConfig", "Float8Tensor"),
        ],
    )
    def test_quantises_every_projection_but_the_tied_head(self, is_causal, variant, config, kind, record_property):
        torchao = pytest.importorskip("torchao.quantization")
        errors = []
        for model in make_pair(is_causal, variant, width=128):
            head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
            quantised = copy.deepcopy(model)
            # The tied head stays: torchao's float8 makes NaN of the zero row of the padding token, in BERT as well.
            chosen = lambda module, name, _head=head: isinstance(module, torch.nn.Linear) and name not in _head  # noqa: E731
            torchao.quantize_(quantised, getattr(torchao, config)(), chosen)
            assert set(left_in_float(quantised, kind)) == head
            assert quantised.get_output_embeddings().weight is quantised.get_input_embeddings().weight
            errors.append(relative_error(quantised, model))
        record_property("left in float but the head", len(set(left_in_float(quantised, kind)) - head))
        compare(record_property, config.removesuffix("Config"), errors)


@pytest.mark.cell("bitsandbytes")
class TestBitsAndBytes:
    def load(self, model, folder, bits):
        pytest.importorskip("bitsandbytes")
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=config, device_map="cpu")

    @pytest.mark.parametrize(("bits", "kind"), [(8, "Int8Params"), (4, "Params4bit")])
    def test_quantises_every_projection_of_the_layers(self, is_causal, variant, tmp_path, bits, kind, record_property):
        errors = []
        for model in make_pair(is_causal, variant, width=128):
            quantised = self.load(model, tmp_path / type(model).__name__, bits)
            kinds = [type(getattr(module, "weight", None)).__name__ for module in quantised.modules()]
            assert kinds.count(kind) >= LAYERS * projections_per_layer(model)
            in_layers = [name for name in left_in_float(quantised, kind) if "layers." in name or "layer." in name]
            assert in_layers == []
            assert quantised.get_output_embeddings().weight is quantised.get_input_embeddings().weight
            errors.append(relative_error(quantised, model))
        record_property("left in float", len(in_layers))
        compare(record_property, f"{bits} bits", errors)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # peft calls it
    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
    def test_adapters_learn_on_four_bits(self, is_causal, variant, tmp_path, record_property):
        peft = pytest.importorskip("peft")
        model = peft.prepare_model_for_kbit_training(
            self.load(make_pair(is_causal, variant, width=128)[0], tmp_path, 4)
        )
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).train()
        adapted = sum(name.endswith("lora_A") for name, _ in model.named_modules())
        assert adapted >= LAYERS * 7
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        input_ids, losses = torch.arange(3, 163).view(2, 80), []
        for _ in range(30):
            losses.append(model(input_ids=input_ids, labels=input_ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]
        record_property("adapted projections", adapted)
        record_property("last loss over first", (losses[-1] / losses[0]).item())
