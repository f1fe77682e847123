"""The Triton kernels of NormAttention and its norm, run by Triton's interpreter, against the definitions in float64."""

import pytest
import torch

from transnormer_hf.model import triton_common_transnormer, triton_norm_transnormer
from transnormer_hf.model.ops_transnormer import eager_norm_attention, norm_attention, simple_rms_norm
from transnormer_hf.model.reference_transnormer import LRPE, attention_metadata
from transnormer_hf.model.triton_common_transnormer import triton_simple_rms_norm
from transnormer_hf.model.triton_norm_transnormer import segment_table, triton_norm_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Results come full of NaN, so that a place that no program writes shows."""

    def new_poisoned(shape, like, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)

    monkeypatch.setattr(triton_common_transnormer, "new_empty", new_poisoned)
    monkeypatch.setattr(triton_norm_transnormer, "new_empty", new_poisoned)


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of 32 tokens in tiles of 16, so that short sequences have several of both."""

    options = triton_norm_transnormer.launch_options
    monkeypatch.setattr(triton_norm_transnormer, "SEGMENT", 32)
    monkeypatch.setattr(triton_norm_transnormer, "launch_options", lambda *key: options(*key) | {"BLOCK_T": 16})


def make_inputs(batch_size, num_heads, seq_len, head_dim, dtype=torch.float32):
    """query, key, value as projections give them, (batch, seq, heads · head_dim) in memory, and LRPE's parameters."""
    query, key, value = (
        torch.randn(batch_size, seq_len, num_heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    theta = 10000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    householder = torch.nn.functional.normalize(torch.randn(head_dim), dim=0)
    return [query, key, value], LRPE(theta, householder)


def run_with_gradients(function, inputs, lrpe, state, grads, metadata, **arguments):
    """Output, state and the gradients of query, key, value, theta and the initial state, as far as there are any."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    wanted = list(inputs)
    if lrpe is not None:
        lrpe = LRPE(lrpe.theta.detach().requires_grad_(), lrpe.householder.detach())
        wanted.append(lrpe.theta)
    if state is not None:
        state = state.detach().requires_grad_()
        wanted.append(state)
    return_state = grads[1] is not None
    output, new_state = function(
        *inputs, metadata=metadata, lrpe=lrpe, initial_state=state, return_state=return_state, **arguments
    )
    results = [output, new_state] if return_state else [output]
    if metadata.is_real is not None:  # outputs at padding are undefined: nothing may flow back from there
        results[0] = output.masked_fill(~metadata.is_real[:, None, :, None], 0)
    gradients = torch.autograd.grad(results, wanted, [g.to(r.dtype) for r, g in zip(results, grads, strict=False)])
    return [result.detach() for result in results] + list(gradients)


def assert_equals_definition(
    inputs,
    lrpe=None,
    *,
    metadata=None,
    causal=False,
    feature_map="1+elu",
    state=None,
    return_state=False,
    function=triton_norm_attention,
):
    """Everything within tolerance of the definition, relative to the norm of each result."""
    dtype = inputs[0].dtype
    batch_size, num_heads, seq_len, head_dim = inputs[0].shape
    metadata = metadata or attention_metadata(batch_size, seq_len, torch.device("cpu"))
    states = batch_size if metadata.cu_seqlens is None else metadata.cu_seqlens.shape[0] - 1
    grads = [torch.randn(inputs[2].shape), None]
    if return_state:
        grads[1] = torch.randn(states, num_heads, head_dim, inputs[2].shape[-1])
    arguments = {"metadata": metadata, "causal": causal, "feature_map": feature_map}
    found = run_with_gradients(function, inputs, lrpe, state, grads, **arguments)
    expected = run_with_gradients(
        eager_norm_attention,
        [tensor.double() for tensor in inputs],
        lrpe and LRPE(*(parameter.double() for parameter in lrpe)),
        None if state is None else state.double(),
        grads,
        **arguments,
    )
    assert found[0].dtype == dtype
    for result, truth in zip(found, expected, strict=True):
        assert result.shape == truth.shape
        error = (result.double() - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype], (error, result.shape)
    return found


@BOTH
@pytest.mark.parametrize("seq_len", [1, 7, 63, 64, 65, 130])
def test_lengths(seq_len, causal):
    inputs, lrpe = make_inputs(1, 2, seq_len, 16)
    assert_equals_definition(inputs, lrpe, causal=causal)


@pytest.mark.parametrize(
    ("head_dim", "causal", "feature_map"),
    [
        (8, False, "elu"),
        (8, True, "1+elu"),
        (24, False, "1+elu"),
        (24, True, "elu"),
        (32, False, "elu"),
        (32, True, "elu"),
        (64, False, "1+elu"),
        (64, True, "1+elu"),
        (96, True, "1+elu"),
        (128, False, "elu"),
        (128, True, "elu"),
    ],
)
def test_head_dims(head_dim, causal, feature_map, small_segments):
    inputs, lrpe = make_inputs(1, 1, 40, head_dim)
    assert_equals_definition(inputs, lrpe, causal=causal, feature_map=feature_map)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 72, 128])
@pytest.mark.parametrize("seq_len", [1, 7, 63, 64, 65, 130, 200])
def test_lengths_and_head_dims(seq_len, head_dim, causal, small_segments):
    inputs, lrpe = make_inputs(1, 3, seq_len, head_dim)
    state = torch.randn(1, 3, head_dim, head_dim)
    assert_equals_definition(inputs, lrpe, causal=causal, state=state, return_state=True)


@BOTH
@pytest.mark.parametrize("has_lrpe", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "elu", "1+elu"])
def test_feature_maps(feature_map, has_lrpe, causal):
    inputs, lrpe = make_inputs(2, 1, 20, 24)
    assert_equals_definition(inputs, lrpe if has_lrpe else None, causal=causal, feature_map=feature_map)


MASKS = {
    "left": [[0] * 20 + [1] * 20, [1] * 40],
    "right": [[1] * 40, [1] * 17 + [0] * 23],
    "interior": [[1] * 5 + [0] * 30 + [1] * 5, [0, 1, 1, 0] * 10],
    "nothing": [[0] * 40, [1] * 40],
}


@BOTH
@pytest.mark.parametrize("side", MASKS)
def test_masks(side, causal):
    """Padding holds infinity: it must not get anywhere, not even times zero."""
    inputs, lrpe = make_inputs(2, 1, 40, 8)
    mask = torch.tensor(MASKS[side])
    found = assert_equals_definition(
        inputs, lrpe, metadata=attention_metadata(2, 40, mask.device, mask), causal=causal, return_state=True
    )
    padding = ~mask.bool()[:, None, :, None]
    for tensor in inputs[1:]:
        tensor.masked_fill_(padding, float("inf"))
    metadata = attention_metadata(2, 40, mask.device, mask)
    output, _ = triton_norm_attention(
        *inputs,
        metadata=metadata,
        causal=causal,
        feature_map="1+elu",
        lrpe=lrpe,
        initial_state=None,
        return_state=False,
    )
    assert torch.equal(output.masked_fill(padding, 0), found[0])


@BOTH
def test_masks_in_segments(causal, small_segments):
    inputs, lrpe = make_inputs(3, 1, 62, 8)
    mask = torch.ones(3, 62, dtype=torch.long)
    mask[0, :35], mask[1, 33:], mask[2, 25:55] = 0, 0, 0
    metadata = attention_metadata(3, 62, mask.device, mask)
    assert_equals_definition(inputs, lrpe, metadata=metadata, causal=causal, return_state=True)


PACKED = [([0, 0, 13, 13, 30], 40), ([0, 35, 35, 50], 50), pytest.param([0, 5, 140], 150, marks=SLOW)]


@BOTH
@pytest.mark.parametrize(("boundaries", "seq_len"), PACKED)
def test_packed_sequences(boundaries, seq_len, causal, small_segments):
    """Empty sequences, and tokens behind the last boundary."""
    inputs, lrpe = make_inputs(1, 1, seq_len, 8)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    metadata = attention_metadata(1, seq_len, cu_seqlens.device, cu_seqlens=cu_seqlens)
    state = torch.randn(len(boundaries) - 1, 1, 8, 8)
    assert_equals_definition(inputs, lrpe, metadata=metadata, causal=causal, state=state, return_state=True)


@BOTH
@pytest.mark.parametrize(("given", "returned"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("seq_len", [1, 20, 40, pytest.param(200, marks=SLOW)])
def test_states(seq_len, given, returned, causal, small_segments):
    inputs, lrpe = make_inputs(1, 1, seq_len, 8)
    state = torch.randn(1, 1, 8, 8) if given else None
    assert_equals_definition(inputs, lrpe, causal=causal, state=state, return_state=returned)


@BOTH
def test_gradient_of_the_state_alone(causal, small_segments):
    inputs, _ = make_inputs(1, 2, 40, 8)
    metadata = attention_metadata(1, 40, torch.device("cpu"))
    results = []
    for function in (triton_norm_attention, eager_norm_attention):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        _, state = function(
            *leaves,
            metadata=metadata,
            causal=causal,
            feature_map="elu",
            lrpe=None,
            initial_state=None,
            return_state=True,
        )
        results.append(torch.autograd.grad(state.square().sum(), leaves[1:]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)


@BOTH
def test_values_of_another_width(causal):
    inputs, lrpe = make_inputs(1, 1, 30, 16)
    inputs[2] = torch.randn(1, 1, 30, 40)
    assert_equals_definition(inputs, lrpe, causal=causal, return_state=True)


@BOTH
def test_inputs_of_any_strides(causal):
    """Slices of one projection, a head_dim that is not the last in memory, and a gradient that is one number."""
    projected = torch.randn(2, 12, 3 * 2 * 16)
    inputs = [part.unflatten(-1, (2, 16)).transpose(1, 2) for part in projected.chunk(3, -1)]
    _, lrpe = make_inputs(1, 1, 1, 16)
    assert_equals_definition(inputs, lrpe, causal=causal)
    assert_equals_definition([tensor.mT.contiguous().mT for tensor in inputs], lrpe, causal=causal)
    leaf = inputs[1].detach().requires_grad_()
    output, _ = norm_attention(inputs[0], leaf, inputs[2], causal=causal, backend="triton")
    output.sum().backward()
    assert leaf.grad.isfinite().all()


@BOTH
def test_rows_that_begin_anywhere(causal):
    """Strides that are no multiples of 8 elements, and tensors that begin in the middle of 16 bytes."""
    inputs, lrpe = make_inputs(2, 2, 12, 8)
    wide = [torch.nn.functional.pad(tensor, (1, 2))[..., 1:9] for tensor in inputs]
    assert (wide[0].stride(2), wide[0].storage_offset()) == (11, 1)
    assert_equals_definition(wide, lrpe, causal=causal)
    moved = [torch.nn.functional.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape) for tensor in inputs]
    assert_equals_definition(moved, lrpe, causal=causal)


def test_output_is_ready_for_the_projection():
    """The heads of a token lie next to each other, in the output and in the gradients: merging them copies nothing."""
    inputs, _ = make_inputs(2, 3, 10, 8)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, _ = norm_attention(*leaves, causal=True, backend="triton")
    gradients = torch.autograd.grad(output.sum(), leaves)
    for tensor in (output, *gradients):
        assert tensor.transpose(1, 2).is_contiguous()


@BOTH
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 32), (torch.bfloat16, 32), (torch.float16, 72)])
def test_half_precision(dtype, head_dim, causal, small_segments):
    inputs, lrpe = make_inputs(1, 1, 40, head_dim, dtype)
    assert_equals_definition(inputs, lrpe, causal=causal, feature_map="elu", return_state=True)


@BOTH
def test_float16_states_beyond_its_range(causal):
    """Sums are float32: neither the state nor the scores overflow where the output itself does not."""
    query, key, value = (torch.full((1, 1, 140, 16), number, dtype=torch.float16) for number in (1e-4, 200, 200))
    output, state = norm_attention(query, key, value, causal=causal, return_state=True, backend="triton")
    expected, expected_state = norm_attention(
        query.double(), key.double(), value.double(), causal=causal, return_state=True, backend="eager"
    )
    assert expected_state.max() > 65504
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.double(), expected, rtol=5e-3, atol=0)


def test_positions_far_out():
    """Angles keep their accuracy at position 131,072, and at 10 million."""
    for offset in (131_072, 10_000_000):
        inputs, lrpe = make_inputs(1, 1, 20, 16)
        metadata = attention_metadata(1, 20, torch.device("cpu"), position_offset=offset)
        function = triton_norm_attention
        arguments = {
            "metadata": metadata,
            "causal": True,
            "feature_map": "elu",
            "initial_state": None,
            "return_state": True,
        }
        output, state = function(*inputs, lrpe=lrpe, **arguments)
        double = [tensor.double() for tensor in inputs]
        expected = eager_norm_attention(*double, lrpe=LRPE(*(p.double() for p in lrpe)), **arguments)
        for result, truth in zip((output, state), expected, strict=True):
            assert (result.double() - truth).norm() / truth.norm() < 1e-5


@BOTH
def test_gradient_of_the_householder_vector(causal):
    """It is frozen in the model; who unfreezes it gets its gradient, by way of plain torch."""
    inputs, lrpe = make_inputs(1, 1, 20, 8)
    gradients = []
    for backend in ("triton", "eager"):
        householder = lrpe.householder.clone().requires_grad_()
        output, _ = norm_attention(*inputs, causal=causal, lrpe=LRPE(lrpe.theta, householder), backend=backend)
        gradients.append(torch.autograd.grad(output.square().sum(), householder)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@BOTH
def test_two_runs_give_the_same_bits(causal, small_segments):
    inputs, lrpe = make_inputs(1, 2, 40, 8)
    grads = [torch.randn(inputs[2].shape), torch.randn(1, 2, 8, 8)]
    metadata = attention_metadata(1, 40, torch.device("cpu"))
    runs = [
        run_with_gradients(
            triton_norm_attention, inputs, lrpe, grads[1], grads, metadata=metadata, causal=causal, feature_map="elu"
        )
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@BOTH
def test_offsets_beyond_32_bits(causal):
    """The last tokens lie more than 2^31 elements behind the first; only the touched pages exist."""
    row = 2**23 - 8  # the widest row for which 256 tokens have 32-bit offsets
    storage = torch.empty(270 * row + 4096, dtype=torch.float16)
    views = []
    for start in (0, 512, 1024):
        view = storage.as_strided((1, 1, 270, 16), (270 * row, 16, row, 1), start)
        view.copy_(torch.randn(1, 1, 270, 16))
        views.append(view)
    assert 260 * row > 2**31
    found, _ = norm_attention(*views, causal=causal, backend="triton")
    expected, _ = norm_attention(*(view.contiguous() for view in views), causal=causal, backend="triton")
    assert torch.equal(found, expected)


@BOTH
def test_tokens_far_apart(causal):
    """Each token lies 2^27 elements behind the one before: a tile of them is wider than 32 bits count."""
    storage = torch.empty(16 * 2**27 + 16, dtype=torch.float16)
    query = storage.as_strided((1, 1, 17, 16), (0, 0, 2**27, 1))
    query.copy_(torch.randn(1, 1, 17, 16))
    (_, key, value), _ = make_inputs(1, 1, 17, 16, torch.float16)
    found, _ = norm_attention(query, key, value, causal=causal, backend="triton")
    expected, _ = norm_attention(query.clone(), key, value, causal=causal, backend="triton")
    assert torch.equal(found, expected)


# Faults that only hardware would show


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e2), (torch.bfloat16, 1e4)])
def test_large_early_keys_do_not_drown_later_gradients(dtype, scale):
    """dq of later tokens is right, because no state is a difference of larger ones.

    Everything is rounded to half precision where a GPU would round it. With states recovered by subtraction the error
    grew with the length of a segment.
    """
    inputs, lrpe = make_inputs(1, 1, 600, 16, dtype)
    inputs[1][:, :, :8] *= scale
    inputs[2][:, :, :8] /= scale  # so that these products are as large as the others
    assert_equals_definition(inputs, lrpe, causal=True, feature_map="identity")


def test_a_state_is_bit_for_bit_the_sum_of_its_segments(small_segments, monkeypatch):
    """Before segment i: initial + sum 0 + ... + sum (i - 1), in this order; dS from the other end."""
    scans = []

    def spy(kernel, grid, tensors, **arguments):
        triton_common_transnormer.launch(kernel, grid, tensors, **arguments)
        if kernel is triton_norm_transnormer.scan_kernel:
            scans.append((tensors, arguments["DIRECTION"]))

    monkeypatch.setattr(triton_norm_transnormer, "launch", spy)
    inputs, lrpe = make_inputs(2, 1, 150, 8)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    state = torch.randn(2, 1, 8, 8)
    output, _ = norm_attention(*leaves, causal=True, lrpe=lrpe, initial_state=state, backend="triton")
    output.square().sum().backward()
    assert [direction for _, direction in scans] == [1, -1]
    for tensors, direction in scans:
        sums, states = (tensors[name].unflatten(0, (2, 5)) for name in ("sum", "states"))
        running = state if direction == 1 else torch.zeros_like(state)
        for segment in range(5)[::direction]:
            assert torch.equal(states[:, segment], running)
            running = running + sums[:, segment]
        assert torch.equal(tensors["total"], running)


@BOTH
@pytest.mark.parametrize("wide", [0, 1, 2])
def test_float32_beside_half_precision_is_not_rounded(wide, causal):
    """The three are promoted to their common dtype, whichever of them is the wide one; the output has the value's."""
    inputs, lrpe = make_inputs(1, 1, 40, 16)
    inputs = [tensor if index == wide else tensor.bfloat16() for index, tensor in enumerate(inputs)]
    options = {"causal": causal, "lrpe": lrpe, "return_state": True}
    output, state = norm_attention(*inputs, **options, backend="triton")
    expected, expected_state = norm_attention(*(t.double() for t in inputs), **options, backend="eager")
    assert output.dtype == inputs[2].dtype
    assert (state - expected_state).norm() / expected_state.norm() < 1e-6
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[inputs[2].dtype]


@BOTH
@pytest.mark.parametrize("given", [False, True])
def test_empty_sequences_have_a_state(given, causal):
    """The initial one, or zeros: never what was in memory (the tests fill that with NaN)."""
    inputs = [torch.zeros(2, 3, 0, 8, requires_grad=True) for _ in range(3)]
    state = torch.randn(2, 3, 8, 8, requires_grad=True) if given else None
    output, new_state = norm_attention(*inputs, causal=causal, initial_state=state, return_state=True, backend="triton")
    assert output.shape == (2, 3, 0, 8)
    assert torch.equal(new_state, state if given else torch.zeros(2, 3, 8, 8))
    if given:
        new_state.sum().backward()
        assert torch.equal(state.grad, torch.ones_like(state))


def test_nothing_waits_for_the_device(monkeypatch, small_segments):
    """No value of a tensor is read by the host, for masks and packed sequences either."""

    def refuse(*arguments):
        raise AssertionError("a tensor was read by the host")

    mask, cu_seqlens = torch.ones(1, 40, dtype=torch.long), torch.tensor([0, 13, 40])
    metadata = attention_metadata(1, 40, mask.device, mask), attention_metadata(1, 40, mask.device, None, cu_seqlens)
    inputs, lrpe = make_inputs(1, 1, 40, 8)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    monkeypatch.setattr(triton_norm_transnormer, "launch", lambda *arguments, **options: None)  # it reads everything
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for here in metadata:
        output, _ = norm_attention(*leaves, causal=True, lrpe=lrpe, metadata=here, backend="triton")
        output.sum().backward()


def test_the_segment_table_is_made_once(monkeypatch):
    """The backward pass has the forward's, and a caller may hand in its own."""
    tables = []

    def count(cu_seqlens, seq_len):
        tables.append(segment_table(cu_seqlens, seq_len))
        return tables[-1]

    monkeypatch.setattr(triton_norm_transnormer, "segment_table", count)
    cu_seqlens = torch.tensor([0, 13, 40])
    inputs, lrpe = make_inputs(1, 1, 40, 8)
    metadata = attention_metadata(1, 40, cu_seqlens.device, cu_seqlens=cu_seqlens)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, _ = norm_attention(*leaves, causal=True, lrpe=lrpe, metadata=metadata, backend="triton")
    output.sum().backward()
    assert len(tables) == 1
    metadata = metadata._replace(segments=segment_table(cu_seqlens, 40))
    options = {"metadata": metadata, "causal": True, "feature_map": "identity", "lrpe": lrpe}
    found, _ = triton_norm_attention(*inputs, **options, initial_state=None, return_state=False)
    assert torch.equal(found, output)
    assert len(tables) == 1


def test_segment_table():
    """(first token, end, sequence) of each segment, unused ones empty; (first segment, end, 0) of each sequence."""
    table = segment_table(torch.tensor([0, 300, 300, 500]), 600)
    assert table.tolist() == [
        [0, 256, 0], [256, 300, 0], [300, 500, 2], [500, 600, 3], [600, 600, 3], [600, 600, 3],
        [0, 2, 0], [2, 2, 0], [2, 3, 0], [3, 4, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 4, 12), torch.float32, "head_dim=12"),
        ((1, 1, 4, 136), torch.float32, "head_dim=136.*from 8 to 128"),
        ((1, 1, 4, 8), torch.float64, "dtype torch.float64"),
    ],
)
def test_unsupported_inputs(shape, dtype, message):
    tensor = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        norm_attention(tensor, tensor, tensor, causal=True, backend="triton")


