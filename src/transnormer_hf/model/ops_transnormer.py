"""The two attentions of TransNormer and its norm, as functions: arguments, backends, and the chunked form in torch.

Each has up to three forms that give the same result: its definition in `reference_transnormer.py` (`"eager"`, quadratic
in length), a form in plain torch that is linear in length (`"torch"`, here), and Triton kernels for a GPU (`"triton"`).
`backend="auto"` takes the kernels for the CUDA tensors that they support, and the torch form for all others; while a
model is exported, a form of its own. Shapes and dtypes are as in the definitions.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, repeat
from typing import NamedTuple

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
    is_exporting,
    operator_namespace,
    prepare_query_key,
    rotation_angles,
    zero_padding,
)

try:
    import triton

    from .triton_common_transnormer import triton_simple_rms_norm, unsupported
    from .triton_diag_transnormer import MAX_BLOCK_SIZE, triton_diag_attention
    from .triton_norm_transnormer import segment_table, triton_norm_attention
except ImportError:  # triton is not installed
    triton = triton_diag_attention = triton_norm_attention = triton_simple_rms_norm = unsupported = segment_table = None
    MAX_BLOCK_SIZE = 0

TRITON_VERSION = (0, 0) if triton is None else tuple(int(part) for part in triton.__version__.split(".")[:2])

NAMESPACE = operator_namespace(__name__)
logger = logging.get_logger(__name__)


def norm_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, feature_map: str = "identity",
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None, return_state: bool = False,
    backend: str = "auto", metadata: AttentionMetadata | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
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
            state per sequence.
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
    backend = _backend_for(backend, metadata, "torch", query, key, value)
    forms = {"eager": eager_norm_attention, "torch": chunked_norm_attention, "triton": triton_norm_attention}
    forms["export"] = exported_norm_attention
    options = {"causal": causal, "feature_map": feature_map, "lrpe": lrpe, "initial_state": initial_state}
    with without_autocast(query.device):
        output, state = forms[backend](query, key, value, metadata=metadata, return_state=return_state, **options)
    return output.to(dtype), state if return_state else None


def diag_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int, causal: bool,
    activation: str = "softmax", scale: float | None = None,
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, dropout_p: float = 0.0,
    backend: str = "auto", metadata: AttentionMetadata | None = None,
) -> torch.Tensor:  # fmt: skip
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
    check_choice("activation", activation, ("softmax", "relu"))
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: a block has at least 1 token.")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} must be a probability, from 0 to 1.")
    dtype = value.dtype
    query, key, value, lrpe, metadata = check_inputs(query, key, value, lrpe, attention_mask, cu_seqlens, metadata)
    is_unsupported = (activation == "relu" and block_size > MAX_BLOCK_SIZE) or value.shape != query.shape
    if backend == "auto" and is_unsupported and not is_exporting():
        backend = "torch"  # the kernels take neither
    backend = _backend_for(backend, metadata, "eager", query, key, value)
    forms = {"eager": eager_diag_attention, "torch": chunked_diag_attention, "triton": triton_diag_attention}
    forms["export"] = exported_diag_attention
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"causal": causal, "activation": activation, "lrpe": lrpe, "dropout_p": dropout_p}
    with without_autocast(query.device):
        output = forms[backend](query, key, value, metadata=metadata, block_size=block_size, scale=scale, **options)
    return output.to(dtype)


def simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8, backend: str = "auto") -> torch.Tensor:
    """SimpleRMSNorm: x / (rms(x) + eps) over the last dimension, without weights; shape and dtype of hidden_states.

    backend: "triton" is one kernel, which "auto" takes for CUDA tensors; all others compute `eager_simple_rms_norm`,
    and all but "eager" its gradient from the result. Raises ValueError for an unknown backend, or one that cannot run.
    """
    if resolve_backend(backend, hidden_states) == "triton":
        return triton_simple_rms_norm(hidden_states, eps)
    if is_exporting():  # the same numbers: onnxscript takes a summand of 1e-8 for 0 and leaves it out
        wide = hidden_states.to(compute_dtype(hidden_states.dtype))
        return eager_simple_rms_norm(wide * 2**12, eps * 2**12).to(hidden_states.dtype)
    if backend == "eager" or not hidden_states.requires_grad or torch.compiler.is_compiling():
        return eager_simple_rms_norm(hidden_states, eps)
    return SimpleRMSNorm.apply(hidden_states, eps)[0]


class SimpleRMSNorm(torch.autograd.Function):
    """`eager_simple_rms_norm` and the rms of each row, (..., 1). Its gradient needs no more than these two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states, eps):
        wide = hidden_states.to(compute_dtype(hidden_states.dtype))
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        return (wide / (rms + eps)).to(hidden_states.dtype), rms

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)
        ctx.eps = inputs[1]

    @staticmethod
    def backward(ctx, grad, grad_rms):
        """dx = (dy - y mean(y dy) (1 + eps / rms)) / (rms + eps), and what a second derivative asks of the rms."""
        (normed, rms), dtype = ctx.saved_tensors, grad.dtype
        grad, normed = grad.to(rms.dtype), normed.to(rms.dtype)
        grad_rms = grad_rms - (grad * normed).sum(-1, keepdim=True) / (rms + ctx.eps)
        slope = grad_rms * (1 + ctx.eps / rms.clamp(min=torch.finfo(rms.dtype).tiny)) / normed.shape[-1]
        return torch.addcmul(grad / (rms + ctx.eps), normed, slope).to(dtype), None


