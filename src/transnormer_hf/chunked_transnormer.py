"""NormAttention and DiagAttention in plain torch, linear in length: the fast path on any device.

The definitions they must equal are `eager_norm_attention` and `eager_diag_attention` in `ops_transnormer.py`.

Both walk over the sequence in tiles (`tiles_transnormer.py`), and the backward pass walks over the tiles again and
recomputes what it needs, so that apart from inputs, outputs and states nothing is as long as the sequence.

The number of steps of a walk is known at run time only. torch.compile and torch.export therefore see each walk as one
operator, a `torch.library.custom_op`, and its gradient as another.
"""

import functools
import re
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch

from .features_transnormer import LRPE, TokenLayout, compute_dtype, prepare_query_key, rotation_angles, zero_padding
from .tiles_transnormer import TILE_SIZE, Preparation, add_product, padding_of, product, rotation_table, spans_of

# A shorter chunk has fewer scores (4 · chunk · head_dim FLOP per token, states take 4 · head_dim^2), but products of
# 32 x 32 matrices run at two thirds of the speed of 64 x 64.
CHUNK_SIZE = 64

# One file loaded twice, as the package and as remote code from the Hub, defines its operators under two names.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


def without_autocast(walk: Callable) -> Callable:
    """Inside of an operator autocast is still on and would make half-precision products of the wide tiles."""

    @functools.wraps(walk)
    def run(query_or_grad: torch.Tensor, *args: Any) -> Any:
        with torch.autocast(query_or_grad.device.type, enabled=False):
            return walk(query_or_grad, *args)

    return run


def chunked_norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: TokenLayout,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
    initial_state: torch.Tensor | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NormAttention by chunks: inside a chunk the scores, between chunks the state K^T V."""
    wide = compute_dtype(query.dtype)
    if query.shape[2] == 1 and layout.cu_seqlens is None:
        # A step of decoding, where calling the operator would take longer than the work.
        query_states, key_states = prepare_query_key(query.to(wide), key.to(wide), layout, feature_map, lrpe)
        state = key_states.transpose(-1, -2) * zero_padding(value.to(wide), layout)
        if initial_state is not None:
            state = state + initial_state.to(wide)
        return (query_states @ state).to(value.dtype), state
    angles = householder = None
    if lrpe is not None:
        angles = rotation_angles(layout.positions, lrpe.theta.to(wide))  # (seq, head_dim / 2) or (batch, ...)
        angles = angles[None, None] if angles.dim() == 2 else angles[:, None]
        householder = lrpe.householder.to(wide)
    output, states = norm_attention_walk(
        query, key, value, angles, householder, initial_state, layout.is_real, layout.cu_seqlens, causal, feature_map
    )
    return output, states if layout.cu_seqlens is None else states[:-1]


def chunked_diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: TokenLayout,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    lrpe: LRPE | None,
    dropout_p: float,
) -> torch.Tensor:
    """DiagAttention as a batch of small attentions, one per block."""
    wide = compute_dtype(query.dtype)
    angles = householder = kept = None
    if lrpe is not None:
        # Scores depend on distances only, so all blocks turn by the same table, also one whose beginning is cut off.
        angles = rotation_angles(torch.arange(block_size, device=query.device), lrpe.theta.to(wide))
        householder = lrpe.householder.to(wide)
    if dropout_p > 0:
        kept = torch.rand(*query.shape[:3], block_size, device=query.device) >= dropout_p
    return diag_attention_walk(
        query,
        key,
        value,
        angles,
        householder,
        kept,
        layout.positions,
        layout.is_real,
        layout.cu_seqlens,
        block_size,
        causal,
        activation,
        scale,
        dropout_p,
    )


@torch.library.custom_op(f"{NAMESPACE}::chunked_norm_attention", mutates_args=())
@without_autocast
def norm_attention_walk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the states after the last tokens. angles: (batch or 1, 1, seq, head_dim / 2)."""
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder)
    output, states = torch.empty_like(value), first_states(query, value, initial_state, cu_seqlens)
    tensors = (query, key, value, output, rotation_table(angles), padding_of(is_real))
    for span in spans_of(query, cu_seqlens):
        state = states[span.states].flatten(0, 1)  # (rows · heads, head_dim, head_dim); all sums go into it in place
        tiles = span.tiles(tensors, CHUNK_SIZE if causal else TILE_SIZE)
        if not causal:
            for _, key_tile, value_tile, _, rotation, padding in tiles:
                k, v = prepare.states(key_tile, rotation, padding), prepare.values(value_tile, padding)
                state.baddbmm_(k[0].mT, v[0])
        for query_tile, key_tile, value_tile, output_tile, rotation, padding in tiles:
            q = prepare.states(query_tile, rotation)
            if causal:
                k, v = prepare.states(key_tile, rotation, padding), prepare.values(value_tile, padding)
                out = product(product(q, k.mT).tril_(), v)
                add_product(out, q, states_before(state, k, v))
            else:
                out = torch.bmm(q[0], state)
            output_tile.copy_(out.view(output_tile.shape))
    return output, states