def test_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_common_transnormer, "is_interpreted", lambda: False)
    tensor = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        norm_attention(tensor, tensor, tensor, causal=True, backend="triton")


# SimpleRMSNorm


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 7, 24), (5, 768), (2, 3, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_simple_rms_norm(shape, dtype):
    hidden_states = torch.randn(shape, dtype=dtype).requires_grad_()
    grad = torch.randn(shape)
    normed = triton_simple_rms_norm(hidden_states)
    (found,) = torch.autograd.grad(normed, hidden_states, grad.to(dtype))
    truth = hidden_states.detach().double().requires_grad_()
    expected = simple_rms_norm(truth)
    (expected_grad,) = torch.autograd.grad(expected, truth, grad.to(dtype).double())
    assert normed.dtype == found.dtype == dtype
    for result, right in ((normed, expected), (found, expected_grad)):
        assert (result.double() - right).norm() / right.norm() < TOLERANCE[dtype]


def test_simple_rms_norm_of_zeros():
    """A row of zeros stays zeros, in float16 too; its gradient is 1 / eps, as in the definition."""
    hidden_states = torch.zeros(2, 16, dtype=torch.float16)
    assert torch.equal(triton_simple_rms_norm(hidden_states), hidden_states)
    leaf = torch.zeros(2, 16, requires_grad=True)
    (found,) = torch.autograd.grad(triton_simple_rms_norm(leaf, 1e-3).sum(), leaf)
    (expected,) = torch.autograd.grad(simple_rms_norm(leaf, 1e-3).sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_simple_rms_norm_of_views():
    wide = torch.randn(4, 6, 32)
    for view in (wide[..., :16], wide.transpose(0, 1), wide.mT, wide[:, ::2]):
        torch.testing.assert_close(triton_simple_rms_norm(view), simple_rms_norm(view))


def test_simple_rms_norm_by_backend():
    hidden_states = torch.randn(3, 24)
    found = {backend: simple_rms_norm(hidden_states, backend=backend) for backend in ("auto", "eager", "torch")}
    assert all(torch.equal(normed, found["eager"]) for normed in found.values())
    assert torch.equal(simple_rms_norm(hidden_states, 0.1, "triton"), triton_simple_rms_norm(hidden_states, 0.1))
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        simple_rms_norm(hidden_states, backend="cuda")


def test_simple_rms_norm_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="float64"):
        simple_rms_norm(torch.zeros(2, 8, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="width 20000"):
        simple_rms_norm(torch.zeros(2, 20000), backend="triton")
