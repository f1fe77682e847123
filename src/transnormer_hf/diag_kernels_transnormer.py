"""Triton kernels of DiagAttention: ordinary attention inside non-overlapping blocks, forward and backward.

With s = scale · q k^T inside a block, seen keys only, the kernels compute

    softmax:  P = softmax(s)     relu:  P = max(s, 0)        O = (P ∘ D) V

(D: dropout, 0 or 1 / (1 - p)) and in the backward pass, with everything but the row statistics computed again,

    dV = (P ∘ D)^T dO,   dP = D ∘ (dO V^T),   dS = P ∘ (dP - rowsum(P ∘ dP))  or  dS = [s > 0] ∘ dP,
    dQ = scale · dS K,   dK = scale · dS^T Q,

where Q and K carry LRPE, whose gradient goes on to q, k and theta.

There are two forms. A block that fits into a tile (`"tile"`: the usual one, several small blocks together) is read
once, and its scores never leave the chip: q, k, v in and o out, then q, k, v, dO in and dQ, dK, dV out. A block that is
too large for that (`"split"`) is walked over in tiles as in FlashAttention; what is read again comes from the cache.

Blocks start where a sequence starts. Nothing about that is known on the host: every program finds its own columns from
the position of the first token, or from cu_seqlens.

The definition these must equal is `eager_diag_attention` in `ops_transnormer.py`.
"""

from typing import Any, NamedTuple

