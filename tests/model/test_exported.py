"""What torch.export and torch.jit.trace make of the models: operators of torch alone, any batch size and length."""

import pytest
import torch

from transnormer_hf import (
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
    diag_attention,
    norm_attention,
)
from transnormer_hf.model import ops_transnormer
from transnormer_hf.model.reference_transnormer import attention_metadata

DIAG, NORM = "chunked_attention", "linear_attention"
SIZES = ((1, 2), (3, 15), (3, 17), (2, 150))
slow = pytest.mark.slow

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:While compiling, we found certain side"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]


def make_model(model_class=TransNormerModel, **fields):
    """DiagAttention, then NormAttention, with weights whose logits differ from token to token."""
    defaults = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 16}
    defaults |= {"position_embedding": "sinusoidal", "layer_types": [DIAG, NORM], "initializer_range": 0.3}
    return model_class(TransNormerConfig(**defaults | fields)).eval()


def make_inputs(batch_size, length, num_choices=None):
    """Padding on the left of the first row and on the right of the second."""
    shape = (batch_size, length) if num_choices is None else (batch_size, num_choices, length)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., : length // 3] = 0
    if batch_size > 1:
        mask[1, ..., length - length // 4 :] = 0
    return {"input_ids": torch.randint(3, 40, shape), "attention_mask": mask}


def export(model, inputs, longest=4096, strict=False):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=longest)
    shape = {0: batch, inputs["input_ids"].dim() - 1: length}
    return torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape), strict=strict)


def assert_equal_on_real_tokens(found, expected, mask):
    for name in expected:
        if isinstance(expected[name], torch.Tensor):
            outputs = found[name], expected[name]
            if expected[name].shape[:2] == mask.shape:  # an output per token
                outputs = tuple(output[mask.bool()] for output in outputs)
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5 * float(outputs[1].detach().abs().max()))


def assert_same_program(program, model, sizes=SIZES, num_choices=None):
    exported = program.module()
    for size in sizes:
        inputs = make_inputs(*size, num_choices)
        assert_equal_on_real_tokens(exported(**inputs), model(**inputs), inputs["attention_mask"])


def operators(program):
    return {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (TransNormerModel, {"variant": "t1"}),
        (TransNormerForCausalLM, {"variant": "t2"}),
        pytest.param(TransNormerModel, {"layer_types": ["hybrid", "full_attention"]}, marks=slow),
        pytest.param(TransNormerForCausalLM, {"layer_types": ["hybrid", "full_attention"]}, marks=slow),
        pytest.param(TransNormerModel, {"norm_type": "rms", "rms_norm_eps": 1e-6}, marks=slow),
        pytest.param(TransNormerForMaskedLM, {"variant": "t1", "type_vocab_size": 2}, marks=slow),
        pytest.param(TransNormerForSequenceClassification, {"pooling": "last"}, marks=slow),
        pytest.param(TransNormerForTokenClassification, {"variant": "t1"}, marks=slow),
        pytest.param(TransNormerForQuestionAnswering, {}, marks=slow),
    ],
)
def test_an_exported_model_takes_other_sizes_and_holds_operators_of_torch_alone(model_class, fields):
    model = make_model(model_class, **fields)
    program = export(model, make_inputs(2, 40))
    assert {operator.namespace for operator in operators(program)} == {"aten"}
    assert_same_program(program, model, ((1, 1), *SIZES))


@slow
def test_multiple_choice_is_exported():
    model = make_model(TransNormerForMultipleChoice)
    assert_same_program(export(model, make_inputs(2, 40, 3)), model, num_choices=3)


@slow
@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 takes it for torch.compile")
def test_strict_export_gives_the_same_program():
    model = make_model(variant="t1")
    program = export(model, make_inputs(2, 40), strict=True)
    assert {operator.namespace for operator in operators(program)} == {"aten"}
    assert_same_program(program, model)


@slow
def test_an_exported_program_comes_down_to_core_operators():
    """ExecuTorch and its like know these alone; it has a kernel for the norm, and drops what checks metadata."""
    program = export(make_model(), make_inputs(2, 40)).run_decompositions()
    others = {str(operator) for operator in operators(program) if torch.Tag.core not in operator.tags}
    assert others <= {"aten.linalg_vector_norm.default", "aten._assert_tensor_metadata.default"}