def resolve_backend(backend: str, *tensors: torch.Tensor) -> str:
    """The backend that runs: "auto" becomes "triton" for CUDA tensors that its kernels support, else "torch".

    tensors: query, key and value of an attention, or the one input of a norm. Raises ValueError for an unknown backend,
    and for "triton" where it cannot run, with the reason.
    """
    check_choice("backend", backend, ("auto", "eager", "torch", "triton"))
    if backend in ("eager", "torch"):
        return backend
    if backend == "auto" and (not tensors[0].is_cuda or is_exporting()):
        return "torch"
    if triton is None:
        reason = 'backend="triton" needs the triton package, which is not installed; use backend="auto".'
    elif TRITON_VERSION < (3, 6):
        reason = f"triton {triton.__version__} is too old for the kernels of TransNormer, which need 3.6; "
        reason += 'upgrade it, or use backend="torch".'
        if backend == "auto" and not torch.compiler.is_compiling():
            logger.warning_once(reason)
    else:
        reason = unsupported(*tensors)
    if reason is not None and backend == "triton":
        raise ValueError(reason)
    return "triton" if reason is None else "torch"


def with_segments(metadata: AttentionMetadata) -> AttentionMetadata:
    """The metadata with what the kernels of NormAttention need of packed sequences: once, for all layers of a model."""
    if metadata.cu_seqlens is None or not metadata.cu_seqlens.is_cuda or segment_table is None:
        return metadata
    return metadata._replace(segments=segment_table(metadata.cu_seqlens, metadata.positions.shape[-1]))


def _backend_for(backend: str, metadata: AttentionMetadata, for_any_positions: str, *tensors: torch.Tensor) -> str:
    resolved, seq_len = resolve_backend(backend, *tensors), tensors[0].shape[2]
    if backend == "auto" and is_exporting():
        return "export" if metadata.is_contiguous and metadata.cu_seqlens is None else "eager"
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


# The exported form: operators that every exporter knows, linear in length. Sizes may be symbols: no reshape divides
# one, which would be a condition on it, and no number of blocks is ever 1, which would be a case of its own.


