"""NormAttention and DiagAttention in plain torch, linear in length: the fast path on any device.

The definitions they must equal are `eager_norm_attention` and `eager_diag_attention` in `ops_transnormer.py`.

Both walk over the sequence in tiles (`tiles_transnormer.py`), and the backward pass walks over the tiles again and
recomputes what it needs, so that apart from inputs, outputs and states nothing is as long as the sequence.

The number of steps of a walk is known at run time only. torch.compile and torch.export therefore see each walk as one
operator, a `torch.library.custom_op`, and its gradient as another. Outside of them the same functions are called
through a `torch.autograd.Function`, which takes less time to reach them.
"""

import functools
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .reference_transnormer import (
    LRPE,
    AttentionMetadata,
    compute_dtype,
    operator_namespace,
    prepare_query_key,
    rotation_angles,
    zero_padding,
)
from .tiles_transnormer import (
    TILE_SIZE,
    Alignment,
    Preparation,
    Span,
    add_product,
    begins_a_block,
    blocks_of_heads,
    must_align,
    padding_of,
    product,
    rotation_table,
    spans_of,
)

# A shorter chunk has fewer scores (4 · chunk · head_dim FLOP per token, states take 4 · head_dim^2), but products of
# 32 x 32 matrices run at two thirds of the speed of 64 x 64.
CHUNK_SIZE = 64
# Up to here the whole sequence is one chunk.
LONGEST_CHUNK = 128

NAMESPACE = operator_namespace(__name__)


def without_autocast(walk: Callable) -> Callable:
    """Inside of an operator autocast is still on and would make half-precision products of the wide tiles."""

    @functools.wraps(walk)
    def run(query_or_grad: torch.Tensor, *args: Any) -> Any:
        device = query_or_grad.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return walk(query_or_grad, *args)
        with torch.autocast(device, enabled=False):
            return walk(query_or_grad, *args)

    return run


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether somebody records what is done here, or there are no numbers: then the walks must be operators."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        return True
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def chunked_norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
    initial_state: torch.Tensor | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NormAttention by chunks: inside a chunk the scores, between chunks the state K^T V."""
    wide = compute_dtype(query.dtype)
    if query.shape[2] == 1 and metadata.cu_seqlens is None:
        # A step of decoding, where calling the operator would take longer than the work.
        query_states, key_states = prepare_query_key(query.to(wide), key.to(wide), metadata, feature_map, lrpe)
        state = key_states.transpose(-1, -2) * zero_padding(value.to(wide), metadata)
        if initial_state is not None:
            state = state + initial_state.to(wide)
        return (query_states @ state).to(value.dtype), state
    angles = householder = None
    if lrpe is not None:
        angles = rotation_angles(metadata.positions, lrpe.theta.to(wide))  # (seq, head_dim / 2) or (batch, ...)
        angles = angles[None, None] if angles.dim() == 2 else angles[:, None]
        householder = lrpe.householder.to(wide)
    tensors = (query, key, value, angles, householder, initial_state)
    needs_starts = causal and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = (causal, feature_map, return_state, needs_starts)
    attend = norm_attention_walk if is_traced(query) else NormAttention.apply
    output, states, _ = attend(*tensors, metadata.is_real, metadata.cu_seqlens, *options)
    return output, states if metadata.cu_seqlens is None else states[:-1]


def chunked_diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
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
    attend = diag_attention_walk if is_traced(query) else DiagAttention.apply
    return attend(
        query,
        key,
        value,
        angles,
        householder,
        kept,
        metadata.positions,
        metadata.is_real,
        metadata.cu_seqlens,
        block_size,
        causal,
        activation,
        scale,
        dropout_p,
    )


@without_autocast
def walk_norm_attention(
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
    needs_state: bool,
    needs_starts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the states after the last tokens, and those in front of each tile but the first, for the gradient.

    angles: (batch or 1, 1, seq, head_dim / 2). Causal states are left unfinished unless `needs_state`.
    """
    output, states = torch.empty_like(value), first_states(query, value, initial_state, cu_seqlens)
    starts = empty_starts(states, query, cu_seqlens, needs_starts)
    if not causal and is_plain(query, angles, is_real, cu_seqlens, feature_map):
        for q, k, v, out, state in zip(query, key, value, output, states, strict=True):
            state.baddbmm_(k.mT, v)
            torch.bmm(q, state, out=out)
        return output, states, starts
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder)
    tensors = (query, key, value, output, rotation_table(angles), padding_of(is_real))
    for span in spans_of(query, cu_seqlens):
        state = states[span.states].flatten(0, 1)  # (rows · heads, head_dim, head_dim); all sums go into it in place
        tiles = span.tiles(tensors, chunk_of(span) if causal else TILE_SIZE)
        if not causal:
            for _, key_tile, value_tile, _, rotation, padding in tiles:
                k, v = prepare.states(key_tile, rotation, padding), prepare.values(value_tile, padding)
                state.baddbmm_(k[0].mT, v[0])
        for number, (query_tile, key_tile, value_tile, output_tile, rotation, padding) in enumerate(tiles):
            q = prepare.states(query_tile, rotation)
            if causal:
                if needs_starts and number:
                    start_of(starts, span, number, cu_seqlens).copy_(state)
                k, v = prepare.states(key_tile, rotation, padding), prepare.values(value_tile, padding)
                out = product(product(q, k.mT).tril_(), v)
                goes_on = needs_state or number < len(tiles) - 1
                add_states(out, q, state, k, v, number > 0 or initial_state is not None, goes_on)
            else:
                out = torch.bmm(q[0], state)
            output_tile.copy_(out.view(output_tile.shape))
    return output, states, starts


