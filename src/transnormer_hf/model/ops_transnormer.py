"""The two attentions of TransNormer and its norm, as functions: arguments, backends, and the chunked form in torch.

Each has up to three forms that give the same result: its definition in `reference_transnormer.py` (`"eager"`, quadratic
in length), a form in plain torch that is linear in length (`"torch"`, here), and Triton kernels for a GPU (`"triton"`).
`backend="auto"` takes the kernels for the CUDA tensors that they support, and the torch form for all others.

Shapes are (batch, heads, seq, head_dim) throughout. Sums and states are float32 whatever the inputs (float64 for
float64 inputs), and outputs have the dtype of `value`.
"""

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .reference_transnormer import (
    FEATURE_MAPS,
    LRPE,
    AttentionMetadata,
    check_choice,
    check_inputs,
    compute_dtype,
    eager_diag_attention,
    eager_norm_attention,
    eager_simple_rms_norm,
    operator_namespace,
    rotation_angles,
)

try:
    import triton

    from .triton_common_transnormer import triton_simple_rms_norm, unsupported
    from .triton_diag_transnormer import MAX_BLOCK_SIZE, triton_diag_attention
    from .triton_norm_transnormer import segment_table, triton_norm_attention
except ImportError:  # triton is not installed
    triton = triton_diag_attention = triton_norm_attention = triton_simple_rms_norm = unsupported = segment_table = None
    MAX_BLOCK_SIZE = 0

BACKENDS = ("auto", "eager", "torch", "triton")
DIAG_ACTIVATIONS = ("softmax", "relu")
OLDEST_TRITON = (3, 6)
TRITON_VERSION = (0, 0) if triton is None else tuple(int(part) for part in triton.__version__.split(".")[:2])

NAMESPACE = operator_namespace(__name__)
logger = logging.get_logger(__name__)


def norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    feature_map: str = "identity",
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
    metadata: AttentionMetadata | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NormAttention before its norm: phi(Q) (phi(K)^T V), without a denominator (Eqs. 13-14 of the paper).

    The norm itself runs over the full width, all heads together, and is left to the caller: `simple_rms_norm`.

    Args:
        query, key, value: (batch, heads, seq, head_dim), float64, float32, float16 or bfloat16. Where their dtypes
            differ, all are promoted to the widest.
        causal: token i sees tokens j <= i only; otherwise all of its sequence.
        feature_map: phi, one of "identity", "elu" (T1), "1+elu" (T2).
        lrpe: None, or (theta (head_dim / 2,), householder (head_dim,)), applied after phi.
        attention_mask: (batch, seq), 1 for real tokens; padding contributes nothing, its own outputs are undefined.
        cu_seqlens: (num_sequences + 1,) boundaries of sequences packed into a batch of one row.
        initial_state: (batch, heads, head_dim, head_dim), K^T V of the tokens before these; with `cu_seqlens`, one
            state per sequence. It may be overwritten afterwards, even if a backward is still to come.
        return_state: also return the state after the last token, same shape, float32.
        backend: "eager", "torch", "triton" or "auto".
        metadata: positions and padding as `attention_metadata` gives them, instead of attention_mask and cu_seqlens.
            One serves every layer of a model, and it may start at an offset (the tokens in `initial_state`).

    Returns:
        The output, shape and dtype of `value`, and the state or None.

    Raises:
        ValueError: unknown feature_map or backend, shapes that do not fit, or a backend that cannot run here.
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    dtype = value.dtype
    query, key, value, lrpe, metadata = check_inputs(query, key, value, lrpe, attention_mask, cu_seqlens, metadata)
    num_states = query.shape[0] if metadata.cu_seqlens is None else metadata.cu_seqlens.shape[0] - 1
    state_shape = (num_states, query.shape[1], key.shape[-1], value.shape[-1])
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; these inputs need {state_shape}.")
    if initial_state is not None and torch.is_grad_enabled():
        # Autograd saves it, and the caller may write the next state into the same memory.
        initial_state = initial_state.clone()
    attend = {"eager": eager_norm_attention, "torch": chunked_norm_attention, "triton": triton_norm_attention}[
        _backend_for(backend, metadata, "torch", query, key, value)
    ]
    options = {"metadata": metadata, "causal": causal, "feature_map": feature_map, "lrpe": lrpe}
    with without_autocast(query.device):
        output, state = attend(query, key, value, **options, initial_state=initial_state, return_state=return_state)
    return output.to(dtype), state if return_state else None


def diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    activation: str = "softmax",
    scale: float | None = None,
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    metadata: AttentionMetadata | None = None,
) -> torch.Tensor:
    """DiagAttention: ordinary attention inside non-overlapping blocks of `block_size` tokens.

    Blocks and the positions of LRPE start at the first real token of a row or of a packed sequence. A query that sees
    no real key gets zeros.

    Args:
        query, key, value, attention_mask, cu_seqlens, metadata, backend: as in `norm_attention`.
        block_size: tokens per block, at least 1; the last block may be shorter.
        causal: token i sees tokens j <= i of its block only.
        activation: "softmax" (T2) or "relu" (T1: relu of the scores, not normalised).
        scale: factor of the scores; None means head_dim ** -0.5.
        lrpe: None, or (theta (head_dim / 2,), householder (head_dim,)); positions restart in every block.
        dropout_p: probability of dropping an entry of the map.

    Returns:
        The output, shape and dtype of `value`.

    Raises:
        ValueError: unknown activation or backend, block_size < 1, dropout_p outside of 0 to 1, shapes that do not fit,
            or a backend that cannot run here.
    """
    check_choice("activation", activation, DIAG_ACTIVATIONS)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: a block has at least 1 token.")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} must be a probability, from 0 to 1.")
    dtype = value.dtype
    query, key, value, lrpe, metadata = check_inputs(query, key, value, lrpe, attention_mask, cu_seqlens, metadata)
    if backend == "auto" and ((activation == "relu" and block_size > MAX_BLOCK_SIZE) or value.shape != query.shape):
        backend = "torch"  # the kernels take neither
    attend = {"eager": eager_diag_attention, "torch": chunked_diag_attention, "triton": triton_diag_attention}[
        _backend_for(backend, metadata, "eager", query, key, value)
    ]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"causal": causal, "activation": activation, "lrpe": lrpe, "dropout_p": dropout_p}
    with without_autocast(query.device):
        output = attend(query, key, value, metadata=metadata, block_size=block_size, scale=scale, **options)
    return output.to(dtype)


def simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8, backend: str = "auto") -> torch.Tensor:
    """SimpleRMSNorm: x / (rms(x) + eps) over the last dimension, without weights; shape and dtype of hidden_states.

    backend: "triton" is one kernel, which "auto" takes for CUDA tensors; all others are `eager_simple_rms_norm`. Raises
    ValueError for an unknown backend, or one that cannot run here.
    """
    if resolve_backend(backend, hidden_states) == "triton":
        return triton_simple_rms_norm(hidden_states, eps)
    return eager_simple_rms_norm(hidden_states, eps)


def resolve_backend(backend: str, *tensors: torch.Tensor) -> str:
    """The backend that runs: "auto" becomes "triton" for CUDA tensors that its kernels support, else "torch".

    tensors: query, key and value of an attention, or the one input of a norm. Raises ValueError for an unknown backend,
    and for "triton" where it cannot run, with the reason.
    """
    check_choice("backend", backend, BACKENDS)
    if backend in ("eager", "torch"):
        return backend
    if backend == "auto" and not tensors[0].is_cuda:
        return "torch"
    if triton is None:
        reason = 'backend="triton" needs the triton package, which is not installed; use backend="auto".'
    elif TRITON_VERSION < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        reason = f"triton {triton.__version__} is too old for the kernels of TransNormer, which need {oldest}; "
        reason += 'upgrade it, or use backend="torch".'
        if backend == "auto" and not torch.compiler.is_compiling():
            logger.warning_once(reason)
    else:
        reason = unsupported(*tensors)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(reason)
    return "torch"


def with_segments(metadata: AttentionMetadata) -> AttentionMetadata:
    """The metadata with what the kernels of NormAttention need of packed sequences: once, for all layers of a model."""
    cu_seqlens = metadata.cu_seqlens
    if cu_seqlens is None or not cu_seqlens.is_cuda or segment_table is None:
        return metadata
    return metadata._replace(segments=segment_table(cu_seqlens, metadata.positions.shape[-1]))