def exported_norm_attention(query, key, value, *, metadata, causal, feature_map, lrpe, initial_state, return_state):
    """`eager_norm_attention` as Q (K^T V); if causal, by chunks, the states before them as cumulative sums."""
    wide, seq_len = compute_dtype(query.dtype), query.shape[2]
    query, key = prepare_query_key(query.to(wide), key.to(wide), metadata, feature_map, lrpe)
    value = zero_padding(value.to(wide), metadata)
    if not causal:
        state = key.mT @ value + (0 if initial_state is None else initial_state)  # (batch, heads, head_dim, value_dim)
        return query @ state, state
    source = block_columns(seq_len, CHUNK_SIZE, query.device)  # (chunks, chunk)
    # (batch, heads, chunks, chunk, head_dim)
    query, key, value = (states[:, :, source.clamp(max=seq_len - 1)] for states in (query, key, value))
    key = key.masked_fill((source >= seq_len)[..., None], 0)
    states = F.pad((key.mT @ value).cumsum(2), (0, 0, 0, 0, 1, 0))  # (batch, heads, chunks + 1, head_dim, value_dim)
    states = states if initial_state is None else states + initial_state[:, :, None]
    output = (query @ key.mT).tril() @ value + query @ states[:, :, :-1]
    target = torch.arange(seq_len, device=query.device)
    return output[:, :, target // CHUNK_SIZE, target % CHUNK_SIZE], states[:, :, -1]


def exported_diag_attention(query, key, value, *, metadata, block_size, **options):
    """`eager_diag_attention` of each block, all blocks one batch. Each row is moved so that a block begins it."""
    batch_size, _, seq_len, _ = query.shape
    rows = torch.arange(batch_size, device=query.device)[:, None]
    shift = torch.atleast_2d(metadata.positions)[:, :1] % block_size  # (batch or 1, 1)
    columns = block_columns(seq_len, block_size, query.device)  # (blocks, block)
    source = (columns - shift[..., None]).expand(batch_size, -1, -1)  # (batch, blocks, block)
    index = (rows[..., None], source.clamp(min=0).clamp(max=seq_len - 1))
    is_real = (source >= 0) & (source < seq_len)
    if metadata.is_real is not None:
        is_real = is_real & metadata.is_real[index]
    in_blocks = AttentionMetadata(columns[0], is_real.flatten(0, 1))
    # (batch * blocks, heads, block, head_dim)
    blocked = (states.transpose(1, 2)[index].flatten(0, 1).transpose(1, 2) for states in (query, key, value))
    output = eager_diag_attention(*blocked, metadata=in_blocks, block_size=block_size, **options).transpose(1, 2)
    target = torch.arange(seq_len, device=query.device) + shift  # (batch or 1, seq)
    return output[rows * columns.shape[0] + target // block_size, target % block_size].transpose(1, 2)


def block_columns(seq_len, size, device):
    """(blocks, size) columns of each block, with room for up to a block before the first column."""
    blocks = torch.arange((seq_len - 1) // size + 2, device=device)
    return blocks[:, None] * size + torch.arange(size, device=device)


# The chunked form
#
# Both attentions go through the sequence in tiles, and the backward pass goes through them again and recomputes what it
# needs: only inputs, outputs and states are as long as the sequence. A tile is copied out of the inputs, which may be
# any views, in chunks (in DiagAttention, the blocks), (chunks, rows, heads, chunk, head_dim). All products of a tile,
# or of one of its chunks, are then one batch of small matrices.
#
# The number of tiles is known only at run time, so each direction of each attention is one custom operator, which
# torch.compile and torch.export keep whole. Eager calls take the same route, in 0.97 to 1.05 times the time of an
# autograd.Function around the same code (one thread, B1 H8 T2048 D64 and B8 H8 T128 D64, forward and backward).

# In tokens. Long enough to hide the overhead of calling torch, short enough for the cache: with one thread and 32 MB of
# cache the time is flat from 256 to 1024 and rises outside.
TILE_SIZE = 512
# A shorter chunk has fewer scores (4 · chunk · head_dim FLOP per token, states take 4 · head_dim^2), but products of
# 32 x 32 matrices run at two thirds of the speed of 64 x 64. Up to LONGEST_CHUNK a sequence is one chunk.
CHUNK_SIZE, LONGEST_CHUNK = 64, 128


def chunked_norm_attention(query, key, value, *, metadata, causal, feature_map, lrpe, initial_state, return_state):
    """`eager_norm_attention` by chunks: scores inside a chunk, the state K^T V between chunks."""
    positions = torch.atleast_2d(metadata.positions)[:, None]  # (batch or 1, 1, seq)
    angles, householder, padding = lrpe_and_padding(metadata, positions, lrpe, query.dtype)
    tensors = (query, key, value, angles, householder, initial_state, padding, metadata.cu_seqlens)
    output, states, _ = chunked_norm_forward(*tensors, causal, feature_map, return_state)
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
    view (chunks, rows or 1, heads or 1, chunk, channels). `output` and all `grad_*` but `grad_output` are written to.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor | None  # 1 channel, True for padding
    rotation: torch.Tensor | None  # head_dim / 2 channels, complex
    output: torch.Tensor | None = None
    grad_output: torch.Tensor | None = None
    grad_query: torch.Tensor | None = None
    grad_key: torch.Tensor | None = None
    grad_value: torch.Tensor | None = None
    grad_angles: torch.Tensor | None = None
    kept: torch.Tensor | None = None  # block_size channels, False where dropout drops an entry of the map


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
        chunk = chunk or (CHUNK_SIZE if length > LONGEST_CHUNK else length)
        middle = self.end - length % chunk  # where a last, shorter chunk begins

        def cut(tensor: torch.Tensor | None) -> Iterable[torch.Tensor | None]:
            if tensor is None:
                return repeat(None)
            tensor = tensor[self.rows if len(tensor) > 1 else slice(1)]
            tiles: list[torch.Tensor] = []
            for begin, end, size in ((self.begin, middle, chunk), (middle, self.end, length % chunk)):
                if begin < end:
                    chunks = tensor[:, :, begin:end].unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4)
                    tiles += chunks.split(max(TILE_SIZE // chunk, 1))
            return tiles

        return [Tile(*tile) for tile in zip(*map(cut, tensors))]  # noqa: B905 (repeat has no end)

    def states_before_tiles(self, states: torch.Tensor, chunk_states: torch.Tensor) -> list[torch.Tensor]:
        """Before tile 0, 1, ... of this range, and perhaps more: (rows, heads, head_dim, value_dim) each."""
        earlier = self.begin // TILE_SIZE + self.states.start - self.rows.start
        return [states[self.states], *chunk_states[earlier:, self.rows]]


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
    is_backward: bool = False
    grad_householder: torch.Tensor | None = None

    def values(self, tile, padding=None):
        if padding is not None:
            return self._load(tile).masked_fill_(padding, 0)
        # One chunk can be multiplied as it lies, if rows and heads make one batch of matrices there.
        values = tile.to(self.dtype) if len(tile) == 1 else self._load(tile)
        return values.flatten(1, 2).view(tile.shape)

    def states(self, tile, rotation, padding=None):
        """Queries or keys as they enter the products, and for `backward` as they are after phi alone."""
        if self.feature_map == "identity" and rotation is None:
            return self.values(tile, padding), None
        states = mapped = self._load(tile)
        if self.feature_map != "identity":
            # 1 + elu(x) as exp(min(x, 0)) + max(x, 0) takes half the time of F.elu, and exp2 half that of exp
            negative = (mapped * math.log2(math.e)).clamp_(max=0).exp2_()
            mapped.clamp_(min=0).add_(negative)
            if self.feature_map == "elu":
                mapped.sub_(1)
        if self.is_backward and not (rotation is None and padding is None):
            states = mapped.clone()
        if rotation is not None:
            self._reflect(states)
            as_complex(states).mul_(rotation)
        if padding is not None:
            states.masked_fill_(padding, 0)
        return states, mapped

    def _load(self, tile):
        return torch.empty(tile.shape, dtype=self.dtype, device=tile.device).copy_(tile)

    def _reflect(self, states):
        rows = states.view(-1, states.shape[-1])  # (tokens, head_dim)
        rows.addr_(rows.mv(self.householder), self.householder, alpha=-2)

    def backward(self, grad, mapped, states, tile, into):
        """Takes the gradient of `states` back to that of their tile, written to `into`, and adds to those of LRPE."""
        if tile.rotation is not None:
            if tile.grad_angles is not None:  # Im(conj(z) dz)
                projection = as_complex(states).conj_physical().mul_(as_complex(grad))
                tile.grad_angles.add_(projection.sum_to_size(tile.grad_angles.shape).imag)
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


def differentiable(forward, backward, like_outputs, inputs, outputs, saved=lambda inputs, output: []):
    """Makes an operator of `forward`, and of `backward` another one, its gradient.

    inputs, outputs: their schemas, tensors first. like_outputs(*inputs): tensors like the outputs.
    saved(inputs, output): list of the outputs that the gradient needs besides the inputs.
    backward(*inputs, saved, grad_output, grad_states, needs): `new_gradients`, filled. grad_states: of all outputs but
    the first, None where nothing depends on one. needs: of each input, whether it needs a gradient.
    """
    num_tensors = inputs.count("Tensor")

    def operator(function, schema, fake):
        def run(query, *others):
            with without_autocast(query.device):  # it may be on in a compiled graph and in the backward pass
                return function(query, *others)

        made = torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", run, mutates_args=(), schema=schema)
        made.register_fake(fake)
        return made

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:num_tensors], *saved(inputs, output))
        ctx.options = inputs[num_tensors:]
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_output, *grad_states):
        tensors = ctx.saved_tensors  # asked for once: a checkpoint hands its tensors out once
        if grad_output is None:
            grad_output = torch.zeros_like(tensors[2])  # as value
        inputs, saved = (*tensors[:num_tensors], *ctx.options), tensors[num_tensors:]
        grads = backward_operator(*inputs, saved, grad_output, grad_states, ctx.needs_input_grad)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))

    forward_operator = operator(forward, f"({inputs}) -> {outputs}", like_outputs)
    schema = f"({inputs}, Tensor[] saved, Tensor grad_output, Tensor?[] grad_states, bool[] needs) -> Tensor[]"
    backward_operator = operator(backward, schema, lambda *inputs: new_gradients(inputs[:-4], inputs[-1]))
    forward_operator.register_autograd(gradients, setup_context=save)
    return forward_operator