from .triton_features_transnormer import (
    dot_precision,
    dot_type,
    padded_dim,
    reflect,
    rotate,
    rotate_back,
    rotation,
    rotation_gradient,
    turn_fraction,
    wide_dot_type,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of DiagAttention need the triton package") from error

# ---------------------------------------------------------------------------------------------------------------------
# Where a program's tokens stand
# ---------------------------------------------------------------------------------------------------------------------


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
        SEARCH: tl.constexpr = 64
        first = tl.full((), 0, tl.int64) + seq_len
        begin = first
        end = first
        tiles_before = tl.full((), 0, tl.int32)
        sequence = tl.full((), 0, tl.int32)
        # Sequences are counted off 64 at a time. Tokens past the last boundary form a sequence of their own.
        while (sequence <= num_sequences) & (tiles_before <= tile):
            candidates = sequence + tl.arange(0, SEARCH)
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
            sequence += SEARCH
    else:
        # positions are negative on leading padding, and % of a negative number has its sign
        begun = tl.load(positions_ptr).to(tl.int64) % block_size
        begun = tl.where(begun < 0, begun + block_size, begun)
        first = tile.to(tl.int64) * tile_tokens - begun
        begin = tl.full((), 0, tl.int64)
        end = tl.full((), 0, tl.int64) + seq_len
    return first, begin, end


# ---------------------------------------------------------------------------------------------------------------------
# Vectors, in two halves of their channels
#
# No sum over channels minds their order. With LRPE the halves are the even and the odd channels, so that a rotation is
# plain arithmetic between two tiles; without, they are the first and the last channels, read and written as they lie.
# Halves also keep fewer registers busy than whole tiles do.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_halves(pointer, columns, exists, stride_t, stride_d, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One head's vectors at the given columns, zeros where there is none: two (tokens, WIDTH / 2) float32."""
    rows = pointer + columns[:, None] * stride_t
    if PAIRS:
        channels = tl.arange(0, WIDTH)[None, :]
        whole = tl.load(rows + channels * stride_d, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
        first, second = tl.split(tl.reshape(whole.to(tl.float32), (columns.shape[0], WIDTH // 2, 2)))
        return first, second
    else:
        channels = tl.arange(0, WIDTH // 2)[None, :]
        first = tl.load(rows + channels * stride_d, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
        channels += WIDTH // 2
        second = tl.load(rows + channels * stride_d, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
        return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_halves(pointer, first, second, columns, exists, stride_t, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_halves`, for a tensor whose channels lie side by side."""
    rows = pointer + columns[:, None] * stride_t
    element_type = pointer.dtype.element_ty
    if PAIRS:
        channels = tl.arange(0, WIDTH)[None, :]
        whole = tl.reshape(tl.join(first, second), (columns.shape[0], WIDTH)).to(element_type)
        tl.store(rows + channels, whole, mask=exists[:, None] & (channels < HEAD_DIM))
    else:
        channels = tl.arange(0, WIDTH // 2)[None, :]
        tl.store(rows + channels, first.to(element_type), mask=exists[:, None] & (channels < HEAD_DIM))
        channels += WIDTH // 2
        tl.store(rows + channels, second.to(element_type), mask=exists[:, None] & (channels < HEAD_DIM))


@triton.jit
def load_lrpe(places, theta_ptr, householder_ptr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """cos and sin of place · theta, (tokens, WIDTH / 2) each, and the reflection's even and odd channels."""
    pairs = tl.arange(0, WIDTH // 2)
    inside = pairs < HEAD_DIM // 2
    high, low = turn_fraction(tl.load(theta_ptr + pairs, mask=inside, other=0.0).to(tl.float32))
    cos, sin = rotation(places, high, low)
    even = tl.load(householder_ptr + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(householder_ptr + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    return cos, sin, even, odd


@triton.jit
def reflect_pairs(even, odd, householder_even, householder_odd):
    """(I - 2 v v^T) x for every row x; its own inverse and its own gradient."""
    along = 2 * (tl.sum(even * householder_even[None, :], 1) + tl.sum(odd * householder_odd[None, :], 1))
    return even - along[:, None] * householder_even[None, :], odd - along[:, None] * householder_odd[None, :]


@triton.jit
def load_turned(
    pointer, columns, exists, stride_t, stride_d, places, theta_ptr, householder_ptr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Queries or keys with LRPE, where there is one."""
    first, second = load_halves(pointer, columns, exists, stride_t, stride_d, theta_ptr is not None, HEAD_DIM, WIDTH)
    if theta_ptr is not None:
        cos, sin, householder_even, householder_odd = load_lrpe(places, theta_ptr, householder_ptr, HEAD_DIM, WIDTH)
        even, odd = reflect_pairs(first, second, householder_even, householder_odd)
        first = even * cos - odd * sin
        second = even * sin + odd * cos
    return first, second


@triton.jit
def store_turned_back(
    pointer, grad_first, grad_second, turned_first, turned_second, columns, exists, stride_t, places,
    theta_ptr, householder_ptr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of queries or keys, given the one after LRPE; returns their part of theta's, (WIDTH / 2,).

    y = R(angle) x has dy / dangle = (-y_odd, y_even), and angle = place · theta. cos and sin are computed once more:
    that is cheaper than to keep them through the kernel.
    """
    grad_theta = tl.zeros((WIDTH // 2,), tl.float32)
    if theta_ptr is not None:
        grad_angle = grad_second * turned_first.to(tl.float32) - grad_first * turned_second.to(tl.float32)
        grad_theta = tl.sum(grad_angle * places.to(tl.float32)[:, None], 0)
        cos, sin, householder_even, householder_odd = load_lrpe(places, theta_ptr, householder_ptr, HEAD_DIM, WIDTH)
        grad_even = grad_first * cos + grad_second * sin
        grad_odd = grad_second * cos - grad_first * sin
        grad_first, grad_second = reflect_pairs(grad_even, grad_odd, householder_even, householder_odd)
    store_halves(
        pointer, grad_first, grad_second, columns, exists, stride_t, theta_ptr is not None, HEAD_DIM, WIDTH
    )
    return grad_theta


@triton.jit
def inner_products(row_first, row_second, column_first, column_second, PRECISION: tl.constexpr):
    """rows columns^T, the sum over both halves of the channels: (rows, columns) float32."""
    products = tl.dot(row_first, tl.trans(column_first), input_precision=PRECISION)
    return tl.dot(row_second, tl.trans(column_second), products, input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------------------------------
# Scores, dropout
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_factors(seed_ptr, row_and_head, query_columns, key_start, dropout_p, keep_scale, KEYS: tl.constexpr):
    """0 or 1 / (1 - p) for a tile of the map: (queries, KEYS) float32.

    The random bits of an entry come from a counter made of its place alone (head, column of the query, number of the
    key), so that the backward pass meets the same ones, in whatever order and tiles. One draw serves four keys.
    """
    groups = key_start // 4 + tl.arange(0, KEYS // 4)
    zeros = tl.zeros((query_columns.shape[0], KEYS // 4), tl.int32)
    first, second, third, fourth = tl.philox(
        tl.load(seed_ptr), groups[None, :] + zeros, query_columns.to(tl.int32)[:, None] + zeros, row_and_head.to(tl.int32) + zeros, zeros
    )
    bits = tl.join(tl.join(first, third), tl.join(second, fourth))  # (queries, KEYS / 4, 2, 2)
    bits = tl.reshape(bits, (query_columns.shape[0], KEYS))
    uniform = (bits >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))  # exact, in [0, 1)
    return tl.where(uniform >= dropout_p, keep_scale, 0.0)


@triton.jit
def masked_softmax(scores, visible):
    """Softmax of each row over its visible entries, zeros for a row that has none."""
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.max(scores, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - highest[:, None])
    total = tl.sum(weights, 1)
    return weights / tl.where(total == 0.0, 1.0, total)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# A whole tile at once
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size", "tile_tokens"])
def diag_tile_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr, output_stride_b, output_stride_h, output_stride_t,
    theta_ptr, householder_ptr,  # (head_dim / 2,), (head_dim,)
    positions_ptr, positions_stride_b,  # (batch, seq) or (seq,) with stride 0
    is_real_ptr, is_real_stride_b,  # (batch, seq)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    seed_ptr,  # (1,)
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size, tile_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
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
    columns = first + places
    exists = (places < tile_tokens) & (columns >= begin) & (columns < end)
    is_key = exists
    if is_real_ptr is not None:
        is_key = tl.load(is_real_ptr + row * is_real_stride_b + columns, mask=exists, other=0) != 0
    query_ptr += row * query_stride_b + head * query_stride_h
    key_ptr += row * key_stride_b + head * key_stride_h
    value_ptr += row * value_stride_b + head * value_stride_h
    output_ptr += row * output_stride_b + head * output_stride_h

    query_first, query_second = load_turned(
        query_ptr, columns, exists, query_stride_t, query_stride_d, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH
    )
    key_first, key_second = load_turned(
        key_ptr, columns, is_key, key_stride_t, key_stride_d, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH
    )
    scores = scale * inner_products(
        query_first.to(DOT_TYPE), query_second.to(DOT_TYPE), key_first.to(DOT_TYPE), key_second.to(DOT_TYPE), PRECISION
    )  # (TILE, TILE)
    visible = is_key[None, :] & (places[:, None] // block_size == places[None, :] // block_size)
    if CAUSAL:
        visible &= places[:, None] >= places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        weights = masked_softmax(scores, visible)
    if seed_ptr is not None:
        weights *= dropout_factors(seed_ptr, row * num_heads + head, columns, 0, dropout_p, keep_scale, TILE)
    weights = weights.to(MAP_TYPE)
    value_first, value_second = load_halves(
        value_ptr, columns, is_key, value_stride_t, value_stride_d, False, HEAD_DIM, WIDTH
    )
    output_first = tl.dot(weights, value_first.to(MAP_TYPE), input_precision=PRECISION)  # (TILE, WIDTH / 2)
    output_second = tl.dot(weights, value_second.to(MAP_TYPE), input_precision=PRECISION)
    store_halves(output_ptr, output_first, output_second, columns, exists, output_stride_t, False, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size", "tile_tokens"])
def diag_tile_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t, grad_stride_d,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    grad_query_ptr, grad_key_ptr, grad_value_ptr, output_stride_b, output_stride_h, output_stride_t,  # all three alike
    grad_theta_ptr,  # (programs, WIDTH / 2) float32, summed afterwards
    theta_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size, tile_tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The same tile once more: reads 4 tiles, writes 3. The map and its row sums are computed again on the chip."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    tile = program // num_heads % programs_per_row
    row = (program // num_heads // programs_per_row).to(tl.int64)
    pairs = tl.arange(0, WIDTH // 2)
    grad_theta_ptr += program.to(tl.int64) * (WIDTH // 2)
    first, begin, end = locate_tile(
        tile, positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, tile_tokens
    )
    if first >= end:
        if theta_ptr is not None:
            tl.store(grad_theta_ptr + pairs, tl.zeros((WIDTH // 2,), tl.float32))
        return
    places = tl.arange(0, TILE)
    within = places % block_size
    columns = first + places
    exists = (places < tile_tokens) & (columns >= begin) & (columns < end)
    is_key = exists
    if is_real_ptr is not None:
        is_key = tl.load(is_real_ptr + row * is_real_stride_b + columns, mask=exists, other=0) != 0
    grad_ptr += row * grad_stride_b + head * grad_stride_h
    query_ptr += row * query_stride_b + head * query_stride_h
    key_ptr += row * key_stride_b + head * key_stride_h
    value_ptr += row * value_stride_b + head * value_stride_h
    start = row * output_stride_b + head * output_stride_h

    query_first, query_second = load_turned(
        query_ptr, columns, exists, query_stride_t, query_stride_d, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH
    )
    query_first = query_first.to(DOT_TYPE)
    query_second = query_second.to(DOT_TYPE)
    key_first, key_second = load_turned(
        key_ptr, columns, is_key, key_stride_t, key_stride_d, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH
    )
    key_first = key_first.to(DOT_TYPE)
    key_second = key_second.to(DOT_TYPE)
    scores = inner_products(query_first, query_second, key_first, key_second, PRECISION) * scale  # (TILE, TILE)
    visible = is_key[None, :] & (places[:, None] // block_size == places[None, :] // block_size)
    if CAUSAL:
        visible &= places[:, None] >= places[None, :]
    if RELU:
        weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
    else:
        weights = masked_softmax(scores, visible)

    grad_first, grad_second = load_halves(
        grad_ptr, columns, exists, grad_stride_t, grad_stride_d, False, HEAD_DIM, WIDTH
    )
    grad_first = grad_first.to(DOT_TYPE)
    grad_second = grad_second.to(DOT_TYPE)
    value_first, value_second = load_halves(
        value_ptr, columns, is_key, value_stride_t, value_stride_d, False, HEAD_DIM, WIDTH
    )
    grad_weights = inner_products(
        grad_first, grad_second, value_first.to(DOT_TYPE), value_second.to(DOT_TYPE), PRECISION
    )
    dropped = weights
    if seed_ptr is not None:
        factors = dropout_factors(seed_ptr, row * num_heads + head, columns, 0, dropout_p, keep_scale, TILE)
        grad_weights *= factors
        dropped = weights * factors
    dropped = tl.trans(dropped.to(MAP_TYPE))
    grad_value_first = tl.dot(dropped, grad_first.to(MAP_TYPE), input_precision=PRECISION)  # (TILE, WIDTH / 2)
    grad_value_second = tl.dot(dropped, grad_second.to(MAP_TYPE), input_precision=PRECISION)
    store_halves(
        grad_value_ptr + start, grad_value_first, grad_value_second, columns, exists, output_stride_t, False, HEAD_DIM, WIDTH
    )

    if RELU:
        grad_scores = tl.where(weights > 0.0, grad_weights, 0.0)
    else:
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
    grad_scores = (grad_scores * scale).to(MAP_TYPE)
    grad_theta = store_turned_back(
        grad_query_ptr + start,
        tl.dot(grad_scores, key_first.to(MAP_TYPE), input_precision=PRECISION),
        tl.dot(grad_scores, key_second.to(MAP_TYPE), input_precision=PRECISION),
        query_first, query_second, columns, exists, output_stride_t, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH,
    )  # fmt: skip
    grad_scores = tl.trans(grad_scores)
    grad_theta += store_turned_back(
        grad_key_ptr + start,
        tl.dot(grad_scores, query_first.to(MAP_TYPE), input_precision=PRECISION),
        tl.dot(grad_scores, query_second.to(MAP_TYPE), input_precision=PRECISION),
        key_first, key_second, columns, exists, output_stride_t, within, theta_ptr, householder_ptr, HEAD_DIM, WIDTH,
    )  # fmt: skip
    if theta_ptr is not None:
        tl.store(grad_theta_ptr + pairs, grad_theta)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks larger than a tile
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def locate_part(
    number, positions_ptr, cu_seqlens_ptr, seq_len, num_sequences, block_size, PART: tl.constexpr
):
    """Where part `number` of a row lies, every block being cut into parts of PART tokens.

    Returns the block's first place (a column that may lie before its sequence), the columns [begin, end) of the block
    that exist, and the number of the part's first token in the block.
    """
    parts_per_block = tl.cdiv(block_size, PART)
    first, begin, end = locate_tile(
        number // parts_per_block, positions_ptr, cu_seqlens_ptr, seq_len, num_sequences, block_size, block_size
    )
    return first, begin, tl.minimum(end, first + block_size), number % parts_per_block * PART


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size"])
def diag_split_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr, output_stride_b, output_stride_h, output_stride_t,
    lse_ptr,  # (batch, heads, seq) float32: log of the sum of exp(scores), +inf where no key is visible; not for relu
    theta_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: TILE queries of one block and head against the block's keys, TILE at a time, with a running softmax."""
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
    query_columns = first + query_places
    query_exists = (query_columns >= begin) & (query_columns < end)
    query_ptr += row * query_stride_b + head * query_stride_h
    key_ptr += row * key_stride_b + head * key_stride_h
    value_ptr += row * value_stride_b + head * value_stride_h
    output_ptr += row * output_stride_b + head * output_stride_h
    if not RELU:
        lse_ptr += (row * num_heads + head) * seq_len

    query = load_rows(query_ptr, query_columns, query_exists, query_stride_t, query_stride_d, HEAD_DIM, WIDTH)
    if theta_ptr is not None:
        householder = load_householder(householder_ptr, HEAD_DIM, WIDTH)
        cos, sin = load_rotation(query_places, theta_ptr, HEAD_DIM, WIDTH)
        query = rotate(reflect(query, householder), cos, sin, TILE, WIDTH)
    query = query.to(DOT_TYPE)
    output = tl.zeros((TILE, WIDTH), tl.float32)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    stop = (end - first).to(tl.int32)
    if CAUSAL:
        stop = tl.minimum(stop, part_start + TILE)
    for key_start in range(0, stop, TILE):
        key_places = key_start + places
        key_columns = first + key_places
        is_key = (key_columns >= begin) & (key_columns < end)
        if is_real_ptr is not None:
            is_key = tl.load(is_real_ptr + row * is_real_stride_b + key_columns, mask=is_key, other=0) != 0
        key = load_rows(key_ptr, key_columns, is_key, key_stride_t, key_stride_d, HEAD_DIM, WIDTH)
        if theta_ptr is not None:
            cos, sin = load_rotation(key_places, theta_ptr, HEAD_DIM, WIDTH)
            key = rotate(reflect(key, householder), cos, sin, TILE, WIDTH)
        scores = tl.dot(query, tl.trans(key.to(DOT_TYPE)), input_precision=PRECISION) * scale  # (TILE, TILE)
        visible = is_key[None, :] & (query_places[:, None] >= 0)
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
            output *= shrink[:, None]
        if seed_ptr is not None:
            weights *= dropout_factors(
                seed_ptr, (row * num_heads + head).to(tl.int32), query_columns, key_start, dropout_p, keep_scale, TILE
            )
        value = load_rows(value_ptr, key_columns, is_key, value_stride_t, value_stride_d, HEAD_DIM, WIDTH)
        output += tl.dot(weights.to(MAP_TYPE), value.to(MAP_TYPE), input_precision=PRECISION)
    if not RELU:
        output /= tl.where(total == 0.0, 1.0, total)[:, None]
        lse = tl.where(total == 0.0, float("inf"), highest + tl.log(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + query_columns, lse, mask=query_exists)
    store_rows(output_ptr, output, query_columns, query_exists, output_stride_t, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=["seq_len", "num_sequences", "programs_per_row", "block_size"])
def diag_split_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t, grad_stride_d,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_ptr, key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_ptr, value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_ptr,  # the forward pass's; not for relu, as lse_ptr
    grad_query_ptr, grad_key_ptr, grad_value_ptr, output_stride_b, output_stride_h, output_stride_t,  # all four alike
    lse_ptr,
    grad_theta_ptr,  # (programs, WIDTH / 2) float32, summed afterwards
    theta_ptr, householder_ptr,
    positions_ptr, positions_stride_b,
    is_real_ptr, is_real_stride_b,
    cu_seqlens_ptr,
    seed_ptr,
    scale, dropout_p, keep_scale,
    num_heads, seq_len, num_sequences, programs_per_row, block_size,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, MAP_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One program: TILE tokens of one block and head, first as queries (dQ), then as keys (dK, dV).

    The row sums of P ∘ dP are those of O ∘ dO, so the saved output and the saved log-sum-exp stand for the whole row.
    """
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    row = (program // num_heads // programs_per_row).to(tl.int64)
    pairs = tl.arange(0, WIDTH // 2)
    grad_theta_ptr += program.to(tl.int64) * (WIDTH // 2)
    first, begin, end, part_start = locate_part(
        program // num_heads % programs_per_row,
        positions_ptr + row * positions_stride_b, cu_seqlens_ptr, seq_len, num_sequences, block_size, TILE,
    )  # fmt: skip
    if first + part_start >= end:
        if theta_ptr is not None:
            tl.store(grad_theta_ptr + pairs, tl.zeros((WIDTH // 2,), tl.float32))
        return
    places = tl.arange(0, TILE)
    my_places = part_start + places
    my_columns = first + my_places
    i_exist = (my_columns >= begin) & (my_columns < end)
    grad_ptr += row * grad_stride_b + head * grad_stride_h
    query_ptr += row * query_stride_b + head * query_stride_h
    key_ptr += row * key_stride_b + head * key_stride_h
    value_ptr += row * value_stride_b + head * value_stride_h
    start = row * output_stride_b + head * output_stride_h
    if not RELU:
        output_ptr += start
        lse_ptr += (row * num_heads + head) * seq_len
    row_and_head = (row * num_heads + head).to(tl.int32)
    if theta_ptr is not None:
        householder = load_householder(householder_ptr, HEAD_DIM, WIDTH)
        grad_theta = tl.zeros((WIDTH // 2,), tl.float32)

    # my tokens as queries
    query = load_rows(query_ptr, my_columns, i_exist, query_stride_t, query_stride_d, HEAD_DIM, WIDTH)
    grad = load_rows(grad_ptr, my_columns, i_exist, grad_stride_t, grad_stride_d, HEAD_DIM, WIDTH)
    if theta_ptr is not None:
        cos, sin = load_rotation(my_places, theta_ptr, HEAD_DIM, WIDTH)
        query = rotate(reflect(query, householder), cos, sin, TILE, WIDTH)
    query = query.to(DOT_TYPE)
    if not RELU:
        output = load_rows(output_ptr, my_columns, i_exist, output_stride_t, 1, HEAD_DIM, WIDTH)
        row_sums = tl.sum(output * grad, 1)
        lse = tl.load(lse_ptr + my_columns, mask=i_exist, other=float("inf"))
    grad = grad.to(DOT_TYPE)
    grad_query = tl.zeros((TILE, WIDTH), tl.float32)
    stop = (end - first).to(tl.int32)
    if CAUSAL:
        stop = tl.minimum(stop, part_start + TILE)
    for key_start in range(0, stop, TILE):
        key_places = key_start + places
        key_columns = first + key_places
        is_key = (key_columns >= begin) & (key_columns < end)
        if is_real_ptr is not None:
            is_key = tl.load(is_real_ptr + row * is_real_stride_b + key_columns, mask=is_key, other=0) != 0
        key = load_rows(key_ptr, key_columns, is_key, key_stride_t, key_stride_d, HEAD_DIM, WIDTH)
        if theta_ptr is not None:
            cos, sin = load_rotation(key_places, theta_ptr, HEAD_DIM, WIDTH)
            key = rotate(reflect(key, householder), cos, sin, TILE, WIDTH)
        key = key.to(DOT_TYPE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        value = load_rows(value_ptr, key_columns, is_key, value_stride_t, value_stride_d, HEAD_DIM, WIDTH)
        grad_scores = tl.dot(grad, tl.trans(value.to(DOT_TYPE)), input_precision=PRECISION)
        if seed_ptr is not None:
            grad_scores *= dropout_factors(
                seed_ptr, row_and_head, my_columns, key_start, dropout_p, keep_scale, TILE
            )
        visible = is_key[None, :] & (my_places[:, None] >= 0)
        if CAUSAL:
            visible &= my_places[:, None] >= key_places[None, :]
        if RELU:
            grad_scores = tl.where(visible & (scores > 0.0), grad_scores, 0.0)
        else:
            weights = tl.exp(tl.where(visible, scores, float("-inf")) - lse[:, None])
            grad_scores = weights * (grad_scores - row_sums[:, None])
        grad_query += tl.dot((grad_scores * scale).to(MAP_TYPE), key.to(MAP_TYPE), input_precision=PRECISION)
    if theta_ptr is not None:
        cos, sin = load_rotation(my_places, theta_ptr, HEAD_DIM, WIDTH)
        grad_query, grad_theta = rotate_backward(
            grad_query, query.to(tl.float32), my_places, householder, cos, sin, TILE, WIDTH
        )
    store_rows(grad_query_ptr + start, grad_query, my_columns, i_exist, output_stride_t, HEAD_DIM, WIDTH)

    # my tokens as keys
    i_am_key = i_exist
    if is_real_ptr is not None:
        i_am_key = tl.load(is_real_ptr + row * is_real_stride_b + my_columns, mask=i_exist, other=0) != 0
    my_key = load_rows(key_ptr, my_columns, i_am_key, key_stride_t, key_stride_d, HEAD_DIM, WIDTH)
    if theta_ptr is not None:
        cos, sin = load_rotation(my_places, theta_ptr, HEAD_DIM, WIDTH)
        my_key = rotate(reflect(my_key, householder), cos, sin, TILE, WIDTH)
    my_key = my_key.to(DOT_TYPE)
    my_value = load_rows(value_ptr, my_columns, i_am_key, value_stride_t, value_stride_d, HEAD_DIM, WIDTH).to(DOT_TYPE)
    grad_key = tl.zeros((TILE, WIDTH), tl.float32)
    grad_value = tl.zeros((TILE, WIDTH), tl.float32)
    query_begin = 0
    if CAUSAL:
        query_begin = part_start
    for query_start in range(query_begin, (end - first).to(tl.int32), TILE):
        query_places = query_start + places
        query_columns = first + query_places
        query_exists = (query_columns >= begin) & (query_columns < end)
        query = load_rows(query_ptr, query_columns, query_exists, query_stride_t, query_stride_d, HEAD_DIM, WIDTH)
        grad = load_rows(grad_ptr, query_columns, query_exists, grad_stride_t, grad_stride_d, HEAD_DIM, WIDTH)
        if theta_ptr is not None:
            cos, sin = load_rotation(query_places, theta_ptr, HEAD_DIM, WIDTH)
            query = rotate(reflect(query, householder), cos, sin, TILE, WIDTH)
        query = query.to(DOT_TYPE)
        scores = tl.dot(query, tl.trans(my_key), input_precision=PRECISION) * scale
        visible = i_am_key[None, :] & query_exists[:, None]
        if CAUSAL:
            visible &= query_places[:, None] >= my_places[None, :]
        if RELU:
            weights = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
        else:
            output = load_rows(output_ptr, query_columns, query_exists, output_stride_t, 1, HEAD_DIM, WIDTH)
            row_sums = tl.sum(output * grad, 1)
            lse = tl.load(lse_ptr + query_columns, mask=query_exists, other=float("inf"))
            weights = tl.exp(tl.where(visible, scores, float("-inf")) - lse[:, None])
        grad = grad.to(DOT_TYPE)
        grad_scores = tl.dot(grad, tl.trans(my_value), input_precision=PRECISION)
        dropped = weights
        if seed_ptr is not None:
            factors = dropout_factors(
                seed_ptr, row_and_head, query_columns, part_start, dropout_p, keep_scale, TILE
            )
            grad_scores *= factors
            dropped = weights * factors
        grad_value += tl.dot(tl.trans(dropped.to(MAP_TYPE)), grad.to(MAP_TYPE), input_precision=PRECISION)
        if RELU:
            grad_scores = tl.where(weights > 0.0, grad_scores, 0.0)
        else:
            grad_scores = weights * (grad_scores - row_sums[:, None])
        grad_key += tl.dot(tl.trans((grad_scores * scale).to(MAP_TYPE)), query.to(MAP_TYPE), input_precision=PRECISION)
    store_rows(grad_value_ptr + start, grad_value, my_columns, i_exist, output_stride_t, HEAD_DIM, WIDTH)
    if theta_ptr is not None:
        cos, sin = load_rotation(my_places, theta_ptr, HEAD_DIM, WIDTH)
        grad_key, more = rotate_backward(
            grad_key, my_key.to(tl.float32), my_places, householder, cos, sin, TILE, WIDTH
        )
        tl.store(grad_theta_ptr + pairs, grad_theta + more)
    store_rows(grad_key_ptr + start, grad_key, my_columns, i_exist, output_stride_t, HEAD_DIM, WIDTH)


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


def tile_sizes(target: str, dtype: str, head_dim: int) -> tuple[int, int, int]:
    """The usual tile, the largest tile that may hold a whole block, and the tile of larger blocks."""
    width = padded_dim(head_dim)
    if dtype == "fp32":
        return (64, 64, 32) if width <= 64 else (32, 32, 32)
    return (64, 128, 64) if width <= 64 else (64, 64, 64)


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


def launch_options(
    kernel: str, target: str, dtype: str, head_dim: int, tile: int, relu: bool, interpreted: bool = False
) -> dict[str, Any]:
    """Constants and num_warps of a kernel ("tile_forward", ...) for a plan's tile."""
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": padded_dim(head_dim),
        "TILE": tile,
        "DOT_TYPE": dot_type(dtype, interpreted),
        # relu scores may outgrow float16, probabilities do not
        "MAP_TYPE": wide_dot_type(dtype, interpreted) if relu else dot_type(dtype, interpreted),
        "PRECISION": dot_precision(target, dtype),
        "num_warps": 8 if tile * padded_dim(head_dim) > 64 * 64 else 4,
        "num_stages": 1,
    }
