"""The Triton kernels of DiagAttention, run by Triton's interpreter on the CPU, against the definition in float64."""

import itertools

import pytest
import torch
import triton.language as tl

from transnormer_hf.model import ops_transnormer, triton_common_transnormer, triton_diag_transnormer
from transnormer_hf.model.ops_transnormer import diag_attention, eager_diag_attention
from transnormer_hf.model.reference_transnormer import LRPE, AttentionMetadata, attention_metadata
from transnormer_hf.model.triton_common_transnormer import unsupported
from transnormer_hf.model.triton_diag_transnormer import (
    _diag_attention,
    count_tiles,
    triton_diag_attention,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LEFT = [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 13]
RIGHT = [[1] * 13, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
INTERIOR = [[1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]]
NOTHING = [[0] * 13, [1] * 13]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Results come full of NaN, so that a place that no program writes shows."""

    def new_poisoned(shape, like, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)

    for module in (triton_common_transnormer, triton_diag_transnormer):
        monkeypatch.setattr(module, "new_empty", new_poisoned)


def make_inputs(batch_size, num_heads, seq_len, head_dim, dtype=torch.float32):
    """query, key, value as projections give them, (batch, seq, heads · head_dim) in memory, and LRPE's parameters."""
    query, key, value = (
        torch.randn(batch_size, seq_len, num_heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    theta = 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    householder = torch.nn.functional.normalize(torch.randn(head_dim), dim=0)
    return [query, key, value], LRPE(theta, householder)


def run_with_gradients(function, inputs, lrpe, grad, **arguments):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    wanted = list(inputs)
    if lrpe is not None:
        lrpe = LRPE(lrpe.theta.detach().requires_grad_(), lrpe.householder)
        wanted.append(lrpe.theta)
    output = function(*inputs, lrpe=lrpe, **arguments)
    return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(output.dtype))]


def assert_equals_definition(
    inputs,
    lrpe,
    *,
    metadata: AttentionMetadata,
    block_size=16,
    causal=False,
    activation="softmax",
    function=triton_diag_attention,
):
    """Output and every gradient within tolerance of the definition's, relative to the largest number of each."""
    dtype, head_dim = inputs[0].dtype, inputs[0].shape[-1]
    arguments = {
        "metadata": metadata,
        "block_size": block_size,
        "causal": causal,
        "activation": activation,
        "scale": head_dim**-0.5,
        "dropout_p": 0.0,
    }
    grad = torch.randn(inputs[0].transpose(1, 2).shape).transpose(1, 2)
    # outputs in front of a row's first real token are undefined, so nothing may flow back from there
    started = torch.ones((), dtype=torch.bool)
    if metadata.is_real is not None:
        started = (metadata.is_real.cumsum(-1) > 0)[:, None, :, None]
    grad = grad.masked_fill(~started, 0).to(dtype)
    results = run_with_gradients(function, inputs, lrpe, grad, **arguments)
    wide = [tensor.double() for tensor in inputs]
    wide_lrpe = None if lrpe is None else LRPE(lrpe.theta.double(), lrpe.householder.double())
    expected = run_with_gradients(eager_diag_attention, wide, wide_lrpe, grad.double(), **arguments)
    for name, result, truth in zip(("output", "query", "key", "value", "theta"), results, expected, strict=False):
        assert torch.isfinite(result).all(), name
        if name == "output":
            result, truth = result * started, truth * started
        error = (result.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-3)
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"
    assert results[0].dtype == dtype


def metadata_of(inputs, attention_mask=None, cu_seqlens=None, position_offset=0):
    if attention_mask is not None:
        attention_mask = torch.tensor(attention_mask)
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens)
    return attention_metadata(
        inputs[0].shape[0], inputs[0].shape[2], torch.device("cpu"), attention_mask, cu_seqlens, position_offset
    )


# lengths, block sizes, head dims, dtypes


@pytest.mark.parametrize(
    ("seq_len", "block_size", "head_dim", "causal", "activation", "dtype"),
    [
        (1, 64, 8, False, "softmax", torch.float32),
        (7, 1, 16, False, "softmax", torch.float32),
        (7, 64, 24, True, "relu", torch.float32),
        (63, 32, 16, True, "softmax", torch.float32),
        (64, 64, 64, False, "softmax", torch.float32),
        (65, 64, 32, True, "softmax", torch.float16),
        (65, 48, 16, False, "relu", torch.float16),
        (130, 64, 16, False, "softmax", torch.float32),
        (40, 16, 40, True, "relu", torch.bfloat16),
    ],
)
def test_equals_definition(seq_len, block_size, head_dim, causal, activation, dtype):
    inputs, lrpe = make_inputs(1, 1, seq_len, head_dim, dtype)
    assert_equals_definition(
        inputs, lrpe, metadata=metadata_of(inputs), block_size=block_size, causal=causal, activation=activation
    )


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 48])
@pytest.mark.parametrize("seq_len", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64])
@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_equals_definition_everywhere(seq_len, block_size, head_dim, activation):
    for causal in (False, True):
        for dtype in (torch.float32, torch.float16):
            inputs, lrpe = make_inputs(1, 1, seq_len, head_dim, dtype)
            assert_equals_definition(
                inputs, lrpe, metadata=metadata_of(inputs), block_size=block_size, causal=causal, activation=activation
            )


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [72, 96, 128])
def test_wide_heads(head_dim):
    inputs, lrpe = make_inputs(1, 2, 70, head_dim)
    assert_equals_definition(inputs, lrpe, metadata=metadata_of(inputs), block_size=64, causal=True)