def new_gradients(inputs, needs):
    """Room for those of query, key and value; zeros for the others, without entries where none is needed."""
    query, key, value, *others = inputs
    others = [torch.zeros_like(t) if need else query.new_empty(0) for t, need in zip(others, needs[3:], strict=True)]
    return [*map(torch.empty_like, (query, key, value)), *others]


def first_states(query, value, initial_state, cu_seqlens):
    """The states before the first tokens, with one more for the tokens behind the last packed sequence."""
    count = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    states = query.new_zeros(count, query.shape[1], query.shape[3], value.shape[3], dtype=compute_dtype(query.dtype))
    if initial_state is not None:
        states[: initial_state.shape[0]] = initial_state
    return states


def like_norm_outputs(query, key, value, angles, householder, initial_state, padding, cu_seqlens, causal, *options):
    """The output, not written yet; `first_states`; and if causal, for the backward pass, room for the states before all
    tiles but the first of each range, (tiles, rows, heads, head_dim, value_dim).

    The latter are one per 512 tokens, head_dim / 2048 of the size of inputs and outputs, and one more because the last
    two tiles may be short. (Since the count is never 1, torch.export can treat lengths below and above 512 alike.)
    """
    states = first_states(query, value, initial_state, cu_seqlens)
    count = query.shape[2] // TILE_SIZE + (2 if cu_seqlens is None else cu_seqlens.shape[0] + 1)
    chunk_states = states.new_empty(count if causal else 0, query.shape[0], *states.shape[1:])
    return torch.empty_like(value), states, chunk_states


