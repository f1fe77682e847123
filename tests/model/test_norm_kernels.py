"""The Triton kernels of NormAttention and its norm, run by Triton's interpreter, against the definitions in float64."""

import pytest
import torch

from transnormer_hf.model import norm_autograd_transnormer, rms_kernels_transnormer
from transnormer_hf.model.norm_autograd_transnormer import triton_norm_attention, triton_norm_attention_step
from transnormer_hf.model.norm_kernels_transnormer import KERNELS, segments_per_sequence
from transnormer_hf.model.ops_transnormer import eager_norm_attention, norm_attention, simple_rms_norm
from transnormer_hf.model.reference_transnormer import LRPE, AttentionMetadata, attention_metadata
from transnormer_hf.model.rms_kernels_transnormer import triton_simple_rms_norm
from transnormer_hf.model.triton_features_transnormer import compile_arguments

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Results come full of NaN, so that a place that no program writes shows."""

    def new_poisoned(shape, like, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)

    monkeypatch.setattr(norm_autograd_transnormer, "new_empty", new_poisoned)
    monkeypatch.setattr(rms_kernels_transnormer, "new_empty", new_poisoned)


@pytest.fixture
def in_segments(monkeypatch):
    """Cut sequences into so many segments, however short they are; none is done in one launch."""

    def set_segments(segments):
        monkeypatch.setattr(norm_autograd_transnormer, "segments_per_sequence", lambda *key: segments)
        monkeypatch.setattr(norm_autograd_transnormer, "SEGMENT_MULTIPLE", 16)
        monkeypatch.setattr(norm_autograd_transnormer, "is_short", lambda *key: False)

    return set_segments


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
def test_head_dims(head_dim, causal, feature_map, in_segments):
    in_segments(2)
    inputs, lrpe = make_inputs(1, 1, 40, head_dim)
    assert_equals_definition(inputs, lrpe, causal=causal, feature_map=feature_map)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("kernels", ["short", "bidirectional", "causal"])
def test_state_in_parts(kernels, parts, monkeypatch, in_segments):
    """However many blocks of columns hold the state; 40 channels fill the last one in part, or not at all."""
    if kernels != "short":
        in_segments(2)
    options = {"BLOCK_T": 16, "num_warps": 4, "num_stages": 1, "PARTS": parts}
    monkeypatch.setattr(norm_autograd_transnormer, "launch_options", lambda *key: options)
    inputs, lrpe = make_inputs(2, 1, 40, 40)
    mask = torch.tensor([[0] * 3 + [1] * 37, [1] * 30 + [0] * 10])
    assert_equals_definition(
        inputs,
        lrpe,
        causal=kernels == "causal",
        metadata=attention_metadata(2, 40, torch.device("cpu"), attention_mask=mask),
        state=torch.randn(2, 1, 40, 40),
        return_state=True,
    )


def test_wide_heads_in_float16():
    """They have no kernel of one launch, however short they are."""
    inputs, lrpe = make_inputs(1, 1, 20, 72, torch.float16)
    assert_equals_definition(inputs, lrpe)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 72, 128])
@pytest.mark.parametrize("seq_len", [1, 7, 63, 64, 65, 130, 200])
def test_lengths_and_head_dims(seq_len, head_dim, causal, in_segments):
    in_segments(2)
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
@pytest.mark.parametrize("segments", [2, pytest.param(4, marks=SLOW)])
def test_masks_in_segments(segments, causal, in_segments):
    in_segments(segments)
    inputs, lrpe = make_inputs(3, 1, 62, 8)
    mask = torch.ones(3, 62, dtype=torch.long)
    mask[0, :35], mask[1, 33:], mask[2, 25:55] = 0, 0, 0
    metadata = attention_metadata(3, 62, mask.device, mask)
    assert_equals_definition(inputs, lrpe, metadata=metadata, causal=causal, return_state=True)


@BOTH
@pytest.mark.parametrize(
    ("boundaries", "segments"),
    [([0, 0, 13, 13, 30], 1), ([0, 35, 35, 50], 2), pytest.param([0, 5, 80], 4, marks=SLOW)],
)
def test_packed_sequences(boundaries, segments, causal, in_segments):
    """Empty sequences, and tokens behind the last boundary."""
    in_segments(segments)
    seq_len = boundaries[-1] if segments == 2 else boundaries[-1] + 10
    inputs, lrpe = make_inputs(1, 1, seq_len, 8)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    metadata = attention_metadata(1, seq_len, cu_seqlens.device, cu_seqlens=cu_seqlens)
    state = torch.randn(len(boundaries) - 1, 1, 8, 8)
    assert_equals_definition(inputs, lrpe, metadata=metadata, causal=causal, state=state, return_state=True)


@BOTH
@pytest.mark.parametrize(("given", "returned"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("seq_len", "segments"), [(1, 1), (20, 1), (40, 2), pytest.param(200, 4, marks=SLOW)])
def test_states(seq_len, segments, given, returned, causal, in_segments):
    if segments > 1:
        in_segments(segments)
    inputs, lrpe = make_inputs(1, 1, seq_len, 8)
    state = torch.randn(1, 1, 8, 8) if given else None
    assert_equals_definition(inputs, lrpe, causal=causal, state=state, return_state=returned)


@BOTH
def test_gradient_of_the_state_alone(causal, in_segments):
    in_segments(2)
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
def test_half_precision(dtype, head_dim, causal, in_segments):
    in_segments(2)
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


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head_dim", [136, 256])
def test_wide_heads(head_dim, causal):
    inputs, lrpe = make_inputs(1, 1, 20, head_dim)
    state = torch.randn(1, 1, head_dim, head_dim)
    assert_equals_definition(inputs, lrpe, causal=causal, state=state, return_state=True)


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
def test_two_runs_give_the_same_bits(causal, in_segments):
    in_segments(2)
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
    """The second row of the batch lies more than 2^31 elements behind the first; only the touched pages exist."""
    far = 2**31 + 64
    storage = torch.empty(far + 4096, dtype=torch.float16)
    views = []
    for start in (0, 512, 1024):
        view = storage.as_strided((2, 1, 20, 16), (far, 16, 16, 1), start)
        view.copy_(torch.randn(2, 1, 20, 16))
        views.append(view)
    found, _ = norm_attention(*views, causal=causal, backend="triton")
    expected, _ = norm_attention(*(view.clone() for view in views), causal=causal, backend="triton")
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


@pytest.mark.parametrize("head_dim", [8, 24, pytest.param(256, marks=SLOW)])
def test_step(head_dim):
    """One token at a time into a state in place, against the definition over all of them."""
    inputs, lrpe = make_inputs(2, 2, 5, head_dim)
    state = torch.zeros(2, 2, head_dim, head_dim)
    address = state.data_ptr()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    metadata = attention_metadata(2, 5, mask.device, mask)
    outputs = []
    for token in range(5):
        here = AttentionMetadata(metadata.positions[:, token : token + 1], metadata.is_real[:, token : token + 1])
        columns = (tensor[:, :, token : token + 1] for tensor in inputs)
        outputs.append(triton_norm_attention_step(*columns, state, metadata=here, feature_map="1+elu", lrpe=lrpe))
    expected, expected_state = eager_norm_attention(
        *(tensor.double() for tensor in inputs),
        metadata=metadata,
        causal=True,
        feature_map="1+elu",
        lrpe=LRPE(*(parameter.double() for parameter in lrpe)),
        initial_state=None,
        return_state=True,
    )
    real = mask.bool()[:, None, :, None]
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(outputs, 2) * real, (expected * real).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state, expected_state.float(), rtol=1e-5, atol=1e-4)
    assert state.data_ptr() == address


def test_step_refuses_what_it_cannot_do():
    inputs, _ = make_inputs(1, 1, 2, 8)
    metadata = attention_metadata(1, 2, torch.device("cpu"))
    state = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="query has 2 tokens"):
        triton_norm_attention_step(*inputs, state, metadata=metadata, feature_map="elu", lrpe=None)
    one = [tensor[:, :, :1] for tensor in inputs]
    metadata = attention_metadata(1, 1, torch.device("cpu"))
    for wrong in (state.half(), state[..., :4], state.expand(1, 2, 8, 8), state.mT):
        with pytest.raises(ValueError, match="changed in place"):
            triton_norm_attention_step(*one, wrong, metadata=metadata, feature_map="elu", lrpe=None)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 4, 12), torch.float32, "head_dim=12"),
        ((1, 1, 4, 264), torch.float32, "head_dim=264"),
        ((1, 1, 4, 8), torch.float64, "dtype torch.float64"),
    ],
)
def test_unsupported_inputs(shape, dtype, message):
    tensor = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        norm_attention(tensor, tensor, tensor, causal=True, backend="triton")


def test_cpu_needs_the_interpreter(monkeypatch):
    from transnormer_hf.model import triton_features_transnormer

    monkeypatch.setattr(triton_features_transnormer, "is_interpreted", lambda: False)
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
        triton_simple_rms_norm(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="width 20000"):
        triton_simple_rms_norm(torch.zeros(2, 20000))


# What follows from shapes alone


def test_segments():
    """Enough programs at batch 1, one segment where the batch fills the device or the sequence is short."""
    assert segments_per_sequence(12, 8192, 64) * 12 >= 96
    assert segments_per_sequence(12, 65536, 64) * 12 >= 128
    assert segments_per_sequence(128, 65536, 64) == 1
    assert segments_per_sequence(1, 200, 64) == 1


def test_every_kernel_can_be_compiled_ahead_of_time():
    """The registry names each parameter of each kernel."""
    for spec in KERNELS:
        for head_dim in (16, 64, 128, 256):
            for variant in spec.variants("sm_90", "bf16", head_dim):
                names = set(spec.function.arg_names)
                assert set(variant.types) | set(variant.constexprs) <= names
                arguments = compile_arguments(spec, variant)
                assert list(arguments.signature) == spec.function.arg_names
                unnamed = names - set(variant.types) - set(variant.constexprs)
                assert all(name.endswith("_stride") or name in INTEGERS for name in unnamed), unnamed


INTEGERS = {"seq_len", "segment_length", "segments_per_sequence", "num_states", "num_rows"}