def test_without_lrpe():
    inputs, _ = make_inputs(2, 3, 21, 24)
    assert_equals_definition(inputs, None, metadata=metadata_of(inputs), causal=True)


def test_large_scores_do_not_overflow():
    inputs, _ = make_inputs(1, 1, 20, 16)
    inputs[0] *= 100
    inputs[1] *= 100
    assert_equals_definition(inputs, None, metadata=metadata_of(inputs))


# masks, packed sequences, offsets


@pytest.mark.parametrize("mask", [LEFT, RIGHT, INTERIOR, NOTHING], ids=["left", "right", "interior", "nothing"])
def test_masks(mask):
    inputs, lrpe = make_inputs(2, 1, 13, 16)
    assert_equals_definition(inputs, lrpe, metadata=metadata_of(inputs, mask), block_size=4, causal=mask is not LEFT)


def test_padding_values_do_not_leak():
    inputs, lrpe = make_inputs(2, 1, 13, 16)
    metadata = metadata_of(inputs, RIGHT)
    arguments = {
        "metadata": metadata,
        "block_size": 4,
        "causal": False,
        "activation": "softmax",
        "scale": 0.25,
        "lrpe": lrpe,
        "dropout_p": 0.0,
    }
    output = triton_diag_attention(*inputs, **arguments)
    for tensor in inputs[1:]:
        tensor[1, :, 5:] = float("nan")
    assert torch.equal(triton_diag_attention(*inputs, **arguments)[1, :, :5], output[1, :, :5])


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 5, 21, 33], [0, 0, 30]], ids=["empty inside", "tokens behind the last"])
def test_packed_sequences(cu_seqlens):
    inputs, lrpe = make_inputs(1, 1, 33, 16)
    assert_equals_definition(
        inputs, lrpe, metadata=metadata_of(inputs, cu_seqlens=cu_seqlens), block_size=8, causal=True
    )


def test_more_packed_sequences_than_are_searched_at_once(monkeypatch):
    monkeypatch.setattr(triton_diag_transnormer, "SEQUENCES_AT_ONCE", tl.constexpr(4))
    inputs, lrpe = make_inputs(1, 1, 20, 16)
    metadata = metadata_of(inputs, cu_seqlens=[0, 3, 3, 3, 3, 3, 3, 5, 6, 17, 17])
    assert_equals_definition(inputs, lrpe, metadata=metadata, block_size=8)


def test_blocks_that_began_earlier():
    inputs, lrpe = make_inputs(2, 1, 19, 16)
    offsets = torch.tensor([3, 8])
    assert_equals_definition(inputs, lrpe, metadata=metadata_of(inputs, position_offset=offsets), block_size=8)


# blocks larger than a tile


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["left", "right", "interior", "nothing", "packed", "offset", "one block", "no lrpe"])
def test_large_softmax_blocks(case, causal):
    packed = case == "packed"
    inputs, lrpe = make_inputs(1 if packed else 2, 2, 150 if case == "one block" else 450, 24)
    masks = {
        "left": [0] * 205 + [1] * 245,
        "right": [1] * 120 + [0] * 330,
        "interior": [1] * 9 + [0] * 221 + [1] * 220,
        "nothing": [0] * 450,
    }
    mask = [masks[case], [1] * 450] if case in masks else None
    offset = torch.tensor([0, 311]) if case == "offset" else 0
    metadata = metadata_of(inputs, mask, [0, 7, 7, 239, 440] if packed else None, offset)
    lrpe = None if case == "no lrpe" else lrpe
    assert_equals_definition(inputs, lrpe, metadata=metadata, block_size=200, causal=causal)