def norm_forward(*inputs):
    """The tensors that `like_norm_outputs` made room for, with the states after the last tokens.

    angles: (batch or 1, 1, seq, head_dim / 2). Causal states are left unfinished unless `needs_state`.
    """
    query, key, value, angles, householder, initial_state, padding, cu_seqlens, *options = inputs
    causal, feature_map, needs_state = options
    output, states, chunk_states = like_norm_outputs(*inputs)
    if not causal and needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
        for q, k, v, out, state in zip(query, key, value, output, states, strict=True):
            state.baddbmm_(k.mT, v)
            torch.bmm(q, state, out=out)
        return output, states, chunk_states
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder)
    tensors = Tile(query, key, value, padding, rotation_table(angles), output)
    for rows in row_ranges(query, cu_seqlens):
        state = states[rows.states]  # (rows, heads, head_dim, value_dim)
        if not causal:  # S = K^T V, then O = Q S
            tiles = rows.tiles(tensors, TILE_SIZE)
            for tile in tiles:
                k, _ = prepare.states(tile.key, tile.rotation, tile.padding)
                add_product(state, k[0].mT, prepare.values(tile.value, tile.padding)[0])
            for tile in tiles:
                q, _ = prepare.states(tile.query, tile.rotation)
                tile.output.copy_(q @ state)
            continue
        # O = (Q K^T under the causal mask) V inside each chunk, plus Q S with the state S before the chunk
        tiles, before_tiles = rows.tiles(tensors), rows.states_before_tiles(states, chunk_states)
        after_tiles = [*before_tiles[1 : len(tiles)], state if needs_state else None]
        for tile, before, after in zip(tiles, before_tiles, after_tiles, strict=False):
            q, _ = prepare.states(tile.query, tile.rotation)
            k, _ = prepare.states(tile.key, tile.rotation, tile.padding)
            v = prepare.values(tile.value, tile.padding)
            out = (q @ k.mT).tril_() @ v  # (chunks, rows, heads, chunk, value_dim)
            if needs_state or initial_state is not None or len(tiles) > 1 or len(k) > 1:
                add_product(out, q, states_before(before, k, v, after))
            tile.output.copy_(out)
    return output, states, chunk_states


def needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
    """True where tokens can be multiplied as and where they lie, which takes a quarter less time at 2,048 tokens."""
    is_plain = all(other is None for other in (angles, padding, cu_seqlens)) and feature_map == "identity"
    return is_plain and query.dtype == compute_dtype(query.dtype) and query.shape[2] >= TILE_SIZE


def states_before(state, k, v, after=None, reverse=False):
    """The state before each chunk of a tile, (chunks, rows, heads, head_dim, value_dim), given that before the first.

    after: where to write the state after the last chunk. reverse: go from the last chunk to the first.
    """
    states = state.new_empty(len(k), *state.shape)
    steps = list(zip(*(tensor.flatten(1, 2) for tensor in (states, k.mT, v)), strict=True))
    if reverse:
        steps.reverse()
    steps[0][0].copy_(state.flatten(0, 1))
    for (before, key_chunk, value_chunk), (behind, *_) in pairwise(steps):
        torch.baddbmm(before, key_chunk, value_chunk, out=behind)
    if after is not None:
        torch.baddbmm(*steps[-1], out=after.flatten(0, 1))
    return states


def norm_backward(*arguments):
    *inputs, (states,), grad_output, (grad_states, _), needs = arguments
    query, key, value, angles, householder, initial_state, padding, cu_seqlens, causal, feature_map, _ = inputs
    has_states = initial_state is not None or grad_states is not None
    grads, grad_states = new_gradients(inputs, needs), first_states(query, value, grad_states, cu_seqlens)
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder, True, grads[4] if needs[4] else None)
    tensors = Tile(query, key, value, padding, rotation_table(angles), None, grad_output, *grads[:3])
    tensors = tensors._replace(grad_angles=grads[3] if needs[3] else None)
    if causal:
        before = first_states(query, value, initial_state, cu_seqlens)
        for rows in row_ranges(query, cu_seqlens):
            tiles, before_tiles = rows.tiles(tensors), rows.states_before_tiles(before, states)
            for number in reversed(range(len(tiles))):
                state, grad_state, update = before_tiles[number], grad_states[rows.states], number > 0 or needs[5]
                causal_tile_backward(prepare, tiles[number], state, grad_state, update, has_states or len(tiles) > 1)
    elif needs_no_preparation(query, angles, padding, cu_seqlens, feature_map):
        whole = (query, key, value, grad_output, *grads[:3], states, grad_states)
        for q, k, v, do, dq, dk, dv, state, grad_state in zip(*whole, strict=True):
            grad_state.baddbmm_(q.mT, do)
            torch.bmm(do, state.mT, out=dq)
            torch.bmm(v, grad_state.mT, out=dk)
            torch.bmm(k, grad_state, out=dv)
    else:
        for rows in row_ranges(query, cu_seqlens):
            tiles, grad_state = rows.tiles(tensors, TILE_SIZE), grad_states[rows.states]
            bidirectional_backward(prepare, tiles, states[rows.states], grad_state)
    if needs[5]:
        grads[5].copy_(grad_states[: len(initial_state)])
    return grads


