"""Triton kernels of causal NormAttention: scans over the tiles of a segment, with the state K^T V in registers.

An overview of all kernels of NormAttention is in `norm_kernels_transnormer.py`.
"""

from .norm_tiles_transnormer import (
    UNSPECIALIZED,
    add_outer_products,
    add_state_products,
    find_segment,
    first_position,
    head_of,
    keep_real,
    load_lrpe,
    load_part,
    load_tile,
    map_tile,
    map_tile_backward,
    rotation_of_rows,
    rotation_of_tile,
    row_of,
    store_part,
    store_states,
    store_theta_gradient,
    store_tile,
    sum_of_states,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr,
    initial_ptr, output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """o = (q' k'^T below the diagonal) v + q' S, tile by tile, S the state before the tile; grid (segments, heads).

    The state begins as the initial state plus the partials of the sequence's earlier segments; the last segment stores
    it.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    states = sum_of_states(
        partial_ptr, first, segment, initial_ptr, sequence, num_states, head, heads,
        HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS,
    )  # fmt: skip
    query_ptr = head_of(query_ptr, batch, head, query_batch_stride, query_head_stride)
    key_ptr = head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    output_ptr = head_of(output_ptr, batch, head, output_batch_stride, output_head_stride)
    real_ptr = row_of(real_ptr, batch, seq_len)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    cos_in_tile, sin_in_tile = rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    position = first_position(position_ptr, batch, position_batch_stride, begin, end)

    in_tile = tl.arange(0, BLOCK_T)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        rows = start + in_tile
        inside = rows < end
        keep = keep_real(real_ptr, rows, inside)
        query = load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        key = load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        query = map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        key = map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        scores = tl.dot(tl.trans(key.to(DOT)), query.to(DOT), input_precision=PRECISION)  # (keys, queries)
        scores = tl.where(in_tile[:, None] <= in_tile[None, :], scores, 0.0)
        sums = ()
        for part in tl.static_range(PARTS):
            value = load_part(value_ptr, part, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)
            output = tl.dot(value.to(WIDE), scores.to(WIDE), input_precision=PRECISION)  # (BLOCK_V / PARTS, BLOCK_T)
            output = tl.dot(tl.trans(states[part].to(WIDE)), query.to(WIDE), output, input_precision=PRECISION)
            sums += (tl.dot(key.to(DOT), tl.trans(value.to(DOT)), states[part], input_precision=PRECISION),)
            store_part(output_ptr, output, part, start, inside, output_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)
        states = sums
    exists = ((segment == last - 1) & (sequence < num_states)).to(tl.int32)
    store_states(state_ptr, states, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)


@triton.jit
def write_scan_gradients(
    segment, head, heads, batch, sequence, begin, end, first, last,
    query_ptr, key_ptr, value_ptr, output_grad_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, partial_ptr,
    initial_ptr, state_ptr, grad_partial_ptr, state_grad_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr,
    initial_grad_ptr, theta_grad_ptr, query_batch_stride, query_head_stride, query_row_stride, key_batch_stride,
    key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    output_grad_batch_stride, output_grad_head_stride, output_grad_row_stride, query_grad_batch_stride,
    query_grad_head_stride, query_grad_row_stride, key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride,
    value_grad_batch_stride, value_grad_head_stride, value_grad_row_stride, position_batch_stride, seq_len,
    num_states,
    theta_row, QUERY_GRAD: tl.constexpr, KEY_GRAD: tl.constexpr, VALUE_GRAD: tl.constexpr,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The walk of `scan_backward_kernel` over one segment, for dq, dk, dv or all three.

    Each gradient loads what it needs anew, from the cache: held in registers it all would not fit. The barriers keep
    the compiler from loading it earlier.
    """
    LRPE: tl.constexpr = theta_ptr is not None
    if QUERY_GRAD:
        if segment == last - 1:
            states = sum_of_states(
                None, 0, 0, state_ptr, sequence, num_states, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
            )
        else:
            states = sum_of_states(
                partial_ptr, first, segment + 1, initial_ptr, sequence, num_states, head, heads,
                HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS,
            )  # fmt: skip
    if KEY_GRAD or VALUE_GRAD:
        state_grads = sum_of_states(
            grad_partial_ptr, segment + 1, last, state_grad_ptr, sequence, num_states, head, heads,
            HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS,
        )  # fmt: skip
    query_ptr = head_of(query_ptr, batch, head, query_batch_stride, query_head_stride)
    key_ptr = head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    output_grad_ptr = head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride)
    query_grad_ptr = head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride)
    key_grad_ptr = head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride)
    value_grad_ptr = head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride)
    real_ptr = row_of(real_ptr, batch, seq_len)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = first_position(position_ptr, batch, position_batch_stride, begin, end)

    theta_grad = tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32)
    in_tile = tl.arange(0, BLOCK_T)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    for step in tl.range(0, tiles, disable_licm=True):
        start = begin + (tiles - 1 - step) * BLOCK_T
        rows = start + in_tile
        inside = rows < end
        keep = keep_real(real_ptr, rows, inside)
        cos, sin = rotation_of_rows(position + (start - begin) + in_tile, high, low, LRPE)
        if QUERY_GRAD or VALUE_GRAD:
            key = load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            key = map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(DOT)
        if KEY_GRAD or VALUE_GRAD:
            query = load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            query = map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(
                DOT
            )

        if VALUE_GRAD:
            scores = tl.dot(tl.trans(query), key, input_precision=PRECISION)  # (queries, keys)
            scores = tl.where(in_tile[:, None] >= in_tile[None, :], scores, 0.0)
            for part in tl.static_range(PARTS):
                tl.debug_barrier()
                output_grad = load_part(
                    output_grad_ptr, part, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS
                )
                grad = tl.dot(output_grad.to(WIDE), scores.to(WIDE), input_precision=PRECISION)
                grad = tl.dot(tl.trans(state_grads[part].to(WIDE)), key.to(WIDE), grad, input_precision=PRECISION)
                store_part(
                    value_grad_ptr, grad, part, start, inside, value_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS
                )

        if QUERY_GRAD or KEY_GRAD:
            scores_grad = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)  # (queries, keys)
            for part in tl.static_range(PARTS):
                tl.debug_barrier()
                value = load_part(value_ptr, part, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)
                output_grad = load_part(
                    output_grad_ptr, part, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS
                )
                scores_grad = tl.dot(
                    tl.trans(output_grad.to(DOT)), value.to(DOT), scores_grad, input_precision=PRECISION
                )
            scores_grad = tl.where(in_tile[:, None] >= in_tile[None, :], scores_grad, 0.0)
            scores_grad = scores_grad.to(WIDE)

        if KEY_GRAD:  # for padding k' and v are zero, and with them the gradients
            grad = tl.dot(query.to(WIDE), scores_grad, input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
            grad = add_state_products(
                grad, state_grads, value_ptr, start, keep, value_row_stride,
                VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, WIDE, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            tile = load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            mapped = map_tile(tile, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
            grad, theta_part = map_tile_backward(
                grad, tile, mapped, cos, sin, householder, position + (start - begin),
                FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            theta_grad += theta_part
            store_tile(key_grad_ptr, grad, start, inside, key_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)

        if QUERY_GRAD:
            grad = tl.dot(key.to(WIDE), tl.trans(scores_grad), input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
            states = add_outer_products(
                states, -key, value_ptr, start, keep, value_row_stride,
                VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, DOT, PRECISION,
            )  # fmt: skip
            grad = add_state_products(
                grad, states, output_grad_ptr, start, inside, output_grad_row_stride,
                VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, WIDE, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            tile = load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            mapped = map_tile(tile, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
            grad, theta_part = map_tile_backward(
                grad, tile, mapped, cos, sin, householder, position + (start - begin),
                FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            theta_grad += theta_part
            store_tile(query_grad_ptr, grad, start, inside, query_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)

        if KEY_GRAD or VALUE_GRAD:  # dS
            state_grads = add_outer_products(
                state_grads, query, output_grad_ptr, start, inside, output_grad_row_stride,
                VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, DOT, PRECISION,
            )  # fmt: skip
    if VALUE_GRAD and initial_grad_ptr is not None:
        exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
        store_states(
            initial_grad_ptr, state_grads, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
        )
    if LRPE and (QUERY_GRAD or KEY_GRAD):
        store_theta_gradient(theta_grad_ptr, theta_grad, theta_row, head, heads, HEAD_DIM, BLOCK_K)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_backward_kernel(
    query_ptr, key_ptr, value_ptr, output_grad_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr,
    partial_ptr, initial_ptr, state_ptr, grad_partial_ptr, state_grad_ptr,
    query_grad_ptr, key_grad_ptr, value_grad_ptr, initial_grad_ptr, theta_grad_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    output_grad_batch_stride, output_grad_head_stride, output_grad_row_stride,
    query_grad_batch_stride, query_grad_head_stride, query_grad_row_stride,
    key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride,
    value_grad_batch_stride, value_grad_head_stride, value_grad_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    TOGETHER: tl.constexpr,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of `scan_kernel`; grid (segments, heads), or three times the segments where not TOGETHER.

    With S the state before a tile, dS the gradient of the state after it, and both products below the diagonal:
        dq' = (do v^T) k' + do S^T      dk' = (do v^T)^T q' + v dS^T      dv = (q' k'^T)^T do + k' dS

    The walk is from the last tile to the first. dS grows on it by q'^T do. S is needed in the same direction: as
    nothing ever decays, it is had by taking k'^T v of each tile off the state after the segment. That costs a rounding,
    as on the way there, and saves a second pass over q, k, v and do.

    S and dS fit into the registers together up to head_dim 64. For wider heads a segment has a program for each of dq,
    dk and dv, that walk side by side: what one has loaded the others find in the cache. The first two have a row each
    in theta's gradient.
    """
    ROLES: tl.constexpr = 1 if TOGETHER else 3
    segment, head, heads = tl.program_id(0) // ROLES, tl.program_id(1), tl.num_programs(1)
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    for role in tl.static_range(ROLES):
        if tl.program_id(0) % ROLES == role:
            write_scan_gradients(
                segment, head, heads, batch, sequence, begin, end, first, last,
                query_ptr, key_ptr, value_ptr, output_grad_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr,
                partial_ptr, initial_ptr, state_ptr, grad_partial_ptr, state_grad_ptr, query_grad_ptr, key_grad_ptr,
                value_grad_ptr, initial_grad_ptr, theta_grad_ptr, query_batch_stride, query_head_stride,
                query_row_stride, key_batch_stride, key_head_stride, key_row_stride, value_batch_stride,
                value_head_stride, value_row_stride, output_grad_batch_stride, output_grad_head_stride,
                output_grad_row_stride, query_grad_batch_stride, query_grad_head_stride, query_grad_row_stride,
                key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride, value_grad_batch_stride,
                value_grad_head_stride, value_grad_row_stride, position_batch_stride, seq_len, num_states,
                segment if TOGETHER else 2 * segment + role,
                TOGETHER or role == 0, TOGETHER or role == 1, TOGETHER or role == 2,
                FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, PARTS,
            )  # fmt: skip
