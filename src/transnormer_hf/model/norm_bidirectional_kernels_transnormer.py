"""Triton kernels of bidirectional NormAttention: o_t = q'_t S with S = sum of k'_s^T v_s over the whole sequence.

An overview of all kernels of NormAttention is in `norm_kernels_transnormer.py`.
"""

from .norm_tiles_transnormer import (
    UNSPECIALIZED,
    add_outer_products,
    add_state_products,
    cast_states,
    find_segment,
    first_position,
    head_of,
    keep_real,
    load_lrpe,
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
    transpose_states,
    zero_states,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# The walks over a segment's tiles that the bidirectional kernels are made of
#
# Pointers are those of the head. disable_licm: what the compiler would move out of the loops, addresses mostly, is more
# than there are registers.


@triton.jit
def sum_key_values(
    states, key_ptr, value_ptr, real_ptr, key_row_stride, value_row_stride,
    begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """states + the sum of k'_t^T v_t."""
    cos_in_tile, sin_in_tile = rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        rows = start + tl.arange(0, BLOCK_T)
        keep = keep_real(real_ptr, rows, rows < end)
        key = load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        key = map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        states = add_outer_products(
            states, key.to(DOT), value_ptr, start, keep, value_row_stride,
            VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, DOT, PRECISION,
        )  # fmt: skip
    return states


@triton.jit
def write_outputs(
    states, query_ptr, output_ptr, query_row_stride, output_row_stride, begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """o_t = q'_t S."""
    cos_in_tile, sin_in_tile = rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    states = transpose_states(cast_states(states, WIDE, PARTS), PARTS)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        inside = start + tl.arange(0, BLOCK_T) < end
        query = load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        query = map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        query = query.to(WIDE)
        for part in tl.static_range(PARTS):
            output = tl.dot(states[part], query, input_precision=PRECISION)
            store_part(output_ptr, output, part, start, inside, output_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)


@triton.jit
def write_query_gradients(
    states, state_grads, query_ptr, output_grad_ptr, query_grad_ptr,
    query_row_stride, output_grad_row_stride, query_grad_row_stride, begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dq'_t = do_t S^T. Returns state_grads + the sum of q'_t^T do_t, and each angle's part in theta's gradient."""
    theta_grad = tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32)
    states = cast_states(states, WIDE, PARTS)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        inside = start + tl.arange(0, BLOCK_T) < end
        query = load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = rotation_of_rows(position + (start - begin) + tl.arange(0, BLOCK_T), high, low, LRPE)
        mapped = map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        state_grads = add_outer_products(
            state_grads, mapped.to(DOT), output_grad_ptr, start, inside, output_grad_row_stride,
            VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, DOT, PRECISION,
        )  # fmt: skip
        grad = add_state_products(
            tl.zeros((BLOCK_K, BLOCK_T), tl.float32), states, output_grad_ptr, start, inside, output_grad_row_stride,
            VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, WIDE, PRECISION,
        )  # fmt: skip
        grad, theta_part = map_tile_backward(
            grad, query, mapped, cos, sin, householder, position + (start - begin), FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K
        )
        theta_grad += theta_part
        store_tile(query_grad_ptr, grad, start, inside, query_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
    return state_grads, theta_grad


@triton.jit
def write_key_value_gradients(
    state_grads, theta_grad, key_ptr, value_ptr, real_ptr, key_grad_ptr, value_grad_ptr,
    key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride,
    begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dk'_t = v_t dS^T and dv_t = k'_t dS. Returns theta_grad with each angle's part in theta's gradient added.

    Tiles are not counted here: in the short kernel a count, the same for every loop, would live through those before.
    """
    state_grads = cast_states(state_grads, WIDE, PARTS)
    for offset in tl.range(0, end - begin, BLOCK_T, disable_licm=True):
        start = begin + offset
        rows = start + tl.arange(0, BLOCK_T)
        inside = rows < end
        keep = keep_real(real_ptr, rows, inside)
        key = load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = rotation_of_rows(position + (start - begin) + tl.arange(0, BLOCK_T), high, low, LRPE)
        mapped = map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        for part in tl.static_range(PARTS):
            grad = tl.dot(tl.trans(state_grads[part]), mapped.to(WIDE), input_precision=PRECISION)
            store_part(
                value_grad_ptr, grad, part, start, inside, value_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS
            )
        grad = add_state_products(
            tl.zeros((BLOCK_K, BLOCK_T), tl.float32), state_grads, value_ptr, start, keep, value_row_stride,
            VALUE_DIM, BLOCK_V, BLOCK_T, PARTS, WIDE, PRECISION,
        )  # fmt: skip
        grad, theta_part = map_tile_backward(
            grad, key, mapped, cos, sin, householder, position + (start - begin), FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K
        )
        theta_grad += theta_part
        store_tile(key_grad_ptr, grad, start, inside, key_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
    return theta_grad


# Bidirectional


@triton.jit(do_not_specialize=UNSPECIALIZED)
def state_kernel(
    key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence,
    SKIP: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """partial[segment, head] = sum over the segment of k'_t^T v_t; grid (segments, heads).

    With q and dO in place of k and v, it gives the partials of dS. SKIP "first" or "last" leaves out that segment of
    each sequence, which a causal scan never asks for.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    if SKIP == "first":
        end = tl.where(segment == first, begin, end)
    if SKIP == "last":
        end = tl.where(segment == last - 1, begin, end)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    states = sum_key_values(
        zero_states(BLOCK_K, BLOCK_V, PARTS),
        head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        row_of(real_ptr, batch, seq_len), key_row_stride, value_row_stride, begin, end,
        first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION, PARTS,
    )  # fmt: skip
    store_states(partial_ptr, states, segment, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_kernel(
    query_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr, initial_ptr, output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """o_t = q'_t S with the state of the whole sequence; grid (segments, heads). The first segment also stores S."""
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    states = sum_of_states(
        partial_ptr,
        first,
        last,
        initial_ptr,
        sequence,
        num_states,
        head,
        heads,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_K,
        BLOCK_V,
        PARTS,
    )
    exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
    store_states(state_ptr, states, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    write_outputs(
        states,
        head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        head_of(output_ptr, batch, head, output_batch_stride, output_head_stride),
        query_row_stride, output_row_stride, begin, end,
        first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_backward_kernel(
    query_ptr, output_grad_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr, state_ptr,
    query_grad_ptr, partial_ptr, theta_grad_ptr,
    query_batch_stride, query_head_stride, query_row_stride,
    output_grad_batch_stride, output_grad_head_stride, output_grad_row_stride,
    query_grad_batch_stride, query_grad_head_stride, query_grad_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dq'_t = do_t S^T, and partial[segment, head] = sum of q'_t^T do_t over the segment; grid (segments, heads)."""
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    states = sum_of_states(
        None, 0, 0, state_ptr, sequence, num_states, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
    )
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    state_grads, theta_grad = write_query_gradients(
        states,
        zero_states(BLOCK_K, BLOCK_V, PARTS),
        head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride),
        head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride),
        query_row_stride, output_grad_row_stride, query_grad_row_stride, begin, end,
        first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, PARTS,
    )  # fmt: skip
    store_states(partial_ptr, state_grads, segment, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)
    if LRPE:
        store_theta_gradient(theta_grad_ptr, theta_grad, segment, head, heads, HEAD_DIM, BLOCK_K)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_value_backward_kernel(
    key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr, state_grad_ptr,
    key_grad_ptr, value_grad_ptr, initial_grad_ptr, theta_grad_ptr,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride,
    value_grad_batch_stride, value_grad_head_stride, value_grad_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dk'_t = v_t dS^T and dv_t = k'_t dS, dS over the whole sequence; grid (segments, heads).

    The first segment also stores dS, which is the gradient of the initial state.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    state_grads = sum_of_states(
        partial_ptr, first, last, state_grad_ptr, sequence, num_states, head, heads,
        HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS,
    )  # fmt: skip
    if initial_grad_ptr is not None:
        exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
        store_states(
            initial_grad_ptr, state_grads, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
        )
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    theta_grad = write_key_value_gradients(
        state_grads,
        tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32),
        head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        row_of(real_ptr, batch, seq_len),
        head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride),
        head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride),
        key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride, begin, end,
        first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, PARTS,
    )  # fmt: skip
    if LRPE:
        store_theta_gradient(theta_grad_ptr, theta_grad, segment, head, heads, HEAD_DIM, BLOCK_K)


# Bidirectional, short


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, initial_ptr,
    output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`state_kernel` and `output_kernel` in one launch, the state never in memory; grid (batch, heads)."""
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    states = sum_of_states(
        None, 0, 0, initial_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
    )
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = first_position(position_ptr, batch, position_batch_stride, batch * 0, seq_len)
    states = sum_key_values(
        states,
        head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        row_of(real_ptr, batch, seq_len), key_row_stride, value_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION, PARTS,
    )  # fmt: skip
    if state_ptr is not None:
        store_states(state_ptr, states, batch, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)
    write_outputs(
        states,
        head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        head_of(output_ptr, batch, head, output_batch_stride, output_head_stride),
        query_row_stride, output_row_stride, batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_backward_kernel(
    query_ptr, key_ptr, value_ptr, output_grad_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr,
    initial_ptr, state_grad_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr, initial_grad_ptr, theta_grad_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    output_grad_batch_stride, output_grad_head_stride, output_grad_row_stride,
    query_grad_batch_stride, query_grad_head_stride, query_grad_row_stride,
    key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride,
    value_grad_batch_stride, value_grad_head_stride, value_grad_row_stride,
    position_batch_stride, seq_len,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All gradients of `short_kernel` in one launch: S from k and v, dq and dS, dk and dv; grid (batch, heads).

    k and v, read a second time, are still in the cache.
    """
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    states = sum_of_states(
        None, 0, 0, initial_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
    )
    key_ptr = head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    real_ptr = row_of(real_ptr, batch, seq_len)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = first_position(position_ptr, batch, position_batch_stride, batch * 0, seq_len)
    states = sum_key_values(
        states, key_ptr, value_ptr, real_ptr, key_row_stride, value_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION, PARTS,
    )  # fmt: skip
    state_grads = sum_of_states(
        None, 0, 0, state_grad_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
    )
    state_grads, theta_grad = write_query_gradients(
        states,
        state_grads,
        head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride),
        head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride),
        query_row_stride, output_grad_row_stride, query_grad_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, PARTS,
    )  # fmt: skip
    if initial_grad_ptr is not None:
        store_states(initial_grad_ptr, state_grads, batch, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)
    theta_grad = write_key_value_gradients(
        state_grads, theta_grad, key_ptr, value_ptr, real_ptr,
        head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride),
        head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride),
        key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, PARTS,
    )  # fmt: skip
    if LRPE:
        store_theta_gradient(theta_grad_ptr, theta_grad, batch, head, heads, HEAD_DIM, BLOCK_K)