def _backend_for(backend: str, metadata: AttentionMetadata, for_any_positions: str, *tensors: torch.Tensor) -> str:
    resolved, seq_len = resolve_backend(backend, *tensors), tensors[0].shape[2]
    # No kernel runs on an empty sequence, and for one token the torch form is slower to reach than the definition.
    if seq_len == 0 or (seq_len == 1 and resolved == "torch"):
        return "eager"
    return resolved if metadata.is_contiguous or resolved == "eager" else for_any_positions


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off: it would take products that must be float32 back to half precision."""
    try:
        is_enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a kind of device that autocast does not know
        is_enabled = False
    return torch.autocast(device.type, enabled=False) if is_enabled else nullcontext()


# The chunked form
#
# Both attentions go through the sequence in tiles, and the backward pass goes through them again and recomputes what it
# needs: only inputs, outputs and states are as long as the sequence. A tile is copied out of the inputs, which may be
# any views, in chunks (in DiagAttention, the blocks), (chunks, rows, heads, chunk, head_dim). All products of a tile,
# or of one of its chunks, are then one batch of small matrices.
#
# The number of tiles is known only at run time, so each direction of each attention is one custom operator, which
# torch.compile and torch.export keep whole. Eager calls take the same route: forward with backward takes 0.97 to 1.05
# times as long as an autograd.Function around the same code (one thread, B1 H8 T2048 D64 and B8 H8 T128 D64).

# In tokens. Long enough to hide the overhead of calling torch, short enough for the cache: with one thread and 32 MB of
# cache the time is flat from 256 to 1024 and rises outside.
TILE_SIZE = 512
# A shorter chunk has fewer scores (4 · chunk · head_dim FLOP per token, states take 4 · head_dim^2), but products of
# 32 x 32 matrices run at two thirds of the speed of 64 x 64. Up to LONGEST_CHUNK a sequence is one chunk.
CHUNK_SIZE, LONGEST_CHUNK = 64, 128


def chunked_norm_attention(query, key, value, *, metadata, causal, feature_map, lrpe, initial_state, return_state):
    """`eager_norm_attention` by chunks: scores inside a chunk, the state K^T V between chunks."""
    angles, householder, padding = lrpe_and_padding(metadata, metadata.positions, lrpe, query.dtype)
    if angles is not None:
        angles = angles[None, None] if angles.dim() == 2 else angles[:, None]  # (batch or 1, 1, seq, head_dim / 2)
    tensors = (query, key, value, angles, householder, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = (causal, feature_map, return_state, causal and needs_grad)
    output, states, _ = chunked_norm_forward(*tensors, padding, metadata.cu_seqlens, *options)
    return output, states if metadata.cu_seqlens is None else states[:-1]


def chunked_diag_attention(query, key, value, *, metadata, block_size, causal, activation, scale, lrpe, dropout_p):
    """`eager_diag_attention` as a batch of small attentions, one per block."""
    # Scores depend on distances only, so one table serves all blocks, even one whose beginning is cut off.
    in_block = torch.arange(block_size, device=query.device)
    angles, householder, padding = lrpe_and_padding(metadata, in_block, lrpe, query.dtype)
    kept = torch.rand(*query.shape[:3], block_size, device=query.device) >= dropout_p if dropout_p > 0 else None
    tensors = (query, key, value, angles, householder, kept, metadata.positions, padding, metadata.cu_seqlens)
    return chunked_diag_forward(*tensors, block_size, causal, activation, scale, dropout_p)


def lrpe_and_padding(metadata, positions, lrpe, dtype):
    """The angles (*positions.shape, head_dim / 2) and v of LRPE, and (batch, 1, seq, 1) True for padding; or None."""
    padding = None if metadata.is_real is None else ~metadata.is_real[:, None, :, None]
    if lrpe is None:
        return None, None, padding
    theta, householder = (parameter.to(compute_dtype(dtype)) for parameter in lrpe)
    return rotation_angles(positions, theta), householder, padding


class Tile(NamedTuple):
    """The tensors that a pass reads and writes: whole, (batch or 1, heads or 1, seq, channels), or one tile of each, a
    view (chunks, rows or 1, heads or 1, chunk, channels).

    rotation: complex numbers (head_dim / 2 channels). padding: True for padding (1 channel). kept: False where dropout
    drops an entry of the map (block_size channels). `output` and all `grad_*` but `grad_output` are written to.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor | None = None
    grad_output: torch.Tensor | None = None
    grad_query: torch.Tensor | None = None
    grad_key: torch.Tensor | None = None
    grad_value: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    grad_rotation: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    kept: torch.Tensor | None = None