def is_plain(query, angles, is_real, cu_seqlens, feature_map="identity"):
    """Nothing happens to the tokens before they are multiplied, so that they can be multiplied where they lie."""
    if angles is not None or is_real is not None or cu_seqlens is not None or feature_map != "identity":
        return False
    return query.dtype == compute_dtype(query.dtype) and query.shape[2] >= TILE_SIZE  # shorter rows go together


def chunk_of(span: Span) -> int:
    length = span.end - span.begin
    return length if length <= LONGEST_CHUNK else CHUNK_SIZE


def first_states(query, value, initial_state, cu_seqlens):
    """The states before the first tokens, with one more for the tokens behind the last packed sequence."""
    count = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    states = query.new_zeros(count, query.shape[1], query.shape[3], value.shape[3], dtype=compute_dtype(query.dtype))
    if initial_state is not None:
        states[: initial_state.shape[0]] = initial_state
    return states


def empty_starts(states, query, cu_seqlens, needs_starts):
    """Room for the states in front of tiles, (tiles, rows, heads, head_dim, head_dim): one per 512 tokens, which is
    head_dim / 2048 of inputs and outputs, and one more because the last two tiles may be short. (What is not written
    to takes no memory, and a count that is never 1 lets torch.export take lengths below and above 512 alike.)"""
    count = 0
    if needs_starts:
        count = query.shape[2] // TILE_SIZE + (2 if cu_seqlens is None else cu_seqlens.shape[0] + 1)
    return states.new_empty(count, query.shape[0], *states.shape[1:])


