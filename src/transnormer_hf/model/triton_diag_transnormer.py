"""DiagAttention by Triton kernels: one forward, one backward, and their place in torch.

With s = scale · q k^T inside a block, visible keys only, the kernels compute

    softmax:  P = softmax(s)     relu:  P = max(s, 0)        O = (P ∘ D) V

(D: dropout, 0 or 1 / (1 - p)) and in the backward pass, with P computed again,

    dV = (P ∘ D)^T dO,   dP = D ∘ (dO V^T),   dS = P ∘ (dP - rowsum(P ∘ dP))  or  dS = [s > 0] ∘ dP,
    dQ = scale · dS K,   dK = scale · dS^T Q,

where Q and K carry LRPE, whose gradient goes on to q, k and theta.

A program owns one tile: up to TILE consecutive tokens of a head, a whole number of blocks. The scores never leave the
chip: the forward pass reads q, k, v and writes o, the backward pass reads q, k, v, dO and writes dQ, dK, dV. Channels
are read CHUNK at a time, and read again (from the cache) when needed again, because registers are scarce.

Blocks start where a sequence starts. Only the device knows where that is: every program finds its tokens from the
position of the first one, or from cu_seqlens.

Blocks larger than a tile go to torch's `scaled_dot_product_attention` (softmax) or are refused (relu). The definition
that all of this must equal is `eager_diag_attention` in `reference_transnormer.py`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .reference_transnormer import apply_lrpe, zero_padding
from .triton_common_transnormer import (
    ELEMENT_TYPES,
    STRIDE_UNIT,
    Differentiable,
    angle_gradient,
    contiguous,
    dot_constants,
    head_of,
    is_interpreted,
    launch,
    load_lrpe,
    load_tile,
    new_empty,
    new_token_major,
    rotate,
    rotation_at,
    row_stride,
    store_tile,
    target_of,
    tl,
    token_major,
    triton,
)

MAX_BLOCK_SIZE = 64  # tokens of a tile
SEQUENCES_AT_ONCE = tl.constexpr(64)
# Integers that differ from call to call: a new value must not make Triton compile anew.
UNSPECIALIZED = ["query_row_stride", "positions_stride", "seq_len", "num_sequences", "tiles_per_row", "block_size"]


# Where a program's tokens are


@triton.jit
def find_tile(
    positions_ptr, positions_stride, is_real_ptr, cu_seqlens_ptr, num_heads, seq_len, num_sequences, tiles_per_row,
    block_size, TILE: tl.constexpr,
):  # fmt: skip
    """The batch row, the head and the first token of this program's tile, and which of its TILE tokens exist.

    Returns batch, head, first (int64), q_mask and kv_mask, (TILE,) each. The first token may lie before the sequence if
    its block began in an earlier call or in padding. The grid has a few tiles too many; their `first` is >= seq_len.
    """
    program = tl.program_id(0)
    head = program % num_heads  # fastest, so that neighbouring programs read neighbouring memory
    tile = program // num_heads % tiles_per_row
    batch = program // num_heads // tiles_per_row
    positions_ptr += batch.to(tl.int64) * positions_stride
    tokens = TILE // block_size * block_size  # of a tile
    if cu_seqlens_ptr is not None:
        first = tl.full((), 0, tl.int64) + seq_len
        begin = first
        end = first
        tiles_before = tl.full((), 0, tl.int32)
        sequence = tl.full((), 0, tl.int32)
        # Tokens behind the last boundary form a sequence of their own.
        while (sequence <= num_sequences) & (tiles_before <= tile):
            candidates = sequence + tl.arange(0, SEQUENCES_AT_ONCE)
            begins = tl.load(cu_seqlens_ptr + candidates, mask=candidates <= num_sequences, other=seq_len).to(tl.int64)
            ends = tl.load(cu_seqlens_ptr + candidates + 1, mask=candidates < num_sequences, other=seq_len).to(tl.int64)
            begun = tl.load(positions_ptr + begins, mask=begins < ends, other=0) % block_size
            tiles = tl.where(begins < ends, (ends - begins + begun + tokens - 1) // tokens, 0).to(tl.int32)
            tiles_after = tiles_before + tl.cumsum(tiles, 0)
            is_mine = (tile < tiles_after) & (tile >= tiles_after - tiles)  # of one sequence at most
            firsts = begins - begun + (tile - tiles_after + tiles) * tokens.to(tl.int64)
            first += tl.sum(tl.where(is_mine, firsts - seq_len, 0), 0)
            begin += tl.sum(tl.where(is_mine, begins - seq_len, 0), 0)
            end += tl.sum(tl.where(is_mine, ends - seq_len, 0), 0)
            tiles_before += tl.sum(tiles, 0)
            sequence += SEQUENCES_AT_ONCE
    else:
        # positions are negative on leading padding, and % of a negative number has its sign
        begun = tl.load(positions_ptr).to(tl.int64) % block_size
        first = tile.to(tl.int64) * tokens - tl.where(begun < 0, begun + block_size, begun)
        begin = tl.full((), 0, tl.int64)
        end = tl.full((), 0, tl.int64) + seq_len
    # 32-bit within the tile: 64-bit integers would cost the registers that the backward pass lacks
    places = tl.arange(0, TILE)
    q_mask = (places >= (begin - first).to(tl.int32)) & (places < tl.minimum(end - first, tokens).to(tl.int32))
    kv_mask = q_mask
    if is_real_ptr is not None:
        is_real = tl.load(is_real_ptr + (batch.to(tl.int64) * seq_len + first) + places, mask=q_mask, other=0)
        kv_mask = is_real != 0
    return batch, head, first, q_mask, kv_mask


# LRPE, CHUNK channels at a time


@triton.jit
def rotation_of_chunk(
    theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """cos and sin, (TILE, CHUNK / 2), and sqrt(2) v, (1, CHUNK), of a chunk. Positions restart in every block."""
    high, low, householder = load_lrpe(theta_ptr + chunk // 2, householder_ptr + chunk, HEAD_DIM - chunk, CHUNK)
    positions = tl.arange(0, TILE) % block_size
    cos, sin = rotation_at(positions[:, None], high[None, :], low[None, :])
    return cos, sin, householder[None, :]


@triton.jit
def project(
    head_ptr, first, mask, row_stride, householder_ptr, theta_ptr,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x · sqrt(2) v of each row over all chunks, (TILE,): the reflection needs it before it sees the first chunk."""
    projection = tl.zeros((TILE,), tl.float32)
    if theta_ptr is not None:
        for chunk in range(0, HEAD_DIM, CHUNK):
            tile = load_tile(head_ptr + chunk, first, mask, row_stride, HEAD_DIM - chunk, TILE, CHUNK).to(tl.float32)
            _, _, householder = load_lrpe(theta_ptr + chunk // 2, householder_ptr + chunk, HEAD_DIM - chunk, CHUNK)
            projection += tl.sum(tile * householder[None, :], 1)
    return projection


@triton.jit
def load_rotated(
    head_ptr, first, mask, row_stride, projection, theta_ptr, householder_ptr, block_size, chunk,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of queries or keys with LRPE, (TILE, CHUNK)."""
    tile = load_tile(head_ptr + chunk, first, mask, row_stride, HEAD_DIM - chunk, TILE, CHUNK)
    if theta_ptr is not None:
        cos, sin, householder = rotation_of_chunk(theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM, TILE, CHUNK)
        tile = rotate(tile.to(tl.float32) - projection[:, None] * householder, cos, sin, TILE, CHUNK)
    return tile.to(DOT)


@triton.jit
def store_gradient(
    grad_ptr, grad, rotated, first, mask, row_stride, projection, theta_ptr, householder_ptr, block_size, chunk,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store a chunk of dQ or dK, given the gradient after LRPE; returns its part of theta's gradient, (CHUNK / 2,).

    rotated: Q or K after LRPE; angle = position · theta.
    """
    grad_theta = tl.zeros((CHUNK // 2,), tl.float32)
    if theta_ptr is not None:
        positions = (tl.arange(0, TILE) % block_size).to(tl.float32)
        grad_theta = tl.sum(angle_gradient(grad, rotated.to(tl.float32), TILE, CHUNK) * positions[:, None], 0)
        cos, sin, householder = rotation_of_chunk(theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM, TILE, CHUNK)
        grad = rotate(grad, cos, -sin, TILE, CHUNK) - projection[:, None] * householder
    store_tile(grad_ptr + chunk, grad, first, mask, row_stride, HEAD_DIM - chunk, TILE, CHUNK)
    return grad_theta


# The map


@triton.jit
def mark_dropped(weights, seed_ptr, row_and_head, columns, dropout_p, TILE: tl.constexpr):
    """The map, >= 0, with a minus sign on what dropout drops: (TILE, TILE) float32.

    The random bits of an entry come from a counter made of the head, the column of the query and the index of the key
    in the tile, so that the backward pass draws the same ones. One draw serves four keys.
    """
    zeros = tl.zeros((TILE, TILE // 4), tl.int32)
    groups = tl.arange(0, TILE // 4)[None, :] + zeros
    queries = columns.to(tl.int32)[:, None] + zeros
    heads = row_and_head.to(tl.int32) + zeros
    bits_0, bits_1, bits_2, bits_3 = tl.philox(tl.load(seed_ptr), groups, queries, heads, zeros)
    bits = tl.join(tl.join(bits_0, bits_2), tl.join(bits_1, bits_3))  # (TILE, TILE / 4, 2, 2)
    uniform = (tl.reshape(bits, (TILE, TILE)) >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))  # exact, in [0, 1)
    return tl.where(uniform >= dropout_p, weights, -weights)


@triton.jit
def keep_scale(dropout_p):
    """1 / (1 - p), finite at p = 1, where nothing is kept."""
    return 1.0 / tl.maximum(1.0 - dropout_p, 1e-8)


@triton.jit
def attention_map(
    query_head, key_head, first, q_mask, kv_mask, row_stride,
    theta_ptr, householder_ptr, seed_ptr, row_and_head, scale, dropout_p, block_size,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """P of a tile, with a minus sign on what dropout drops: (TILE, TILE) float32. Zeros in a row that sees no key.

    Also the projections of q and k on the reflection's vector, which the backward pass needs again: (TILE,) each.
    """
    query_projection = project(query_head, first, q_mask, row_stride, householder_ptr, theta_ptr, HEAD_DIM, TILE, CHUNK)
    key_projection = project(key_head, first, kv_mask, row_stride, householder_ptr, theta_ptr, HEAD_DIM, TILE, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, HEAD_DIM, CHUNK):
        query = load_rotated(
            query_head, first, q_mask, row_stride, query_projection, theta_ptr, householder_ptr, block_size, chunk,
            HEAD_DIM, TILE, CHUNK, DOT,
        )  # fmt: skip
        key = load_rotated(
            key_head, first, kv_mask, row_stride, key_projection, theta_ptr, householder_ptr, block_size, chunk,
            HEAD_DIM, TILE, CHUNK, DOT,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    scores *= scale
    places = tl.arange(0, TILE)
    visible = kv_mask[None, :] & (places[:, None] // block_size == places[None, :] // block_size)
    if CAUSAL:
        visible &= places[:, None] >= places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.max(scores, 1)
        weights = tl.exp(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
        total = tl.sum(weights, 1)
        weights *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if seed_ptr is not None:
        weights = mark_dropped(weights, seed_ptr, row_and_head, first + places, dropout_p, TILE)
    return weights, query_projection, key_projection


@triton.jit
def query_key_gradients(
    grad_scores, grad_scores_t, query_head, key_head, query_projection, key_projection,
    first, q_mask, kv_mask, row_stride, theta_ptr, householder_ptr, block_size, chunk,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk of Q and K after LRPE, and of dQ = dS K and dK = dS^T Q, before LRPE's gradient: (TILE, CHUNK) each."""
    query = load_rotated(
        query_head, first, q_mask, row_stride, query_projection, theta_ptr, householder_ptr, block_size, chunk,
        HEAD_DIM, TILE, CHUNK, DOT,
    )  # fmt: skip
    key = load_rotated(
        key_head, first, kv_mask, row_stride, key_projection, theta_ptr, householder_ptr, block_size, chunk,
        HEAD_DIM, TILE, CHUNK, DOT,
    )  # fmt: skip
    query_grad = tl.dot(grad_scores, key.to(grad_scores.dtype), input_precision=PRECISION)
    key_grad = tl.dot(grad_scores_t, query.to(grad_scores.dtype), input_precision=PRECISION)
    return query, key, query_grad, key_grad


# The kernels


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_forward_kernel(
    query_ptr, key_ptr, value_ptr, query_row_stride,  # token-major, one stride for all three
    output_ptr,  # contiguous (batch, seq, heads, head_dim)
    theta_ptr, householder_ptr,  # (head_dim / 2,), (head_dim,)
    positions_ptr, positions_stride,  # (batch, seq), or (seq,) with stride 0
    is_real_ptr,  # (batch, seq)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    seed_ptr,  # (1,)
    scale, dropout_p, num_heads, seq_len, num_sequences, tiles_per_row, block_size,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program per tile and head: reads q, k, v, writes o."""
    MAP: tl.constexpr = WIDE if RELU else DOT  # scores of relu may outgrow float16, probabilities do not
    batch, head, first, q_mask, kv_mask = find_tile(
        positions_ptr, positions_stride, is_real_ptr, cu_seqlens_ptr,
        num_heads, seq_len, num_sequences, tiles_per_row, block_size, TILE,
    )  # fmt: skip
    if first >= seq_len:
        return
    query_head = head_of(query_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    key_head = head_of(key_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    value_head = head_of(value_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    output_row_stride = num_heads * HEAD_DIM // STRIDE_UNIT
    output_head = head_of(output_ptr, batch, head, seq_len, output_row_stride, HEAD_DIM)
    weights, _, _ = attention_map(
        query_head, key_head, first, q_mask, kv_mask, query_row_stride,
        theta_ptr, householder_ptr, seed_ptr, batch.to(tl.int64) * num_heads + head, scale, dropout_p, block_size,
        HEAD_DIM, TILE, CHUNK, DOT, PRECISION, CAUSAL, RELU,
    )  # fmt: skip
    if seed_ptr is not None:
        weights = tl.maximum(weights, 0.0) * keep_scale(dropout_p)
    weights = weights.to(MAP)
    for chunk in range(0, HEAD_DIM, CHUNK):
        value = load_tile(value_head + chunk, first, kv_mask, query_row_stride, HEAD_DIM - chunk, TILE, CHUNK)
        output = tl.dot(weights, value.to(MAP), input_precision=PRECISION)
        store_tile(output_head + chunk, output, first, q_mask, output_row_stride, HEAD_DIM - chunk, TILE, CHUNK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_backward_kernel(
    query_ptr, key_ptr, value_ptr, query_row_stride,
    grad_ptr,  # of the output; this and the next three are contiguous (batch, seq, heads, head_dim)
    query_grad_ptr, key_grad_ptr, value_grad_ptr,
    theta_grad_ptr,  # (programs, head_dim / 2) float32, to be summed
    theta_ptr, householder_ptr,
    positions_ptr, positions_stride, is_real_ptr, cu_seqlens_ptr, seed_ptr,
    scale, dropout_p, num_heads, seq_len, num_sequences, tiles_per_row, block_size,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The same tile once more: reads q, k, v, dO, writes dQ, dK, dV and this tile's part of theta's gradient."""
    MAP: tl.constexpr = WIDE if RELU else DOT
    batch, head, first, q_mask, kv_mask = find_tile(
        positions_ptr, positions_stride, is_real_ptr, cu_seqlens_ptr,
        num_heads, seq_len, num_sequences, tiles_per_row, block_size, TILE,
    )  # fmt: skip
    pairs = tl.arange(0, CHUNK // 2)
    if theta_grad_ptr is not None:
        theta_grad_ptr += tl.program_id(0).to(tl.int64) * (HEAD_DIM // 2)
    if first >= seq_len:
        if theta_grad_ptr is not None:
            for chunk in range(0, HEAD_DIM // 2, CHUNK // 2):
                tl.store(theta_grad_ptr + chunk + pairs, 0.0, mask=chunk + pairs < HEAD_DIM // 2)
        return
    query_head = head_of(query_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    key_head = head_of(key_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    value_head = head_of(value_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    grad_row_stride = num_heads * HEAD_DIM // STRIDE_UNIT
    grad_head = head_of(grad_ptr, batch, head, seq_len, grad_row_stride, HEAD_DIM)
    query_grad_head = head_of(query_grad_ptr, batch, head, seq_len, grad_row_stride, HEAD_DIM)
    key_grad_head = head_of(key_grad_ptr, batch, head, seq_len, grad_row_stride, HEAD_DIM)
    value_grad_head = head_of(value_grad_ptr, batch, head, seq_len, grad_row_stride, HEAD_DIM)
    weights, query_projection, key_projection = attention_map(
        query_head, key_head, first, q_mask, kv_mask, query_row_stride,
        theta_ptr, householder_ptr, seed_ptr, batch.to(tl.int64) * num_heads + head, scale, dropout_p, block_size,
        HEAD_DIM, TILE, CHUNK, DOT, PRECISION, CAUSAL, RELU,
    )  # fmt: skip

    dropped = weights
    if seed_ptr is not None:
        dropped = tl.maximum(weights, 0.0) * keep_scale(dropout_p)
    dropped = tl.trans(dropped.to(MAP))
    grad_weights = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, HEAD_DIM, CHUNK):
        grad = load_tile(grad_head + chunk, first, q_mask, grad_row_stride, HEAD_DIM - chunk, TILE, CHUNK)
        value = load_tile(value_head + chunk, first, kv_mask, query_row_stride, HEAD_DIM - chunk, TILE, CHUNK)
        value_grad = tl.dot(dropped, grad.to(MAP), input_precision=PRECISION)
        store_tile(value_grad_head + chunk, value_grad, first, q_mask, grad_row_stride, HEAD_DIM - chunk, TILE, CHUNK)
        value = tl.trans(value.to(DOT))
        grad_weights = tl.dot(grad.to(DOT), value, grad_weights, input_precision=PRECISION)
    if seed_ptr is not None:
        grad_weights = tl.where(weights > 0.0, grad_weights * keep_scale(dropout_p), 0.0)
        weights = tl.abs(weights)
    if RELU:
        grad_scores = tl.where(weights > 0.0, grad_weights, 0.0)
    else:
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
    grad_scores = (grad_scores * scale).to(MAP)
    grad_scores_t = tl.trans(grad_scores)

    # The first pass over dQ and dK is for their projections only; the reflection needs these before the second stores.
    query_grad_projection = tl.zeros((TILE,), tl.float32)
    key_grad_projection = tl.zeros((TILE,), tl.float32)
    if theta_ptr is not None:
        for chunk in range(0, HEAD_DIM, CHUNK):
            query, key, query_grad, key_grad = query_key_gradients(
                grad_scores, grad_scores_t, query_head, key_head, query_projection, key_projection,
                first, q_mask, kv_mask, query_row_stride, theta_ptr, householder_ptr, block_size, chunk,
                HEAD_DIM, TILE, CHUNK, DOT, PRECISION,
            )  # fmt: skip
            cos, sin, householder = rotation_of_chunk(
                theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM, TILE, CHUNK
            )
            query_grad_projection += tl.sum(rotate(query_grad, cos, -sin, TILE, CHUNK) * householder, 1)
            key_grad_projection += tl.sum(rotate(key_grad, cos, -sin, TILE, CHUNK) * householder, 1)
    for chunk in range(0, HEAD_DIM, CHUNK):
        query, key, query_grad, key_grad = query_key_gradients(
            grad_scores, grad_scores_t, query_head, key_head, query_projection, key_projection,
            first, q_mask, kv_mask, query_row_stride, theta_ptr, householder_ptr, block_size, chunk,
            HEAD_DIM, TILE, CHUNK, DOT, PRECISION,
        )  # fmt: skip
        theta_grad = store_gradient(
            query_grad_head, query_grad, query, first, q_mask, grad_row_stride, query_grad_projection,
            theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM, TILE, CHUNK,
        )  # fmt: skip
        theta_grad += store_gradient(
            key_grad_head, key_grad, key, first, q_mask, grad_row_stride, key_grad_projection,
            theta_ptr, householder_ptr, block_size, chunk, HEAD_DIM, TILE, CHUNK,
        )  # fmt: skip
        if theta_grad_ptr is not None:
            tl.store(theta_grad_ptr + chunk // 2 + pairs, theta_grad, mask=chunk // 2 + pairs < HEAD_DIM // 2)


# As torch sees it


class DiagInputs(NamedTuple):
    """What the operator takes; torch makes its schema of these types."""

    query: torch.Tensor  # (batch, heads, seq, head_dim), like key and value
    key: torch.Tensor
    value: torch.Tensor
    theta: torch.Tensor | None  # (head_dim / 2,)
    householder: torch.Tensor | None  # (head_dim,)
    positions: torch.Tensor  # (seq,) or (batch, seq)
    is_real: torch.Tensor | None  # (batch, seq)
    cu_seqlens: torch.Tensor | None  # (num_sequences + 1,)
    seed: torch.Tensor | None  # of dropout, (1,)
    block_size: int
    causal: bool
    activation: str
    scale: float
    dropout_p: float


def triton_diag_attention(query, key, value, *, metadata, block_size, causal, activation, scale, lrpe, dropout_p):
    """DiagAttention by the kernels; arguments and result as `eager_diag_attention`.

    LRPE is applied inside the kernels, with gradients to theta. If the householder vector needs a gradient too, plain
    torch applies it first. Dropout draws one number per call from torch's generator, on the device.

    Softmax in blocks of more than 64 tokens is not done by the kernels but by `folded_diag_attention`.

    Raises ValueError for relu in larger blocks, and for values of another width. What else the kernels do not take,
    `unsupported` tells before.
    """
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"value has head_dim={value.shape[-1]} and query head_dim={query.shape[-1]}; the Triton kernels of "
            'DiagAttention need one head_dim. Use backend="auto" or "torch".'
        )
    if block_size > MAX_BLOCK_SIZE and activation == "relu":
        raise ValueError(
            f'block_size={block_size}: with activation="relu" the Triton kernels take blocks of up to '
            f'{MAX_BLOCK_SIZE} tokens. Use backend="auto" or "torch" for larger ones.'
        )
    needs_householder = lrpe is not None and lrpe.householder.requires_grad and torch.is_grad_enabled()
    if lrpe is not None and (needs_householder or block_size > MAX_BLOCK_SIZE):
        within_block = metadata.positions % block_size
        query, key = (apply_lrpe(states.float(), within_block, lrpe).to(value.dtype) for states in (query, key))
        lrpe = None
    if block_size > MAX_BLOCK_SIZE:
        return folded_diag_attention(query, key, value, metadata, block_size, causal, scale, dropout_p)
    theta, householder = (None, None) if lrpe is None else lrpe
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p > 0 else None
    tensors = (query, key, value, theta, householder, metadata.positions, metadata.is_real, metadata.cu_seqlens, seed)
    return _diag_attention(*tensors, block_size, causal, activation, scale, dropout_p)


def folded_diag_attention(query, key, value, metadata, block_size, causal, scale, dropout_p):
    """Softmax in blocks, each folded into a row of a larger batch, by torch's `scaled_dot_product_attention`.

    Where blocks begin is known on the device only, so there is room for as many as these sequences can have at most,
    and a mask for the room that is left. Arguments as `eager_diag_attention`; query and key have LRPE already.
    """
    batch_size, num_heads, seq_len, head_dim = query.shape
    if 0 in query.shape:
        return query + key + value  # empty as well, and all three get gradients
    blocks = metadata.positions.div(block_size, rounding_mode="floor")
    begins = blocks[..., 1:] != blocks[..., :-1]
    count, width = triton.cdiv(seq_len + block_size - 1, block_size), min(block_size, seq_len)
    if metadata.cu_seqlens is not None:
        begins = begins | (metadata.sequence_ids[1:] != metadata.sequence_ids[:-1])
        count = seq_len // block_size + 2 * metadata.cu_seqlens.shape[0]
    begins = F.pad(begins.long(), (1, 0), value=1).expand(batch_size, seq_len)
    columns = torch.arange(seq_len, device=query.device)
    slots = (begins.cumsum(1) - 1) * width + columns - (columns * begins).cummax(1).values  # (batch, seq)

    def fold(tensor: torch.Tensor) -> torch.Tensor:
        """(batch, seq, ...) to (batch · blocks, width, ...), zeros where there is no token."""
        folded = tensor.new_zeros(batch_size, count * width, *tensor.shape[2:])
        index = slots.view(batch_size, seq_len, *(1,) * (tensor.dim() - 2)).expand(tensor.shape)
        return folded.scatter(1, index, tensor).view(-1, width, *tensor.shape[2:])

    is_key = torch.ones_like(slots, dtype=torch.bool) if metadata.is_real is None else metadata.is_real
    visible = fold(is_key)[:, None, None, :]  # (batch · blocks, 1, 1, width)
    if causal:
        visible = visible & torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    sees_no_key = ~visible.any(-1, keepdim=True)
    padded = (query, zero_padding(key, metadata), zero_padding(value, metadata))
    folded = (fold(tensor.transpose(1, 2)).transpose(1, 2) for tensor in padded)
    visible = visible | sees_no_key  # a row without any key must become zeros and not NaN
    output = F.scaled_dot_product_attention(*folded, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    output = output.masked_fill(sees_no_key, 0).transpose(1, 2).reshape(batch_size, count * width, num_heads, head_dim)
    return output.gather(1, slots[:, :, None, None].expand(-1, -1, num_heads, head_dim)).transpose(1, 2)


def diag_attention_forward(inputs: DiagInputs) -> torch.Tensor:
    """The output, token-major."""
    output = new_token_major(inputs.query)
    _launch(diag_forward_kernel, inputs, {"output": output})
    return output


def diag_attention_backward(needs_theta: bool, grad: torch.Tensor, inputs: DiagInputs) -> list[torch.Tensor]:
    """Gradients of query, key, value and theta (of length 0 unless needs_theta)."""
    query, theta = inputs.query, inputs.theta
    grads = {f"{name}_grad": new_token_major(query) for name in ("query", "key", "value")}
    parts, theta_grad = None, new_empty((0,), query, torch.float32)
    if needs_theta:
        # Each program writes its part into a row of its own: the sum has one order, and no atomics.
        programs = query.shape[0] * query.shape[1] * count_tiles(query.shape[2], inputs.block_size, inputs.cu_seqlens)
        parts = new_empty((programs, theta.shape[0]), query, torch.float32)
    _launch(diag_backward_kernel, inputs, {"grad": _without_gaps(token_major(grad)), **grads, "theta_grad": parts})
    if needs_theta:
        theta_grad = parts.sum(0).to(theta.dtype)
    return [*grads.values(), theta_grad]


def _empty_output(inputs: DiagInputs) -> torch.Tensor:
    return new_token_major(inputs.query)


def _empty_grads(needs_theta, grad, inputs: DiagInputs) -> list[torch.Tensor]:
    theta_grad = torch.empty_like(inputs.theta) if needs_theta else new_empty((0,), grad, torch.float32)
    return [*(new_token_major(inputs.query) for _ in range(3)), theta_grad]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _gradients(ctx, run_backward, grad):
    needs_theta = ctx.needs_input_grad[3]
    *grads, theta_grad = run_backward(needs_theta, grad, *ctx.saved_tensors, *ctx.options)
    return *grads, theta_grad if needs_theta else None, *(None,) * 10


_diag_attention = Differentiable(
    "diag_attention", diag_attention_forward, _empty_output, diag_attention_backward, _empty_grads, _save, _gradients
)


# The launches


@lru_cache
def diag_constants(target: str, dtype: str, head_dim: int, interpreted: bool = False) -> dict[str, Any]:
    """The constexprs of both kernels that follow from the target ("sm_90"), the dtype ("bf16") and the head_dim."""
    chunk = 16 if dtype == "fp32" else 32  # the most channels with which the backward pass spills nothing anywhere
    return {"HEAD_DIM": head_dim, "TILE": MAX_BLOCK_SIZE, "CHUNK": chunk, **dot_constants(target, dtype, interpreted)}


def launch_options(target: str, dtype: str, head_dim: int) -> dict[str, int]:
    """Options of both kernels. maxnreg: else ptxas spills a few registers to fit two programs onto an SM."""
    if not target.startswith("sm_"):
        return {"num_warps": 4, "num_stages": 1}  # AMD's warps have 64 threads
    num_warps = 4 if dtype == "fp32" and head_dim == 8 else 8  # 8 would spill there on sm_90
    return {"num_warps": num_warps, "num_stages": 1, "maxnreg": 255}


def count_tiles(seq_len: int, block_size: int, cu_seqlens: torch.Tensor | None) -> int:
    """Tiles of a batch row and head: enough wherever its blocks or its packed sequences begin."""
    tokens = MAX_BLOCK_SIZE // block_size * block_size  # of a tile: whole blocks
    if seq_len == 0:
        return 0
    if cu_seqlens is None:
        return triton.cdiv(seq_len + block_size - 1, tokens)
    return seq_len // tokens + 2 * cu_seqlens.shape[0]


def _launch(kernel: Any, inputs: DiagInputs, results: dict[str, torch.Tensor | None]) -> None:
    """Run a kernel. Inputs in a layout that it does not read are copied first; projections never are."""
    batch_size, num_heads, seq_len, head_dim = inputs.query.shape
    query, key, value = (token_major(tensor) for tensor in inputs[:3])
    if not row_stride(query) == row_stride(key) == row_stride(value):
        query, key, value = (_without_gaps(tensor) for tensor in (query, key, value))
    tensors = {name: contiguous(getattr(inputs, name)) for name in ("theta", "householder", "is_real", "cu_seqlens")}
    positions, cu_seqlens, is_relu = inputs.positions, inputs.cu_seqlens, inputs.activation == "relu"
    if cu_seqlens is not None:
        positions = positions.contiguous()
    tensors |= {"query": query, "key": key, "value": value, "positions": positions, "seed": inputs.seed, **results}
    tiles = count_tiles(seq_len, inputs.block_size, cu_seqlens)
    shape = target_of(query), ELEMENT_TYPES[query.dtype], head_dim
    arguments = {name: getattr(inputs, name) for name in ("scale", "dropout_p", "block_size")}
    arguments |= {"num_heads": num_heads, "seq_len": seq_len, "tiles_per_row": tiles}
    arguments["positions_stride"] = positions.stride(0) if positions.dim() == 2 else 0
    arguments["num_sequences"] = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = diag_constants(*shape, is_interpreted()) | {"CAUSAL": inputs.causal, "RELU": is_relu}
    launch(kernel, (batch_size * num_heads * tiles,), tensors, **arguments, **constants, **launch_options(*shape))


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """A token-major tensor with nothing between its rows; a copy of a slice of something wider."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
