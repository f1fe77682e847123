"""The Triton operators inside of torch: opcheck, torch.compile, a model that trains and generates, known complaints.

All of it runs in Triton's interpreter on the CPU.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import transnormer_hf
from kernel_registry.diag import KERNELS as DIAG_KERNELS
from kernel_registry.norm import KERNELS
from kernel_registry.registry import compile_arguments
from transnormer_hf import TransNormerConfig, TransNormerForCausalLM, TransNormerForMaskedLM
from transnormer_hf.model import triton_common_transnormer, triton_norm_transnormer
from transnormer_hf.model.ops_transnormer import diag_attention, norm_attention
from transnormer_hf.model.reference_transnormer import LRPE, AttentionMetadata
from transnormer_hf.model.triton_common_transnormer import _rms_norm
from transnormer_hf.model.triton_diag_transnormer import DiagInputs, _diag_attention
from transnormer_hf.model.triton_norm_transnormer import NormInputs, _norm_attention, segment_table

BOTH = pytest.mark.parametrize("causal", [False, True])
SOURCE = Path(transnormer_hf.__file__).parent / "model"


def make_inputs(batch_size, seq_len, head_dim=8, num_heads=2):
    tensors = [torch.randn(batch_size, seq_len, num_heads, head_dim).transpose(1, 2) for _ in range(3)]
    theta = 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return tensors, LRPE(theta, torch.nn.functional.normalize(torch.randn(head_dim), dim=0))


def tiny_model(variant, backend, head=TransNormerForCausalLM, **fields):
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 4} | fields
    config = TransNormerConfig(
        vocab_size=40,
        variant=variant,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        backend=backend,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return head(config)


# opcheck


@BOTH
@pytest.mark.parametrize("kind", ["plain", "mask", pytest.param("packed", marks=pytest.mark.slow)])
def test_opcheck_norm_attention(kind, causal):
    (query, key, value), lrpe = make_inputs(1, 5, num_heads=1)
    for tensor in (query, key, value, lrpe.theta):
        tensor.requires_grad_()
    is_real = torch.tensor([[1] * 4 + [0]]).bool() if kind == "mask" else None
    table = segment_table(torch.tensor([0, 2, 5]), 5) if kind == "packed" else None
    positions = torch.tensor([0, 1, 0, 1, 2]) if kind == "packed" else torch.arange(5)
    state = None if kind == "mask" else torch.randn(2 if kind == "packed" else 1, 1, 8, 8, requires_grad=True)
    arguments = (query, key, value, positions, is_real, table, *lrpe, state, causal, "1+elu")
    torch.library.opcheck(_norm_attention.operator, arguments)

    with torch.no_grad():
        output, final, states = _norm_attention(*arguments)
    *inputs, state, causal, feature_map = arguments
    detached = [tensor if tensor is None else tensor.detach() for tensor in inputs]
    final_grad = None if state is None else torch.randn_like(final)
    arguments = (torch.randn_like(output), final_grad, final, states, *detached, None, causal, feature_map)
    torch.library.opcheck(_norm_attention.backward_operator, arguments)


def test_opcheck_simple_rms_norm():
    hidden_states = torch.randn(3, 5, 24, requires_grad=True)
    torch.library.opcheck(_rms_norm.operator, (hidden_states, 1e-8))
    with torch.no_grad():
        normed, rms = _rms_norm(hidden_states, 1e-8)
    torch.library.opcheck(_rms_norm.backward_operator, (torch.randn(3, 5, 24), normed, rms, 1e-8))


@pytest.mark.parametrize(
    ("attention", "fields"), [(_norm_attention, NormInputs._fields), (_diag_attention, DiagInputs._fields)]
)
def test_operators_take_the_fields_of_their_inputs(attention, fields):
    """By name, in order, last: what is saved for the backward pass is handed to its operator by position."""
    for operator in (attention.operator, attention.backward_operator):
        names = [argument.name for argument in operator._opoverload._schema.arguments]
        assert names[-len(fields) :] == list(fields)


# torch.compile


@BOTH
def test_compiled_op_has_no_graph_break(causal):
    tensors, lrpe = make_inputs(2, 20)
    leaves = [tensor.requires_grad_() for tensor in (*tensors, lrpe.theta)]

    def loss(query, key, value, theta):
        output, state = norm_attention(
            query,
            key,
            value,
            causal=causal,
            feature_map="elu",
            lrpe=(theta, lrpe.householder),
            return_state=True,
            backend="triton",
        )
        return output.square().mean() + state.square().mean()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for result, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("variant", ["t1", pytest.param("t2", marks=pytest.mark.slow)])
def test_compiled_model_has_no_graph_break(variant):
    model = tiny_model(variant, "triton", TransNormerForMaskedLM)
    input_ids = torch.randint(3, 40, (1, 6))

    def loss(input_ids):
        return model(input_ids=input_ids, labels=input_ids).loss

    loss(input_ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(input_ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_lengths_share_a_graph():
    """A new length is not a new graph; how many segments it has changes every 256 tokens only."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def attend(query, key, value):
        return norm_attention(query, key, value, causal=True, backend="triton")[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for seq_len in (5, 6, 9, 12):
        compiled(*make_inputs(1, seq_len)[0])
    assert len(graphs) == 1


# Models


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels of NormAttention and SimpleRMSNorm, in the order in which they are launched."""
    names = []

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return launch(kernel, *arguments, **options)

    launch = triton_common_transnormer.launch
    monkeypatch.setattr(triton_common_transnormer, "launch", spy)
    monkeypatch.setattr(triton_norm_transnormer, "launch", spy)
    return names


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_training_ends_where_plain_torch_does(variant, steps):
    """On sentences with padding, causal and with dropout-free layers of both kinds."""
    input_ids = torch.randint(3, 40, (steps, 2, 7), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones(2, 7, dtype=torch.long)
    attention_mask[1, 5:] = 0
    results = []
    for backend in ("torch", "triton"):
        model = tiny_model(variant, backend, hidden_size=8, num_attention_heads=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch in input_ids:
            labels = batch.masked_fill(attention_mask == 0, -100)
            loss = model(input_ids=batch, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((loss.detach(), dict(model.named_parameters())))
    (plain_loss, plain), (loss, parameters) = results
    assert abs(loss - plain_loss) < 1e-4
    for name, parameter in parameters.items():
        assert (parameter - plain[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("attention_norm_type", ["simple_rms", "rms"])
def test_a_model_uses_the_fused_norm(attention_norm_type, launches):
    """The norm of NormAttention and those of the blocks, where they are the simple one."""
    model = tiny_model("t2", "triton", attention_norm_type=attention_norm_type, norm_type="simple_rms")
    model(torch.randint(3, 40, (2, 5))).logits.sum().backward()
    norms = 4 + (attention_norm_type == "simple_rms")  # two for each of two layers, and that of the attention
    assert launches.count("rms_norm_kernel") == launches.count("rms_norm_backward_kernel") == norms


def test_a_model_without_the_kernels_launches_none(launches):
    for backend in ("auto", "torch", "eager"):
        tiny_model("t1", backend)(torch.randint(3, 40, (2, 5))).logits.sum().backward()
    assert not launches


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_generation_gives_the_scores_of_plain_torch(variant, dtype, launches):
    """Broken caches: decoding behind padding; the prompt goes through the kernels, the steps after it need none."""
    input_ids = torch.randint(3, 40, (2, 6))
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    scores = []
    for backend in ("torch", "triton"):
        generated = (
            tiny_model(variant, backend)
            .to(dtype)
            .eval()
            .generate(
                input_ids,
                attention_mask=attention_mask,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
        scores.append(torch.stack(generated.scores)[..., 3:])  # the special tokens are forbidden
    assert launches.count("output_kernel") == 1
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


# What users of other kernels complain about


@BOTH
def test_padding_does_not_leak(causal):
    """Padding that leaks: outputs at real tokens are those of the unpadded sequence, to the rounding of the sums."""
    (query, key, value), lrpe = make_inputs(1, 30)
    for leading, trailing in ((13, 0), (0, 13), (6, 7)):
        padded = [torch.nn.functional.pad(t, (0, 0, leading, trailing), value=3.0) for t in (query, key, value)]
        mask = torch.tensor([[0] * leading + [1] * 30 + [0] * trailing])
        options = {"causal": causal, "feature_map": "1+elu", "lrpe": lrpe, "backend": "triton", "return_state": True}
        output, state = norm_attention(query, key, value, **options)
        found, found_state = norm_attention(*padded, attention_mask=mask, **options)
        torch.testing.assert_close(found[:, :, leading : leading + 30], output, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found_state, state, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", [*KERNELS, *DIAG_KERNELS], ids=lambda spec: spec.name)
def test_neither_lengths_nor_strides_are_a_key_of_the_compiler(spec):
    """Autotuning whenever lengths vary: a new length compiles and tunes nothing, nor does a view of other strides."""
    assert "autotune" not in Path(sys.modules[spec.function.fn.__module__].__file__).read_text()
    constexprs = {name for variant in spec.variants("sm_80", "bf16", 64) for name in variant.constexprs}
    # the widths of whole rows are no lengths, and neither is the number of heads
    of_the_model = {"num_heads", "eps", "scale", "dropout_p", "keep_scale"}
    of_the_model |= {name for name in spec.function.arg_names if spec.name.startswith("rms") and "stride" in name}
    integers = {name for name in spec.function.arg_names if name.islower() and not name.endswith("_ptr")} - of_the_model
    assert integers
    assert not integers & constexprs
    assert integers <= set(spec.function.kwargs["do_not_specialize"])


def test_sums_use_no_atomics():
    """Results that change from run to run: partial sums are added in order, never in that of arrival."""
    for path in SOURCE.glob("*_transnormer.py"):
        assert "tl.atomic" not in path.read_text(), path


def test_copies_of_the_package_have_operators_of_their_own():
    """Copied kernels that go stale: a repository's own copy, perhaps another revision, works beside the package."""
    before = triton_common_transnormer.NAMESPACE
    name = "a_repository.with_a.copy_of_it"
    for parent in ("a_repository", "a_repository.with_a", name):
        spec = importlib.util.spec_from_loader(parent, loader=None, is_package=True)
        sys.modules[parent] = importlib.util.module_from_spec(spec)
    sys.modules[name].__path__ = [str(SOURCE)]
    try:
        copy = importlib.import_module(f"{name}.triton_norm_transnormer")
        assert before not in copy._norm_attention.operator._qualname
        assert copy._norm_attention.operator._qualname != _norm_attention.operator._qualname
        (query, key, value), _ = make_inputs(1, 5)
        metadata = AttentionMetadata(torch.arange(5))
        options = {"causal": True, "feature_map": "elu", "lrpe": None, "initial_state": None, "return_state": False}
        output, _ = copy.triton_norm_attention(query, key, value, metadata=metadata, **options)
        expected, _ = norm_attention(query, key, value, causal=True, feature_map="elu", backend="triton")
        assert torch.equal(output, expected)
    finally:
        for module in [module for module in sys.modules if module.startswith("a_repository")]:
            del sys.modules[module]


def test_large_numbers_stay_finite():
    """NaN and infinity: exp of a large feature, or of a long sum, never makes one."""
    (query, key, value), lrpe = make_inputs(1, 40)
    for causal in (False, True):
        leaves = [(tensor * 1e4).detach().requires_grad_() for tensor in (query, key, value)]
        output, state = norm_attention(
            *leaves, causal=causal, feature_map="1+elu", lrpe=lrpe, return_state=True, backend="triton"
        )
        assert output.isfinite().all()
        assert state.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), leaves))


