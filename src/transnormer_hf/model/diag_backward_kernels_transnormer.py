"""Triton kernels of DiagAttention, backward: of a tile of whole blocks, and of a part of a larger block.

An overview of the kernels is in `diag_kernels_transnormer.py`.
"""

from .diag_tiles_transnormer import (
    UNSPECIALIZED,
    add_inner_products,
    find_vectors,
    load_halves,
    load_table,
    load_turned,
    locate_part,
    locate_tile,
    mark_dropped,
    masked_softmax,
    project,
    store_halves,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error


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
def map_product(scores, vectors, PRECISION: tl.constexpr):
    """scores^T vectors, (keys, channels) from (queries, keys) and (queries, channels); or queries and keys exchanged.

    It is the transpose of vectors^T scores, a wide product. Of a tall one the compiler would give each warp all columns
    of 16 rows: with 64 rows half of the warps would repeat the others' work, and every warp would hold all vectors.
    """
    return tl.trans(tl.dot(tl.trans(vectors), scores, input_precision=PRECISION))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_tile_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t,
    key_ptr, key_stride_b, key_stride_h, key_stride_t,
    value_ptr, value_stride_b, value_stride_h, value_stride_t,
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

    q and k are read (and turned) once for the map and again for dQ and dK, and dO once for dV and again for dP; by then
    they are in the cache.
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
    channels_stop = WIDTH
    if CHUNK == WIDTH:
        # Heads of one chunk: a loop of one turn whose end is known is no loop to the compiler, which then overlaps the
        # phases of the kernel and runs out of registers. That it cannot know this end (it is WIDTH) keeps them apart.
        channels_stop = tl.minimum(WIDTH, tile_tokens * WIDTH)
    # 32-bit from here on, within the tile: wide integers would cost the registers that the backward pass lacks
    exists = (places >= (begin - first).to(tl.int32)) & (places < tl.minimum(end - first, tile_tokens).to(tl.int32))
    is_key = exists
    if is_real_ptr is not None:
        is_key = tl.load(is_real_ptr + (row * is_real_stride_b + first) + places, mask=exists, other=0) != 0
    grad_ptr, grad_stride_t = find_vectors(grad_ptr, row, head, first, grad_stride_b, grad_stride_h, grad_stride_t)
    query_ptr, query_stride_t = find_vectors(
        query_ptr, row, head, first, query_stride_b, query_stride_h, query_stride_t
    )
    key_ptr, key_stride_t = find_vectors(key_ptr, row, head, first, key_stride_b, key_stride_h, key_stride_t)
    value_ptr, value_stride_t = find_vectors(
        value_ptr, row, head, first, value_stride_b, value_stride_h, value_stride_t
    )
    start, output_stride_t = find_vectors(0, row, head, first, output_stride_b, output_stride_h, output_stride_t)

    query_along = project(query_ptr, places, exists, query_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    key_along = project(key_ptr, places, is_key, key_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, channels_stop, CHUNK):
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

    dropped = weights
    if seed_ptr is not None:
        dropped = tl.maximum(weights, 0.0) * keep_scale
    dropped = dropped.to(MAP_TYPE)
    for chunk in range(0, channels_stop, CHUNK):
        grad_first, grad_second = load_halves(grad_ptr, places, exists, grad_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK)
        grad_value_first = map_product(dropped, grad_first.to(MAP_TYPE), PRECISION)  # (TILE, CHUNK / 2)
        grad_value_second = map_product(dropped, grad_second.to(MAP_TYPE), PRECISION)
        store_halves(
            grad_value_ptr + start, grad_value_first, grad_value_second, places, exists, output_stride_t, False,
            chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
    # a loop of its own, which need not hold the map as an operand
    grad_weights = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, channels_stop, CHUNK):
        grad_first, grad_second = load_halves(grad_ptr, places, exists, grad_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK)
        value_first, value_second = load_halves(
            value_ptr, places, is_key, value_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK
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
                key_ptr, places, is_key, key_stride_t, within,
                table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
            )  # fmt: skip
            grad_query_along += turn_back(
                map_product(grad_scores_t, key_first.to(DOT_TYPE).to(MAP_TYPE), PRECISION),
                map_product(grad_scores_t, key_second.to(DOT_TYPE).to(MAP_TYPE), PRECISION),
                exists, within, table_ptr, householder_ptr, block_size, chunk, HEAD_DIM, WIDTH, CHUNK,
            )[4]  # fmt: skip
        for chunk in range(0, WIDTH, CHUNK):  # again, because both forms of dS are too much to hold
            query_first, query_second = load_turned(
                query_ptr, places, exists, query_stride_t, within,
                table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
            )  # fmt: skip
            grad_key_along += turn_back(
                map_product(grad_scores, query_first.to(DOT_TYPE).to(MAP_TYPE), PRECISION),
                map_product(grad_scores, query_second.to(DOT_TYPE).to(MAP_TYPE), PRECISION),
                exists, within, table_ptr, householder_ptr, block_size, chunk, HEAD_DIM, WIDTH, CHUNK,
            )[4]  # fmt: skip
    for chunk in range(0, channels_stop, CHUNK):
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, within,
            table_ptr, householder_ptr, block_size, key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first = key_first.to(DOT_TYPE)
        key_second = key_second.to(DOT_TYPE)
        grad_first = map_product(grad_scores_t, key_first.to(MAP_TYPE), PRECISION)
        grad_second = map_product(grad_scores_t, key_second.to(MAP_TYPE), PRECISION)
        query_first, query_second = load_turned(
            query_ptr, places, exists, query_stride_t, within,
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
            map_product(grad_scores, query_first.to(MAP_TYPE), PRECISION),
            map_product(grad_scores, query_second.to(MAP_TYPE), PRECISION),
            key_first, key_second, places, exists, output_stride_t, within,
            table_ptr, householder_ptr, block_size, grad_key_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        if table_ptr is not None:
            tl.store(grad_theta_ptr + chunk // 2 + tl.arange(0, CHUNK // 2), grad_theta)


@triton.jit
def load_row_statistics(
    output_ptr, lse_ptr, grad_ptr, grad_stride_t, tokens, exists, stride_t,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """rowsum(O ∘ dO), which is rowsum(P ∘ dP), and the log-sum-exp of some queries: (queries,) each."""
    first, second = load_halves(output_ptr, tokens, exists, stride_t, 0, HEAD_DIM, WIDTH, WIDTH)
    grad_first, grad_second = load_halves(grad_ptr, tokens, exists, grad_stride_t, 0, HEAD_DIM, WIDTH, WIDTH)
    row_sums = tl.sum(first * grad_first + second * grad_second, 1)
    return row_sums, tl.load(lse_ptr + tokens, mask=exists, other=float("inf"))


@triton.jit
def split_map(
    query_ptr, query_stride_t, query_places, query_exists,  # pointers to the first of some tokens, of
    key_ptr, key_stride_t, key_places, is_key,  # which these are the places in the block
    places,  # 0, 1, 2, ...
    lse,  # of the queries; None for relu
    table_ptr, householder_ptr, seed_ptr, row_and_head, block_column, key_start, block_size, scale, dropout_p,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The map of some queries on some keys, dropped entries with a minus sign: (queries, keys) float32."""
    query_along = project(query_ptr, places, query_exists, query_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    key_along = project(key_ptr, places, is_key, key_stride_t, householder_ptr, HEAD_DIM, WIDTH, CHUNK)
    scores = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        query_first, query_second = load_turned(
            query_ptr, places, query_exists, query_stride_t, query_places,
            table_ptr, householder_ptr, block_size, query_along, chunk, HEAD_DIM, WIDTH, CHUNK,
        )  # fmt: skip
        key_first, key_second = load_turned(
            key_ptr, places, is_key, key_stride_t, key_places,
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
    grad_ptr, grad_stride_t, query_exists, value_ptr, value_stride_t, is_key, places,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dO V^T of some queries and keys: (queries, keys) float32."""
    grad_weights = tl.zeros((TILE, TILE), tl.float32)
    for chunk in range(0, WIDTH, CHUNK):
        grad_first, grad_second = load_halves(
            grad_ptr, places, query_exists, grad_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        value_first, value_second = load_halves(
            value_ptr, places, is_key, value_stride_t, chunk, HEAD_DIM, WIDTH, CHUNK
        )
        grad_weights = add_inner_products(
            grad_weights, grad_first, grad_second, value_first, value_second, DOT_TYPE, PRECISION
        )
    return grad_weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def diag_split_backward_kernel(
    grad_ptr, grad_stride_b, grad_stride_h, grad_stride_t,  # of the output
    query_ptr, query_stride_b, query_stride_h, query_stride_t,
    key_ptr, key_stride_b, key_stride_h, key_stride_t,
    value_ptr, value_stride_b, value_stride_h, value_stride_t,
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
    grad_ptr, grad_stride_t = find_vectors(grad_ptr, row, head, first, grad_stride_b, grad_stride_h, grad_stride_t)
    query_ptr, query_stride_t = find_vectors(
        query_ptr, row, head, first, query_stride_b, query_stride_h, query_stride_t
    )
    key_ptr, key_stride_t = find_vectors(key_ptr, row, head, first, key_stride_b, key_stride_h, key_stride_t)
    value_ptr, value_stride_t = find_vectors(
        value_ptr, row, head, first, value_stride_b, value_stride_h, value_stride_t
    )
    start, output_stride_t = find_vectors(0, row, head, first, output_stride_b, output_stride_h, output_stride_t)
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
                output_ptr + my_start * output_stride_t, lse_ptr + my_start, my_grad_ptr, grad_stride_t,
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
                my_query_ptr, query_stride_t, my_places, i_exist_now,
                other_key_ptr, key_stride_t, key_places, is_key,
                places, lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, key_start,
                block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
            )  # fmt: skip
            grad_weights = split_grad_of_map(
                my_grad_ptr, grad_stride_t, i_exist_now,
                value_ptr + tl.cast(key_start, tl.int64) * value_stride_t, value_stride_t, is_key,
                places, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION,
            )  # fmt: skip
            grad_scores = grad_of_scores(weights, grad_weights, row_sums, seed_ptr, keep_scale, RELU)
            grad_scores = (grad_scores * scale).to(MAP_TYPE)
            key_first, key_second = load_turned(
                other_key_ptr, places, is_key, key_stride_t, key_places,
                table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
            )  # fmt: skip
            sum_first = tl.dot(grad_scores, key_first.to(DOT_TYPE).to(MAP_TYPE), sum_first, input_precision=PRECISION)
            sum_second = tl.dot(
                grad_scores, key_second.to(DOT_TYPE).to(MAP_TYPE), sum_second, input_precision=PRECISION
            )
        my_first, my_second = load_turned(
            my_query_ptr, places, i_exist, query_stride_t, my_places,
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
                query_stride_t, query_places, query_exists,
                my_key_ptr, key_stride_t, my_places, i_am_key_now,
                places, query_lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, part_start,
                block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
            )  # fmt: skip
            if seed_ptr is not None:
                weights = tl.maximum(weights, 0.0) * keep_scale
            weights = tl.trans(weights.to(MAP_TYPE))
            grad_first, grad_second = load_halves(
                grad_ptr + tl.cast(query_start, tl.int64) * grad_stride_t, places, query_exists,
                grad_stride_t, 0, HEAD_DIM, WIDTH, WIDTH,
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
                other_grad_ptr, grad_stride_t, places, query_exists, output_stride_t, HEAD_DIM, WIDTH,
            )  # fmt: skip
        grad_weights = split_grad_of_map(
            other_grad_ptr, grad_stride_t, query_exists,
            my_value_ptr, value_stride_t, i_am_key_now,
            places, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION,
        )  # fmt: skip
        weights = split_map(
            other_query_ptr, query_stride_t, query_places, query_exists,
            my_key_ptr, key_stride_t, my_places, i_am_key_now,
            places, query_lse, table_ptr, householder_ptr, seed_ptr, row * num_heads + head, first, part_start,
            block_size, scale, dropout_p, HEAD_DIM, WIDTH, CHUNK, TILE, DOT_TYPE, PRECISION, CAUSAL, RELU,
        )  # fmt: skip
        grad_scores = grad_of_scores(weights, grad_weights, query_sums, seed_ptr, keep_scale, RELU)
        grad_scores = tl.trans((grad_scores * scale).to(MAP_TYPE))
        query_first, query_second = load_turned(
            other_query_ptr, places, query_exists, query_stride_t, query_places,
            table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
        )  # fmt: skip
        sum_first = tl.dot(grad_scores, query_first.to(DOT_TYPE).to(MAP_TYPE), sum_first, input_precision=PRECISION)
        sum_second = tl.dot(grad_scores, query_second.to(DOT_TYPE).to(MAP_TYPE), sum_second, input_precision=PRECISION)
    my_first, my_second = load_turned(
        my_key_ptr, places, i_am_key, key_stride_t, my_places,
        table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
    )  # fmt: skip
    grad_theta = store_turned_back(
        grad_key_ptr + start + my_start * output_stride_t,
        sum_first, sum_second, my_first, my_second, places, i_exist, output_stride_t,
        my_places, table_ptr, householder_ptr, block_size, None, 0, HEAD_DIM, WIDTH, WIDTH,
    )  # fmt: skip
    if table_ptr is not None:
        tl.store(grad_theta_ptr + pairs, grad_theta)