def test_a_traced_model_takes_other_sizes_and_holds_operators_of_torch_alone():
    model = make_model(variant="t1")

    class LastHiddenState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask).last_hidden_state

    traced = torch.jit.trace(LastHiddenState(), tuple(make_inputs(2, 40).values()), check_trace=False)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} == {"aten", "prim"}
    for size in ((1, 1), *SIZES):
        inputs = make_inputs(*size)
        found = {"last_hidden_state": traced(*inputs.values())}
        assert_equal_on_real_tokens(found, {**model(**inputs)}, inputs["attention_mask"])


def test_learned_positions_bound_the_length_of_an_exported_model():
    model = make_model(position_embedding="learned", max_position_embeddings=64)
    program = export(model, make_inputs(2, 40), longest=64)
    with pytest.raises(AssertionError, match="64"):
        program.module()(**make_inputs(2, 65))


def test_a_named_backend_keeps_its_operators():
    program = export(make_model(backend="torch"), make_inputs(2, 40))
    assert {operator.namespace for operator in operators(program)} == {"aten", ops_transnormer.NAMESPACE}


def test_a_compiled_model_keeps_the_fused_operators():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(make_model(), backend=backend)(**make_inputs(2, 40))
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("norm_forward" in target for target in targets)
    assert any("diag_forward" in target for target in targets)


class TestExportedAttentions:
    """The exported forms against the definitions, called outside of an export."""

    @pytest.fixture(autouse=True)
    def _exporting(self, monkeypatch):
        monkeypatch.setattr(ops_transnormer, "is_exporting", lambda: True)

    def tensors(self, length, dtype=torch.float64):
        query, key = torch.randn(2, 3, 2, length, 8, dtype=dtype)
        lrpe = torch.rand(4, dtype=dtype), torch.nn.functional.normalize(torch.randn(8, dtype=dtype), dim=0)
        mask = make_inputs(3, length)["attention_mask"]
        return query, key, torch.randn(3, 2, length, 6, dtype=dtype), lrpe, mask

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
    def test_norm_attention(self, causal, length):
        *tensors, lrpe, mask = self.tensors(length)
        options = {"causal": causal, "feature_map": "1+elu", "lrpe": lrpe, "attention_mask": mask}
        options |= {"initial_state": torch.randn(3, 2, 8, 6, dtype=torch.float64), "return_state": True}
        found, state = norm_attention(*tensors, **options)
        expected, expected_state = norm_attention(*tensors, **options, backend="eager")
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(state, expected_state)

    @pytest.mark.parametrize("activation", ["softmax", "relu"])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
    def test_diag_attention(self, activation, causal, length):
        *tensors, lrpe, mask = self.tensors(length)
        options = {"block_size": 16, "causal": causal, "activation": activation, "lrpe": lrpe}
        for where in ({"attention_mask": mask}, {"metadata": attention_metadata(3, length, None, position_offset=5)}):
            found = diag_attention(*tensors, **options, **where)
            torch.testing.assert_close(found, diag_attention(*tensors, **options, **where, backend="eager"))

    def test_packed_sequences_are_computed_by_the_definition(self):
        query, key, value, lrpe, _ = self.tensors(40)
        tensors = [tensor[:1] for tensor in (query, key, value)]
        options = {"causal": True, "lrpe": lrpe, "cu_seqlens": torch.tensor([0, 13, 40])}
        found, expected = (norm_attention(*tensors, **options, backend=name)[0] for name in ("auto", "eager"))
        torch.testing.assert_close(found, expected)

    def test_gradients(self):
        *tensors, lrpe, mask = self.tensors(70)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        grads = []
        for backend in ("auto", "eager"):
            options = {"causal": True, "lrpe": lrpe, "attention_mask": mask, "backend": backend}
            output = norm_attention(*tensors, **options)[0] + diag_attention(*tensors, block_size=16, **options)
            grads.append(torch.autograd.grad(output.square().sum(), tensors))
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected)

    def test_the_norm_survives_optimizers_that_take_1e_8_for_zero(self):
        """onnxscript does, and a row of zeros became NaN."""
        hidden_states = torch.cat((torch.zeros(1, 16), 3 * torch.randn(3, 16)))
        program = torch.export.export(Norm(), (hidden_states,), strict=False)
        summands = [
            argument
            for node in program.graph.nodes
            if node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar)
            for argument in node.args
            if isinstance(argument, float)
        ]
        assert min(summands) > 1e-6
        assert torch.equal(program.module()(hidden_states), Norm()(hidden_states))
        assert torch.equal(Norm()(hidden_states), ops_transnormer.eager_simple_rms_norm(hidden_states))


class Norm(torch.nn.Module):
    def forward(self, hidden_states):
        return ops_transnormer.simple_rms_norm(hidden_states)
