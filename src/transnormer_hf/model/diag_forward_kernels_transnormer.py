"""Triton kernels of DiagAttention, forward: the table of LRPE, a tile of whole blocks, a part of a larger block.

An overview of the kernels is in `diag_kernels_transnormer.py`.
"""

from .diag_tiles_transnormer import (
    UNSPECIALIZED,
    add_inner_products,
    find_vectors,
    load_halves,
    load_turned,
    locate_part,
    locate_tile,
    mark_dropped,
    masked_softmax,
    project,
    store_halves,
)
from .triton_features_transnormer import rotation, turn_fraction

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error


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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_tile_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t,
    value_ptr, value_stride_b, value_stride_h, value_stride_t,
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
    query_ptr, query_stride_t = find_vectors(
        query_ptr, row, head, first, query_stride_b, query_stride_h, query_stride_t
    )
    key_ptr, key_stride_t = find_vectors(key_ptr, row, head, first, key_stride_b, key_stride_h, key_stride_t)
    value_ptr, value_stride_t = find_vectors(
        value_ptr, row, head, first, value_stride_b, value_stride_h, value_stride_t
    )
    output_ptr, output_stride_t = find_vectors(
        output_ptr, row, head, first, output_stride_b, output_stride_h, output_stride_t
    )

    query_along = project(query_ptr, places, exists, query_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    key_along = project(key_ptr, places, is_key, key_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        query_first, query_second = load_turned(
            query_ptr, places, exists, query_stride_t, within,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, within,
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
            value_ptr, places, is_key, value_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        output_first = tl.dot(weights, value_first.to(MAP_TYPE), input_precision=PRECISION)  # (TILE, CHUNK / 2)
        output_second = tl.dot(weights, value_second.to(MAP_TYPE), input_precision=PRECISION)
        store_halves(
            output_ptr, output_first, output_second, places, exists, output_stride_t, False,
            chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_split_forward_kernel(
    query_ptr, query_stride_b, query_stride_h, query_stride_t,  # (batch, heads, seq, head_dim)
    key_ptr, key_stride_b, key_stride_h, key_stride_t,
    value_ptr, value_stride_b, value_stride_h, value_stride_t,
    output_ptr, output_stride_b, output_stride_h, output_stride_t,
    lse_ptr,  # (batch, heads, seq) float32: log of the sum of exp(scores), +inf where no key is visible; not for relu
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
    query_ptr, query_stride_t = find_vectors(
        query_ptr, row, head, first + part_start, query_stride_b, query_stride_h, query_stride_t
    )
    key_ptr, key_stride_t = find_vectors(key_ptr, row, head, first, key_stride_b, key_stride_h, key_stride_t)
    value_ptr, value_stride_t = find_vectors(
        value_ptr, row, head, first, value_stride_b, value_stride_h, value_stride_t
    )
    output_ptr, output_stride_t = find_vectors(
        output_ptr, row, head, first + part_start, output_stride_b, output_stride_h, output_stride_t
    )
    if not RELU:
        lse_ptr += (row * num_heads + head) * seq_len + first + part_start

    query_along = project(query_ptr, places, query_exists, query_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
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
        other_key_ptr = key_ptr + tl.cast(key_start, tl.int64) * key_stride_t
        key_along = project(other_key_ptr, places, is_key, key_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
        scores = tl.zeros((TILE, TILE), tl.float32)
        for chunk in range(0, WIDTH, CHUNK):
            # where there is one chunk, the compiler reads it once, before the loop over the keys
            query_first, query_second = load_turned(
                query_ptr, places, query_exists, query_stride_t, query_places,
                table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
            )  # fmt: skip
            key_first, key_second = load_turned(
                other_key_ptr, places, is_key, key_stride_t, key_places,
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
