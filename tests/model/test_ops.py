"""The public ops: their definition against loops written out again here, gradients, states, precision, and errors."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from transnormer_hf import diag_attention, norm_attention, simple_rms_norm
from transnormer_hf.model import ops_transnormer
from transnormer_hf.model.ops_transnormer import resolve_backend
from transnormer_hf.model.reference_transnormer import attention_metadata

BATCH, HEADS, SEQ, HEAD_DIM = 2, 2, 7, 4
BACKENDS = ("eager", "torch")

# What a batch may look like: the keyword of the op, and per row and column (sequence, position, is real).
LAYOUTS = {
    "no padding": {},
    "right padding": {"attention_mask": [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]},
    "left padding": {"attention_mask": [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]},
    "interior zeros": {"attention_mask": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0]]},
    "one token": {"attention_mask": [[0, 0, 0, 1, 0, 0, 0], [1] * 7]},
    "a row of padding": {"attention_mask": [[0] * 7, [1] * 7]},
    "packed": {"cu_seqlens": [0, 3, 4, 7]},
    "packed, with empty sequences": {"cu_seqlens": [0, 0, 5, 5, 7]},
}


class Tokens:
    """Where each token of one of LAYOUTS stands, found by counting."""

    def __init__(self, attention_mask=None, cu_seqlens=None):
        self.batch_size = BATCH if cu_seqlens is None else 1
        self.kwargs, self.rows = {}, []
        if cu_seqlens is not None:
            self.kwargs["cu_seqlens"] = torch.tensor(cu_seqlens)
            pairs = list(pairwise(cu_seqlens))
            self.rows = [[(index, place, True) for index, (a, b) in enumerate(pairs) for place in range(b - a)]]
            self.num_states = len(pairs)
            return
        if attention_mask is not None:
            self.kwargs["attention_mask"] = torch.tensor(attention_mask)
        for index, row in enumerate(attention_mask or [[1] * SEQ] * BATCH):
            first = row.index(1) if 1 in row else SEQ
            self.rows.append([(index, column - first, bool(real)) for column, real in enumerate(row)])
        self.num_states = BATCH

    def is_real(self):
        return torch.tensor([[real for _, _, real in row] for row in self.rows])

    def make_inputs(self, value_dim=HEAD_DIM):
        shape = (self.batch_size, HEADS, SEQ)
        return [torch.randn(*shape, width, dtype=torch.float64) for width in (HEAD_DIM, HEAD_DIM, value_dim)]

    def assert_close_at_real_tokens(self, actual, expected):
        real = self.is_real()
        torch.testing.assert_close(actual.transpose(1, 2)[real], expected.transpose(1, 2)[real])


PHI = {
    "identity": lambda x: x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "1+elu": lambda x: 1 + x if x > 0 else math.exp(x),
}


def make_lrpe(head_dim=HEAD_DIM):
    householder = torch.randn(head_dim, dtype=torch.float64)
    return torch.rand(head_dim // 2, dtype=torch.float64), householder / householder.norm()


def rotate(x, position, lrpe):
    """R_t(theta) (I - 2 v v^T) x on a list of numbers."""
    if lrpe is None:
        return x
    theta, v = (parameter.tolist() for parameter in lrpe)
    dot = sum(a * b for a, b in zip(x, v, strict=True))
    x = [a - 2 * dot * b for a, b in zip(x, v, strict=True)]
    turned = []
    for pair, angle in enumerate(theta):
        a, b = x[2 * pair : 2 * pair + 2]
        cos, sin = math.cos(position * angle), math.sin(position * angle)
        turned += [a * cos - b * sin, a * sin + b * cos]
    return turned


def dot_product(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def weighted_sum(weights, vectors, width):
    return [sum(weight * vector[d] for weight, vector in zip(weights, vectors, strict=True)) for d in range(width)]


def norm_attention_by_loops(query, key, value, tokens, causal, feature_map, lrpe, initial_state=None):
    """o_i = sum_j (q'_i . k'_j) v_j over the tokens j that i sees, and S = sum_j k'_j v_j^T; entry by entry."""
    output = torch.zeros_like(value)
    state = torch.zeros(tokens.num_states, HEADS, HEAD_DIM, value.shape[-1], dtype=value.dtype)
    if initial_state is not None:
        state += initial_state
    phi = PHI[feature_map]
    for b, row in enumerate(tokens.rows):
        for h in range(HEADS):
            mapped = [
                [rotate([phi(x) for x in t[b, h, i].tolist()], row[i][1], lrpe) for i in range(SEQ)]
                for t in (query, key)
            ]
            for i, (sequence, _, _) in enumerate(row):
                seen = [
                    j for j, (other, _, real) in enumerate(row) if real and other == sequence and (j <= i or not causal)
                ]
                scores = [dot_product(mapped[0][i], mapped[1][j]) for j in seen]
                o = weighted_sum(scores, [value[b, h, j].tolist() for j in seen], value.shape[-1])
                output[b, h, i] = torch.tensor(o, dtype=value.dtype)
                if initial_state is not None:
                    output[b, h, i] += torch.tensor(mapped[0][i], dtype=value.dtype) @ initial_state[sequence, h]
                if row[i][2]:
                    state[sequence, h] += torch.outer(torch.tensor(mapped[1][i], dtype=value.dtype), value[b, h, i])
    return output, state