def test_large_blocks_in_half_precision():
    inputs, lrpe = make_inputs(1, 1, 450, 16, torch.float16)
    assert_equals_definition(inputs, lrpe, metadata=metadata_of(inputs), block_size=200, causal=True)


def test_a_block_far_longer_than_the_sequence_takes_no_more_memory():
    inputs, lrpe = make_inputs(1, 1, 20, 16)
    assert_equals_definition(inputs, lrpe, metadata=metadata_of(inputs), block_size=10**7)


def test_padding_values_do_not_leak_into_large_blocks():
    inputs, _ = make_inputs(1, 1, 90, 16)
    mask = torch.tensor([[1] * 70 + [0] * 20])
    options = {"block_size": 80, "causal": False, "attention_mask": mask, "backend": "triton"}
    output = diag_attention(*inputs, **options)
    for tensor in inputs[1:]:
        tensor[:, :, 70:] = float("nan")
    assert torch.equal(diag_attention(*inputs, **options)[:, :, :70], output[:, :, :70])


def test_dropout_in_large_blocks():
    inputs, _ = make_inputs(2, 2, 80, 8)
    inputs[2] = torch.ones(2, 2, 80, 8)
    options = {"block_size": 80, "causal": False, "backend": "triton"}
    torch.manual_seed(1)
    output = diag_attention(*inputs, dropout_p=0.25, **options)
    torch.manual_seed(1)
    assert torch.equal(diag_attention(*inputs, dropout_p=0.25, **options), output)
    assert output.std() > 0.01  # without dropout every entry is 1
    assert abs(output.mean() - 1) < 0.02


def test_kernels_refuse_large_relu_blocks():
    inputs, _ = make_inputs(1, 1, 5, 16)
    with pytest.raises(ValueError, match=r'block_size=200.*up to 64 tokens.*backend="auto"'):
        diag_attention(*inputs, block_size=200, causal=True, activation="relu", backend="triton")


@pytest.mark.parametrize(
    ("block_size", "activation", "head_dim"), [(200, "relu", 24), (200, "softmax", 24), (16, "softmax", 136)]
)
def test_auto_always_works(block_size, activation, head_dim, monkeypatch):
    """On a GPU, where "auto" means the kernels: what they do not take goes to plain torch."""
    monkeypatch.setattr(
        ops_transnormer, "resolve_backend", lambda backend, *_: "triton" if backend == "auto" else backend
    )
    inputs, lrpe = make_inputs(1, 2, 210, head_dim)

    def attend(query, key, value, lrpe, **arguments):
        return diag_attention(query, key, value, lrpe=lrpe, **arguments)

    assert_equals_definition(
        inputs, lrpe, metadata=metadata_of(inputs), block_size=block_size, activation=activation, function=attend
    )


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"width": 12}, {"width": 136}]
)
def test_what_the_kernels_take(changes):
    query = torch.empty(1, 1, 4, changes.get("width", 16), dtype=changes.get("dtype", torch.float32))
    reason = unsupported(query, query, query)
    if changes in ({}, {"dtype": torch.bfloat16}):
        assert reason is None
    else:
        assert str(next(iter(changes.values()))) in reason


# memory


def test_strides_as_they_come():
    """Slices of one fused projection, another metadata for the value, and a gradient that is one number expanded."""
    fused = torch.randn(2, 18, 3, 2, 16)
    query, key = fused[:, :, 0].transpose(1, 2), fused[:, :, 1].transpose(1, 2)
    value = torch.randn(2, 2, 16, 18).transpose(-1, -2)
    results, expected = [], []
    for function, wanted in ((triton_diag_attention, results), (eager_diag_attention, expected)):
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        metadata = metadata_of(inputs)
        output = function(
            *inputs,
            metadata=metadata,
            block_size=8,
            causal=True,
            activation="softmax",
            scale=0.25,
            lrpe=None,
            dropout_p=0.0,
        )
        output.sum().backward()
        wanted += [output, *(tensor.grad for tensor in inputs)]
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, atol=1e-5, rtol=1e-5)
    assert results[0].transpose(1, 2).is_contiguous()  # so that merging the heads is free


