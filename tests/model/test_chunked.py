"""The chunked attentions of `ops_transnormer.py` against their definitions: values, states, gradients, masks,
packing, dtypes, views, memory, and what torch.compile and torch.export make of them."""

import importlib
import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from transnormer_hf.model import ops_transnormer
from transnormer_hf.model.ops_transnormer import diag_attention, norm_attention
from transnormer_hf.model.reference_transnormer import attention_metadata

# Around the chunk of 64 and the tile of 512 tokens.
LENGTHS = [1, 7, 63, 64, 65, 130, 300, 600]
HEADS, HEAD_DIM = 2, 8


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def projections(batch_size: int, seq_len: int, count: int = 3, head_dim: int = HEAD_DIM, dtype=torch.float64):
    """Transposed views, as a model makes them."""
    return [
        torch.randn(batch_size, seq_len, HEADS, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(count)
    ]


def rotation(head_dim: int = HEAD_DIM, dtype=torch.float64):
    theta = torch.rand(head_dim // 2, dtype=dtype).requires_grad_()
    return theta, F.normalize(torch.randn(head_dim, dtype=dtype), dim=0).requires_grad_()


def padding_mask(seq_len: int) -> torch.Tensor:
    """Padding on the left, on the right, inside, everywhere, and nowhere."""
    mask = torch.ones(5, seq_len, dtype=torch.long)
    mask[0, : seq_len // 3] = 0
    mask[1, seq_len - seq_len // 4 :] = 0
    mask[2, seq_len // 2 : seq_len // 2 + 3] = 0
    mask[3] = 0
    return mask


def metadata_of(kind: str, seq_len: int):
    """Batch size, metadata, number of states, and where outputs are defined."""
    device = torch.device("cpu")
    if kind == "masked":
        mask = padding_mask(seq_len)
        return len(mask), attention_metadata(len(mask), seq_len, device, attention_mask=mask), len(mask), mask.bool()
    if kind == "packed":  # with an empty sequence, and tokens beyond the last boundary
        cu_seqlens = torch.tensor([0, seq_len // 3, seq_len // 3, seq_len - seq_len // 5])
        return (
            1,
            attention_metadata(1, seq_len, device, cu_seqlens=cu_seqlens),
            3,
            torch.ones(1, seq_len, dtype=torch.bool),
        )
    offset = torch.tensor([5, 5, 0, 70]) if kind == "continued" else 0
    metadata = attention_metadata(4, seq_len, device, position_offset=offset)
    return 4, metadata, 4, torch.ones(4, seq_len, dtype=torch.bool)


def assert_all_close(results, expected, tolerance=1e-10):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        scale = wanted.abs().max().clamp(min=1)
        torch.testing.assert_close(result / scale, wanted / scale, rtol=0, atol=tolerance)


KINDS = ["whole", "masked", "packed", "continued"]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize(("feature_map", "with_lrpe"), [("identity", False), ("elu", True), ("1+elu", True)])
def test_norm_attention_equals_its_definition(seq_len, kind, causal, feature_map, with_lrpe):
    batch_size, metadata, num_states, is_defined = metadata_of(kind, seq_len)
    query, key, value = projections(batch_size, seq_len)
    initial_state = torch.randn(num_states, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64).requires_grad_()
    lrpe = rotation() if with_lrpe else None
    inputs = [query, key, value, initial_state, *(lrpe or ())]
    grad_output = torch.randn_like(value) * is_defined[:, None, :, None]
    grad_state = torch.randn_like(initial_state)
    results = []
    for backend in ("torch", "eager"):
        output, state = norm_attention(
            query,
            key,
            value,
            causal=causal,
            feature_map=feature_map,
            lrpe=lrpe,
            initial_state=initial_state,
            return_state=True,
            backend=backend,
            metadata=metadata,
        )
        grads = torch.autograd.grad([output, state], inputs, [grad_output, grad_state])
        results.append([output * is_defined[:, None, :, None], state, *grads])
    assert_all_close(*results)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize(("activation", "with_lrpe"), [("softmax", True), ("relu", True), ("softmax", False)])
def test_diag_attention_equals_its_definition(seq_len, kind, causal, activation, with_lrpe):
    batch_size, metadata, _, is_defined = metadata_of(kind, seq_len)
    query, key, value = projections(batch_size, seq_len)
    lrpe = rotation() if with_lrpe else None
    grad_output = torch.randn_like(value) * is_defined[:, None, :, None]
    results = []
    for backend in ("torch", "eager"):
        output = diag_attention(
            query,
            key,
            value,
            block_size=64,
            causal=causal,
            activation=activation,
            lrpe=lrpe,
            backend=backend,
            metadata=metadata,
        )
        grads = torch.autograd.grad(output, [query, key, value, *(lrpe or ())], grad_output)
        results.append([output * is_defined[:, None, :, None], *grads])
    assert_all_close(*results)


class _WatchReads(TorchDispatchMode):
    """Counts the values that the host asks a tensor for."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", ["whole", "masked", "continued"])
@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_off_the_cpu_positions_are_not_read_by_the_host(monkeypatch, activation, kind, causal):
    """Which would make it wait for the device in every layer. The CPU plays the device here: it shifts every row."""
    batch_size, metadata, _, is_defined = metadata_of(kind, 130)
    inputs = [*projections(batch_size, 130), *rotation()]
    grad_output = torch.randn_like(inputs[0]) * is_defined[:, None, :, None]

    def attend(backend):
        torch.manual_seed(3)
        output = diag_attention(
            *inputs[:3],
            block_size=16,
            causal=causal,
            activation=activation,
            lrpe=tuple(inputs[3:]),
            dropout_p=0.25 if kind == "whole" and backend == "torch" else 0.0,
            backend=backend,
            metadata=metadata,
        )
        grads = torch.autograd.grad(output, inputs, grad_output)
        return [output * is_defined[:, None, :, None], *grads]

    expected = attend("torch" if kind == "whole" else "eager")  # which entries are dropped is the same if not shifted
    monkeypatch.setattr(ops_transnormer, "begins_a_block", lambda positions, block_size: False)
    with patch.object(torch.Tensor, "tolist", side_effect=AssertionError), _WatchReads() as watch:
        found = attend("torch")
    assert not watch.reads
    assert_all_close(found, expected)


def test_only_on_the_cpu_the_host_looks_at_the_positions():
    begins_a_block = ops_transnormer.begins_a_block
    assert begins_a_block(torch.arange(5), 4)
    assert begins_a_block(torch.arange(8, 13), 4)
    assert not begins_a_block(torch.arange(3, 8), 4)
    assert not begins_a_block(torch.tensor([[0, 1], [-1, 0]]), 4)
    assert not begins_a_block(torch.arange(5, device="meta"), 4)


@pytest.mark.parametrize("offsets", [[0, 3, 16, 7], [15, 1, 0, 31]])
def test_packed_sequences_may_go_on_in_the_middle_of_a_block(offsets):
    cu_seqlens = torch.tensor([0, 5, 6, 50, 90])  # the first two end before their first block does
    metadata = attention_metadata(1, 97, cu_seqlens.device, None, cu_seqlens, torch.tensor(offsets))
    inputs = [*projections(1, 97), *rotation()]
    results = []
    for backend in ("torch", "eager"):
        options = {"block_size": 16, "causal": True, "lrpe": tuple(inputs[3:]), "metadata": metadata}
        output = diag_attention(*inputs[:3], **options, backend=backend)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert_all_close(*results)


@pytest.mark.parametrize("block_size", [1, 3, 16, 600])
def test_diag_attention_takes_any_block_size(block_size):
    query, key, value = projections(2, 50)
    attend = {"block_size": block_size, "causal": True, "lrpe": rotation()}
    output = diag_attention(query, key, value, backend="torch", **attend)
    assert_all_close([output], [diag_attention(query, key, value, backend="eager", **attend)])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_norm_attention_gradients_are_those_of_finite_differences(causal):
    query, key, value = projections(2, 5, head_dim=4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    initial_state = torch.randn(2, HEADS, 4, 4, dtype=torch.float64).requires_grad_()

    def attend(query, key, value, initial_state, theta, householder):
        return norm_attention(
            query,
            key,
            value,
            causal=causal,
            feature_map="1+elu",
            lrpe=(theta, householder),
            attention_mask=mask,
            initial_state=initial_state,
            return_state=True,
            backend="torch",
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, initial_state, *rotation(4)), fast_mode=True)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_diag_attention_gradients_are_those_of_finite_differences(activation):
    query, key, value = projections(2, 7, head_dim=4)

    def attend(query, key, value, theta, householder):
        return diag_attention(
            query,
            key,
            value,
            block_size=3,
            causal=True,
            activation=activation,
            lrpe=(theta, householder),
            backend="torch",
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, *rotation(4)), fast_mode=True)


def test_dropout_drops_and_rescales_entries_of_the_map():
    """With one-hot values the output is the map itself."""
    query, key, _ = projections(2, 64, head_dim=64)
    value = torch.eye(64, dtype=torch.float64).expand(2, HEADS, 64, 64)
    attend = {"block_size": 64, "causal": False, "backend": "torch"}
    weights = diag_attention(query, key, value, **attend)
    dropped = diag_attention(query, key, value, dropout_p=0.25, **attend)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert 0.7 < kept.double().mean() < 0.8


def test_dropout_drops_the_same_entries_in_the_backward_pass():
    query, key, value = projections(1, 100)

    def attend(value):
        torch.manual_seed(3)
        return diag_attention(query, key, value, block_size=16, causal=True, dropout_p=0.5, backend="torch")

    direction, grad_output = torch.randn_like(value), torch.randn_like(value)
    (grad_value,) = torch.autograd.grad(attend(value), value, grad_output)
    torch.testing.assert_close((attend(direction) * grad_output).sum(), (grad_value * direction).sum())

    def attend_to_query(query):
        torch.manual_seed(3)
        return diag_attention(query, key, value, block_size=16, causal=True, dropout_p=0.5, backend="torch")

    assert torch.autograd.gradcheck(attend_to_query, (query,), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_at_the_end(causal, dtype):
    query, key, value = (tensor.detach().to(dtype) for tensor in projections(2, 300))
    lrpe = tuple(parameter.detach().float() for parameter in rotation())
    norm = {"causal": causal, "feature_map": "1+elu", "lrpe": lrpe, "return_state": True, "backend": "torch"}
    diag = {"causal": causal, "block_size": 64, "lrpe": lrpe, "backend": "torch"}
    wide = [tensor.float() for tensor in (query, key, value)]
    output, state = norm_attention(query, key, value, **norm)
    expected, expected_state = norm_attention(*wide, **norm)
    assert_all_close([output, state], [expected.to(dtype), expected_state], tolerance=1e-6)
    assert_all_close([diag_attention(query, key, value, **diag)], [diag_attention(*wide, **diag).to(dtype)])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradients_are_the_same_under_a_dispatch_mode(causal):
    """Such as a FLOP counter, under which the kernels see no lazy conjugation."""
    inputs, results = [*projections(2, 70), *rotation()], []
    for mode in (nullcontext(), _WatchReads()):
        with mode:
            options = {"causal": causal, "lrpe": tuple(inputs[3:]), "backend": "torch"}
            output, _ = norm_attention(*inputs[:3], feature_map="elu", **options)
            output = output + diag_attention(*inputs[:3], block_size=16, **options)
            results.append(torch.autograd.grad(output.square().sum(), inputs))
    assert_all_close(*results)


@pytest.mark.parametrize("name", ["norm", "diag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_into_the_sums(name, dtype):
    """Outputs and gradients are those of float32 for the same inputs, rounded once."""
    inputs = [*(tensor.detach().to(dtype).requires_grad_() for tensor in projections(2, 130)), *rotation()]
    inputs[3:] = [tensor.detach().float().requires_grad_() for tensor in inputs[3:]]

    def run(query, key, value, *lrpe):
        options = {"causal": True, "backend": "torch", "lrpe": lrpe}
        if name == "norm":
            output, _ = norm_attention(query, key, value, feature_map="1+elu", **options)
        else:
            output = diag_attention(query, key, value, block_size=64, **options)
        return output, *torch.autograd.grad(output.square().sum(dtype=torch.float32), inputs)

    expected = run(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(*inputs)
    assert [tensor.dtype for tensor in found] == [dtype] * 4 + [torch.float32] * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_what_stands_in_the_padding_does_not_matter(causal):
    mask = padding_mask(130)
    clean = [tensor.detach() for tensor in projections(len(mask), 130)]
    poisoned = [tensor.masked_fill(~mask.bool()[:, None, :, None], torch.nan) for tensor in clean]
    for attend in (
        lambda *qkv: norm_attention(*qkv, causal=causal, attention_mask=mask, backend="torch")[0],
        lambda *qkv: diag_attention(*qkv, block_size=64, causal=causal, attention_mask=mask, backend="torch"),
    ):
        outputs = [attend(*qkv).transpose(1, 2)[mask.bool()] for qkv in (poisoned, clean)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_outputs_and_gradients_lie_as_the_inputs_do(causal):
    """So that neither the reshape behind the attention nor that of the projections' gradients copies."""
    query, key, value = projections(2, 100)
    output, _ = norm_attention(query, key, value, causal=causal, backend="torch")
    diag = diag_attention(query, key, value, block_size=64, causal=causal, backend="torch")
    for tensor in (output, diag, *torch.autograd.grad((output + diag).sum(), [query, key, value])):
        assert tensor.stride() == query.stride()


def test_slices_of_one_merged_projection_are_taken_as_they_are():
    merged = torch.randn(2, 100, 3, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    views = merged.permute(2, 0, 3, 1, 4)
    copies = [view.contiguous() for view in views]
    for causal in (True, False):
        results = []
        for qkv in (views, copies):
            output, _ = norm_attention(*qkv, causal=causal, feature_map="elu", backend="torch")
            output = output + diag_attention(*qkv, block_size=16, causal=causal, backend="torch")
            results.append([output, *torch.autograd.grad(output.square().sum(), merged, retain_graph=True)])
        assert_all_close(*results)


@pytest.mark.parametrize("seq_len", [1, 70, 600])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_a_state_overwritten_before_the_backward_pass_is_an_error(backend, causal, seq_len):
    """And no wrong gradient. The cache replaces its tensors while gradients are on."""
    qkv, state = projections(2, seq_len), torch.zeros(2, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    output, _ = norm_attention(*qkv, causal=causal, initial_state=state, backend=backend, feature_map="1+elu")
    state.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_last_state_of_causal_attention_may_be_written_to_before_the_backward_pass():
    query, key, value = projections(1, 200)
    output, state = norm_attention(query, key, value, causal=True, return_state=True, backend="torch")
    (expected,) = torch.autograd.grad(output.sum(), key, retain_graph=True)
    state.detach().zero_()
    assert_all_close(torch.autograd.grad(output.sum(), [key]), [expected])


def test_the_backward_pass_writes_to_nothing_that_autograd_saved():
    inputs = [*projections(1, 1200), torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64).requires_grad_()]
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    for causal in (True, False):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, state = norm_attention(
                *inputs[:3], causal=causal, initial_state=inputs[3], return_state=True, backend="torch"
            )
        (output.square().sum() + state.square().sum()).backward()
    assert len(saved) >= 10
    for tensor, before in saved:
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_memory_of_a_training_step_is_linear_and_at_most_three_times_inputs_and_outputs():
    """The peak of a process of its own, on top of what a short sequence needs there."""
    program = """
import resource, torch
torch.set_num_threads(1)
from transnormer_hf.model.ops_transnormer import diag_attention, norm_attention
lrpe = torch.rand(32, requires_grad=True), torch.nn.functional.normalize(torch.randn(64), dim=0)
norm = {"feature_map": "1+elu", "lrpe": lrpe, "backend": "torch"}
attentions = (
    lambda *qkv: norm_attention(*qkv, causal=True, **norm)[0],
    lambda *qkv: norm_attention(*qkv, causal=False, **norm)[0],
    lambda *qkv: diag_attention(*qkv, block_size=64, causal=True, lrpe=lrpe, backend="torch"),
)
def train(attend, seq_len):  # a function, so that nothing of one attention lives on in the next
    query, key, value = (torch.randn(1, seq_len, 4, 64).transpose(1, 2).requires_grad_() for _ in range(3))
    output = attend(query, key, value)
    output.backward(output.detach())
for seq_len in (1024, 8192, 16384):
    for attend in attentions:
        train(attend, seq_len)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    base, half, whole = map(int, output.split())
    inputs_and_output = 4 * (16384 - 1024) * 4 * 64 * 4
    assert whole - base <= 3 * inputs_and_output
    assert whole - half <= 3 * inputs_and_output * 0.6


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_attentions_compile_and_export_as_one_graph_for_all_lengths(causal):
    class Attentions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta, self.householder = (torch.nn.Parameter(parameter.detach().float()) for parameter in rotation())

        def forward(self, query, key, value, attention_mask):
            arguments = {"causal": causal, "lrpe": (self.theta, self.householder), "attention_mask": attention_mask}
            output, _ = norm_attention(query, key, value, feature_map="1+elu", backend="torch", **arguments)
            return output + diag_attention(query, key, value, block_size=16, backend="torch", **arguments)

    module = Attentions()

    def inputs(batch_size, seq_len):
        mask = torch.ones(batch_size, seq_len, dtype=torch.long)
        mask[0, :3] = 0
        return *(tensor.detach().float() for tensor in projections(batch_size, seq_len)), mask

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len in (40, 100):
        tensors, results = inputs(2, seq_len), []
        for run in (compiled, module):
            output = run(*tensors)
            results.append([output, *torch.autograd.grad(output.square().sum(), [module.theta])])
        assert_all_close(*results, tolerance=1e-6)

    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq", min=2, max=4096)
    shapes = [{0: batch, 2: seq}] * 3 + [{0: batch, 1: seq}]
    exported = torch.export.export(module, inputs(2, 40), dynamic_shapes=shapes).module()
    for seq_len in (17, 300):
        tensors = inputs(3, seq_len)
        torch.testing.assert_close(exported(*tensors), module(*tensors))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_operators_keep_the_rules_of_torch(causal):
    query, key, value = (tensor.detach().requires_grad_() for tensor in projections(2, 70))
    theta, householder = rotation()
    angles = (torch.arange(70)[:, None] * theta.detach())[None, None].requires_grad_()
    padding = (torch.arange(70) < torch.tensor([[0], [3]]))[:, None, :, None]
    norm = (query, key, value, angles, householder, None, padding, None, causal, "elu", True)
    torch.library.opcheck(ops_transnormer.chunked_norm_forward, norm, test_utils=OPCHECKS)
    diag = (query, key, value, angles[0, 0, :16], householder, None, torch.arange(70), padding, None)
    diag = (*diag, 16, causal, "softmax", 0.5, 0.0)
    torch.library.opcheck(ops_transnormer.chunked_diag_forward, diag, test_utils=OPCHECKS)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_the_file_can_be_loaded_twice_in_one_process():
    """As the package, and as remote code from the Hub."""
    folder = Path(ops_transnormer.__file__).parent
    name = "transformers_modules_twice"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    try:
        second = importlib.import_module(f"{name}.ops_transnormer")
        assert second.chunked_norm_forward is not ops_transnormer.chunked_norm_forward
        query, key, value = projections(1, 70)
        arguments = (query, key, value, None, None, None, None, None, True, "elu", True)
        for module in (second, ops_transnormer):
            output, *_ = module.chunked_norm_forward(*arguments)
            output.sum().backward()
    finally:
        for loaded in [module for module in sys.modules if module.startswith(name)]:
            del sys.modules[loaded]