def diag_attention_by_loops(query, key, value, tokens, block_size, causal, activation, scale, lrpe):
    """Each token against the real tokens of its own block."""
    output = torch.zeros_like(value)
    for b, row in enumerate(tokens.rows):
        for h in range(HEADS):
            q, k = (
                [rotate(t[b, h, i].tolist(), row[i][1] % block_size, lrpe) for i in range(SEQ)] for t in (query, key)
            )
            for i, (sequence, position, _) in enumerate(row):
                seen = [
                    j
                    for j, (other, place, real) in enumerate(row)
                    if real
                    and other == sequence
                    and place // block_size == position // block_size
                    and (j <= i or not causal)
                ]
                scores = [dot_product(q[i], k[j]) * scale for j in seen]
                if activation == "relu":
                    weights = [max(score, 0.0) for score in scores]
                else:
                    exponentials = [math.exp(score) for score in scores]
                    weights = [e / sum(exponentials) for e in exponentials]
                o = weighted_sum(weights, [value[b, h, j].tolist() for j in seen], value.shape[-1])
                output[b, h, i] = torch.tensor(o, dtype=value.dtype)
    return output


@pytest.fixture(params=LAYOUTS, name="tokens")
def _tokens(request):
    return Tokens(**LAYOUTS[request.param])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
class TestAgainstLoops:
    @pytest.mark.parametrize(("feature_map", "has_lrpe"), [("identity", False), ("elu", True), ("1+elu", True)])
    def test_norm_attention(self, tokens, causal, feature_map, has_lrpe, backend):
        inputs, lrpe = tokens.make_inputs(), make_lrpe() if has_lrpe else None
        expected, expected_state = norm_attention_by_loops(*inputs, tokens, causal, feature_map, lrpe)
        kwargs = {"causal": causal, "feature_map": feature_map, "lrpe": lrpe, "backend": backend, **tokens.kwargs}
        output, state = norm_attention(*inputs, **kwargs, return_state=True)
        tokens.assert_close_at_real_tokens(output, expected)
        torch.testing.assert_close(state, expected_state)
        assert norm_attention(*inputs, **kwargs)[1] is None

    def test_norm_attention_with_a_state_and_wider_values(self, tokens, causal, backend):
        inputs, lrpe = tokens.make_inputs(value_dim=6), make_lrpe()
        initial_state = torch.randn(tokens.num_states, HEADS, HEAD_DIM, 6, dtype=torch.float64)
        expected = norm_attention_by_loops(*inputs, tokens, causal, "1+elu", lrpe, initial_state)
        output, state = norm_attention(
            *inputs,
            causal=causal,
            feature_map="1+elu",
            lrpe=lrpe,
            initial_state=initial_state,
            return_state=True,
            backend=backend,
            **tokens.kwargs,
        )
        tokens.assert_close_at_real_tokens(output, expected[0])
        torch.testing.assert_close(state, expected[1])

    @pytest.mark.parametrize("activation", ["softmax", "relu"])
    @pytest.mark.parametrize(("block_size", "has_lrpe"), [(1, False), (3, True), (64, True)])
    def test_diag_attention(self, tokens, causal, activation, block_size, has_lrpe, backend):
        inputs, lrpe = tokens.make_inputs(), make_lrpe() if has_lrpe else None
        expected = diag_attention_by_loops(*inputs, tokens, block_size, causal, activation, HEAD_DIM**-0.5, lrpe)
        output = diag_attention(
            *inputs,
            block_size=block_size,
            causal=causal,
            activation=activation,
            lrpe=lrpe,
            backend=backend,
            **tokens.kwargs,
        )
        tokens.assert_close_at_real_tokens(output, expected)

    def test_diag_attention_with_a_scale(self, causal, backend):
        tokens = Tokens()
        inputs = tokens.make_inputs()
        expected = diag_attention_by_loops(*inputs, tokens, 3, causal, "softmax", 2.5, None)
        torch.testing.assert_close(
            diag_attention(*inputs, block_size=3, causal=causal, scale=2.5, backend=backend), expected
        )

    def test_padding_is_never_looked_at(self, causal, backend):
        mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [1] * 7])
        inputs = Tokens().make_inputs()
        poisoned = [states.masked_fill(mask[:, None, :, None] == 0, math.nan) for states in inputs]
        kwargs = {"causal": causal, "attention_mask": mask, "lrpe": make_lrpe(), "backend": backend}
        for op in (
            lambda *states: norm_attention(*states, feature_map="1+elu", **kwargs)[0],
            lambda *states: diag_attention(*states, block_size=3, **kwargs),
        ):
            real = (slice(None), slice(None), mask[0] == 1)
            torch.testing.assert_close(op(*poisoned)[real], op(*inputs)[real])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