def first_states(query, value, initial_state, cu_seqlens):
    """The states before the first tokens, with one more for the tokens behind the last packed sequence."""
    count = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    states = query.new_zeros(count, query.shape[1], query.shape[3], value.shape[3], dtype=compute_dtype(query.dtype))
    if initial_state is not None:
        states[: initial_state.shape[0]] = initial_state
    return states


def states_before(state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backwards: bool = False) -> torch.Tensor:
    """The state each chunk of a tile meets, (chunks, rows · heads, head_dim, head_dim); `state` moves on in place."""
    before = state.new_empty(len(k), *state.shape)
    steps = list(zip(before, k.mT, v, strict=True))
    for state_before, key_chunk, value_chunk in reversed(steps) if backwards else steps:
        state_before.copy_(state)
        state.baddbmm_(key_chunk, value_chunk)
    return before


@norm_attention_walk.register_fake
def _(query, key, value, angles, householder, initial_state, is_real, cu_seqlens, causal, feature_map):
    return torch.empty_like(value), first_states(query, value, None, cu_seqlens)


@torch.library.custom_op(f"{NAMESPACE}::chunked_norm_attention_backward", mutates_args=())
@without_autocast
def norm_attention_walk_back(
    grad_output: torch.Tensor,
    grad_states: torch.Tensor,
    states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    feature_map: str,
    needs_angles: bool,
    needs_householder: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, angles and householder (empty where not needed), and of the first states."""
    rotation = rotation_table(angles)
    grad_rotation = torch.zeros_like(rotation) if needs_angles else None
    grad_householder = torch.zeros_like(householder) if needs_householder else None
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder, grad_householder)
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    grad_states = grad_states.clone(memory_format=torch.contiguous_format)
    if causal:
        states = first_states(query, value, initial_state, cu_seqlens)
    tensors = (query, key, value, grad_output, *grads, rotation, grad_rotation, padding_of(is_real))
    for span in spans_of(query, cu_seqlens):
        state, grad_state = states[span.states].flatten(0, 1), grad_states[span.states].flatten(0, 1)
        if causal:
            scan_back(prepare, span.tiles(tensors, CHUNK_SIZE), state, grad_state)
        else:
            sum_back(prepare, span.tiles(tensors, TILE_SIZE), state, grad_state)
    return *grads, *grads_or_empty(grad_rotation, grad_householder, query), grad_states


def sum_back(prepare, tiles, state, grad_state):
    """Bidirectional, O = Q S with S = K^T V: dQ = dO S^T, dS = Q^T dO, dK = V dS^T, dV = K dS."""
    for query_tile, _, _, grad_tile, grad_query, _, _, rotation, grad_rotation, _ in tiles:
        mapped, q = prepare.states_twice(query_tile, rotation)
        do = prepare.values(grad_tile)
        grad_state.baddbmm_(q[0].mT, do[0])
        prepare.backward(torch.bmm(do[0], state.mT), mapped, q, rotation, grad_rotation, into=grad_query)
    for _, key_tile, value_tile, _, _, grad_key, grad_value, rotation, grad_rotation, padding in tiles:
        mapped, k = prepare.states_twice(key_tile, rotation, padding)
        v = prepare.values(value_tile, padding)
        prepare.backward(torch.bmm(v[0], grad_state.mT), mapped, k, rotation, grad_rotation, into=grad_key)
        grad_value.copy_(torch.bmm(k[0], grad_state).view(grad_value.shape))


def scan_back(prepare, tiles, state, grad_state):
    """Causal: dQ needs the state before each token, dK and dV the gradient of the states behind it.

    The states are summed up forwards once more, and the one in front of each tile is kept for the way back. Taking
    k^T v off the last state again, instead of the first pass, would lose digits.
    """
    starts = []
    for _, key_tile, value_tile, *_, rotation, _, padding in tiles:
        starts.append(state.clone())
        k, v = prepare.states(key_tile, rotation, padding), prepare.values(value_tile, padding)
        for key_chunk, value_chunk in zip(k.mT, v, strict=True):
            state.baddbmm_(key_chunk, value_chunk)
    for state, tile in zip(reversed(starts), reversed(tiles), strict=True):
        (
            query_tile,
            key_tile,
            value_tile,
            grad_tile,
            grad_query,
            grad_key,
            grad_value,
            rotation,
            grad_rotation,
            padding,
        ) = tile
        mapped_query, q = prepare.states_twice(query_tile, rotation)
        mapped_key, k = prepare.states_twice(key_tile, rotation, padding)
        v, do = prepare.values(value_tile, padding), prepare.values(grad_tile)
        dv = product(product(q, k.mT).tril_().mT, do)
        grad_scores = product(do, v.mT).tril_()  # (chunks, rows · heads, chunk, chunk)
        dq, dk = product(grad_scores, k), product(grad_scores.mT, q)
        add_product(dq, do, states_before(state, k, v).mT)
        grad_states = states_before(grad_state, q, do, backwards=True)
        add_product(dk, v, grad_states.mT)
        add_product(dv, k, grad_states)
        prepare.backward(dq, mapped_query, q, rotation, grad_rotation, into=grad_query)
        prepare.backward(dk, mapped_key, k, rotation, grad_rotation, into=grad_key)
        grad_value.copy_(dv.view(grad_value.shape))


@norm_attention_walk_back.register_fake
def _(grad_output, grad_states, states, query, key, value, angles, householder, *args):
    *_, needs_angles, needs_householder = args
    return (
        *(torch.empty_like(tensor) for tensor in (query, key, value)),
        torch.empty_like(angles) if needs_angles else query.new_empty(0),
        torch.empty_like(householder) if needs_householder else query.new_empty(0),
        torch.empty_like(grad_states, memory_format=torch.contiguous_format),
    )


def _save_norm_attention(ctx, inputs, output):
    *tensors, ctx.causal, ctx.feature_map = inputs
    ctx.save_for_backward(output[1], *tensors)


def _norm_attention_backward(ctx, grad_output, grad_states):
    _, _, _, needs_angles, needs_householder, needs_initial_state, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors  # asked for once: a checkpoint gives its tensors out once
    *grads, grad_angles, grad_householder, grad_states = norm_attention_walk_back(
        grad_output, grad_states, *saved, ctx.causal, ctx.feature_map, needs_angles, needs_householder
    )
    initial_state = saved[6]
    return (
        *grads,
        grad_angles if needs_angles else None,
        grad_householder if needs_householder else None,
        grad_states[: initial_state.shape[0]].to(initial_state.dtype) if needs_initial_state else None,
        *repeat(None, 4),
    )


norm_attention_walk.register_autograd(_norm_attention_backward, setup_context=_save_norm_attention)


def grads_or_empty(grad_rotation, grad_householder, query):
    """An operator has no optional results. The gradient of an angle is Im(conj(z) dz) of the number z it turned."""
    return (
        query.new_empty(0) if grad_rotation is None else grad_rotation.imag.contiguous(),
        query.new_empty(0) if grad_householder is None else grad_householder,
    )


@torch.library.custom_op(f"{NAMESPACE}::chunked_diag_attention", mutates_args=())
@without_autocast
def diag_attention_walk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor | None,
    householder: torch.Tensor | None,
    kept: torch.Tensor | None,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """angles: (block, head_dim / 2); kept: (batch, heads, seq, block), False where dropout takes a weight away."""
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder)
    weigh = Weights(causal, activation, scale, dropout_p)
    output, table = torch.empty_like(value), rotation_table(angles)
    tensors = (query, key, value, output, kept, padding_of(is_real))
    for span in spans_of(query, cu_seqlens, positions, block_size):
        for query_tile, key_tile, value_tile, output_tile, keep, padding in span.tiles(tensors, block_size):
            rotation = None if table is None else table[: query_tile.shape[3]]
            q, k = prepare.states(query_tile, rotation), prepare.states(key_tile, rotation, padding)
            weights = weigh.dropped(weigh.forward(q, k, padding), keep)
            out = product(weights, prepare.values(value_tile, padding))
            output_tile.copy_(out.view(output_tile.shape))
    return output


class Weights(NamedTuple):
    """The map of DiagAttention in tiles, (chunks, rows · heads, block, block), in place."""

    causal: bool
    activation: str
    scale: float
    dropout_p: float

    def forward(self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        weights = product(q, k.mT).mul_(self.scale)
        # masked_fill_ takes 15 times as long as a product or a sum
        seen = None if padding is None else (~padding.mT).to(q.dtype)  # (chunks, rows, 1, 1, block)
        if self.causal:
            earlier = q.new_ones(q.shape[2], q.shape[2]).tril_()
            seen = earlier if seen is None else seen * earlier
        by_rows = weights if padding is None else weights.unflatten(1, (padding.shape[1], -1))
        if self.activation == "relu":
            weights.relu_()
            return weights if seen is None else by_rows.mul_(seen).view(weights.shape)
        if seen is None:
            return weights.softmax(-1)
        weights = by_rows.add_((1 - seen) * torch.finfo(q.dtype).min).softmax(-1)
        if padding is not None:
            weights.mul_(seen)  # a row without a key is zero
        return weights.view(q.shape[0], q.shape[1], q.shape[2], q.shape[2])

    def dropped(self, weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is None:
            return weights
        kept = kept[..., : weights.shape[-1]].to(weights.dtype).flatten(1, 2)
        return weights * kept.mul_(1 / (1 - self.dropout_p))

    def backward(self, grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu":
            return grad.mul_(weights.sign()).mul_(self.scale)
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(self.scale)


@diag_attention_walk.register_fake
def _(query, key, value, *args):
    return torch.empty_like(value)


@torch.library.custom_op(f"{NAMESPACE}::chunked_diag_attention_backward", mutates_args=())
@without_autocast
def diag_attention_walk_back(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor | None,
    householder: torch.Tensor | None,
    kept: torch.Tensor | None,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    dropout_p: float,
    needs_angles: bool,
    needs_householder: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, and of angles and householder (empty where not needed)."""
    table = rotation_table(angles)
    grad_table = torch.zeros_like(table) if needs_angles else None
    grad_householder = torch.zeros_like(householder) if needs_householder else None
    prepare = Preparation(compute_dtype(query.dtype), "identity", householder, grad_householder)
    weigh = Weights(causal, activation, scale, dropout_p)
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    tensors = (query, key, value, grad_output, *grads, kept, padding_of(is_real))
    for span in spans_of(query, cu_seqlens, positions, block_size):
        for tile in span.tiles(tensors, block_size):
            query_tile, key_tile, value_tile, grad_tile, grad_query, grad_key, grad_value, keep, padding = tile
            rotation, grad_rotation = (None if t is None else t[: query_tile.shape[3]] for t in (table, grad_table))
            mapped_query, q = prepare.states_twice(query_tile, rotation)
            mapped_key, k = prepare.states_twice(key_tile, rotation, padding)
            v, do = prepare.values(value_tile, padding), prepare.values(grad_tile)
            weights = weigh.forward(q, k, padding)
            dv = product(weigh.dropped(weights, keep).mT, do)
            grad_scores = weigh.backward(weigh.dropped(product(do, v.mT), keep), weights)
            dq, dk = product(grad_scores, k), product(grad_scores.mT, q)
            prepare.backward(dq, mapped_query, q, rotation, grad_rotation, into=grad_query)
            prepare.backward(dk, mapped_key, k, rotation, grad_rotation, into=grad_key)
            grad_value.copy_(dv.view(grad_value.shape))
    return *grads, *grads_or_empty(grad_table, grad_householder, query)


@diag_attention_walk_back.register_fake
def _(grad_output, query, key, value, angles, householder, *args):
    *_, needs_angles, needs_householder = args
    return (
        *(torch.empty_like(tensor) for tensor in (query, key, value)),
        torch.empty_like(angles) if needs_angles else query.new_empty(0),
        torch.empty_like(householder) if needs_householder else query.new_empty(0),
    )


def _save_diag_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _diag_attention_backward(ctx, grad_output):
    _, _, _, needs_angles, needs_householder, *_ = ctx.needs_input_grad
    *grads, grad_angles, grad_householder = diag_attention_walk_back(
        grad_output, *ctx.saved_tensors, *ctx.options, needs_angles, needs_householder
    )
    return (
        *grads,
        grad_angles if needs_angles else None,
        grad_householder if needs_householder else None,
        *repeat(None, 9),
    )


diag_attention_walk.register_autograd(_diag_attention_backward, setup_context=_save_diag_attention)