class RowRange(NamedTuple):
    """Tokens [begin, end) of some rows of the batch, which are worked through together.

    states: their rows among the states, of which there is one per sequence where sequences are packed.
    """

    rows: slice
    begin: int
    end: int
    states: slice

    def tiles(self, tensors: Tile, chunk: int | None = None) -> list[Tile]:
        """The range in tiles of up to TILE_SIZE tokens, in chunks of equal length; None: that of causal attention."""
        length = self.end - self.begin
        if chunk is None:
            chunk = CHUNK_SIZE if length > LONGEST_CHUNK else length
        parts = [(length - length % chunk, chunk), (length % chunk, length % chunk)]
        fields: list[Iterable[torch.Tensor | None]] = []
        for tensor in tensors:
            tiles: list[torch.Tensor] = []
            begin = self.begin
            for size, chunk_size in parts if tensor is not None else ():
                if size:
                    part = tensor[self.rows if len(tensor) > 1 else slice(1)].narrow(2, begin, size)
                    part = part.unflatten(2, (-1, chunk_size)).permute(2, 0, 1, 3, 4)
                    tiles += part.split(max(TILE_SIZE // chunk, 1))
                    begin += size
            fields.append(repeat(None) if tensor is None else tiles)
        return [Tile(*tile) for tile in zip(*fields)]  # noqa: B905 (repeat has no end)

    def before_tiles(self, chunk_states: torch.Tensor) -> torch.Tensor:
        """Of `empty_chunk_states`, those before tiles 1, 2, ... of this range."""
        earlier = self.begin // TILE_SIZE + self.states.start - self.rows.start
        return chunk_states[earlier:, self.rows]


def row_ranges(query: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[RowRange]:
    """As many rows of the batch as fill a tile; where sequences are packed, each of them and what lies behind the last.

    The host reads `cu_seqlens`, and so waits for the device that holds it.
    """
    batch_size, _, seq_len, _ = query.shape
    if cu_seqlens is None:
        step = max(TILE_SIZE // seq_len, 1)
        groups = [slice(begin, min(begin + step, batch_size)) for begin in range(0, batch_size, step)]
        return [RowRange(rows, 0, seq_len, rows) for rows in groups]
    cuts = enumerate(pairwise([*cu_seqlens.tolist(), seq_len]))
    return [RowRange(slice(0, 1), begin, end, slice(i, i + 1)) for i, (begin, end) in cuts if begin < end]


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    """`total += factor * left @ right`, for a contiguous total and without broadcasting."""
    total.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3), alpha=factor)


def rotation_table(angles: torch.Tensor | None) -> torch.Tensor | None:
    """Complex numbers of modulus 1: to multiply a pair of channels, a + bi, by one is to rotate it."""
    return None if angles is None else torch.polar(torch.ones_like(angles), angles)


def as_complex(states: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(states.unflatten(-1, (-1, 2)))


class Preparation(NamedTuple):
    """`prepare_query_key` for tiles: a copy, then phi, LRPE and padding in place; and the gradient of all these."""

    dtype: torch.dtype
    feature_map: str
    householder: torch.Tensor | None
    grad_householder: torch.Tensor | None = None

    def values(self, tile, padding=None):
        if padding is not None:
            return self._load(tile).masked_fill_(padding, 0)
        # One chunk can be multiplied as it lies, if rows and heads make one batch of matrices there.
        values = tile.to(self.dtype) if len(tile) == 1 else self._load(tile)
        return values.flatten(1, 2).view(tile.shape)

    def states(self, tile, rotation, padding=None):
        """Queries or keys as they enter the products."""
        return self.mapped_and_states(tile, rotation, padding, keeps_mapped=False)[1]

    def mapped_and_states(self, tile, rotation, padding=None, keeps_mapped=True):
        """Queries or keys after phi alone, and as they enter the products: `backward` needs both."""
        if self.feature_map == "identity" and rotation is None:
            return None, self.values(tile, padding)
        states = mapped = self._map(self._load(tile))
        if keeps_mapped and not (rotation is None and padding is None):
            states = mapped.clone()
        if rotation is not None:
            self._reflect(states)
            as_complex(states).mul_(rotation)
        if padding is not None:
            states.masked_fill_(padding, 0)
        return mapped, states

    def _load(self, tile):
        return torch.empty(tile.shape, dtype=self.dtype, device=tile.device).copy_(tile)

    def _map(self, states):
        """phi. 1 + elu(x) as exp(min(x, 0)) + max(x, 0) takes half the time of F.elu, and exp2 half that of exp."""
        if self.feature_map == "identity":
            return states
        negative = (states * math.log2(math.e)).clamp_(max=0).exp2_()
        states.clamp_(min=0).add_(negative)
        return states if self.feature_map == "1+elu" else states.sub_(1)

    def _reflect(self, states):
        rows = states.view(-1, states.shape[-1])  # (tokens, head_dim)
        rows.addr_(rows.mv(self.householder), self.householder, alpha=-2)

    def backward(self, grad, mapped, states, tile, into):
        """Takes the gradient of `states` back to that of their tile, written to `into`, and adds to those of LRPE."""
        if tile.rotation is not None:
            if tile.grad_rotation is not None:  # its imaginary part, Im(conj(z) dz), is the gradient of the angle
                projection = as_complex(states).conj_physical().mul_(as_complex(grad))
                tile.grad_rotation.add_(projection.sum_to_size(tile.grad_rotation.shape))
            # not the lazy conj(): operators called under a TorchDispatchMode (a FLOP counter) do not see its flag
            as_complex(grad).mul_(tile.rotation.conj_physical())
            if self.grad_householder is not None:
                rows, grad_rows = mapped.flatten(0, -2), grad.flatten(0, -2)  # (tokens, head_dim)
                self.grad_householder.addmv_(rows.T, grad_rows.mv(self.householder), alpha=-2)
                self.grad_householder.addmv_(grad_rows.T, rows.mv(self.householder), alpha=-2)
            self._reflect(grad)
        if self.feature_map != "identity":
            # 1 + elu is its own derivative below zero; above zero it exceeds its derivative, which is 1.
            grad.mul_((mapped if self.feature_map == "1+elu" else mapped + 1).clamp(max=1))
        into.copy_(grad)


# Operators. Those for the backward pass return the gradients of query, key and value, and of those other inputs that
# need one, in a list.

NORM_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? angles, Tensor? householder, Tensor? initial_state, "
    "Tensor? padding, Tensor? cu_seqlens, bool causal, str feature_map"
)
DIAG_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? angles, Tensor? householder, Tensor? kept, Tensor positions, "
    "Tensor? padding, Tensor? cu_seqlens, SymInt block_size, bool causal, str activation, float scale, float dropout_p"
)


def chunked_operator(schema: str) -> Callable[[Callable], Any]:
    """Makes an operator of a function. Autocast is off inside: in a compiled graph and in backward it may be on."""

    def register(function: Callable) -> Any:
        @functools.wraps(function)
        def run(first: torch.Tensor, *args: Any) -> Any:
            with without_autocast(first.device):
                return function(first, *args)

        return torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", run, mutates_args=(), schema=schema)

    return register


def zeros_where_needed(needs, *tensors):
    return [torch.zeros_like(tensor) if is_needed else None for tensor, is_needed in zip(tensors, needs, strict=False)]


def lrpe_gradients(grad_rotation, grad_householder):
    grad_angles = None if grad_rotation is None else grad_rotation.imag.contiguous()
    return [grad for grad in (grad_angles, grad_householder) if grad is not None]


def empty_gradients(inputs, needs):
    others = [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs[3:], needs, strict=True) if need]
    return [*map(torch.empty_like, inputs[:3]), *others]