class TestGradients:
    """Against finite differences in float64: of inputs, angles and states, padded, packed, across chunks."""

    LAYOUTS = pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])},
            {"cu_seqlens": torch.tensor([0, 2, 5])},
        ],
        ids=["plain", "padded", "packed"],
    )

    def inputs(self, batch_size, seq_len, head_dim):
        shape = (batch_size, 1, seq_len, head_dim)
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def angles(self, head_dim):
        theta, householder = make_lrpe(head_dim)
        return theta.requires_grad_(), householder

    @LAYOUTS
    def test_norm_attention(self, causal, backend, metadata):
        batch_size = 1 if "cu_seqlens" in metadata else 2
        theta, householder = self.angles(2)
        state = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)

        def op(query, key, value, theta, state):
            return norm_attention(
                query,
                key,
                value,
                causal=causal,
                feature_map="elu",
                lrpe=(theta, householder),
                initial_state=state,
                return_state=True,
                backend=backend,
                **metadata,
            )

        assert gradcheck(op, (*self.inputs(batch_size, 5, 2), theta, state))

    @LAYOUTS
    @pytest.mark.parametrize("activation", ["softmax", "relu"])
    def test_diag_attention(self, causal, backend, metadata, activation):
        batch_size = 1 if "cu_seqlens" in metadata else 2
        theta, householder = self.angles(2)

        def op(query, key, value, theta):
            return diag_attention(
                query,
                key,
                value,
                block_size=2,
                causal=causal,
                activation=activation,
                lrpe=(theta, householder),
                backend=backend,
                **metadata,
            )

        assert gradcheck(op, (*self.inputs(batch_size, 5, 2), theta))

    @pytest.mark.parametrize("packing", [None, [0, 100, 101, 300]], ids=["one sequence", "packed"])
    def test_norm_attention_of_several_chunks(self, causal, backend, packing):
        theta, householder = self.angles(4)
        cu_seqlens = None if packing is None else torch.tensor(packing)

        def op(query, key, value, theta):
            lrpe = (theta, householder)
            return norm_attention(
                query, key, value, causal=causal, feature_map="elu", lrpe=lrpe, cu_seqlens=cu_seqlens, backend=backend
            )[0]

        theta = (theta.detach() * 1e-2).requires_grad_()
        assert gradcheck(op, (*self.inputs(1, 300, 4), theta), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
class TestNormAttention:
    def test_there_is_no_denominator(self, backend):
        query, key, value = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
        output, _ = norm_attention(query, key, value, causal=False, backend=backend)
        scaled, _ = norm_attention(query, 3 * key, value, causal=False, backend=backend)
        torch.testing.assert_close(scaled, 3 * output)
        twice, _ = norm_attention(*(torch.cat((t, t), 2) for t in (query, key, value)), causal=False, backend=backend)
        torch.testing.assert_close(twice, 2 * torch.cat((output, output), 2))

    @pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
    def test_the_norm_bounds_outputs_and_gradients_whatever_the_scores(self, backend, scale):
        query, key, value = (torch.randn(1, 1, 50, 8, dtype=torch.float64) for _ in range(3))
        key = (key * scale).requires_grad_()
        output, _ = norm_attention(query, key, value, causal=True, backend=backend)
        normed = simple_rms_norm(output)
        assert normed.square().mean(-1).max() <= 1 + 1e-9
        (gradient,) = torch.autograd.grad(normed[0, 0, -1, 0], key)
        assert gradient.abs().max() * scale < 1  # what a relative change of a key may do

    @pytest.mark.parametrize("split", [1, 64, 128, 200])
    def test_two_calls_with_a_state_between_equal_one(self, backend, split):
        inputs, lrpe = [torch.randn(2, 2, 260, 4, dtype=torch.float64) for _ in range(3)], make_lrpe()
        kwargs = {"causal": True, "feature_map": "1+elu", "lrpe": lrpe, "return_state": True, "backend": backend}
        expected, expected_state = norm_attention(*inputs, **kwargs)
        early, state = norm_attention(*(states[:, :, :split] for states in inputs), **kwargs)
        metadata = attention_metadata(2, 260 - split, torch.device("cpu"), position_offset=split)
        rest = (states[:, :, split:] for states in inputs)
        late, state = norm_attention(*rest, **kwargs, initial_state=state, metadata=metadata)
        torch.testing.assert_close(torch.cat((early, late), 2), expected)
        torch.testing.assert_close(state, expected_state)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_float32(self, backend, dtype):
        inputs = [torch.randn(1, 2, 300, 8).to(dtype) for _ in range(3)]
        kwargs = {"causal": True, "feature_map": "1+elu", "return_state": True, "backend": backend}
        output, state = norm_attention(*inputs, **kwargs)
        expected, expected_state = norm_attention(*(states.float() for states in inputs), **kwargs)
        assert (output.dtype, state.dtype) == (dtype, torch.float32)
        assert torch.equal(output, expected.to(dtype))
        assert torch.equal(state, expected_state)


@pytest.mark.parametrize("backend", BACKENDS)
class TestDiagAttention:
    def test_softmax_outputs_are_means_of_values(self, backend):
        query, key, value = (torch.randn(1, 2, 10, 4) * 30 for _ in range(3))
        output = diag_attention(query, key, value, block_size=4, causal=False, backend=backend)
        assert (output.abs().amax((2, 3)) <= value.abs().amax((2, 3)) * (1 + 1e-6)).all()
        constant = diag_attention(query, key, torch.ones_like(value), block_size=4, causal=True, backend=backend)
        torch.testing.assert_close(constant, torch.ones_like(value))

    def test_a_query_without_keys_gets_zeros(self, backend):
        inputs = [torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3)]
        mask = torch.tensor([[1, 1, 0, 0, 1, 1]])  # the middle block of 2 holds no token
        output = diag_attention(*inputs, block_size=2, causal=False, attention_mask=mask, backend=backend)
        output.sum().backward()
        assert (output[:, :, 2:4] == 0).all()
        assert all(states.grad.isfinite().all() and (states.grad[:, :, 2:4] == 0).all() for states in inputs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("activation", ["softmax", "relu"])
    def test_half_precision_is_computed_in_float32(self, backend, dtype, activation):
        inputs = [torch.randn(1, 2, 11, 8).to(dtype) for _ in range(3)]
        kwargs = {"block_size": 4, "causal": True, "activation": activation, "backend": backend}
        output = diag_attention(*inputs, **kwargs)
        assert output.dtype == dtype
        assert torch.equal(output, diag_attention(*(states.float() for states in inputs), **kwargs).to(dtype))

    @pytest.mark.parametrize("activation", ["softmax", "relu"])
    def test_dropout_drops_entries_of_the_map_and_keeps_the_mean(self, backend, activation):
        inputs = [torch.randn(1, 1, 8, 4).abs() for _ in range(3)]
        kwargs = {"block_size": 4, "causal": False, "activation": activation, "backend": backend}
        kept = diag_attention(*inputs, **kwargs)
        assert (diag_attention(*inputs, **kwargs, dropout_p=1.0) == 0).all()
        many = [states.expand(4000, -1, -1, -1) for states in inputs]
        torch.testing.assert_close(
            diag_attention(*many, **kwargs, dropout_p=0.3).mean(0), kept[0], rtol=0.05, atol=0.02
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
class TestEmptySequences:
    def inputs(self):
        return [torch.randn(2, 2, 0, 4, requires_grad=True) for _ in range(3)]

    def test_norm_attention_returns_the_state_it_was_given_or_zeros(self, causal, backend):
        initial_state = torch.randn(2, 2, 4, 4, requires_grad=True)
        options = {"causal": causal, "return_state": True, "backend": backend, "feature_map": "elu", "lrpe": None}
        output, state = norm_attention(*self.inputs(), **options, initial_state=initial_state)
        assert output.shape == (2, 2, 0, 4)
        assert torch.equal(state, initial_state)
        (gradient,) = torch.autograd.grad(state.sum(), initial_state)
        assert (gradient == 1).all()
        _, state = norm_attention(*self.inputs(), **options, attention_mask=torch.ones(2, 0))
        assert torch.equal(state, torch.zeros(2, 2, 4, 4))
        packed = [tensor[:1] for tensor in self.inputs()]
        _, state = norm_attention(*packed, **options, cu_seqlens=torch.tensor([0, 0, 0]))
        assert torch.equal(state, torch.zeros(2, 2, 4, 4))

    def test_diag_attention_returns_nothing(self, causal, backend):
        output = diag_attention(*self.inputs(), block_size=4, causal=causal, backend=backend)
        assert output.shape == (2, 2, 0, 4)
        output.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", ["query", "key", "value"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_mixed_dtypes_are_computed_in_the_widest(backend, wide, dtypes):
    """No key is rounded to the dtype of a query; the output has the dtype of the value."""
    narrow_dtype, wide_dtype = dtypes
    inputs = {name: torch.randn(1, 2, 70, 8).to(narrow_dtype) for name in ("query", "key", "value")}
    inputs[wide] = torch.randn(1, 2, 70, 8, dtype=wide_dtype)
    widened = {name: tensor.to(wide_dtype) for name, tensor in inputs.items()}
    for op in (
        lambda **qkv: norm_attention(**qkv, causal=True, return_state=True, backend=backend),
        lambda **qkv: (diag_attention(**qkv, block_size=16, causal=True, backend=backend),),
    ):
        found, expected = op(**inputs), op(**widened)
        assert torch.equal(found[0], expected[0].to(inputs["value"].dtype))
        assert all(map(torch.equal, found[1:], expected[1:]))


class TestBackends:
    """On a machine without a GPU: a tensor that says it is on one, and a stand-in for triton."""

    @pytest.fixture
    def cuda(self, monkeypatch):
        monkeypatch.setattr(ops_transnormer, "triton", SimpleNamespace(__version__="3.6.0"))
        monkeypatch.setattr(ops_transnormer, "TRITON_VERSION", (3, 6))
        monkeypatch.setattr(ops_transnormer, "unsupported", lambda *tensors: None)
        return SimpleNamespace(is_cuda=True)

    def test_auto_is_triton_on_cuda_and_torch_elsewhere(self, cuda):
        assert resolve_backend("auto", cuda, cuda, cuda) == "triton"
        assert resolve_backend("auto", torch.zeros(1)) == "torch"
        for backend in ("eager", "torch", "triton"):
            assert resolve_backend(backend, cuda) == backend

    def test_auto_is_torch_for_what_the_kernels_do_not_take(self, cuda, monkeypatch):
        monkeypatch.setattr(ops_transnormer, "unsupported", lambda *tensors: "head_dim=192 is too wide.")
        assert resolve_backend("auto", cuda, cuda, cuda) == "torch"
        with pytest.raises(ValueError, match="head_dim=192 is too wide"):
            resolve_backend("triton", cuda, cuda, cuda)

    def test_without_triton(self, cuda, monkeypatch):
        monkeypatch.setattr(ops_transnormer, "triton", None)
        assert resolve_backend("auto", cuda) == "torch"
        with pytest.raises(ValueError, match="needs the triton package, which is not installed"):
            resolve_backend("triton", cuda)

    def test_an_old_triton_is_named_once(self, cuda, monkeypatch):
        monkeypatch.setattr(ops_transnormer, "triton", SimpleNamespace(__version__="3.5.1"))
        monkeypatch.setattr(ops_transnormer, "TRITON_VERSION", (3, 5))
        said = []
        monkeypatch.setattr(ops_transnormer.logger, "warning_once", said.append)
        assert resolve_backend("auto", cuda) == "torch"
        assert len(said) == 1
        assert said[0].startswith("triton 3.5.1 is too old for the kernels of TransNormer, which need 3.6;")
        with pytest.raises(ValueError, match=r"triton 3\.5\.1 is too old"):
            resolve_backend("triton", cuda)


@pytest.mark.parametrize("device", ["meta", "vulkan", "cpu"])
def test_devices_that_autocast_does_not_know_are_left_alone(device):
    with ops_transnormer.without_autocast(torch.device(device)):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu"), ops_transnormer.without_autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_auto_on_a_cpu_is_torch(causal):
    inputs = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    auto, fast = (norm_attention(*inputs, causal=causal, backend=backend)[0] for backend in ("auto", "torch"))
    assert torch.equal(auto, fast)
    auto, fast = (diag_attention(*inputs, block_size=4, causal=causal, backend=b) for b in ("auto", "torch"))
    assert torch.equal(auto, fast)


class TestSimpleRMSNorm:
    def test_is_x_over_rms_plus_eps(self):
        x = torch.randn(3, 5, dtype=torch.float64)
        rms = torch.tensor([math.sqrt(sum(a * a for a in row) / 5) for row in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(simple_rms_norm(x, eps=0.25), x / (rms[:, None] + 0.25))

    @pytest.mark.parametrize("eps", [1e-8, 0.5])
    def test_gradients_first_and_second(self, eps):
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert gradcheck(simple_rms_norm, (x, eps))
        assert gradgradcheck(simple_rms_norm, (x, eps))

    def test_gradients_are_those_of_the_definition(self):
        x, grad = torch.randn(2, 4, 9, 16).transpose(1, 2).requires_grad_(), torch.randn(2, 9, 4, 16)
        found, expected = (simple_rms_norm(x, 1e-3, backend) for backend in ("torch", "eager"))
        assert torch.equal(found, expected)
        found, expected = (torch.autograd.grad(normed, x, grad) for normed in (found, expected))
        torch.testing.assert_close(found, expected)

    def test_under_vmap(self):
        x = torch.randn(3, 5)
        rows = torch.func.vmap(torch.func.grad(lambda row: simple_rms_norm(row)[0]))(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(rows, torch.autograd.grad(simple_rms_norm(leaf)[:, 0].sum(), leaf)[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_a_row_of_zeros_stays_zero_and_its_gradient_is_finite(self, dtype):
        x = torch.zeros(2, 8, dtype=dtype)
        x[1] = torch.arange(8)
        x.requires_grad_()
        output = simple_rms_norm(x)
        assert output.dtype == dtype
        assert (output[0] == 0).all()
        output[1].sum().backward()
        assert x.grad.isfinite().all()
        x = torch.zeros(2, 8, requires_grad=True)
        simple_rms_norm(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_float16_neither_overflows_nor_underflows(self):
        for size in (6e4, 1e-7):
            output = simple_rms_norm(torch.full((1, 64), size, dtype=torch.float16))
            torch.testing.assert_close(output, torch.ones(1, 64, dtype=torch.float16), rtol=0.2, atol=0)


def bytes_for_backward(op, seq_len: int) -> int:
    """Bytes that autograd keeps for the backward of an op on sequences of this length."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # or a later tensor might take its place in memory
        return tensor

    kept: list[torch.Tensor] = []
    inputs = [torch.randn(1, 1, seq_len, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(*inputs)
    return sum(storages.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_the_torch_backend_is_linear_in_length(causal, padded):
    def mask(query):
        return torch.arange(query.shape[2])[None] > 5 if padded else None

    def norm(query, key, value):
        return norm_attention(query, key, value, causal=causal, attention_mask=mask(query), backend="torch")

    def diag(query, key, value):
        return diag_attention(
            query, key, value, block_size=64, causal=causal, attention_mask=mask(query), backend="torch"
        )

    for op in (norm, diag):
        assert bytes_for_backward(op, 8192) < 2.3 * bytes_for_backward(op, 4096)


def states(*shape):
    return torch.zeros(*(shape or (2, 2, 6, 4)))


THETA, HOUSEHOLDER = torch.zeros(2), torch.zeros(4)
WRONG = [
    # (arguments that differ from a right call, the op or both, what the error says)
    ({"query": states(2, 6, 4)}, "both", "query, key, value have shapes (2, 6, 4), (2, 2, 6, 4)"),
    ({"key": states(2, 2, 5, 4)}, "both", "(2, 2, 6, 4), (2, 2, 5, 4)"),
    ({"key": states(2, 2, 6, 8)}, "both", "(batch, heads, seq, head_dim)"),
    ({"value": states(2, 3, 6, 4)}, "both", "(2, 3, 6, 4)"),
    ({"attention_mask": torch.ones(2, 1, 6, 6)}, "both", "attention_mask has shape (2, 1, 6, 6); supported is"),
    ({"attention_mask": torch.ones(2, 7)}, "both", "(batch, seq) = (2, 6)"),
    ({"attention_mask": torch.ones(6)}, "both", "attention_mask has shape (6,)"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "both", "the batch size is 2; packed sequences lie in one row"),
    (
        {"attention_mask": torch.ones(2, 6), "cu_seqlens": torch.tensor([0, 6])},
        "both",
        "attention_mask and cu_seqlens were both given",
    ),
    (
        {"attention_mask": torch.ones(2, 6), "metadata": attention_metadata(2, 6, torch.device("cpu"))},
        "both",
        "metadata was given together with attention_mask or cu_seqlens",
    ),
    (
        {"metadata": attention_metadata(2, 5, torch.device("cpu"))},
        "both",
        "metadata has positions of shape (5,); these inputs need 6 columns",
    ),
    ({"key": states().long()}, "both", "key has dtype torch.int64; use float64, float32, float16 or bfloat16"),
    ({"value": states().to("meta")}, "both", "value is on meta and query on cpu; move them to one device"),
    ({"lrpe": (torch.zeros(4), HOUSEHOLDER)}, "both", "lrpe has shapes (4,) and (4,); head_dim=4 needs theta (2,)"),
    ({"lrpe": (THETA, torch.zeros(2))}, "both", "and householder (4,)"),
    (
        {name: states(2, 2, 6, 3) for name in ("query", "key", "value")} | {"lrpe": (THETA, HOUSEHOLDER)},
        "both",
        "head_dim=3 is odd; use an even one or lrpe=None",
    ),
    ({"backend": "cuda"}, "both", "backend='cuda' is not known; choose one of 'auto', 'eager', 'torch', 'triton'"),
    ({"feature_map": "relu"}, "norm", "feature_map='relu' is not known; choose one of 'identity', 'elu', '1+elu'"),
    (
        {"initial_state": states(2, 2, 4, 5)},
        "norm",
        "initial_state has shape (2, 2, 4, 5); these inputs need (2, 2, 4, 4)",
    ),
    ({"initial_state": states(1, 2, 4, 4)}, "norm", "these inputs need (2, 2, 4, 4)"),
    ({"activation": "gelu"}, "diag", "activation='gelu' is not known; choose one of 'softmax', 'relu'"),
    ({"block_size": 0}, "diag", "block_size=0: a block has at least 1 token"),
    ({"dropout_p": 1.5}, "diag", "dropout_p=1.5 must be a probability, from 0 to 1"),
]


@pytest.mark.parametrize(
    ("arguments", "op", "said"),
    [(arguments, op, said) for arguments, which, said in WRONG for op in ("norm", "diag") if which in (op, "both")],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value)[:4],
)
def test_wrong_arguments_are_named(arguments, op, said):
    right = {"query": states(), "key": states(), "value": states(), "causal": True}
    call = {"norm": norm_attention, "diag": lambda *qkv, **kw: diag_attention(*qkv, **{"block_size": 2} | kw)}[op]
    arguments = right | arguments
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    with pytest.raises(ValueError, match=re.escape(said)):
        call(query, key, value, **arguments)