def bidirectional_backward(prepare, tiles, state, grad_state):
    """dQ = dO S^T, dS = Q^T dO, dK = V dS^T, dV = K dS."""
    for tile in tiles:
        q, mapped = prepare.states(tile.query, tile.rotation)
        do = prepare.values(tile.grad_output)
        add_product(grad_state, q[0].mT, do[0])
        prepare.backward(do @ state.mT, mapped, q, tile, into=tile.grad_query)
    for tile in tiles:
        k, mapped = prepare.states(tile.key, tile.rotation, tile.padding)
        v = prepare.values(tile.value, tile.padding)
        tile.grad_value.copy_(k @ grad_state)
        prepare.backward(v @ grad_state.mT, mapped, k, tile, into=tile.grad_key)


def causal_tile_backward(prepare, tile, state, grad_state, update, has_states):
    """One tile, from the last to the first: dQ takes the state before each chunk, dK and dV the gradient of the next.

    state: before the tile, as the forward pass kept it (to subtract k^T v from the last would lose digits).
    grad_state: of the state behind the tile, moved on to the one before it if `update`. has_states: False if both are
    zero. (A function, so that the next tile finds the memory of this one free, and in the cache.)
    """
    q, mapped_query = prepare.states(tile.query, tile.rotation)
    k, mapped_key = prepare.states(tile.key, tile.rotation, tile.padding)
    v, do = prepare.values(tile.value, tile.padding), prepare.values(tile.grad_output)
    dv = (q @ k.mT).tril_().mT @ do  # (chunks, rows, heads, chunk, value_dim)
    grad_scores = (do @ v.mT).tril_()  # (chunks, rows, heads, chunk, chunk)
    dq, dk = grad_scores @ k, grad_scores.mT @ q  # (chunks, rows, heads, chunk, head_dim)
    if has_states or len(k) > 1:
        add_product(dq, do, states_before(state, k, v).mT)
        grad_states = states_before(grad_state, q, do, after=grad_state if update else None, reverse=True)
        add_product(dk, v, grad_states.mT)
        add_product(dv, k, grad_states)
    prepare.backward(dq, mapped_query, q, tile, into=tile.grad_query)
    prepare.backward(dk, mapped_key, k, tile, into=tile.grad_key)
    tile.grad_value.copy_(dv)


chunked_norm_forward = differentiable(
    norm_forward, norm_backward, like_norm_outputs,
    "Tensor query, Tensor key, Tensor value, Tensor? angles, Tensor? householder, Tensor? initial_state, "
    "Tensor? padding, Tensor? cu_seqlens, bool causal, str feature_map, bool needs_state",
    "(Tensor, Tensor, Tensor)",
    # The causal gradient does without the last states, whose owner may then write to them.
    saved=lambda inputs, output: [output[2] if inputs[8] else output[1]],
)  # fmt: skip


def diag_forward(query, key, value, angles, householder, kept, positions, padding, cu_seqlens, block_size, *options):
    """angles: (block, head_dim / 2); kept: (batch, heads, seq, block), False where dropout drops an entry."""
    causal, activation, scale, dropout_p = options
    output = torch.empty_like(value)
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder)
    tensors = Tile(query, key, value, padding, rotation_table(angles), output, kept=kept)
    for tile in block_tiles(tensors, positions, cu_seqlens, block_size):
        q, _ = prepare.states(tile.query, tile.rotation)
        k, _ = prepare.states(tile.key, tile.rotation, tile.padding)
        weights = block_weights(q, k, tile.padding, causal, activation, scale)
        tile.output.copy_(drop(weights, tile.kept, dropout_p) @ prepare.values(tile.value, tile.padding))
    return output