def gradients_by_input(grads, needs):
    others = iter(grads[3:])
    return [*grads[:3], *(next(others) if is_needed else None for is_needed in needs)]


# NormAttention by chunks


@chunked_operator(f"({NORM_INPUTS}, bool needs_state, bool needs_chunk_states) -> (Tensor, Tensor, Tensor)")
def chunked_norm_forward(query, key, value, angles, householder, initial_state, padding, cu_seqlens, *options):
    """The output, the states after the last tokens, and for the backward pass those before each tile but the first.

    angles: (batch or 1, 1, seq, head_dim / 2). Causal states are left unfinished unless `needs_state`.
    """
    causal, feature_map, needs_state, needs_chunk_states = options
    output, states = torch.empty_like(value), first_states(query, value, initial_state, cu_seqlens)
    chunk_states = empty_chunk_states(states, query, cu_seqlens, needs_chunk_states)
    if not causal and needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
        for q, k, v, out, state in zip(query, key, value, output, states, strict=True):
            state.baddbmm_(k.mT, v)
            torch.bmm(q, state, out=out)
        return output, states, chunk_states
    tensors = Tile(query, key, value, output, rotation=rotation_table(angles), padding=padding)
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder)
    for rows in row_ranges(query, cu_seqlens):
        state = states[rows.states]  # (rows, heads, head_dim, value_dim), written in place
        if causal:
            before_tiles = rows.before_tiles(chunk_states) if needs_chunk_states else None
            causal_forward(prepare, rows.tiles(tensors), state, before_tiles, initial_state is not None, needs_state)
        else:
            bidirectional_forward(prepare, rows.tiles(tensors, TILE_SIZE), state)
    return output, states, chunk_states


@chunked_norm_forward.register_fake
def _(query, key, value, angles, householder, initial_state, padding, cu_seqlens, *options):
    states = first_states(query, value, None, cu_seqlens)
    return torch.empty_like(value), states, empty_chunk_states(states, query, cu_seqlens, options[-1])


def needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
    """True where tokens can be multiplied as and where they lie, which takes a quarter less time at 2,048 tokens."""
    is_plain = all(other is None for other in (angles, padding, cu_seqlens)) and feature_map == "identity"
    return is_plain and query.dtype == compute_dtype(query.dtype) and query.shape[2] >= TILE_SIZE


def first_states(query, value, initial_state, cu_seqlens):
    """The states before the first tokens, with one more for the tokens behind the last packed sequence."""
    count = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    states = query.new_zeros(count, query.shape[1], query.shape[3], value.shape[3], dtype=compute_dtype(query.dtype))
    if initial_state is not None:
        states[: initial_state.shape[0]] = initial_state
    return states


def empty_chunk_states(states, query, cu_seqlens, is_needed):
    """For the states before all tiles but the first of each range, (tiles, rows, heads, head_dim, value_dim).

    One per 512 tokens, head_dim / 2048 of the size of inputs and outputs, and one more because the last two tiles may
    be short. (Since the count is never 1, torch.export can treat lengths below and above 512 alike.)
    """
    count = query.shape[2] // TILE_SIZE + (2 if cu_seqlens is None else cu_seqlens.shape[0] + 1)
    return states.new_empty(count if is_needed else 0, query.shape[0], *states.shape[1:])


def bidirectional_forward(prepare, tiles, state):
    """S = K^T V over all tiles, then O = Q S."""
    for tile in tiles:
        k, v = prepare.states(tile.key, tile.rotation, tile.padding), prepare.values(tile.value, tile.padding)
        add_product(state, k[0].mT, v[0])
    for tile in tiles:
        tile.output.copy_(prepare.states(tile.query, tile.rotation) @ state)