def test_both_directions_and_every_kernel_on_the_cpu():
    """No bidirectional form, and none for the CPU: here are both, and `backend="auto"` runs without any GPU."""
    (query, key, value), _ = make_inputs(1, 9)
    for causal in (False, True):
        for backend in ("auto", "triton"):
            assert norm_attention(query, key, value, causal=causal, backend=backend)[0].shape == value.shape
            output = diag_attention(query, key, value, block_size=4, causal=causal, backend=backend)
            assert output.shape == value.shape
    assert isinstance(_diag_attention.operator, torch._library.custom_ops.CustomOpDef)


@pytest.mark.parametrize("head_dim", [8, 40, 120])
def test_any_head_dim_that_is_a_multiple_of_8(head_dim):
    """Head widths that are refused: the kernels pad inside."""
    (query, key, value), lrpe = make_inputs(1, 3, head_dim, num_heads=1)
    for attend in (norm_attention, diag_attention):
        options = {"causal": True, "lrpe": lrpe} | ({"block_size": 2} if attend is diag_attention else {})
        found, expected = (attend(query, key, value, backend=backend, **options) for backend in ("triton", "eager"))
        if attend is norm_attention:
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("seq_len", [1, 5, 300])
def test_every_length_is_six_launches(seq_len, causal, launches):
    """One form for all: three kernels forward and three backward."""
    (query, key, value), lrpe = make_inputs(1, seq_len, num_heads=1)
    output, _ = norm_attention(query.requires_grad_(), key, value, causal=causal, lrpe=lrpe, backend="triton")
    output.sum().backward()
    sums = ["sum_kernel", "scan_kernel"]
    assert launches == [*sums, "output_kernel", *sums, "gradient_kernel"]


def test_every_kernel_can_be_compiled_ahead_of_time():
    """The registry names each parameter of each kernel."""
    for spec in (*KERNELS, *DIAG_KERNELS):
        for head_dim in (16, 64, 128):
            for variant in spec.variants("sm_90", "bf16", head_dim):
                names = set(spec.function.arg_names)
                assert set(variant.types) | set(variant.constexprs) <= names
                arguments = compile_arguments(spec, variant)
                assert list(arguments.signature) == spec.function.arg_names
                unnamed = names - set(variant.types) - set(variant.constexprs)
                assert all(name.endswith("_stride") or name in INTEGERS for name in unnamed), unnamed


INTEGERS = {"seq_len", "segments", "num_states", "num_rows"}
INTEGERS |= {"num_heads", "num_sequences", "tiles_per_row", "block_size"}


def test_modules_compile_and_probe_nothing():
    """torch.compile that nobody asked for, devices asked at import: neither is anywhere in the shipped files."""
    for path in SOURCE.glob("*_transnormer.py"):
        tree = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "torch.compile" not in called, path
        at_import = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not any("torch.cuda" in ast.unparse(node) for node in at_import), path