def test_inputs_are_left_alone():
    inputs, lrpe = make_inputs(1, 2, 17, 16)
    before = [tensor.clone() for tensor in inputs]
    run_with_gradients(
        triton_diag_attention, inputs, lrpe, torch.ones(1, 2, 17, 16), metadata=metadata_of(inputs), block_size=8,
        causal=True, activation="relu", scale=1.0, dropout_p=0.0,
    )  # fmt: skip
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_same_bits_every_time():
    inputs, lrpe = make_inputs(2, 2, 33, 16)
    arguments = {
        "metadata": metadata_of(inputs),
        "block_size": 8,
        "causal": True,
        "activation": "softmax",
        "scale": 0.25,
        "dropout_p": 0.0,
    }
    grad = torch.randn(2, 2, 33, 16)
    first, second = (run_with_gradients(triton_diag_attention, inputs, lrpe, grad, **arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_householder_gradient():
    """The kernels have none; where it is asked for, plain torch does LRPE first."""
    inputs, lrpe = make_inputs(1, 1, 9, 16)
    grads = []
    for function in (triton_diag_attention, eager_diag_attention):
        householder = lrpe.householder.clone().requires_grad_()
        output = function(
            *inputs, metadata=metadata_of(inputs), block_size=4, causal=True, activation="softmax", scale=0.25,
            lrpe=LRPE(lrpe.theta, householder), dropout_p=0.0,
        )  # fmt: skip
        grads.append(torch.autograd.grad(output.square().sum(), householder)[0])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


# dropout


def dropout_case():
    """Inputs whose output is the map itself: one block, values the identity."""
    inputs, lrpe = make_inputs(2, 2, 16, 16)
    inputs[2] = torch.eye(16).expand(2, 2, 16, 16)
    return inputs, {
        "metadata": metadata_of(inputs),
        "block_size": 16,
        "causal": False,
        "activation": "softmax",
        "scale": 0.25,
        "lrpe": lrpe,
    }


def test_dropout_drops_and_scales():
    inputs, arguments = dropout_case()
    weights = triton_diag_attention(*inputs, **arguments, dropout_p=0.0)
    dropped = triton_diag_attention(*inputs, **arguments, dropout_p=0.3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)
    assert abs(kept.float().mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    heads = kept.flatten(0, 1)
    assert not any(torch.equal(heads[i], heads[j]) for i in range(4) for j in range(i))
    assert not torch.equal(triton_diag_attention(*inputs, **arguments, dropout_p=0.3), dropped)
    assert not triton_diag_attention(*inputs, **arguments, dropout_p=1.0).any()


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_dropout_is_the_same_in_backward(activation):
    """The mask is read off a forward pass with identity values; with it, torch's autograd gives the gradients."""
    inputs, arguments = dropout_case()
    arguments["activation"] = activation
    torch.manual_seed(5)
    with_identity = triton_diag_attention(*inputs, **arguments, dropout_p=0.3)
    weights = triton_diag_attention(*inputs, **arguments, dropout_p=0.0)
    factors = torch.where((with_identity != 0) | (weights == 0), 1 / 0.7, 0.0)

    inputs[2], grad = torch.randn(2, 2, 16, 16), torch.randn(2, 2, 16, 16)
    lrpe = arguments.pop("lrpe")
    torch.manual_seed(5)
    results = run_with_gradients(triton_diag_attention, inputs, lrpe, grad, **arguments, dropout_p=0.3)

    def definition(query, key, value, lrpe):
        identity = torch.eye(16).expand_as(value)
        weights = eager_diag_attention(query, key, identity, lrpe=lrpe, **arguments, dropout_p=0.0)
        return (weights * factors) @ value

    expected = run_with_gradients(definition, inputs, lrpe, grad)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, atol=1e-5, rtol=1e-4)


def test_dropout_follows_the_generator():
    inputs, arguments = dropout_case()
    torch.manual_seed(1)
    first = triton_diag_attention(*inputs, **arguments, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(triton_diag_attention(*inputs, **arguments, dropout_p=0.5), first)


# as torch sees it


def operator_arguments(seq_len=9, dropout=False, mask=False):
    (query, key, value), lrpe = make_inputs(2, 1, seq_len, 16)
    metadata = metadata_of([query], LEFT if mask else None)
    seed = torch.tensor([7]) if dropout else None
    return (
        *(tensor.requires_grad_() for tensor in (query, key, value)), lrpe.theta.requires_grad_(), lrpe.householder,
        metadata.positions, metadata.is_real, None, seed, 4, True, "softmax", 0.25, 0.1 if dropout else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("case", [{}, {"seq_len": 13, "dropout": True, "mask": True}])
def test_opcheck(case, monkeypatch):
    monkeypatch.undo()  # no poison: NaN is not equal to NaN
    torch.library.opcheck(_diag_attention.operator, operator_arguments(**case))


@pytest.mark.parametrize("needs_theta", [False, True])
def test_opcheck_of_backward(needs_theta):
    arguments = [
        argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in operator_arguments()
    ]
    torch.library.opcheck(
        _diag_attention.backward_operator,
        (needs_theta, torch.randn(2, 1, 9, 16), *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_graph_break():
    inputs, lrpe = make_inputs(1, 2, 12, 16)
    mask = torch.ones(1, 12, dtype=torch.long)

    def attend(query, key, value, theta):
        return diag_attention(
            query, key, value, block_size=8, causal=True, lrpe=(theta, lrpe.householder), attention_mask=mask,
            dropout_p=0.1, backend="triton",
        ).square()  # fmt: skip

    grads = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, lrpe.theta)]
        function(*leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for plain, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("block_size", [1, 8, 200])
@pytest.mark.parametrize("shape", [(0, 2, 12, 16), (2, 2, 0, 16), (2, 0, 12, 16)], ids=["batch", "sequence", "heads"])
def test_empty_inputs(shape, block_size):
    query = torch.randn(shape, requires_grad=True)
    theta = torch.ones(8, requires_grad=True)
    output = diag_attention(
        query, query, query, block_size=block_size, causal=True, lrpe=(theta, torch.ones(16)), backend="triton"
    )
    assert output.shape == shape
    grads = torch.autograd.grad(output.sum(), (query, theta))
    assert grads[0].shape == shape
    assert not grads[1].any()


def test_empty_packed_sequences():
    query = torch.randn(1, 2, 0, 16)
    for block_size in (8, 200):
        output = diag_attention(
            query,
            query,
            query,
            block_size=block_size,
            causal=True,
            cu_seqlens=torch.tensor([0, 0, 0]),
            backend="triton",
        )
        assert output.shape == query.shape


def test_the_grid_has_a_program_for_every_block():
    """Whatever position the row starts at, and however the packed sequences are cut."""
    for seq_len in (1, 63, 64, 65, 200):
        for block_size in (1, 7, 33, 64):
            tokens = 64 // block_size * block_size
            for offset in range(block_size):
                assert count_tiles(seq_len, block_size, None) * tokens >= seq_len + offset
            for cuts in ([0, seq_len], [0] * 5 + [seq_len], list(range(seq_len + 1))):
                needed = sum(-(-(end - begin) // tokens) for begin, end in itertools.pairwise(cuts))
                assert count_tiles(seq_len, block_size, torch.tensor(cuts)) >= needed


# errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.double(), "float64"),
        (lambda tensor: tensor[..., :12], "head_dim=12"),
        (lambda tensor: tensor.repeat(1, 1, 1, 9), "head_dim=144"),
        (lambda tensor: tensor.to("meta"), "meta"),
    ],
)
def test_what_is_not_supported_says_so(change, message):
    inputs, _ = make_inputs(1, 1, 4, 16)
    with pytest.raises(ValueError, match=message):
        diag_attention(*(change(tensor) for tensor in inputs), block_size=4, causal=True, backend="triton")


def test_query_and_value_must_be_equally_wide():
    inputs, _ = make_inputs(1, 1, 4, 16)
    with pytest.raises(ValueError, match="value has head_dim=8 and query head_dim=16"):
        diag_attention(inputs[0], inputs[1], inputs[2][..., :8], block_size=4, causal=True, backend="triton")


@pytest.mark.parametrize("block_size", [4, 80])
def test_mixed_dtypes_are_promoted(block_size):
    """A float32 key is not rounded because the query is float16."""
    inputs, lrpe = make_inputs(1, 1, 90, 16)
    mixed = [inputs[0].half(), inputs[1], inputs[2]]
    options = {"block_size": block_size, "causal": True, "lrpe": lrpe}
    output = diag_attention(*mixed, backend="triton", **options)
    expected = diag_attention(*(tensor.double() for tensor in mixed), backend="eager", **options)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    mixed = [inputs[0], inputs[1], inputs[2].half()]
    assert diag_attention(*mixed, backend="triton", **options).dtype == torch.float16