def causal_forward(prepare, tiles, state, before_tiles, has_initial_state, needs_state):
    """O = (Q K^T under the causal mask) V inside each chunk, plus Q S with the state S before the chunk."""
    for number, tile in enumerate(tiles):
        has_state, update = number > 0 or has_initial_state, needs_state or number < len(tiles) - 1
        if number and before_tiles is not None:
            before_tiles[number - 1].copy_(state)
        q = prepare.states(tile.query, tile.rotation)
        k, v = prepare.states(tile.key, tile.rotation, tile.padding), prepare.values(tile.value, tile.padding)
        out = (q @ k.mT).tril_() @ v  # (chunks, rows, heads, chunk, value_dim)
        if has_state or update or len(k) > 1:
            add_product(out, q, states_before(state, k, v, update))
        tile.output.copy_(out)


def states_before(state, k, v, update, reverse=False):
    """The state before each chunk of a tile, (chunks, rows, heads, head_dim, value_dim), given that before the first.

    update: write the state after the last chunk to `state`. reverse: go from the last chunk to the first.
    """
    states = state.new_empty(len(k), *state.shape)
    state = state.flatten(0, 1)
    steps = list(zip(*(tensor.flatten(1, 2) for tensor in (states, k.mT, v)), strict=True))
    if reverse:
        steps.reverse()
    steps[0][0].copy_(state)
    for (before, key_chunk, value_chunk), (after, *_) in pairwise(steps):
        torch.baddbmm(before, key_chunk, value_chunk, out=after)
    if update:
        torch.baddbmm(*steps[-1], out=state)
    return states


@chunked_operator(
    f"(Tensor grad_output, Tensor? grad_states, Tensor? states, Tensor chunk_states, {NORM_INPUTS}, "
    "bool needs_angles, bool needs_householder, bool needs_initial_state) -> Tensor[]"
)
def chunked_norm_backward(grad_output, grad_states, states, chunk_states, query, key, value, *others):
    angles, householder, initial_state, padding, cu_seqlens, causal, feature_map, *needs = others
    has_grad_states = grad_states is not None
    grad_states = first_states(query, value, grad_states, cu_seqlens)  # a copy, moved on in place
    rotation = rotation_table(angles)
    grad_rotation, grad_householder = zeros_where_needed(needs, rotation, householder)
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    if causal:
        states = first_states(query, value, initial_state, cu_seqlens)
    elif needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
        rows = (query, key, value, grad_output, *grads, states, grad_states)
        for q, k, v, do, dq, dk, dv, state, grad_state in zip(*rows, strict=True):
            grad_state.baddbmm_(q.mT, do)
            torch.bmm(do, state.mT, out=dq)
            torch.bmm(v, grad_state.mT, out=dk)
            torch.bmm(k, grad_state, out=dv)
        return [*grads, grad_states.to(initial_state.dtype)] if needs[2] else grads
    tensors = Tile(query, key, value, None, grad_output, *grads)
    tensors = tensors._replace(rotation=rotation, grad_rotation=grad_rotation, padding=padding)
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder, grad_householder)
    for rows in row_ranges(query, cu_seqlens):
        state, grad_state = states[rows.states], grad_states[rows.states]
        if causal:
            before_tiles, tiles = rows.before_tiles(chunk_states), list(enumerate(rows.tiles(tensors)))
            for number, tile in reversed(tiles):
                before = before_tiles[number - 1] if number else state
                has_state, update = number > 0 or initial_state is not None, number > 0 or needs[2]
                has_grad_state = has_grad_states or number < len(tiles) - 1
                causal_tile_backward(prepare, tile, before, grad_state, has_state, has_grad_state, update)
        else:
            bidirectional_backward(prepare, rows.tiles(tensors, TILE_SIZE), state, grad_state)
    grads += lrpe_gradients(grad_rotation, grad_householder)
    return [*grads, grad_states[: initial_state.shape[0]].to(initial_state.dtype)] if needs[2] else grads


@chunked_norm_backward.register_fake
def _(grad_output, grad_states, states, chunk_states, *others):
    return empty_gradients(others[:6], others[-3:])


def bidirectional_backward(prepare, tiles, state, grad_state):
    """O = Q S with S = K^T V: dQ = dO S^T, dS = Q^T dO, dK = V dS^T, dV = K dS."""
    for tile in tiles:
        mapped, q = prepare.mapped_and_states(tile.query, tile.rotation)
        do = prepare.values(tile.grad_output)
        add_product(grad_state, q[0].mT, do[0])
        prepare.backward(do @ state.mT, mapped, q, tile, into=tile.grad_query)
    for tile in tiles:
        mapped, k = prepare.mapped_and_states(tile.key, tile.rotation, tile.padding)
        v = prepare.values(tile.value, tile.padding)
        tile.grad_value.copy_(k @ grad_state)
        prepare.backward(v @ grad_state.mT, mapped, k, tile, into=tile.grad_key)