def start_of(starts: torch.Tensor, span: Span, number: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The place for the state in front of tile `number` > 0 of a span."""
    before = 0 if cu_seqlens is None else span.begin // TILE_SIZE + span.states.start
    return starts[before + number - 1, span.rows].flatten(0, 1)


def add_states(
    total: torch.Tensor,
    queries: torch.Tensor,
    state: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    has_begun: bool,
    goes_on: bool,
) -> None:
    """`total` += queries times the state that each chunk meets; `state` moves on in place.

    has_begun: False where the state is zero; goes_on: False where nobody needs it behind this tile.
    """
    if has_begun:
        add_product(total, queries, states_before(state, k, v, goes_on))
    elif len(k) > 1:  # the first chunk meets nothing
        add_product(total[1:], queries[1:], states_before(state, k, v, goes_on)[1:])
    elif goes_on:
        state.baddbmm_(k[0].mT, v[0])


def states_before(
    state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, goes_on: bool, backwards: bool = False
) -> torch.Tensor:
    """The state each chunk of a tile meets, (chunks, rows · heads, head_dim, head_dim); `state` moves on in place."""
    before = state.new_empty(len(k), *state.shape)
    steps = list(zip(before, k.mT, v, strict=True))
    if backwards:
        steps.reverse()
    for number, (state_before, key_chunk, value_chunk) in enumerate(steps, 1):
        state_before.copy_(state)
        if goes_on or number < len(steps):
            state.baddbmm_(key_chunk, value_chunk)
    return before


norm_attention_walk = torch.library.custom_op(
    f"{NAMESPACE}::chunked_norm_attention", walk_norm_attention, mutates_args=()
)


@norm_attention_walk.register_fake
def _(query, key, value, angles, householder, initial_state, is_real, cu_seqlens, *options):
    states = first_states(query, value, None, cu_seqlens)
    return torch.empty_like(value), states, empty_starts(states, query, cu_seqlens, options[-1])


@without_autocast
def walk_norm_attention_back(
    grad_output: torch.Tensor,
    grad_states: torch.Tensor | None,
    states: torch.Tensor,
    starts: torch.Tensor,
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
    needs_initial_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, angles and householder (empty where not needed), and of the first states (left
    unfinished where not needed)."""
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    has_end = grad_states is not None
    if grad_states is None:
        grad_states = torch.zeros_like(states, memory_format=torch.contiguous_format)
    else:
        grad_states = grad_states.clone(memory_format=torch.contiguous_format)
    if not causal and is_plain(query, angles, is_real, cu_seqlens, feature_map):
        rows = (query, key, value, grad_output, *grads, states, grad_states)
        for q, k, v, do, dq, dk, dv, state, grad_state in zip(*rows, strict=True):
            grad_state.baddbmm_(q.mT, do)
            torch.bmm(do, state.mT, out=dq)
            torch.bmm(v, grad_state.mT, out=dk)
            torch.bmm(k, grad_state, out=dv)
        return grads[0], grads[1], grads[2], query.new_empty(0), query.new_empty(0), grad_states
    rotation = rotation_table(angles)
    grad_rotation = torch.zeros_like(rotation) if needs_angles else None
    grad_householder = torch.zeros_like(householder) if needs_householder else None
    prepare = Preparation(compute_dtype(query.dtype), feature_map, householder, grad_householder)
    if causal:
        states = first_states(query, value, initial_state, cu_seqlens)
    tensors = (query, key, value, grad_output, *grads, rotation, grad_rotation, padding_of(is_real))
    for span in spans_of(query, cu_seqlens):
        state, grad_state = states[span.states].flatten(0, 1), grad_states[span.states].flatten(0, 1)
        if causal:
            tiles = span.tiles(tensors, chunk_of(span))
            for number in reversed(range(len(tiles))):
                before = start_of(starts, span, number, cu_seqlens).clone() if number else state
                has_begun, goes_on = number > 0 or initial_state is not None, number > 0 or needs_initial_state
                has_grad = has_end or number < len(tiles) - 1
                scan_back(prepare, tiles[number], before, grad_state, has_begun, has_grad, goes_on)
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


def scan_back(prepare, tile, state, grad_state, has_begun, has_grad, goes_on):
    """Causal, one tile, on the way from the last to the first: dQ needs the state before each token, dK and dV the
    gradient of the states behind it.

    The state in front of the tile was kept by the forward walk: to take k^T v off the last state would lose digits.
    has_begun and has_grad: False where the state in front and the gradient behind are zero; goes_on: as in
    `add_states`, for the gradient.
    """
    query_tile, key_tile, value_tile, grad_tile, grad_query, grad_key, grad_value, rotation, grad_rotation, padding = (
        tile
    )
    mapped_query, q = prepare.states_twice(query_tile, rotation)
    mapped_key, k = prepare.states_twice(key_tile, rotation, padding)
    v, do = prepare.values(value_tile, padding), prepare.values(grad_tile)
    dv = product(product(q, k.mT).tril_().mT, do)
    grad_scores = product(do, v.mT).tril_()  # (chunks, rows · heads, chunk, chunk)
    dq, dk = product(grad_scores, k), product(grad_scores.mT, q)
    if has_begun or len(k) > 1:
        add_product(dq, do, states_before(state, k, v, goes_on=False).mT)
    if has_grad or len(k) > 1:
        grad_states = states_before(grad_state, q, do, goes_on, backwards=True)
        add_product(dk, v, grad_states.mT)
        add_product(dv, k, grad_states)
    elif goes_on:
        grad_state.baddbmm_(q[0].mT, do[0])
    prepare.backward(dq, mapped_query, q, rotation, grad_rotation, into=grad_query)
    prepare.backward(dk, mapped_key, k, rotation, grad_rotation, into=grad_key)
    grad_value.copy_(dv.view(grad_value.shape))


norm_attention_walk_back = torch.library.custom_op(
    f"{NAMESPACE}::chunked_norm_attention_backward", walk_norm_attention_back, mutates_args=()
)


@norm_attention_walk_back.register_fake
def _(grad_output, grad_states, states, starts, query, key, value, angles, householder, *args):
    *_, needs_angles, needs_householder, _ = args
    return (
        *(torch.empty_like(tensor) for tensor in (query, key, value)),
        torch.empty_like(angles) if needs_angles else query.new_empty(0),
        torch.empty_like(householder) if needs_householder else query.new_empty(0),
        torch.empty_like(states, memory_format=torch.contiguous_format),
    )


def _save_norm_attention(ctx, inputs, output):
    *tensors, ctx.causal, ctx.feature_map, _, _ = inputs
    _, states, starts = output
    ctx.save_for_backward(states, starts, *tensors)
    ctx.set_materialize_grads(False)


def _norm_attention_backward(ctx, grad_output, grad_states, _grad_starts):
    needed = ctx.needs_input_grad[3:6]
    saved = ctx.saved_tensors  # asked for once: a checkpoint gives its tensors out once
    query, value, initial_state = saved[2], saved[4], saved[7]
    if grad_output is None:
        grad_output = torch.zeros_like(value)
    walk_back = norm_attention_walk_back if is_traced(query) else walk_norm_attention_back
    *grads, grad_angles, grad_householder, grad_states = walk_back(
        grad_output, grad_states, *saved, ctx.causal, ctx.feature_map, *needed
    )
    needs_angles, needs_householder, needs_initial_state = needed
    return (
        *grads,
        grad_angles if needs_angles else None,
        grad_householder if needs_householder else None,
        grad_states[: initial_state.shape[0]].to(initial_state.dtype) if needs_initial_state else None,
        *repeat(None, 6),
    )


norm_attention_walk.register_autograd(_norm_attention_backward, setup_context=_save_norm_attention)


class NormAttention(torch.autograd.Function):
    forward = staticmethod(walk_norm_attention)
    setup_context = staticmethod(_save_norm_attention)
    backward = staticmethod(once_differentiable(_norm_attention_backward))  # type: ignore[assignment]


def grads_or_empty(grad_rotation, grad_householder, query):
    """An operator has no optional results. The gradient of an angle is Im(conj(z) dz) of the number z it turned."""
    return (
        query.new_empty(0) if grad_rotation is None else grad_rotation.imag.contiguous(),
        query.new_empty(0) if grad_householder is None else grad_householder,
    )


@without_autocast
def walk_diag_attention(
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
    output, table, padding = torch.empty_like(value), rotation_table(angles), padding_of(is_real)
    if kept is None and is_plain(query, angles, is_real, cu_seqlens) and begins_a_block(positions, block_size):
        for q, k, v, out in blocks_of_heads((query, key, value, output), block_size):
            torch.bmm(weigh.forward(q, k, None).squeeze(1), v.squeeze(1), out=out.squeeze(1))
        return output
    if must_align(positions, cu_seqlens):
        to_blocks = Alignment.of(positions, block_size)
        tensors = tuple(to_blocks.align(tensor) for tensor in (query, key, value, output, kept))
        spans = spans_of(tensors[0], None)
        tensors = (*tensors, to_blocks.align_padding(padding))
    else:
        tensors = (query, key, value, output, kept, padding)
        spans = spans_of(query, cu_seqlens, positions, block_size)
    for span in spans:
        for query_tile, key_tile, value_tile, output_tile, keep, padding in span.tiles(tensors, block_size):
            rotation = None if table is None else table[: query_tile.shape[3]]
            q, k = prepare.states(query_tile, rotation), prepare.states(key_tile, rotation, padding)
            weights = weigh.dropped(weigh.forward(q, k, padding), keep)
            out = product(weights, prepare.values(value_tile, padding))
            output_tile.copy_(out.view(output_tile.shape))
    if must_align(positions, cu_seqlens):
        output.copy_(to_blocks.restore(tensors[3]))
    return output


class Weights(NamedTuple):
    """The map of DiagAttention in tiles, (chunks, rows · heads, block, block), in place."""

    causal: bool
    activation: str
    scale: float
    dropout_p: float

    def forward(self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        seen = None if padding is None else (~padding.mT).to(q.dtype)  # (chunks, rows, 1, 1, block)
        if self.causal:
            earlier = q.new_ones(q.shape[2], q.shape[2]).tril_()
            seen = earlier if seen is None else seen * earlier
        if seen is None or self.activation == "relu":
            weights = product(q, k.mT, self.scale)
        else:  # the scores are added to what hides them
            weights = q.new_empty(*q.shape[:3], k.shape[2])
            self.by_rows(weights, padding).copy_((1 - seen) * torch.finfo(q.dtype).min)
            add_product(weights, q, k.mT, self.scale)
        if self.activation == "relu":
            weights.relu_()
        else:
            torch.softmax(weights, -1, out=weights)
        if seen is not None and (self.activation == "relu" or padding is not None):
            self.by_rows(weights, padding).mul_(seen)  # a row without a key is zero
        return weights

    def by_rows(self, weights: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        return weights if padding is None else weights.unflatten(1, (padding.shape[1], -1))

    def dropped(self, weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is None:
            return weights
        kept = kept[..., : weights.shape[-1]].to(weights.dtype).flatten(1, 2)
        return weights * kept.div_(max(1 - self.dropout_p, torch.finfo(weights.dtype).tiny))  # nothing is kept at 1

    def backward(self, grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu":
            return grad.mul_(weights.sign())
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)


diag_attention_walk = torch.library.custom_op(
    f"{NAMESPACE}::chunked_diag_attention", walk_diag_attention, mutates_args=()
)


@diag_attention_walk.register_fake
def _(query, key, value, *args):
    return torch.empty_like(value)


@without_autocast
def walk_diag_attention_back(
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
    padding = padding_of(is_real)
    if must_align(positions, cu_seqlens):
        to_blocks = Alignment.of(positions, block_size)
        tensors = tuple(to_blocks.align(tensor) for tensor in (query, key, value, grad_output, *grads, kept))
        spans = spans_of(tensors[0], None)
        tensors = (*tensors, to_blocks.align_padding(padding))
    else:
        tensors = (query, key, value, grad_output, *grads, kept, padding)
        spans = spans_of(query, cu_seqlens, positions, block_size)
    for span in spans:
        for tile in span.tiles(tensors, block_size):
            query_tile, key_tile, value_tile, grad_tile, grad_query, grad_key, grad_value, keep, padding = tile
            rotation, grad_rotation = (None if t is None else t[: query_tile.shape[3]] for t in (table, grad_table))
            mapped_query, q = prepare.states_twice(query_tile, rotation)
            mapped_key, k = prepare.states_twice(key_tile, rotation, padding)
            v, do = prepare.values(value_tile, padding), prepare.values(grad_tile)
            weights = weigh.forward(q, k, padding)
            dv = product(weigh.dropped(weights, keep).mT, do)
            grad_scores = weigh.backward(weigh.dropped(product(do, v.mT), keep), weights)
            dq, dk = product(grad_scores, k, scale), product(grad_scores.mT, q, scale)
            prepare.backward(dq, mapped_query, q, rotation, grad_rotation, into=grad_query)
            prepare.backward(dk, mapped_key, k, rotation, grad_rotation, into=grad_key)
            grad_value.copy_(dv.view(grad_value.shape))
    if must_align(positions, cu_seqlens):
        for grad, aligned in zip(grads, tensors[4:7], strict=True):
            grad.copy_(to_blocks.restore(aligned))
    return *grads, *grads_or_empty(grad_table, grad_householder, query)


diag_attention_walk_back = torch.library.custom_op(
    f"{NAMESPACE}::chunked_diag_attention_backward", walk_diag_attention_back, mutates_args=()
)


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
    walk_back = diag_attention_walk_back if is_traced(grad_output) else walk_diag_attention_back
    *grads, grad_angles, grad_householder = walk_back(
        grad_output, *ctx.saved_tensors, *ctx.options, needs_angles, needs_householder
    )
    return (
        *grads,
        grad_angles if needs_angles else None,
        grad_householder if needs_householder else None,
        *repeat(None, 9),
    )


diag_attention_walk.register_autograd(_diag_attention_backward, setup_context=_save_diag_attention)


class DiagAttention(torch.autograd.Function):
    forward = staticmethod(walk_diag_attention)
    setup_context = staticmethod(_save_diag_attention)
    backward = staticmethod(once_differentiable(_diag_attention_backward))  # type: ignore[assignment]