def block_tiles(tensors, positions, cu_seqlens, block_size):
    """Tiles of whole blocks, but for the last of a range. `rotation` and `grad_angles` are tables for one block, and in
    each tile their rows, (up to block_size, head_dim / 2).

    Where the blocks of a batch do not begin at column 0, as with padding on the left, the tiles are those of a copy
    whose rows are shifted to the right until they do. What was written there is copied back after the last tile.
    """
    table, grad_table = tensors.rotation, tensors.grad_angles
    whole = shifted = tensors._replace(rotation=None, grad_angles=None)
    seq_len = whole.query.shape[2]
    if cu_seqlens is not None:  # each sequence, cut once more where its first block ends
        begins = F.pad(cu_seqlens.long(), (0, 1), value=seq_len)
        first_ends = begins + -positions[begins.clamp(max=seq_len - 1)] % block_size
        cu_seqlens = torch.cat((begins, torch.minimum(first_ends[:-1], begins[1:]))).sort().values
    elif not begins_a_block(positions, block_size):
        shift = (positions[..., 0] % block_size).reshape(-1, 1)  # (batch or 1, 1)
        columns = torch.arange(seq_len + block_size - 1, device=positions.device)
        source = (columns - shift)[:, None, :, None]  # (batch or 1, 1, wider, 1)
        is_outside, source = (source < 0) | (source >= seq_len), source.clamp(0, seq_len - 1)
        shifted = Tile(*(t if t is None else t.take_along_dim(source, 2).masked_fill_(is_outside, 0) for t in whole))
        shifted = shifted._replace(padding=is_outside if whole.padding is None else shifted.padding | is_outside)
    for rows in row_ranges(shifted.query, cu_seqlens):
        for tile in rows.tiles(shifted, block_size):
            rotation, grad_angles = (None if t is None else t[: tile.query.shape[3]] for t in (table, grad_table))
            yield tile._replace(rotation=rotation, grad_angles=grad_angles)
    if shifted is not whole:
        target = (columns[:seq_len] + shift)[:, None, :, None]  # (batch or 1, 1, seq, 1)
        for name in ("output", "grad_query", "grad_key", "grad_value"):
            if getattr(whole, name) is not None:
                getattr(whole, name).copy_(getattr(shifted, name).take_along_dim(target, 2))


def begins_a_block(positions: torch.Tensor, block_size: int) -> bool:
    """Whether every row does, as far as the host can tell without waiting for a device in every layer."""
    return positions.device.type == "cpu" and not (positions[..., 0] % block_size).any()


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


def diag_backward(*arguments):
    *inputs, _, grad_output, _, needs = arguments
    query, key, value, angles, householder, kept, positions, padding, cu_seqlens, block_size, *options = inputs
    causal, activation, scale, dropout_p = options
    grads = new_gradients(inputs, needs)
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder, True, grads[4] if needs[4] else None)
    tensors = Tile(query, key, value, padding, rotation_table(angles), None, grad_output, *grads[:3])
    tensors = tensors._replace(grad_angles=grads[3] if needs[3] else None, kept=kept)
    for tile in block_tiles(tensors, positions, cu_seqlens, block_size):
        q, mapped_query = prepare.states(tile.query, tile.rotation)
        k, mapped_key = prepare.states(tile.key, tile.rotation, tile.padding)
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
    return grads


chunked_diag_forward = differentiable(
    diag_forward, diag_backward, lambda query, key, value, *others: torch.empty_like(value),
    "Tensor query, Tensor key, Tensor value, Tensor? angles, Tensor? householder, Tensor? kept, Tensor positions, "
    "Tensor? padding, Tensor? cu_seqlens, SymInt block_size, bool causal, str activation, float scale, float dropout_p",
    "Tensor",
)  # fmt: skip