def causal_tile_backward(prepare, tile, state, grad_state, has_state, has_grad_state, update):
    """One tile, going from the last to the first: dQ needs the state before each chunk, dK and dV the gradient of the
    state behind it.

    state: before the tile, as the forward pass kept it (to subtract k^T v from the last state would lose digits); only
    read. grad_state: of the state behind the tile, moved on to the one before it if `update`. has_state and
    has_grad_state are False where these are zero.
    """
    mapped_query, q = prepare.mapped_and_states(tile.query, tile.rotation)
    mapped_key, k = prepare.mapped_and_states(tile.key, tile.rotation, tile.padding)
    v, do = prepare.values(tile.value, tile.padding), prepare.values(tile.grad_output)
    dv = (q @ k.mT).tril_().mT @ do  # (chunks, rows, heads, chunk, value_dim)
    grad_scores = (do @ v.mT).tril_()  # (chunks, rows, heads, chunk, chunk)
    dq, dk = grad_scores @ k, grad_scores.mT @ q  # (chunks, rows, heads, chunk, head_dim)
    if has_state or len(k) > 1:
        add_product(dq, do, states_before(state, k, v, update=False).mT)
    if has_grad_state or len(k) > 1:
        grad_states = states_before(grad_state, q, do, update, reverse=True)
        add_product(dk, v, grad_states.mT)
        add_product(dv, k, grad_states)
    elif update:
        add_product(grad_state, q[0].mT, do[0])
    prepare.backward(dq, mapped_query, q, tile, into=tile.grad_query)
    prepare.backward(dk, mapped_key, k, tile, into=tile.grad_key)
    tile.grad_value.copy_(dv)


def _save_norm_attention(ctx, inputs, output):
    # The causal gradient does without the last states, whose owner may then write to them.
    ctx.save_for_backward(None if inputs[8] else output[1], output[2], *inputs[:8])
    ctx.options = inputs[8:10]
    ctx.set_materialize_grads(False)


def _norm_attention_backward(ctx, grad_output, grad_states, _grad_chunk_states):
    needs = ctx.needs_input_grad[3:6]
    saved = ctx.saved_tensors  # asked for once: a checkpoint hands its tensors out once
    if grad_output is None:
        grad_output = torch.zeros_like(saved[4])
    grads = chunked_norm_backward(grad_output, grad_states, *saved, *ctx.options, *needs)
    return *gradients_by_input(grads, needs), *repeat(None, 6)


chunked_norm_forward.register_autograd(_norm_attention_backward, setup_context=_save_norm_attention)


# DiagAttention by blocks


@chunked_operator(f"({DIAG_INPUTS}) -> Tensor")
def chunked_diag_forward(query, key, value, angles, householder, kept, positions, padding, cu_seqlens, *options):
    """angles: (block, head_dim / 2); kept: (batch, heads, seq, block), False where dropout drops an entry."""
    block_size, causal, activation, scale, dropout_p = options
    output, table = torch.empty_like(value), rotation_table(angles)
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder)
    tensors = Tile(query, key, value, output, padding=padding, kept=kept)
    blocks = Blocks.of(tensors, positions, cu_seqlens, block_size)
    for tile in blocks.tiles(block_size, table):
        q = prepare.states(tile.query, tile.rotation)
        k, v = prepare.states(tile.key, tile.rotation, tile.padding), prepare.values(tile.value, tile.padding)
        weights = block_weights(q, k, tile.padding, causal, activation, scale)
        tile.output.copy_(drop(weights, tile.kept, dropout_p) @ v)
    blocks.copy_back(blocks.tensors.output, output)
    return output


@chunked_diag_forward.register_fake
def _(query, key, value, *others):
    return torch.empty_like(value)


class Blocks(NamedTuple):
    """Tensors of which each range of rows consists of whole blocks, but for the last.

    Where the blocks of a batch do not begin at column 0, as with padding on the left, its rows are shifted to the right
    until they do. `target`: the columns that tokens were shifted to, (batch or 1, 1, seq, 1); None for no shift.
    """

    tensors: Tile
    ranges: list[RowRange]
    target: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: Tile, positions: torch.Tensor, cu_seqlens: torch.Tensor | None, block_size: int) -> "Blocks":
        seq_len = tensors.query.shape[2]
        if cu_seqlens is not None:  # each sequence, cut once more where its first block ends
            begins = F.pad(cu_seqlens.long(), (0, 1), value=seq_len)
            first_ends = begins + -positions[begins.clamp(max=seq_len - 1)] % block_size
            cuts = torch.cat((begins, torch.minimum(first_ends[:-1], begins[1:]))).sort().values
            return cls(tensors, row_ranges(tensors.query, cuts))
        if begins_a_block(positions, block_size):
            return cls(tensors, row_ranges(tensors.query, None))
        shift = (positions[..., 0] % block_size).reshape(-1, 1)  # (batch or 1, 1)
        columns = torch.arange(seq_len + block_size - 1, device=positions.device)
        source = (columns - shift)[:, None, :, None]  # (batch or 1, 1, wider, 1)
        is_outside, source = (source < 0) | (source >= seq_len), source.clamp(0, seq_len - 1)
        shifted = Tile(*(None if t is None else take_columns(t, source).masked_fill_(is_outside, 0) for t in tensors))
        shifted = shifted._replace(padding=is_outside if tensors.padding is None else shifted.padding | is_outside)
        target = (columns[:seq_len] + shift)[:, None, :, None]  # (batch or 1, 1, seq, 1)
        return cls(shifted, row_ranges(shifted.query, None), target)

    def tiles(self, block_size, table, grad_table=None):
        """The tiles; the rotation and its gradient in each block are rows of tables (block_size, head_dim / 2)."""
        for rows in self.ranges:
            for tile in rows.tiles(self.tensors, block_size):
                rotation, grad_rotation = (None if t is None else t[: tile.query.shape[3]] for t in (table, grad_table))
                yield tile._replace(rotation=rotation, grad_rotation=grad_rotation)

    def copy_back(self, shifted: torch.Tensor, into: torch.Tensor) -> None:
        if self.target is not None:
            into.copy_(take_columns(shifted, self.target))


