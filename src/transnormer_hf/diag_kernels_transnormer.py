"""Triton kernels of DiagAttention: ordinary attention inside non-overlapping blocks, forward and backward.

With s = scale · q k^T inside a block, seen keys only, the kernels compute

    softmax:  P = softmax(s)     relu:  P = max(s, 0)        O = (P ∘ D) V

(D: dropout, 0 or 1 / (1 - p)) and in the backward pass, with everything but the row statistics computed again,

    dV = (P ∘ D)^T dO,   dP = D ∘ (dO V^T),   dS = P ∘ (dP - rowsum(P ∘ dP))  or  dS = [s > 0] ∘ dP,
    dQ = scale · dS K,   dK = scale · dS^T Q,

where Q and K carry LRPE, whose gradient goes on to q, k and theta.

There are two forms. A block that fits into a tile (`"tile"`: the usual one, several small blocks together) belongs to
one program, and its scores never leave the chip: q, k, v in and o out, then q, k, v, dO in and dQ, dK, dV out. A block
that is too large for that (`"split"`) is walked over in tiles as in FlashAttention. In both, what a program reads again
comes from the cache.

Blocks start where a sequence starts. Nothing about that is known on the host: every program finds its own columns from
the position of the first token, or from cu_seqlens.

The definition these must equal is `eager_diag_attention` in `ops_transnormer.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .triton_features_transnormer import (
    KernelSpec,
    KernelVariant,
    dot_precision,
    dot_type,
    padded_dim,
    rotation,
    target_family,
    turn_fraction,
    wide_dot_type,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# ---------------------------------------------------------------------------------------------------------------------
# Where a program's tokens stand
# ---------------------------------------------------------------------------------------------------------------------


SEQUENCES_AT_ONCE = tl.constexpr(64)


@triton.jit
def locate_tile(
    tile,
    positions_ptr,  # of this row of the batch
    cu_seqlens_ptr,
    seq_len,
    num_sequences,
    block_size,
    tile_tokens,  # a multiple of block_size
):
    """The column of a tile's first place, and the columns [begin, end) of the sequence that it belongs to.

    The first place may lie before the sequence: a block that began in an earlier call, or padding. A tile that is past
    the last one gets a first place at or after `end`.
    """
    if cu_seqlens_ptr is not None:
        first = tl.full((), 0, tl.int64) + seq_len
        begin = first
        end = first
        tiles_before = tl.full((), 0, tl.int32)
        sequence = tl.full((), 0, tl.int32)
        # Tokens past the last boundary form a sequence of their own.
        while (sequence <= num_sequences) & (tiles_before <= tile):
            candidates = sequence + tl.arange(0, SEQUENCES_AT_ONCE)
            begins = tl.load(cu_seqlens_ptr + candidates, mask=candidates <= num_sequences, other=seq_len).to(tl.int64)
            ends = tl.load(cu_seqlens_ptr + candidates + 1, mask=candidates < num_sequences, other=seq_len).to(tl.int64)
            begun = tl.load(positions_ptr + begins, mask=begins < ends, other=0) % block_size
            tiles = tl.where(begins < ends, (ends - begins + begun + tile_tokens - 1) // tile_tokens, 0).to(tl.int32)
            tiles_after = tiles_before + tl.cumsum(tiles, 0)
            is_mine = (tile < tiles_after) & (tile >= tiles_after - tiles)  # of one sequence at most
            firsts = begins - begun + (tile - tiles_after + tiles) * tile_tokens.to(tl.int64)
            first += tl.sum(tl.where(is_mine, firsts - seq_len, 0), 0)
            begin += tl.sum(tl.where(is_mine, begins - seq_len, 0), 0)
            end += tl.sum(tl.where(is_mine, ends - seq_len, 0), 0)
            tiles_before += tl.sum(tiles, 0)
            sequence += SEQUENCES_AT_ONCE
    else:
        # positions are negative on leading padding, and % of a negative number has its sign
        begun = tl.load(positions_ptr).to(tl.int64) % block_size
        begun = tl.where(begun < 0, begun + block_size, begun)
        first = tile.to(tl.int64) * tile_tokens - begun
        begin = tl.full((), 0, tl.int64)
        end = tl.full((), 0, tl.int64) + seq_len
    return first, begin, end


# ---------------------------------------------------------------------------------------------------------------------
# Vectors: CHUNK of their channels at a time, in two halves
#
# No sum over channels minds their order. With LRPE the halves are the even and the odd channels, so that a rotation is
# plain arithmetic between two tiles; without, they are the first and the last channels, read and written as they lie.
# A chunk begins at channel `chunk`, and what the program needs of it again it reads again, from the cache: registers
# are what the backward pass lacks.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_halves(
    pointer, tokens, exists, stride_t, stride_d, chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """One head's vectors of some tokens, zeros where there is none: two (tokens, CHUNK / 2) float32."""
    rows = pointer + tokens[:, None] * stride_t
    channels = chunk + tl.arange(0, CHUNK // 2)[None, :]
    first = tl.load(rows + channels * stride_d, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
    channels += CHUNK // 2
    second = tl.load(rows + channels * stride_d, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_halves(
    pointer, first, second, tokens, exists, stride_t, PAIRS: tl.constexpr,
    chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store halves, which PAIRS says are the even and the odd channels. Channels lie side by side in memory."""
    rows = pointer + tokens[:, None] * stride_t
    element_type = pointer.dtype.element_ty
    if PAIRS:
        channels = chunk + tl.arange(0, CHUNK)[None, :]
        whole = tl.reshape(tl.join(first, second), (tokens.shape[0], CHUNK)).to(element_type)
        tl.store(rows + channels, whole, mask=exists[:, None] & (channels < HEAD_DIM))
    else:
        channels = chunk + tl.arange(0, CHUNK // 2)[None, :]
        tl.store(rows + channels, first.to(element_type), mask=exists[:, None] & (channels < HEAD_DIM))
        channels += CHUNK // 2
        tl.store(rows + channels, second.to(element_type), mask=exists[:, None] & (channels < HEAD_DIM))


@triton.jit
def load_table(places, exists, table_ptr, block_size, chunk, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """cos and sin of place · theta, (tokens, CHUNK / 2) each.

    The table is small (32 KiB for 64 places of 128 channels), and every program reads it: it stays in the caches.
    """
    entries = table_ptr + places[:, None] * (WIDTH // 2) + (chunk // 2 + tl.arange(0, CHUNK // 2))[None, :]
    cos = tl.load(entries, mask=exists[:, None], other=0.0)
    sin = tl.load(entries + block_size * (WIDTH // 2), mask=exists[:, None], other=0.0)
    return cos, sin


@triton.jit
def load_and_project(
    pointer, tokens, exists, stride_t, stride_d, householder_ptr, chunk, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """A chunk of some vectors x, (tokens, CHUNK), of the reflection v, (1, CHUNK), and 2 x · v of that chunk."""
    channels = chunk + tl.arange(0, CHUNK)
    householder = tl.load(householder_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    pointers = pointer + tokens[:, None] * stride_t + channels[None, :] * stride_d
    whole = tl.load(pointers, mask=exists[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    return whole, householder, 2 * tl.sum(whole * householder, 1)


@triton.jit
def project(
    pointer, tokens, exists, stride_t, stride_d, householder_ptr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """2 x · v over all chunks, (tokens,): how far the reflection (I - 2 v v^T) x moves x along -v.

    None where there is one chunk, which tells `load_turned` that it sees all of x.
    """
    if householder_ptr is None or WIDTH == CHUNK:
        return None
    else:
        along = tl.zeros((tokens.shape[0],), tl.float32)
        for chunk in range(0, WIDTH, CHUNK):
            along += load_and_project(
                pointer, tokens, exists, stride_t, stride_d, householder_ptr, chunk, HEAD_DIM, CHUNK
            )[2]
        return along


@triton.jit
def load_turned(
    pointer, tokens, exists, stride_t, stride_d, places, table_ptr, householder_ptr, block_size, along,
    chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Queries or keys with LRPE, where there is one. along: their `project`.

    A rotated channel is written as the sum of two products, over an axis of its own, because the compiler moves nothing
    across a sum. Else it would turn the operands of the rotation, not its result, into the registers of a matrix
    product, of which every warp holds all of a tile: the rotation would be computed once per warp, and for want of
    registers the backward pass would spill.
    """
    if table_ptr is not None:
        cos, sin = load_table(places, exists, table_ptr, block_size, chunk, WIDTH, CHUNK)
        whole, householder, along_chunk = load_and_project(
            pointer, tokens, exists, stride_t, stride_d, householder_ptr, chunk, HEAD_DIM, CHUNK
        )
        if along is None:
            along = along_chunk
        whole -= along[:, None] * householder
        even, odd = tl.split(tl.reshape(whole, (tokens.shape[0], CHUNK // 2, 2)))
        return tl.sum(tl.join(even * cos, -odd * sin), 2), tl.sum(tl.join(even * sin, odd * cos), 2)
    else:
        return load_halves(pointer, tokens, exists, stride_t, stride_d, chunk, HEAD_DIM, WIDTH, CHUNK)


@triton.jit
def turn_back(
    grad_first, grad_second, exists, places, table_ptr, householder_ptr, block_size,
    chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients before the rotation, given those after it: the even and odd channels, v's, and 2 x · v of the chunk.

    cos and sin are read once more: that is cheaper than to keep them through the kernel.
    """
    cos, sin = load_table(places, exists, table_ptr, block_size, chunk, WIDTH, CHUNK)
    even = grad_first * cos + grad_second * sin
    odd = grad_second * cos - grad_first * sin
    channels = chunk + 2 * tl.arange(0, CHUNK // 2)
    inside = channels < HEAD_DIM
    householder_even = tl.load(householder_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    householder_odd = tl.load(householder_ptr + channels + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    along = 2 * (tl.sum(even * householder_even, 1) + tl.sum(odd * householder_odd, 1))
    return even, odd, householder_even, householder_odd, along


@triton.jit
def store_turned_back(
    pointer, grad_first, grad_second, turned_first, turned_second, tokens, exists, stride_t, places,
    table_ptr, householder_ptr, block_size, along,
    chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of queries or keys, given the one after LRPE; returns their part of theta's, (CHUNK / 2,).

    y = R(angle) x has dy / dangle = (-y_odd, y_even), and angle = place · theta. along: 2 x · v of all chunks of the
    gradients before the rotation, None where there is one chunk.
    """
    grad_theta = tl.zeros((CHUNK // 2,), tl.float32)
    if table_ptr is not None:
        grad_angle = grad_second * turned_first.to(tl.float32) - grad_first * turned_second.to(tl.float32)
        grad_theta = tl.sum(grad_angle * places.to(tl.float32)[:, None], 0)
        even, odd, householder_even, householder_odd, along_chunk = turn_back(
            grad_first, grad_second, exists, places, table_ptr, householder_ptr, block_size,
            chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        if along is None:
            along = along_chunk
        grad_first = even - along[:, None] * householder_even
        grad_second = odd - along[:, None] * householder_odd
    store_halves(
        pointer, grad_first, grad_second, tokens, exists, stride_t, table_ptr is not None, chunk, HEAD_DIM, WIDTH, CHUNK
    )
    return grad_theta


@triton.jit
def add_inner_products(
    products, row_first, row_second, column_first, column_second, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """products + rows columns^T over a chunk of the channels: (rows, columns) float32."""
    products = tl.dot(row_first.to(DOT_TYPE), tl.trans(column_first.to(DOT_TYPE)), products, input_precision=PRECISION)
    return tl.dot(row_second.to(DOT_TYPE), tl.trans(column_second.to(DOT_TYPE)), products, input_precision=PRECISION)


@triton.jit
def inner_products(row_first, row_second, column_first, column_second, PRECISION: tl.constexpr):
    """rows columns^T, the sum over both halves of the channels: (rows, columns) float32."""
    products = tl.dot(row_first, tl.trans(column_first), input_precision=PRECISION)
    return tl.dot(row_second, tl.trans(column_second), products, input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------------------------------
# Scores, dropout
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def mark_dropped(weights, seed_ptr, row_and_head, query_columns, key_start, dropout_p, KEYS: tl.constexpr):
    """The map, >= 0, with a minus sign on what dropout drops: (queries, KEYS) float32.

    The random bits of an entry come from a counter made of its place alone (head, column of the query, number of the
    key), so that the backward pass meets the same ones, in whatever order and tiles. One draw serves four keys.
    """
    groups = key_start // 4 + tl.arange(0, KEYS // 4)
    zeros = tl.zeros((query_columns.shape[0], KEYS // 4), tl.int32)
    heads = row_and_head.to(tl.int32) + zeros
    queries = query_columns.to(tl.int32)[:, None] + zeros
    bits_0, bits_1, bits_2, bits_3 = tl.philox(tl.load(seed_ptr), groups[None, :] + zeros, queries, heads, zeros)
    bits = tl.join(tl.join(bits_0, bits_2), tl.join(bits_1, bits_3))  # (queries, KEYS / 4, 2, 2)
    bits = tl.reshape(bits, (query_columns.shape[0], KEYS))
    uniform = (bits >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))  # exact, in [0, 1)
    return tl.where(uniform >= dropout_p, weights, -weights)


@triton.jit
def grad_of_scores(weights, grad_weights, row_sums, seed_ptr, keep_scale, RELU: tl.constexpr):
    """dS from the map (dropped entries with a minus sign) and dO V^T: (queries, keys) float32.

    row_sums: rowsum(P ∘ dP), (queries,), or None where the whole row is here; not used for relu.
    """
    if seed_ptr is not None:
        grad_weights = tl.where(weights > 0.0, grad_weights * keep_scale, 0.0)
        weights = tl.abs(weights)
    if RELU:
        return tl.where(weights > 0.0, grad_weights, 0.0)
    else:
        if row_sums is None:
            row_sums = tl.sum(weights * grad_weights, 1)
        return weights * (grad_weights - row_sums[:, None])


@triton.jit
def masked_softmax(scores, visible):
    """Softmax of each row over its visible entries, zeros for a row that has none."""
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.max(scores, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - highest[:, None])
    total = tl.sum(weights, 1)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The table of LRPE
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["block_size"])
def diag_table_kernel(
    table_ptr,  # (2, block_size, WIDTH / 2) float32
    theta_ptr,  # (head_dim / 2,)
    block_size,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """cos and sin of place · theta for the places of a block, TILE of them per program: positions restart in each."""
    pairs = tl.arange(0, WIDTH // 2)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    high, low = turn_fraction(tl.load(theta_ptr + pairs, mask=pairs < HEAD_DIM // 2, other=0.0).to(tl.float32))
    cos, sin = rotation(places, high, low)
    entries = table_ptr + places[:, None] * (WIDTH // 2) + pairs[None, :]
    is_inside = (places < block_size)[:, None]
    tl.store(entries, cos, mask=is_inside)
    tl.store(entries + block_size * (WIDTH // 2), sin, mask=is_inside)


# ---------------------------------------------------------------------------------------------------------------------
# A whole tile at once
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size", "tile_tokens"])
def diag_tile_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr, output_stride_b, output_stride_h, output_stride_t,
    table_ptr, householder_ptr,  # (2, block_size, WIDTH / 2) cos and sin, (head_dim,)
    positions_ptr, positions_stride_b,  # (batch, seq) or (seq,) with stride 0
    is_real_ptr, is_real_stride_b,  # (batch, seq)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    seed_ptr,  # (1,)
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size, tile_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: one head, `tile_tokens` <= TILE places, a whole number of blocks. Reads 3, writes 1 tile."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)  # fastest, so that programs side by side read memory side by side
    tile = program // num_heads % programs_per_row
    row = (program // num_heads // programs_per_row).to(tl.int64)
    first, begin, end = locate_tile(
        tile, positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, tile_tokens
    )
    if first >= end:
        return
    places = tl.arange(0, TILE)
    within = places % block_size
    # 32-bit from here on, within the tile: wide integers would cost the registers that the backward pass lacks
    exists = (places >= (begin - first).to(tl.int32)) & (places < tl.minimum(end - first, tile_tokens).to(tl.int32))
    is_key = exists
    if is_real_ptr is not None:
        is_key = tl.load(is_real_ptr + (row * is_real_stride_b + first) + places, mask=exists, other=0) != 0
    query_ptr += row * query_stride_b + head * query_stride_h + first * query_stride_t
    key_ptr += row * key_stride_b + head * key_stride_h + first * key_stride_t
    value_ptr += row * value_stride_b + head * value_stride_h + first * value_stride_t
    output_ptr += row * output_stride_b + head * output_stride_h + first * output_stride_t

    query_along = project(
        query_ptr, places, exists, query_stride_t, query_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK
    )
    key_along = project(key_ptr, places, is_key, key_stride_t, key_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        query_first, query_second = load_turned(
            query_ptr, places, exists, query_stride_t, query_stride_d, within,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, key_stride_d, within,
            table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        scores = add_inner_products(scores, query_first, query_second, key_first, key_second, DOT_TYPE, PRECISION)
    scores *= scale
    visible = is_key[None, :] & (places[:, None] // block_size == places[None, :] // block_size)
    if CAUSAL:
        visible &= places[:, None] >= places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        weights = masked_softmax(scores, visible)
    if seed_ptr is not None:
        weights = mark_dropped(
            weights, seed_ptr, row * num_heads + head, first.to(tl.int32) + places, 0, dropout_p, TILE
        )
        weights = tl.maximum(weights, 0.0) * keep_scale
    weights = weights.to(MAP_TYPE)
    for chunk in range(0, WIDTH, CHUNK):
        value_first, value_second = load_halves(
            value_ptr, places, is_key, value_stride_t, value_stride_d, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        output_first = tl.dot(weights, value_first.to(MAP_TYPE), input_precision=PRECISION)  # (TILE, CHUNK / 2)
        output_second = tl.dot(weights, value_second.to(MAP_TYPE), input_precision=PRECISION)
        store_halves(
            output_ptr, output_first, output_second, places, exists, output_stride_t, False,
            chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size", "tile_tokens"])
def diag_tile_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t, grad_stride_d,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    grad_query_ptr, grad_key_ptr, grad_value_ptr, output_stride_b, output_stride_h, output_stride_t,  # all three alike
    grad_theta_ptr,  # (programs, WIDTH / 2) float32, summed afterwards
    table_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size, tile_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The same tile once more: reads 4 tiles, writes 3. The map and its row sums are computed again on the chip.

    q and k are read (and turned) once for the map and again for dQ and dK; by then they are in the cache.
    """
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    tile = program // num_heads % programs_per_row
    row = (program // num_heads // programs_per_row).to(tl.int64)
    if table_ptr is not None:
        grad_theta_ptr += program.to(tl.int64) * (WIDTH // 2)
    first, begin, end = locate_tile(
        tile, positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, tile_tokens
    )
    if first >= end:
        if table_ptr is not None:
            tl.store(grad_theta_ptr + tl.arange(0, WIDTH // 2), tl.zeros((WIDTH // 2,), tl.float32))
        return
    places = tl.arange(0, TILE)
    within = places % block_size
    # 32-bit from here on, within the tile: wide integers would cost the registers that the backward pass lacks
    exists = (places >= (begin - first).to(tl.int32)) & (places < tl.minimum(end - first, tile_tokens).to(tl.int32))
    is_key = exists
    if is_real_ptr is not None:
        is_key = tl.load(is_real_ptr + (row * is_real_stride_b + first) + places, mask=exists, other=0) != 0
    grad_ptr += row * grad_stride_b + head * grad_stride_h + first * grad_stride_t
    query_ptr += row * query_stride_b + head * query_stride_h + first * query_stride_t
    key_ptr += row * key_stride_b + head * key_stride_h + first * key_stride_t
    value_ptr += row * value_stride_b + head * value_stride_h + first * value_stride_t
    start = row * output_stride_b + head * output_stride_h + first * output_stride_t

    query_along = project(
        query_ptr, places, exists, query_stride_t, query_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK
    )
    key_along = project(key_ptr, places, is_key, key_stride_t, key_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        query_first, query_second = load_turned(
            query_ptr, places, exists, query_stride_t, query_stride_d, within,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, key_stride_d, within,
            table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        scores = add_inner_products(scores, query_first, query_second, key_first, key_second, DOT_TYPE, PRECISION)
    scores *= scale
    visible = is_key[None, :] & (places[:, None] // block_size == places[None, :] // block_size)
    if CAUSAL:
        visible &= places[:, None] >= places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        weights = masked_softmax(scores, visible)
    if seed_ptr is not None:
        weights = mark_dropped(
            weights, seed_ptr, row * num_heads + head, first.to(tl.int32) + places, 0, dropout_p, TILE
        )

    dropped = weights
    if seed_ptr is not None:
        dropped = tl.maximum(weights, 0.0) * keep_scale
    dropped = tl.trans(dropped.to(MAP_TYPE))
    grad_weights = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        grad_first, grad_second = load_halves(
            grad_ptr, places, exists, grad_stride_t, grad_stride_d, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        grad_value_first = tl.dot(dropped, grad_first.to(MAP_TYPE), input_precision=PRECISION)  # (TILE, CHUNK / 2)
        grad_value_second = tl.dot(dropped, grad_second.to(MAP_TYPE), input_precision=PRECISION)
        store_halves(
            grad_value_ptr + start, grad_value_first, grad_value_second, places, exists, output_stride_t, False,
            chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        value_first, value_second = load_halves(
            value_ptr, places, is_key, value_stride_t, value_stride_d, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        grad_weights = add_inner_products(
            grad_weights, grad_first, grad_second, value_first, value_second, DOT_TYPE, PRECISION
        )
    grad_scores = grad_of_scores(weights, grad_weights, None, seed_ptr, keep_scale, RELU) * scale
    grad_scores = grad_scores.to(MAP_TYPE)
    grad_scores_t = tl.trans(grad_scores)

    # The reflection's gradient needs a vector's product with v before its first chunk is stored.
    grad_query_along = None
    grad_key_along = None
    if table_ptr is not None and CHUNK < WIDTH:
        grad_query_along = tl.zeros((TILE,), tl.float32)
        grad_key_along = tl.zeros((TILE,), tl.float32)
        for chunk in range(0, WIDTH, CHUNK):
            key_first, key_second = load_turned(
                key_ptr, places, is_key, key_stride_t, key_stride_d, within,
                table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
            )  # fmt: skip
            grad_query_along += turn_back(
                tl.dot(grad_scores, key_first.to(DOT_TYPE).to(MAP_TYPE), input_precision=PRECISION),
                tl.dot(grad_scores, key_second.to(DOT_TYPE).to(MAP_TYPE), input_precision=PRECISION),
                exists, within, table_ptr, householder_ptr, block_size, chunk, HEAD_DIM, WIDTH, CHUNK,
            )[4]  # fmt: skip
            query_first, query_second = load_turned(
                query_ptr, places, exists, query_stride_t, query_stride_d, within,
                table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
            )  # fmt: skip
            grad_key_along += turn_back(
                tl.dot(grad_scores_t, query_first.to(DOT_TYPE).to(MAP_TYPE), input_precision=PRECISION),
                tl.dot(grad_scores_t, query_second.to(DOT_TYPE).to(MAP_TYPE), input_precision=PRECISION),
                exists, within, table_ptr, householder_ptr, block_size, chunk, HEAD_DIM, WIDTH, CHUNK,
            )[4]  # fmt: skip
    for chunk in range(0, WIDTH, CHUNK):
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, key_stride_d, within,
            table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first = key_first.to(DOT_TYPE)
        key_second = key_second.to(DOT_TYPE)
        grad_first = tl.dot(grad_scores, key_first.to(MAP_TYPE), input_precision=PRECISION)
        grad_second = tl.dot(grad_scores, key_second.to(MAP_TYPE), input_precision=PRECISION)
        query_first, query_second = load_turned(
            query_ptr, places, exists, query_stride_t, query_stride_d, within,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        query_first = query_first.to(DOT_TYPE)
        query_second = query_second.to(DOT_TYPE)
        grad_theta = store_turned_back(
            grad_query_ptr + start, grad_first, grad_second, query_first, query_second,
            places, exists, output_stride_t, within,
            table_ptr, householder_ptr, block_size, grad_query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        grad_theta += store_turned_back(
            grad_key_ptr + start,
            tl.dot(grad_scores_t, query_first.to(MAP_TYPE), input_precision=PRECISION),
            tl.dot(grad_scores_t, query_second.to(MAP_TYPE), input_precision=PRECISION),
            key_first, key_second, places, exists, output_stride_t, within,
            table_ptr, householder_ptr, block_size, grad_key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        if table_ptr is not None:
            tl.store(grad_theta_ptr + chunk // 2 + tl.arange(0, CHUNK // 2), grad_theta)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks larger than a tile
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def locate_part(number, positions_ptr, cu_seqlens_ptr, seq_len, num_sequences, block_size, PART: tl.constexpr):
    """Where part `number` of a row lies, every block being cut into parts of PART tokens.

    Returns the block's first place (a column that may lie before its sequence), the columns [begin, end) of the block
    that exist, and the number of the part's first token in the block.
    """
    parts_per_block = tl.cdiv(block_size, PART)
    first, begin, end = locate_tile(
        number // parts_per_block, positions_ptr, cu_seqlens_ptr, seq_len, num_sequences, block_size, block_size
    )
    return first, begin, tl.minimum(end, first + block_size), number % parts_per_block * PART


@triton.jit
def load_row_statistics(
    output_ptr, lse_ptr, grad_ptr, grad_stride_t, grad_stride_d, tokens, exists, stride_t,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """rowsum(O ∘ dO), which is rowsum(P ∘ dP), and the log-sum-exp of some queries: (queries,) each."""
    first, second = load_halves(output_ptr, tokens, exists, stride_t, 1, 0, HEAD_DIM, WIDTH, WIDTH)
    grad_first, grad_second = load_halves(
        grad_ptr, tokens, exists, grad_stride_t, grad_stride_d, 0, HEAD_DIM, WIDTH, WIDTH
    )
    row_sums = tl.sum(first * grad_first + second * grad_second, 1)
    return row_sums, tl.load(lse_ptr + tokens, mask=exists, other=float("inf"))


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size"])
def diag_split_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr, output_stride_b, output_stride_h, output_stride_t,
    lse_ptr,  # (batch, heads, seq) float32: log of the sum of exp(scores), +inf where no key is visible; not for relu
    table_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: TILE queries of one block and head against the block's keys, with a running softmax."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    row = (program // num_heads // programs_per_row).to(tl.int64)
    first, begin, end, part_start = locate_part(
        program // num_heads % programs_per_row,
        positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, TILE,
    )  # fmt: skip
    if first + part_start >= end:
        return
    places = tl.arange(0, TILE)
    query_places = part_start + places  # numbers of the tokens in the block
    lower = (begin - first).to(tl.int32)  # the places of the block that exist, which may begin before its sequence
    upper = (end - first).to(tl.int32)
    query_exists = (query_places >= lower) & (query_places < upper)
    query_ptr += row * query_stride_b + head * query_stride_h + (first + part_start) * query_stride_t
    key_ptr += row * key_stride_b + head * key_stride_h + first * key_stride_t
    value_ptr += row * value_stride_b + head * value_stride_h + first * value_stride_t
    output_ptr += row * output_stride_b + head * output_stride_h + (first + part_start) * output_stride_t
    if not RELU:
        lse_ptr += (row * num_heads + head) * seq_len + first + part_start

    query_first, query_second = load_turned(
        query_ptr, places, query_exists, query_stride_t, query_stride_d, query_places,
        table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
    )  # fmt: skip
    query_first = query_first.to(DOT_TYPE)
    query_second = query_second.to(DOT_TYPE)
    output_first = tl.zeros((TILE, WIDTH // 2), tl.float32)
    output_second = tl.zeros((TILE, WIDTH // 2), tl.float32)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    stop = upper
    if CAUSAL:
        stop = tl.minimum(stop, part_start + TILE)
    for key_start in range(0, stop, TILE):
        key_places = key_start + places
        is_key = (key_places >= lower) & (key_places < upper)
        if is_real_ptr is not None:
            is_key = tl.load(is_real_ptr + (row * is_real_stride_b + first) + key_places, mask=is_key, other=0) != 0
        key_first, key_second = load_turned(
            key_ptr + tl.cast(key_start, tl.int64) * key_stride_t, places, is_key,
            key_stride_t, key_stride_d, key_places,
            table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        scores = scale * inner_products(
            query_first, query_second, key_first.to(DOT_TYPE), key_second.to(DOT_TYPE), PRECISION
        )  # (TILE, TILE)
        visible = is_key[None, :] & query_exists[:, None]
        if CAUSAL:
            visible &= query_places[:, None] >= key_places[None, :]
        if RELU:
            weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
        else:
            scores = tl.where(visible, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp(scores - shift[:, None])
            shrink = tl.exp(highest - shift)
            highest = new_highest
            total = total * shrink + tl.sum(weights, 1)
            output_first *= shrink[:, None]
            output_second *= shrink[:, None]
        if seed_ptr is not None:
            weights = mark_dropped(
                weights, seed_ptr, row * num_heads + head, first.to(tl.int32) + query_places, key_start, dropout_p, TILE
            )
            weights = tl.maximum(weights, 0.0) * keep_scale
        weights = weights.to(MAP_TYPE)
        value_first, value_second = load_halves(
            value_ptr + tl.cast(key_start, tl.int64) * value_stride_t,
            places,
            is_key,
            value_stride_t,
            value_stride_d,
            0,
            HEAD_DIM,
            WIDTH,
            WIDTH,
        )
        output_first = tl.dot(weights, value_first.to(MAP_TYPE), output_first, input_precision=PRECISION)
        output_second = tl.dot(weights, value_second.to(MAP_TYPE), output_second, input_precision=PRECISION)
    if not RELU:
        norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        output_first *= norm[:, None]
        output_second *= norm[:, None]
        lse = tl.where(total == 0.0, float("inf"), highest + tl.log(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + places, lse, mask=query_exists)
    store_halves(
        output_ptr, output_first, output_second, places, query_exists, output_stride_t, False, 0, HEAD_DIM, WIDTH, WIDTH
    )


@triton.jit
def split_map(
    query_ptr, query_stride_t, query_stride_d, query_places, query_exists,  # pointers to the first of some tokens, of
    key_ptr, key_stride_t, key_stride_d, key_places, is_key,  # which these are the places in the block
    places,  # 0, 1, 2, ...
    lse,  # of the queries; None for relu
    table_ptr, householder_ptr, seed_ptr, row_and_head, block_column, key_start, block_size, scale, dropout_p,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The map of some queries on some keys, dropped entries with a minus sign: (queries, keys) float32."""
    query_along = project(
        query_ptr, places, query_exists, query_stride_t, query_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK
    )
    key_along = project(key_ptr, places, is_key, key_stride_t, key_stride_d, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        query_first, query_second = load_turned(
            query_ptr, places, query_exists, query_stride_t, query_stride_d, query_places,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, key_stride_d, key_places,
            table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        scores = add_inner_products(scores, query_first, query_second, key_first, key_second, DOT_TYPE, PRECISION)
    scores *= scale
    visible = is_key[None, :] & query_exists[:, None]
    if CAUSAL:
        visible &= query_places[:, None] >= key_places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        weights = tl.exp(tl.where(visible, scores, float("-inf")) - lse[:, None])
    if seed_ptr is not None:
        query_columns = block_column.to(tl.int32) + query_places
        weights = mark_dropped(weights, seed_ptr, row_and_head, query_columns, key_start, dropout_p, TILE)
    return weights


@triton.jit
def split_grad_of_map(
    grad_ptr, grad_stride_t, grad_stride_d, query_exists, value_ptr, value_stride_t, value_stride_d, is_key, places,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dO V^T of some queries and keys: (queries, keys) float32."""
    grad_weights = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        grad_first, grad_second = load_halves(
            grad_ptr, places, query_exists, grad_stride_t, grad_stride_d, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        value_first, value_second = load_halves(
            value_ptr, places, is_key, value_stride_t, value_stride_d, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        grad_weights = add_inner_products(
            grad_weights, grad_first, grad_second, value_first, value_second, DOT_TYPE, PRECISION
        )
    return grad_weights


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size"])
def diag_split_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t, grad_stride_d,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr,  # the forward pass's; not for relu, as lse_ptr
    grad_query_ptr, grad_key_ptr, grad_value_ptr, output_stride_b, output_stride_h, output_stride_t,  # all four alike
    lse_ptr,
    grad_theta_ptr,  # (2 / 3 of the programs, WIDTH / 2) float32, summed afterwards
    table_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Three programs for TILE tokens of one block and head: they are queries (dQ), keys (dV), keys (dK).

    One program that did all three would keep the addresses of each in registers through the others. The row sums of
    P ∘ dP are those of O ∘ dO, so the saved output and the saved log-sum-exp stand for the whole row.
    """
    role = tl.program_id(0) % 3
    program = tl.program_id(0) // 3
    head = (program % num_heads).to(tl.int64)
    row = (program // num_heads // programs_per_row).to(tl.int64)
    pairs = tl.arange(0, WIDTH // 2)
    if table_ptr is not None:
        grad_theta_ptr += (2 * program.to(tl.int64) + role // 2) * (WIDTH // 2)  # dV has no part in it
    first, begin, end, part_start = locate_part(
        program // num_heads % programs_per_row,
        positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, TILE,
    )  # fmt: skip
    if first + part_start >= end:
        if table_ptr is not None:
            tl.store(grad_theta_ptr + pairs, tl.zeros((WIDTH // 2,), tl.float32))
        return
    places = tl.arange(0, TILE)
    my_places = part_start + places
    lower = (begin - first).to(tl.int32)  # the places of the block that exist, which may begin before its sequence
    upper = (end - first).to(tl.int32)
    i_exist = (my_places >= lower) & (my_places < upper)
    grad_ptr += row * grad_stride_b + head * grad_stride_h + first * grad_stride_t
    query_ptr += row * query_stride_b + head * query_stride_h + first * query_stride_t
    key_ptr += row * key_stride_b + head * key_stride_h + first * key_stride_t
    value_ptr += row * value_stride_b + head * value_stride_h + first * value_stride_t
    start = row * output_stride_b + head * output_stride_h + first * output_stride_t
    if not RELU:
        output_ptr += start
        lse_ptr += (row * num_heads + head) * seq_len + first
    stop = upper
    my_start = part_start.to(tl.int64)

    # A program walks over the other tokens, with one sum. What it needs of its own tokens it reads in every turn anew,
    # from the cache: as registers that live through the loop it would be too many. (The comparison that is true
    # throughout keeps the compiler from reading it once.)
    my_query_ptr = query_ptr + my_start * query_stride_t
    my_key_ptr = key_ptr + my_start * key_stride_t
    my_value_ptr = value_ptr + my_start * value_stride_t
    my_grad_ptr = grad_ptr + my_start * grad_stride_t
    i_am_key = i_exist
    if is_real_ptr is not None:
        is_real_ptr += row * is_real_stride_b + first
        i_am_key = tl.load(is_real_ptr + my_places, mask=i_exist, other=0) != 0

    if role == 0:  # my tokens as queries: dQ
        row_sums = None
        lse = None
        if not RELU:
            row_sums, lse = load_row_statistics(
                output_ptr + my_start * output_stride_t, lse_ptr + my_start, my_grad_ptr, grad_stride_t, grad_stride_d,
                places, i_exist, output_stride_t, HEAD_DIM, WIDTH,
            )  # fmt: skip
        sum_first = tl.zeros((TILE, WIDTH // 2), tl.float32)
        sum_second = tl.zeros((TILE, WIDTH // 2), tl.float32)
        keys_stop = stop
        if CAUSAL:
            keys_stop = tl.minimum(stop, part_start + TILE)
        for key_start in range(0, keys_stop, TILE):
            key_places = key_start + places
            i_exist_now = i_exist & (key_places < keys_stop + TILE)
            is_key = (key_places >= lower) & (key_places < upper)
            if is_real_ptr is not None:
                is_key = tl.load(is_real_ptr + key_places, mask=is_key, other=0) != 0
            other_key_ptr = key_ptr + tl.cast(key_start, tl.int64) * key_stride_t
            weights = split_map(
                my_query_ptr, query_stride_t, query_stride_d, my_places, i_exist_now,
                other_key_ptr, key_stride_t, key_stride_d, key_places, is_key,
                places, lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, key_start,
                block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
            )  # fmt: skip
            grad_weights = split_grad_of_map(
                my_grad_ptr, grad_stride_t, grad_stride_d, i_exist_now,
                value_ptr + tl.cast(key_start, tl.int64) * value_stride_t, value_stride_t, value_stride_d, is_key,
                places, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION,
            )  # fmt: skip
            grad_scores = grad_of_scores(weights, grad_weights, row_sums, seed_ptr, keep_scale, RELU)
            grad_scores = (grad_scores * scale).to(MAP_TYPE)
            key_first, key_second = load_turned(
                other_key_ptr, places, is_key, key_stride_t, key_stride_d, key_places,
                table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
            )  # fmt: skip
            sum_first = tl.dot(grad_scores, key_first.to(DOT_TYPE).to(MAP_TYPE), sum_first, input_precision=PRECISION)
            sum_second = tl.dot(
                grad_scores, key_second.to(DOT_TYPE).to(MAP_TYPE), sum_second, input_precision=PRECISION
            )
        my_first, my_second = load_turned(
            my_query_ptr, places, i_exist, query_stride_t, query_stride_d, my_places,
            table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        grad_theta = store_turned_back(
            grad_query_ptr + start + my_start * output_stride_t,
            sum_first, sum_second, my_first, my_second, places, i_exist, output_stride_t,
            my_places, table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        if table_ptr is not None:
            tl.store(grad_theta_ptr + pairs, grad_theta)
        return

    queries_begin = 0
    if CAUSAL:
        queries_begin = part_start
    if role == 1:  # my tokens as keys: dV
        sum_first = tl.zeros((TILE, WIDTH // 2), tl.float32)
        sum_second = tl.zeros((TILE, WIDTH // 2), tl.float32)
        for query_start in range(queries_begin, stop, TILE):
            query_places = query_start + places
            i_am_key_now = i_am_key & (query_places < stop + TILE)
            query_exists = (query_places >= lower) & (query_places < upper)
            query_lse = None
            if not RELU:
                query_lse = tl.load(lse_ptr + query_start + places, mask=query_exists, other=float("inf"))
            weights = split_map(
                query_ptr + tl.cast(query_start, tl.int64) * query_stride_t,
                query_stride_t, query_stride_d, query_places, query_exists,
                my_key_ptr, key_stride_t, key_stride_d, my_places, i_am_key_now,
                places, query_lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, part_start,
                block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
            )  # fmt: skip
            if seed_ptr is not None:
                weights = tl.maximum(weights, 0.0) * keep_scale
            weights = tl.trans(weights.to(MAP_TYPE))
            grad_first, grad_second = load_halves(
                grad_ptr + tl.cast(query_start, tl.int64) * grad_stride_t, places, query_exists,
                grad_stride_t, grad_stride_d, 0, HEAD_DIM, WIDTH, WIDTH,
            )  # fmt: skip
            sum_first = tl.dot(weights, grad_first.to(MAP_TYPE), sum_first, input_precision=PRECISION)
            sum_second = tl.dot(weights, grad_second.to(MAP_TYPE), sum_second, input_precision=PRECISION)
        store_halves(
            grad_value_ptr + start + my_start * output_stride_t, sum_first, sum_second,
            places, i_exist, output_stride_t, False, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        return

    # my tokens as keys: dK
    sum_first = tl.zeros((TILE, WIDTH // 2), tl.float32)
    sum_second = tl.zeros((TILE, WIDTH // 2), tl.float32)
    for query_start in range(queries_begin, stop, TILE):
        query_places = query_start + places
        i_am_key_now = i_am_key & (query_places < stop + TILE)
        query_exists = (query_places >= lower) & (query_places < upper)
        other_query_ptr = query_ptr + tl.cast(query_start, tl.int64) * query_stride_t
        other_grad_ptr = grad_ptr + tl.cast(query_start, tl.int64) * grad_stride_t
        query_sums = None
        query_lse = None
        if not RELU:
            query_sums, query_lse = load_row_statistics(
                output_ptr + tl.cast(query_start, tl.int64) * output_stride_t, lse_ptr + query_start,
                other_grad_ptr, grad_stride_t, grad_stride_d, places, query_exists, output_stride_t, HEAD_DIM, WIDTH,
            )  # fmt: skip
        grad_weights = split_grad_of_map(
            other_grad_ptr, grad_stride_t, grad_stride_d, query_exists,
            my_value_ptr, value_stride_t, value_stride_d, i_am_key_now,
            places, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION,
        )  # fmt: skip
        weights = split_map(
            other_query_ptr, query_stride_t, query_stride_d, query_places, query_exists,
            my_key_ptr, key_stride_t, key_stride_d, my_places, i_am_key_now,
            places, query_lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, part_start,
            block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
        )  # fmt: skip
        grad_scores = grad_of_scores(weights, grad_weights, query_sums, seed_ptr, keep_scale, RELU)
        grad_scores = tl.trans((grad_scores * scale).to(MAP_TYPE))
        query_first, query_second = load_turned(
            other_query_ptr, places, query_exists, query_stride_t, query_stride_d, query_places,
            table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        sum_first = tl.dot(grad_scores, query_first.to(DOT_TYPE).to(MAP_TYPE), sum_first, input_precision=PRECISION)
        sum_second = tl.dot(grad_scores, query_second.to(DOT_TYPE).to(MAP_TYPE), sum_second, input_precision=PRECISION)
    my_first, my_second = load_turned(
        my_key_ptr, places, i_am_key, key_stride_t, key_stride_d, my_places,
        table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
    )  # fmt: skip
    grad_theta = store_turned_back(
        grad_key_ptr + start + my_start * output_stride_t,
        sum_first, sum_second, my_first, my_second, places, i_exist, output_stride_t,
        my_places, table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
    )  # fmt: skip
    if table_ptr is not None:
        tl.store(grad_theta_ptr + pairs, grad_theta)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


class DiagPlan(NamedTuple):
    """How a call is cut into programs.

    is_split: blocks are larger than a tile, so the `split` kernels run.
    tile: places of a tile, a power of two.
    tokens: places in use of one program: whole blocks in a tile, or all of a tile that is part of a block.
    programs_per_row: programs of one head of one row of the batch. Some find nothing to do: where blocks begin is known
        on the device only.
    """

    is_split: bool
    tile: int
    tokens: int
    programs_per_row: int


class TileSizes(NamedTuple):
    """Places of a tile, powers of two: the usual number, the most that may hold a block, and that of larger blocks."""

    usual: int
    largest: int
    split: int


def tile_sizes(target: str, dtype: str, head_dim: int) -> TileSizes:
    """The table of tiles: as many places as the registers of the backward pass hold without spilling."""
    if dtype == "fp32":
        return TileSizes(64, 64, 32 if target_family(target) == "amd" else 16)
    return TileSizes(64, 64, 32 if width_of(head_dim) <= 64 else 16)


def diag_plan(
    target: str, dtype: str, head_dim: int, seq_len: int, block_size: int, num_sequences: int | None
) -> DiagPlan:
    """The plan of a call; the forward and the backward pass have the same. num_sequences: None where not packed."""
    tile, largest, split_tile = tile_sizes(target, dtype, head_dim)
    is_split = block_size > largest
    if is_split:
        tile, places = split_tile, block_size  # places that are given to a sequence at a time
        tokens, programs_per_place = split_tile, triton.cdiv(block_size, split_tile)
    else:
        tile = max(tile, triton.next_power_of_2(block_size))
        places = tokens = tile // block_size * block_size
        programs_per_place = 1
    # A row or a sequence may begin in the middle of a block.
    if num_sequences is None:
        count = triton.cdiv(seq_len + block_size - 1, places)
    else:
        count = seq_len // places + 2 * (num_sequences + 1)
    return DiagPlan(is_split, tile, tokens, count * programs_per_place)


def width_of(head_dim: int) -> int:
    """Channels of a tile: a power of two, of which each half has at least the 16 that `tl.dot` needs."""
    return max(32, padded_dim(head_dim))


def chunk_of(kernel: str, target: str, dtype: str, head_dim: int) -> int:
    """Channels that a program has in registers at a time, but for the sums of the split kernels."""
    is_wide = dtype == "fp32" or (kernel.endswith("backward") and target_family(target) != "amd")
    return min(width_of(head_dim), 32 if is_wide else 64)


def launch_options(kernel: str, target: str, dtype: str, head_dim: int, tile: int) -> dict[str, int]:
    """num_warps and num_stages of a kernel ("tile_forward", "split_backward", ...) for a plan's tile."""
    if target_family(target) == "amd":  # whose warps have 64 threads, of up to 512 registers
        warps = 4
    elif kernel == "split_forward":
        warps = 8 if tile * width_of(head_dim) > 64 * 64 else 4
    else:
        warps = 8 if kernel.endswith("backward") else 4
    return {"num_warps": warps, "num_stages": 1}


def kernel_constants(
    kernel: str,
    target: str,
    dtype: str,
    head_dim: int,
    tile: int,
    causal: bool,
    relu: bool,
    interpreted: bool = False,
) -> dict[str, Any]:
    """The constexprs of a kernel ("tile_forward", "split_backward", ...)."""
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": width_of(head_dim),
        **({} if kernel == "split_forward" else {"CHUNK": chunk_of(kernel, target, dtype, head_dim)}),
        "TILE": tile,
        "DOT_TYPE": dot_type(dtype, interpreted),
        # relu scores may outgrow float16, probabilities do not
        "MAP_TYPE": wide_dot_type(dtype, interpreted) if relu else dot_type(dtype, interpreted),
        "PRECISION": dot_precision(target, dtype),
        "CAUSAL": causal,
        "RELU": relu,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The registry for compiling ahead of time
# ---------------------------------------------------------------------------------------------------------------------


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    relu: bool
    causal: bool
    lrpe: bool = True
    mask: bool = False
    packed: bool = False
    dropout: bool = False


_USES = {
    "softmax, no lrpe": _Use(relu=False, causal=False, lrpe=False),
    "softmax, causal": _Use(relu=False, causal=True),
    "softmax, mask, dropout": _Use(relu=False, causal=False, mask=True, dropout=True),
    "softmax, causal, packed, dropout": _Use(relu=False, causal=True, packed=True, dropout=True),
    "relu, causal": _Use(relu=True, causal=True),
    "relu, mask, dropout": _Use(relu=True, causal=False, mask=True, dropout=True),
}


def _variants(kernel: Any, name: str) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        sizes = tile_sizes(target, dtype, head_dim)
        tiles = {sizes.split} if name.startswith("split") else {sizes.usual, sizes.largest}
        for tile in sorted(tiles):
            for use_name, use in _USES.items():
                constexprs = kernel_constants(name, target, dtype, head_dim, tile, use.causal, use.relu)
                constexprs |= dict.fromkeys(
                    (argument for argument in kernel.arg_names if argument.endswith("stride_d")), 1
                )
                types: dict[str, str | None] = dict.fromkeys(("scale", "dropout_p", "keep_scale"), "fp32")
                types |= {argument: f"*{dtype}" for argument in kernel.arg_names if argument.endswith("_ptr")}
                types |= dict.fromkeys(
                    ("grad_theta_ptr", "table_ptr", "householder_ptr"), "*fp32" if use.lrpe else None
                )
                types |= {"lse_ptr": None if use.relu else "*fp32", "positions_ptr": "*i64"}
                types |= {"is_real_ptr": "*i1" if use.mask else None, "seed_ptr": "*i64" if use.dropout else None}
                types |= {"cu_seqlens_ptr": "*i64" if use.packed else None}
                if name == "split_backward" and use.relu:
                    types["output_ptr"] = None
                absent = {argument: None for argument, type_ in types.items() if type_ is None}
                yield KernelVariant(
                    f"tile {tile}, {use_name}",
                    {argument: type_ for argument, type_ in types.items() if type_ is not None},
                    {
                        argument: value
                        for argument, value in (constexprs | absent).items()
                        if argument in kernel.arg_names
                    },
                    launch_options(name, target, dtype, head_dim, tile),
                )

    return variants


def _table_variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
    constexprs = {"HEAD_DIM": head_dim, "WIDTH": width_of(head_dim), "TILE": TABLE_TILE}
    yield KernelVariant("", {"table_ptr": "*fp32", "theta_ptr": "*fp32"}, constexprs, {"num_warps": 4, "num_stages": 1})


TABLE_TILE = 16
KERNELS: list[KernelSpec] = [
    KernelSpec("diag_table", diag_table_kernel, _table_variants),
    KernelSpec("diag_tile_forward", diag_tile_forward_kernel, _variants(diag_tile_forward_kernel, "tile_forward")),
    KernelSpec("diag_tile_backward", diag_tile_backward_kernel, _variants(diag_tile_backward_kernel, "tile_backward")),
    KernelSpec("diag_split_forward", diag_split_forward_kernel, _variants(diag_split_forward_kernel, "split_forward")),
    KernelSpec(
        "diag_split_backward", diag_split_backward_kernel, _variants(diag_split_backward_kernel, "split_backward")
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels read and write
# ---------------------------------------------------------------------------------------------------------------------


def diag_attention_traffic(
    batch_size: int,
    num_heads: int,
    seq_len: int,
    head_dim: int,
    dtype: str,
    *,
    block_size: int = 64,
    activation: str = "softmax",
    mask: bool = True,
    target: str = "sm_90",
) -> tuple[int, int]:
    """Bytes through device memory of a forward and of a backward pass with LRPE, counted program by program.

    With U = batch · heads · seq · head_dim · element size, one program of the tile kernels reads the q, k, v of its
    tokens and writes their output: 4 U in all. Its backward reads q, k, v, dO and writes dQ, dK, dV: 7 U. The map and
    its row sums stay in registers. q and k are read again by the program that has just read them, 32 KiB for 64 tokens
    of 128 channels in 16 bits, which its cache still has: they count once. Beside these a program reads one position
    and its part of the mask, and leaves WIDTH / 2 numbers for theta's gradient that are read once more to be summed:
    4 WIDTH bytes per `tokens` tokens of a head, 0.03 U for 64 tokens of 16 bits. The table of LRPE is counted once,
    however many programs read it: it is a few KiB that stay in the caches.

    Blocks larger than a tile: the forward pass writes a log-sum-exp per row as well, the backward pass reads it and O
    (8 U), and its programs for dQ and dK each leave a part of theta's gradient. Programs of one block run next to each
    other, so what they read of each other's tokens is in the second-level cache and counted once.
    """
    element_size, width = (4 if dtype == "fp32" else 2), width_of(head_dim)
    plan = diag_plan(target, dtype, head_dim, seq_len, block_size, None)
    per_block = triton.cdiv(block_size, plan.tile) if plan.is_split else 1
    tokens_of_programs = []
    for program in range(plan.programs_per_row):
        start = program // per_block * (block_size if plan.is_split else plan.tokens)
        part = program % per_block * plan.tile
        end = min(seq_len, start + block_size) if plan.is_split else min(seq_len, start + plan.tokens)
        tokens_of_programs.append(max(0, min(end - start - part, plan.tokens)))

    forward = backward = table = 2 * block_size * (width // 2) * 4
    forward += table  # written, then read
    row_statistics = 4 if plan.is_split and activation == "softmax" else 0
    for tokens in tokens_of_programs:
        program_bytes = 8 + tokens * mask if tokens else 8
        tile_bytes = tokens * head_dim * element_size
        forward += batch_size * num_heads * (program_bytes + 4 * tile_bytes + tokens * row_statistics)
        parts_of_theta = 2 if plan.is_split else 1
        backward += batch_size * num_heads * (program_bytes + 7 * tile_bytes + parts_of_theta * 2 * (width // 2) * 4)
        if row_statistics:
            backward += batch_size * num_heads * (tile_bytes + tokens * row_statistics)
    return forward, backward