def begins_a_block(positions: torch.Tensor, block_size: int) -> bool:
    """Whether every row does, as far as the host can tell without waiting for a device in every layer."""
    return positions.device.type == "cpu" and not (positions[..., 0] % block_size).any()


def take_columns(tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns of (batch or 1, heads or 1, seq, channels), by their numbers (batch or 1, 1, wider, 1)."""
    batch_size, heads, _, channels = tensor.shape
    return tensor.gather(2, columns.expand(max(batch_size, len(columns)), heads, -1, channels))


def block_weights(q, k, padding, causal, activation, scale):
    """The map of DiagAttention in a tile, (chunks, rows, heads, block, block)."""
    visible = None if padding is None else (~padding.mT).to(q.dtype)  # (chunks, rows or 1, 1, 1, block)
    if causal:
        earlier = q.new_ones(q.shape[3], q.shape[3]).tril_()
        visible = earlier if visible is None else visible * earlier
    weights = q.new_zeros(*q.shape[:4], k.shape[3])
    if visible is not None and activation == "softmax":  # scores are added to the lowest number where they are hidden
        weights.copy_((1 - visible) * torch.finfo(q.dtype).min)
    add_product(weights, q, k.mT, scale)
    if activation == "relu":
        weights.relu_()
    else:
        torch.softmax(weights, -1, out=weights)
    if visible is not None and (activation == "relu" or padding is not None):
        weights.mul_(visible)  # a query without any key has a row of zeros
    return weights


def drop(weights, kept, dropout_p):
    if kept is None:
        return weights
    kept = kept[..., : weights.shape[-1]].to(weights.dtype)
    return weights * kept.div_(max(1 - dropout_p, torch.finfo(weights.dtype).tiny))  # nothing is kept at 1


@chunked_operator(f"(Tensor grad_output, {DIAG_INPUTS}, bool needs_angles, bool needs_householder) -> Tensor[]")
def chunked_diag_backward(grad_output, query, key, value, angles, householder, kept, positions, *others):
    padding, cu_seqlens, block_size, causal, activation, scale, dropout_p, *needs = others
    table = rotation_table(angles)
    grad_table, grad_householder = zeros_where_needed(needs, table, householder)
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder, grad_householder)
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    tensors = Tile(query, key, value, None, grad_output, *grads)._replace(padding=padding, kept=kept)
    blocks = Blocks.of(tensors, positions, cu_seqlens, block_size)
    for tile in blocks.tiles(block_size, table, grad_table):
        mapped_query, q = prepare.mapped_and_states(tile.query, tile.rotation)
        mapped_key, k = prepare.mapped_and_states(tile.key, tile.rotation, tile.padding)
        v, do = prepare.values(tile.value, tile.padding), prepare.values(tile.grad_output)
        weights = block_weights(q, k, tile.padding, causal, activation, scale)  # (chunks, rows, heads, block, block)
        tile.grad_value.copy_(drop(weights, tile.kept, dropout_p).mT @ do)
        grad_scores = drop(do @ v.mT, tile.kept, dropout_p)
        if activation == "relu":
            grad_scores.mul_(weights.sign())
        else:
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
        grad_scores.mul_(scale)
        prepare.backward(grad_scores @ k, mapped_query, q, tile, into=tile.grad_query)
        prepare.backward(grad_scores.mT @ q, mapped_key, k, tile, into=tile.grad_key)
    shifted = blocks.tensors
    for found, grad in zip((shifted.grad_query, shifted.grad_key, shifted.grad_value), grads, strict=True):
        blocks.copy_back(found, grad)
    return grads + lrpe_gradients(grad_table, grad_householder)


@chunked_diag_backward.register_fake
def _(grad_output, *others):
    return empty_gradients(others[:5], others[-2:])


def _save_diag_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _diag_attention_backward(ctx, grad_output):
    needs = ctx.needs_input_grad[3:5]
    grads = chunked_diag_backward(grad_output, *ctx.saved_tensors, *ctx.options, *needs)
    return *gradients_by_input(grads, needs), *repeat(None, 9)


chunked_diag_forward.register_autograd(_diag_attention_backward, setup_context=_save_diag_attention)
