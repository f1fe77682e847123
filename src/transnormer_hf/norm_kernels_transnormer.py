"""The Triton kernels of NormAttention: o_t = phi(q_t) S, S = sum of phi(k_s)^T v_s, without a denominator (Eqs. 13-14).

Below, q' and k' stand for phi and LRPE applied; both happen on the tiles as they are loaded, so that q' and k' never
exist in memory. A program works on one *segment* of one sequence and one head: it walks over the segment in tiles of
BLOCK_T tokens with the (head_dim, head_dim) state in registers. Segments of a sequence meet through *partials*, the
sums K'^T V of each segment, (segments, heads, head_dim, head_dim) float32 in memory; they are added up in order, so
that two runs give the same bits.

    bidirectional   _state_kernel               partials of K'^T V
                    _output_kernel              S = all partials, o = q' S
      backward      _query_backward_kernel      dq' = do S^T, and partials of dS = Q'^T dO
                    _key_value_backward_kernel  dk' = v dS^T, dv = k' dS
    causal          _state_kernel               as above, where there is more than one segment
                    _scan_kernel                o = (q' k'^T below the diagonal) v + q' S, S before the tile
      backward      _state_kernel               partials of Q'^T dO, where there is more than one segment
                    _scan_backward_kernel       dq, dk, dv in one pass from the last tile to the first
    short           _short_kernel               all of it in one launch, for sequences of up to 128 tokens
      backward      _short_backward_kernel      so too
    decoding        _step_kernel                one token: S += k'^T v, o = q' S

Tiles lie with their channels along the first axis, (head_dim, BLOCK_T), and the products are written for that:
o^T = S^T q'^T. So the state is always the left operand, whose rows the warps share out among them, however short the
tile of tokens; as the right operand every warp would hold the whole of it.

The launches, and the derivatives as torch sees them, are in `norm_autograd_transnormer.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .triton_features_transnormer import (
    KernelSpec,
    KernelVariant,
    dot_precision,
    dot_type,
    map_features,
    map_features_backward,
    padded_dim,
    rotation_at,
    turn_fraction,
    wide_dot_type,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# The length, and what follows from it, must not make Triton compile anew.
_LENGTHS = ["seq_len", "segment_length", "segments_per_sequence", "num_states"]


# Pieces of the kernels


@triton.jit
def _find_segment(segment, table_ptr, segments_per_sequence, segment_length, seq_len):
    """Batch row, state row, first and end token of a segment, and the range of segments that its sequence has.

    Packed sequences have a table of them, (segments, 5) integers; a table entry that is not used has sequence -1.
    """
    if table_ptr is None:
        sequence = segment // segments_per_sequence
        first = sequence * segments_per_sequence
        start = tl.minimum((segment - first) * segment_length, seq_len)
        end = tl.minimum(start + segment_length, seq_len)
        return sequence, sequence, start, end, first, first + segments_per_sequence
    else:
        entry = table_ptr + segment * 5
        sequence = tl.load(entry)
        return segment * 0, sequence, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def _head_of(tensor_ptr, batch, head, batch_stride, head_stride):
    """Where a head of a (batch, heads, seq, head_dim) tensor begins; 64-bit, tensors may have over 2^31 elements."""
    return tensor_ptr + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _row_of(real_ptr, batch, seq_len):
    """Where a row of the (batch, seq) mask begins."""
    if real_ptr is None:
        return real_ptr
    else:
        return real_ptr + batch.to(tl.int64) * seq_len


@triton.jit
def _load_tile(head_ptr, start, keep, row_stride, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tokens start, start + 1, ... of a head, one per column: (CHANNELS, BLOCK_T) float32.

    Zeros stand for the tokens that are not kept and for the channels beyond WIDTH. Only the tile's beginning is a
    64-bit offset: one number for the program, where 64 bits for each element would cost it registers.
    """
    channels = tl.arange(0, CHANNELS)
    offsets = tl.arange(0, BLOCK_T)[None, :] * row_stride + channels[:, None]
    tile_ptr = head_ptr + start.to(tl.int64) * row_stride + offsets
    return tl.load(tile_ptr, mask=(channels < WIDTH)[:, None] & keep[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(
    head_ptr, tile, start, keep, row_stride, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr
):
    channels = tl.arange(0, CHANNELS)
    offsets = tl.arange(0, BLOCK_T)[None, :] * row_stride + channels[:, None]
    tile_ptr = head_ptr + start.to(tl.int64) * row_stride + offsets
    tl.store(tile_ptr, tile.to(head_ptr.dtype.element_ty), mask=(channels < WIDTH)[:, None] & keep[None, :])


@triton.jit
def _state_offsets(
    index, head, heads, exists,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a state in (index, heads, head_dim, value_dim), contiguous; `exists` is 0 to mask all."""
    rows, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    base = (index.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM)
    offsets = base + rows[:, None] * VALUE_DIM + columns[None, :]
    return offsets, (rows < HEAD_DIM * exists)[:, None] & (columns < VALUE_DIM)[None, :]


@triton.jit
def _sum_of_states(
    partial_ptr, begin, end, initial_ptr, sequence, num_states, head, heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """initial[sequence] + partial[begin] + ... + partial[end - 1], float32 (BLOCK_K, BLOCK_V); either may be None."""
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if initial_ptr is not None:
        offsets, inside = _state_offsets(
            sequence, head, heads, (sequence < num_states).to(tl.int32), HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
        )
        state += tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if partial_ptr is not None:
        for step in range(0, end - begin):
            offsets, inside = _state_offsets(begin + step, head, heads, 1, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
            state += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    return state


@triton.jit
def _store_state(
    state_ptr, state, index, exists, head, heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    offsets, inside = _state_offsets(index, head, heads, exists, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    tl.store(state_ptr + offsets, state, mask=inside)


@triton.jit
def _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """theta as a fraction of a turn, (BLOCK_K / 2,) twice, and the reflection's vector times sqrt(2), (BLOCK_K,)."""
    if theta_ptr is None:
        return 0, 0, 0
    else:
        pairs, columns = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K)
        high, low = turn_fraction(tl.load(theta_ptr + pairs, mask=pairs < HEAD_DIM // 2, other=0.0).to(tl.float32))
        householder = tl.load(householder_ptr + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
        return high, low, householder * 1.4142135623730951


@triton.jit
def _first_position(position_ptr, batch, batch_stride, begin, end):
    """The position of a segment's first token; those of the others follow one by one."""
    if position_ptr is None:
        return 0
    else:
        return tl.load(position_ptr + batch.to(tl.int64) * batch_stride + begin, mask=begin < end, other=0).to(tl.int32)


@triton.jit
def _rotation_of_rows(positions, high, low, LRPE: tl.constexpr):
    """cos and sin of positions · theta, (BLOCK_K / 2, BLOCK_T)."""
    if LRPE:
        return rotation_at(positions[None, :], high[:, None], low[:, None])
    else:
        return 0, 0


@triton.jit
def _rotation_of_tile(position, cos_in_tile, sin_in_tile, high, low, LRPE: tl.constexpr):
    """cos and sin of a tile whose first token stands at `position`, from those of a tile at 0 (addition theorem)."""
    if LRPE:
        cos, sin = rotation_at(position + tl.zeros((1, 1), tl.int32), high[:, None], low[:, None])  # (BLOCK_K / 2, 1)
        return cos_in_tile * cos - sin_in_tile * sin, sin_in_tile * cos + cos_in_tile * sin
    else:
        return 0, 0


@triton.jit
def _split_pairs(tile, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The even and the odd channels of a tile, (BLOCK_K / 2, BLOCK_T) each."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_K // 2, 2, BLOCK_T)), (0, 2, 1)))


@triton.jit
def _join_pairs(even, odd, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (BLOCK_K, BLOCK_T))


@triton.jit
def _reflect(tile, householder):
    """(I - 2 v v^T) on each column, for sqrt(2) v; its own inverse and gradient."""
    return tile - householder[:, None] * tl.sum(tile * householder[:, None], 0)[None, :]


@triton.jit
def _keep_real(real_ptr, rows, inside):
    """Which rows of a tile hold a token that others may see."""
    if real_ptr is None:
        return inside
    else:
        return inside & (tl.load(real_ptr + rows, mask=inside, other=0) != 0)


@triton.jit
def _map_tile(
    tile, keep, cos, sin, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q' or k' of a tile: phi, then LRPE; zero for the tokens that are not kept, for any phi."""
    tile = map_features(tile, FEATURE_MAP)
    if FEATURE_MAP == "1+elu":
        tile = tl.where((tl.arange(0, BLOCK_K) < HEAD_DIM)[:, None] & keep[None, :], tile, 0.0)
    if LRPE:
        even, odd = _split_pairs(_reflect(tile, householder), BLOCK_T, BLOCK_K)
        tile = _join_pairs(even * cos - odd * sin, even * sin + odd * cos, BLOCK_T, BLOCK_K)
    return tile


@triton.jit
def _map_tile_backward(
    grad, tile, mapped, cos, sin, householder, position,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile as loaded, from the gradient of `_map_tile`'s result, and each angle's part in theta's.

    With y = R(angle) x, dy/dangle is (-y_odd, y_even); the angle is position · theta. position: the first token's.
    """
    theta_grad = 0.0
    if LRPE:
        grad_even, grad_odd = _split_pairs(grad, BLOCK_T, BLOCK_K)
        even, odd = _split_pairs(mapped, BLOCK_T, BLOCK_K)
        positions = (position + tl.arange(0, BLOCK_T)).to(tl.float32)
        theta_grad = (grad_odd * even - grad_even * odd) * positions[None, :]  # (BLOCK_K / 2, BLOCK_T)
        grad = _join_pairs(grad_even * cos + grad_odd * sin, grad_odd * cos - grad_even * sin, BLOCK_T, BLOCK_K)
        grad = _reflect(grad, householder)
    return map_features_backward(grad, tile, FEATURE_MAP), theta_grad


@triton.jit
def _store_theta_gradient(
    theta_grad_ptr, theta_grad, index, head, heads, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Each program has a row of its own in (segments, heads, head_dim / 2); the rows are summed outside, in order."""
    pairs = tl.arange(0, BLOCK_K // 2)
    row_ptr = theta_grad_ptr + (index.to(tl.int64) * heads + head) * (HEAD_DIM // 2)
    tl.store(row_ptr + pairs, tl.sum(theta_grad, 1), mask=pairs < HEAD_DIM // 2)


# The walks over a segment's tiles that the bidirectional kernels are made of
#
# Pointers are those of the head. disable_licm: what the compiler would move out of the loops, addresses mostly, is more
# than there are registers.


@triton.jit
def _sum_key_values(
    state, key_ptr, value_ptr, real_ptr, key_row_stride, value_row_stride, begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """state + the sum of k'_t^T v_t."""
    cos_in_tile, sin_in_tile = _rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        rows = start + tl.arange(0, BLOCK_T)
        keep = _keep_real(real_ptr, rows, rows < end)
        key = _load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        cos, sin = _rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        key = _map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        state = tl.dot(key.to(DOT), tl.trans(value.to(DOT)), state, input_precision=PRECISION)
    return state


@triton.jit
def _write_outputs(
    state, query_ptr, output_ptr, query_row_stride, output_row_stride, begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_t = q'_t S."""
    cos_in_tile, sin_in_tile = _rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    state = tl.trans(state.to(WIDE))  # (BLOCK_V, BLOCK_K)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        inside = start + tl.arange(0, BLOCK_T) < end
        query = _load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        cos, sin = _rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        query = _map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        output = tl.dot(state, query.to(WIDE), input_precision=PRECISION)  # (BLOCK_V, BLOCK_T)
        _store_tile(output_ptr, output, start, inside, output_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)


@triton.jit
def _write_query_gradients(
    state, state_grad, query_ptr, output_grad_ptr, query_grad_ptr,
    query_row_stride, output_grad_row_stride, query_grad_row_stride, begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq'_t = do_t S^T. Returns state_grad + the sum of q'_t^T do_t, and each angle's part in theta's gradient."""
    theta_grad = tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32)
    state = state.to(WIDE)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        inside = start + tl.arange(0, BLOCK_T) < end
        query = _load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        output_grad = _load_tile(output_grad_ptr, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        cos, sin = _rotation_of_rows(position + (start - begin) + tl.arange(0, BLOCK_T), high, low, LRPE)
        mapped = _map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        state_grad = tl.dot(mapped.to(DOT), tl.trans(output_grad.to(DOT)), state_grad, input_precision=PRECISION)
        grad = tl.dot(state, output_grad.to(WIDE), input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
        grad, theta_part = _map_tile_backward(
            grad, query, mapped, cos, sin, householder, position + (start - begin), FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K
        )
        theta_grad += theta_part
        _store_tile(query_grad_ptr, grad, start, inside, query_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
    return state_grad, theta_grad


@triton.jit
def _write_key_value_gradients(
    state_grad, theta_grad, key_ptr, value_ptr, real_ptr, key_grad_ptr, value_grad_ptr,
    key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride,
    begin, end, position, high, low, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk'_t = v_t dS^T and dv_t = k'_t dS. Returns theta_grad with each angle's part in theta's gradient added."""
    state_grad = state_grad.to(WIDE)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        rows = start + tl.arange(0, BLOCK_T)
        inside = rows < end
        keep = _keep_real(real_ptr, rows, inside)
        key = _load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        cos, sin = _rotation_of_rows(position + (start - begin) + tl.arange(0, BLOCK_T), high, low, LRPE)
        mapped = _map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        value_grad = tl.dot(tl.trans(state_grad), mapped.to(WIDE), input_precision=PRECISION)  # (BLOCK_V, BLOCK_T)
        _store_tile(value_grad_ptr, value_grad, start, inside, value_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        grad = tl.dot(state_grad, value.to(WIDE), input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
        grad, theta_part = _map_tile_backward(
            grad, key, mapped, cos, sin, householder, position + (start - begin), FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K
        )
        theta_grad += theta_part
        _store_tile(key_grad_ptr, grad, start, inside, key_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
    return theta_grad


# Bidirectional


@triton.jit(do_not_specialize=_LENGTHS)
def _state_kernel(
    key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence,
    SKIP: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[segment, head] = sum over the segment of k'_t^T v_t; grid (segments, heads).

    With q and dO in place of k and v, it gives the partials of dS. SKIP "first" or "last" leaves out that segment of
    each sequence, which a causal scan never asks for.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    if SKIP == "first":
        end = tl.where(segment == first, begin, end)
    if SKIP == "last":
        end = tl.where(segment == last - 1, begin, end)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    state = _sum_key_values(
        tl.zeros((BLOCK_K, BLOCK_V), tl.float32),
        _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        _row_of(real_ptr, batch, seq_len), key_row_stride, value_row_stride, begin, end,
        _first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION,
    )  # fmt: skip
    _store_state(partial_ptr, state, segment, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=_LENGTHS)
def _output_kernel(
    query_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr, initial_ptr, output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_t = q'_t S with the state of the whole sequence; grid (segments, heads). The first segment also stores S."""
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    state = _sum_of_states(
        partial_ptr, first, last, initial_ptr, sequence, num_states, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
    _store_state(state_ptr, state, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    _write_outputs(
        state,
        _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        _head_of(output_ptr, batch, head, output_batch_stride, output_head_stride),
        query_row_stride, output_row_stride, begin, end,
        _first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _query_backward_kernel(
    query_ptr, output_grad_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr, state_ptr,
    query_grad_ptr, partial_ptr, theta_grad_ptr,
    query_batch_stride, query_head_stride, query_row_stride,
    output_grad_batch_stride, output_grad_head_stride, output_grad_row_stride,
    query_grad_batch_stride, query_grad_head_stride, query_grad_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq'_t = do_t S^T, and partial[segment, head] = sum of q'_t^T do_t over the segment; grid (segments, heads)."""
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    state = _sum_of_states(
        None, 0, 0, state_ptr, sequence, num_states, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    state_grad, theta_grad = _write_query_gradients(
        state,
        tl.zeros((BLOCK_K, BLOCK_V), tl.float32),
        _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        _head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride),
        _head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride),
        query_row_stride, output_grad_row_stride, query_grad_row_stride, begin, end,
        _first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION,
    )  # fmt: skip
    _store_state(partial_ptr, state_grad, segment, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    if LRPE:
        _store_theta_gradient(theta_grad_ptr, theta_grad, segment, head, heads, HEAD_DIM, BLOCK_K)


@triton.jit(do_not_specialize=_LENGTHS)
def _key_value_backward_kernel(
    key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr, state_grad_ptr,
    key_grad_ptr, value_grad_ptr, initial_grad_ptr, theta_grad_ptr,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    key_grad_batch_stride, key_grad_head_stride, key_grad_row_stride,
    value_grad_batch_stride, value_grad_head_stride, value_grad_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk'_t = v_t dS^T and dv_t = k'_t dS, dS over the whole sequence; grid (segments, heads).

    The first segment also stores dS, which is the gradient of the initial state.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    state_grad = _sum_of_states(
        partial_ptr, first, last, state_grad_ptr, sequence, num_states, head, heads,
        HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    if initial_grad_ptr is not None:
        exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
        _store_state(initial_grad_ptr, state_grad, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    theta_grad = _write_key_value_gradients(
        state_grad,
        tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32),
        _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        _row_of(real_ptr, batch, seq_len),
        _head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride),
        _head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride),
        key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride, begin, end,
        _first_position(position_ptr, batch, position_batch_stride, begin, end), high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION,
    )  # fmt: skip
    if LRPE:
        _store_theta_gradient(theta_grad_ptr, theta_grad, segment, head, heads, HEAD_DIM, BLOCK_K)


# Bidirectional, short


@triton.jit(do_not_specialize=_LENGTHS)
def _short_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, initial_ptr,
    output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_state_kernel` and `_output_kernel` in one launch, the state never in memory; grid (batch, heads)."""
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    state = _sum_of_states(
        None, 0, 0, initial_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = _first_position(position_ptr, batch, position_batch_stride, batch * 0, seq_len)
    state = _sum_key_values(
        state,
        _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride),
        _row_of(real_ptr, batch, seq_len), key_row_stride, value_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION,
    )  # fmt: skip
    if state_ptr is not None:
        _store_state(state_ptr, state, batch, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    _write_outputs(
        state,
        _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        _head_of(output_ptr, batch, head, output_batch_stride, output_head_stride),
        query_row_stride, output_row_stride, batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _short_backward_kernel(
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
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of `_short_kernel` in one launch: S from k and v, dq and dS, dk and dv; grid (batch, heads).

    k and v, read a second time, are still in the cache.
    """
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    state = _sum_of_states(
        None, 0, 0, initial_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    key_ptr = _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    real_ptr = _row_of(real_ptr, batch, seq_len)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = _first_position(position_ptr, batch, position_batch_stride, batch * 0, seq_len)
    state = _sum_key_values(
        state, key_ptr, value_ptr, real_ptr, key_row_stride, value_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, PRECISION,
    )  # fmt: skip
    state_grad = _sum_of_states(
        None, 0, 0, state_grad_ptr, batch, batch + 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    state_grad, theta_grad = _write_query_gradients(
        state,
        state_grad,
        _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        _head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride),
        _head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride),
        query_row_stride, output_grad_row_stride, query_grad_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION,
    )  # fmt: skip
    if initial_grad_ptr is not None:
        _store_state(initial_grad_ptr, state_grad, batch, 1, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    theta_grad = _write_key_value_gradients(
        state_grad, theta_grad, key_ptr, value_ptr, real_ptr,
        _head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride),
        _head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride),
        key_row_stride, value_row_stride, key_grad_row_stride, value_grad_row_stride,
        batch * 0, seq_len, position, high, low, householder,
        FEATURE_MAP, LRPE, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION,
    )  # fmt: skip
    if LRPE:
        _store_theta_gradient(theta_grad_ptr, theta_grad, batch, head, heads, HEAD_DIM, BLOCK_K)


# Causal


@triton.jit(do_not_specialize=_LENGTHS)
def _scan_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, table_ptr, partial_ptr,
    initial_ptr, output_ptr, state_ptr,
    query_batch_stride, query_head_stride, query_row_stride, key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride, output_batch_stride, output_head_stride, output_row_stride,
    position_batch_stride, seq_len, segment_length, segments_per_sequence, num_states,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = (q' k'^T below the diagonal) v + q' S, tile by tile, S the state before the tile; grid (segments, heads).

    The state begins as the initial state plus the partials of the sequence's earlier segments; the last segment stores
    it.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    state = _sum_of_states(
        partial_ptr, first, segment, initial_ptr, sequence, num_states, head, heads,
        HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    query_ptr = _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride)
    key_ptr = _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    output_ptr = _head_of(output_ptr, batch, head, output_batch_stride, output_head_stride)
    real_ptr = _row_of(real_ptr, batch, seq_len)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    cos_in_tile, sin_in_tile = _rotation_of_rows(tl.arange(0, BLOCK_T), high, low, LRPE)
    position = _first_position(position_ptr, batch, position_batch_stride, begin, end)

    in_tile = tl.arange(0, BLOCK_T)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_T), disable_licm=True):
        start = begin + step * BLOCK_T
        rows = start + in_tile
        inside = rows < end
        keep = _keep_real(real_ptr, rows, inside)
        query = _load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        key = _load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        cos, sin = _rotation_of_tile(position + (start - begin), cos_in_tile, sin_in_tile, high, low, LRPE)
        query = _map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        key = _map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        scores = tl.dot(tl.trans(key.to(DOT)), query.to(DOT), input_precision=PRECISION)  # (keys, queries)
        scores = tl.where(in_tile[:, None] <= in_tile[None, :], scores, 0.0)
        output = tl.dot(value.to(WIDE), scores.to(WIDE), input_precision=PRECISION)  # (BLOCK_V, BLOCK_T)
        output = tl.dot(tl.trans(state.to(WIDE)), query.to(WIDE), output, input_precision=PRECISION)
        state = tl.dot(key.to(DOT), tl.trans(value.to(DOT)), state, input_precision=PRECISION)
        _store_tile(output_ptr, output, start, inside, output_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
    exists = ((segment == last - 1) & (sequence < num_states)).to(tl.int32)
    _store_state(state_ptr, state, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=_LENGTHS)
def _scan_backward_kernel(
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
    QUERY_GRAD: tl.constexpr, KEY_VALUE_GRAD: tl.constexpr,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `_scan_kernel`; grid (segments, heads).

    With S the state before a tile, dS the gradient of the state after it, and both products below the diagonal:
        dq' = (do v^T) k' + do S^T      dk' = (do v^T)^T q' + v dS^T      dv = (q' k'^T)^T do + k' dS

    KEY_VALUE_GRAD alone walks from the last tile to the first, dS growing by q'^T do; QUERY_GRAD alone from the first
    to the last, S growing by k'^T v. Both together are one pass from the last to the first, which saves reading
    everything twice: as nothing ever decays, S is had by taking k'^T v of each tile off the state after the segment,
    at the cost of a rounding, as on the way there. They fit into the registers together up to head_dim 64.
    """
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, sequence, begin, end, first, last = _find_segment(
        segment, table_ptr, segments_per_sequence, segment_length, seq_len
    )
    if QUERY_GRAD:
        if KEY_VALUE_GRAD:  # the state after the segment
            if segment == last - 1:
                state = _sum_of_states(
                    None, 0, 0, state_ptr, sequence, num_states, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
                )
            else:
                state = _sum_of_states(
                    partial_ptr, first, segment + 1, initial_ptr, sequence, num_states, head, heads,
                    HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
                )  # fmt: skip
        else:  # the state before it
            state = _sum_of_states(
                partial_ptr, first, segment, initial_ptr, sequence, num_states, head, heads,
                HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
            )  # fmt: skip
    if KEY_VALUE_GRAD:
        state_grad = _sum_of_states(
            grad_partial_ptr, segment + 1, last, state_grad_ptr, sequence, num_states, head, heads,
            HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    query_ptr = _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride)
    key_ptr = _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    value_ptr = _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    output_grad_ptr = _head_of(output_grad_ptr, batch, head, output_grad_batch_stride, output_grad_head_stride)
    query_grad_ptr = _head_of(query_grad_ptr, batch, head, query_grad_batch_stride, query_grad_head_stride)
    key_grad_ptr = _head_of(key_grad_ptr, batch, head, key_grad_batch_stride, key_grad_head_stride)
    value_grad_ptr = _head_of(value_grad_ptr, batch, head, value_grad_batch_stride, value_grad_head_stride)
    real_ptr = _row_of(real_ptr, batch, seq_len)
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    position = _first_position(position_ptr, batch, position_batch_stride, begin, end)

    theta_grad = tl.zeros((BLOCK_K // 2, BLOCK_T), tl.float32)
    in_tile = tl.arange(0, BLOCK_T)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    for step in tl.range(0, tiles, disable_licm=True):
        start = begin + step * BLOCK_T
        if KEY_VALUE_GRAD:
            start = begin + (tiles - 1 - step) * BLOCK_T
        rows = start + in_tile
        inside = rows < end
        keep = _keep_real(real_ptr, rows, inside)
        cos, sin = _rotation_of_rows(position + (start - begin) + in_tile, high, low, LRPE)
        # Each gradient loads what it needs anew, from the cache: held in registers it all would not fit.
        key = _load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        key = _map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(DOT)
        query = _load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
        query = _map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(DOT)

        if KEY_VALUE_GRAD:  # dv
            output_grad = _load_tile(
                output_grad_ptr, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T
            )
            scores = tl.dot(tl.trans(query), key, input_precision=PRECISION)  # (queries, keys)
            scores = tl.where(in_tile[:, None] >= in_tile[None, :], scores, 0.0)
            grad = tl.dot(output_grad.to(WIDE), scores.to(WIDE), input_precision=PRECISION)  # (BLOCK_V, BLOCK_T)
            grad = tl.dot(tl.trans(state_grad.to(WIDE)), key.to(WIDE), grad, input_precision=PRECISION)
            _store_tile(value_grad_ptr, grad, start, inside, value_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)

        value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        output_grad = _load_tile(output_grad_ptr, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
        scores_grad = tl.dot(tl.trans(output_grad.to(DOT)), value.to(DOT), input_precision=PRECISION)  # (queries, keys)
        scores_grad = tl.where(in_tile[:, None] >= in_tile[None, :], scores_grad, 0.0)
        scores_grad = scores_grad.to(WIDE)

        if KEY_VALUE_GRAD:  # dk; for padding k' and v are zero, and with them the gradients
            grad = tl.dot(query.to(WIDE), scores_grad, input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
            grad = tl.dot(state_grad.to(WIDE), value.to(WIDE), grad, input_precision=PRECISION)
            tile = _load_tile(key_ptr, start, keep, key_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            grad, theta_part = _map_tile_backward(
                grad, tile, key.to(tl.float32), cos, sin, householder, position + (start - begin),
                FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            theta_grad += theta_part
            _store_tile(key_grad_ptr, grad, start, inside, key_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)

        if QUERY_GRAD:  # dq
            grad = tl.dot(key.to(WIDE), tl.trans(scores_grad), input_precision=PRECISION)  # (BLOCK_K, BLOCK_T)
            if KEY_VALUE_GRAD:
                value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
                state = tl.dot(-key, tl.trans(value.to(DOT)), state, input_precision=PRECISION)
            output_grad = _load_tile(
                output_grad_ptr, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T
            )
            grad = tl.dot(state.to(WIDE), output_grad.to(WIDE), grad, input_precision=PRECISION)
            tile = _load_tile(query_ptr, start, inside, query_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            grad, theta_part = _map_tile_backward(
                grad, tile, query.to(tl.float32), cos, sin, householder, position + (start - begin),
                FEATURE_MAP, LRPE, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            theta_grad += theta_part
            _store_tile(query_grad_ptr, grad, start, inside, query_grad_row_stride, HEAD_DIM, BLOCK_K, BLOCK_T)
            if not KEY_VALUE_GRAD:
                value = _load_tile(value_ptr, start, keep, value_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T)
                state = tl.dot(key, tl.trans(value.to(DOT)), state, input_precision=PRECISION)

        if KEY_VALUE_GRAD:  # dS
            output_grad = _load_tile(
                output_grad_ptr, start, inside, output_grad_row_stride, VALUE_DIM, BLOCK_V, BLOCK_T
            )
            state_grad = tl.dot(query, tl.trans(output_grad.to(DOT)), state_grad, input_precision=PRECISION)
    if KEY_VALUE_GRAD and initial_grad_ptr is not None:
        exists = ((segment == first) & (sequence < num_states)).to(tl.int32)
        _store_state(initial_grad_ptr, state_grad, sequence, exists, head, heads, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V)
    if LRPE:
        _store_theta_gradient(theta_grad_ptr, theta_grad, segment, head, heads, HEAD_DIM, BLOCK_K)


# Decoding


@triton.jit
def _step_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr, initial_ptr, output_ptr,
    state_ptr,
    query_batch_stride, query_head_stride, key_batch_stride, key_head_stride, value_batch_stride, value_head_stride,
    output_batch_stride, output_head_stride, position_batch_stride,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token: S = initial + k'^T v, o = q' S, on BLOCK_V columns of S; grid (batch, heads, value_dim / BLOCK_V).

    state_ptr may be initial_ptr: each element is read once, and written by the program that read it.
    """
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    row = tl.zeros((1,), tl.int32)
    keep = row == 0
    if real_ptr is not None:
        keep = tl.load(real_ptr + batch + row) != 0
    query = _load_tile(
        _head_of(query_ptr, batch, head, query_batch_stride, query_head_stride),
        tl.program_id(0) * 0,
        row == 0,
        0,
        HEAD_DIM,
        BLOCK_K,
        1,
    )
    key = _load_tile(
        _head_of(key_ptr, batch, head, key_batch_stride, key_head_stride),
        tl.program_id(0) * 0,
        keep,
        0,
        HEAD_DIM,
        BLOCK_K,
        1,
    )
    high, low, householder = _load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    cos, sin = 0, 0
    if LRPE:
        cos, sin = rotation_at(
            tl.load(position_ptr + batch.to(tl.int64) * position_batch_stride + row)[None, :],
            high[:, None],
            low[:, None],
        )
    query = _map_tile(query, row == 0, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, 1, BLOCK_K)
    key = _map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, 1, BLOCK_K)

    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    value_ptr = _head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    value = tl.load(value_ptr + columns, mask=(columns < VALUE_DIM) & (tl.sum(keep.to(tl.int32), 0) > 0), other=0.0)
    offsets = (
        (batch.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM) + rows[:, None] * VALUE_DIM + columns[None, :]
    )
    inside = (rows < HEAD_DIM)[:, None] & (columns < VALUE_DIM)[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    state += key * value.to(tl.float32)[None, :]
    if state_ptr is not None:
        tl.store(state_ptr + offsets, state, mask=inside)
    output = tl.sum(query * state, 0)
    output_ptr = _head_of(output_ptr, batch, head, output_batch_stride, output_head_stride)
    tl.store(output_ptr + columns, output.to(output_ptr.dtype.element_ty), mask=columns < VALUE_DIM)


# Configurations, and the registry for compiling ahead of time


def gradients_together(head_dim: int, value_dim: int) -> bool:
    """Whether a causal backward is one pass over the tiles, or one for dq and one for dk and dv."""
    return max(head_dim, value_dim) <= 64


def launch_options(kernel: str, target: str, dtype: str, head_dim: int, value_dim: int) -> dict[str, int]:
    """BLOCK_T, num_warps and num_stages of a kernel ("state", "output", ...) on a target ("sm_90", "gfx942", ...)."""
    block = max(padded_dim(head_dim), padded_dim(value_dim))
    wide = block == 128
    block_t, num_stages = _TILES[kernel][int(wide)]
    return {"BLOCK_T": block_t, "num_warps": 8 if wide else 4, "num_stages": num_stages}


_TILES = {
    # BLOCK_T and num_stages up to head_dim 64 and up to 128
    "state": ((64, 2), (64, 2)),
    "output": ((64, 2), (64, 2)),
    "query_backward": ((32, 2), (32, 2)),
    "key_value_backward": ((32, 2), (32, 2)),
    "scan": ((32, 2), (32, 2)),
    "scan_backward": ((16, 1), (16, 1)),
    "short": ((32, 1), (32, 1)),
    "short_backward": ((32, 1), (32, 1)),
}


def kernel_constants(
    target: str, dtype: str, head_dim: int, value_dim: int, feature_map: str, interpreted: bool = False
) -> dict[str, Any]:
    """The constexprs that all kernels take the same way."""
    return {
        "FEATURE_MAP": feature_map,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": padded_dim(head_dim),
        "BLOCK_V": padded_dim(value_dim),
        "DOT": dot_type(dtype, interpreted),
        "WIDE": wide_dot_type(dtype, interpreted),
        "PRECISION": dot_precision(target, dtype),
    }


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    name: str
    feature_map: str
    lrpe: bool
    mask: bool
    packed: bool
    states: bool  # an initial state, and the gradients of both states


_USES = (
    _Use("identity", "identity", lrpe=False, mask=False, packed=False, states=False),
    _Use("elu, lrpe", "elu", lrpe=True, mask=False, packed=False, states=False),
    _Use("elu, lrpe, mask", "elu", lrpe=True, mask=True, packed=False, states=False),
    _Use("1+elu, lrpe, mask, states", "1+elu", lrpe=True, mask=True, packed=False, states=True),
    _Use("1+elu, lrpe, packed, states", "1+elu", lrpe=True, mask=False, packed=True, states=True),
)
_INPUTS = ("query", "key", "value", "output", "output_grad", "query_grad", "key_grad", "value_grad")


def _variants(kernel: Any, name: str, **constants: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    """The function that lists a kernel's variants; constants are the constexprs that are this kernel's own."""

    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        options = launch_options(name, target, dtype, head_dim, head_dim)
        if name == "scan_backward" and gradients_together(head_dim, head_dim) != (
            constants["QUERY_GRAD"] and constants["KEY_VALUE_GRAD"]
        ):
            return
        names = set(kernel.arg_names)
        for use in _USES:
            if use.packed and "table_ptr" not in names:
                continue
            constexprs = kernel_constants(target, dtype, head_dim, head_dim, use.feature_map)
            constexprs |= constants | {"BLOCK_T": options["BLOCK_T"]}
            types: dict[str, str | None] = {f"{tensor}_ptr": f"*{dtype}" for tensor in _INPUTS}
            types |= {f"{pointer}_ptr": "*fp32" for pointer in ("state", "partial", "grad_partial")}
            types |= {
                f"{pointer}_ptr": "*fp32" if use.lrpe else None for pointer in ("theta", "householder", "theta_grad")
            }
            types |= {
                f"{pointer}_ptr": "*fp32" if use.states else None
                for pointer in ("initial", "state_grad", "initial_grad")
            }
            types["position_ptr"] = "*i64" if use.lrpe else None
            types["real_ptr"] = "*u8" if use.mask else None
            types["table_ptr"] = "*i32" if use.packed else None
            if name == "short":
                types["state_ptr"] = types["initial_ptr"]
            yield KernelVariant(
                use.name,
                {argument: type_ for argument, type_ in types.items() if argument in names and type_ is not None},
                {constant: value for constant, value in constexprs.items() if constant in names}
                | {argument: None for argument, type_ in types.items() if argument in names and type_ is None},
                {"num_warps": options["num_warps"], "num_stages": options["num_stages"]},
            )

    return variants


KERNELS: list[KernelSpec] = [
    KernelSpec("norm_state", _state_kernel, _variants(_state_kernel, "state", SKIP="none")),
    KernelSpec("norm_output", _output_kernel, _variants(_output_kernel, "output")),
    KernelSpec("norm_query_backward", _query_backward_kernel, _variants(_query_backward_kernel, "query_backward")),
    KernelSpec(
        "norm_key_value_backward",
        _key_value_backward_kernel,
        _variants(_key_value_backward_kernel, "key_value_backward"),
    ),
    KernelSpec("norm_scan", _scan_kernel, _variants(_scan_kernel, "scan")),
    KernelSpec(
        "norm_scan_backward",
        _scan_backward_kernel,
        _variants(_scan_backward_kernel, "scan_backward", QUERY_GRAD=True, KEY_VALUE_GRAD=True),
    ),
    KernelSpec(
        "norm_scan_query_backward",
        _scan_backward_kernel,
        _variants(_scan_backward_kernel, "scan_backward", QUERY_GRAD=True, KEY_VALUE_GRAD=False),
    ),
    KernelSpec(
        "norm_scan_key_value_backward",
        _scan_backward_kernel,
        _variants(_scan_backward_kernel, "scan_backward", QUERY_GRAD=False, KEY_VALUE_GRAD=True),
    ),
    KernelSpec("norm_short", _short_kernel, _variants(_short_kernel, "short")),
    KernelSpec("norm_short_backward", _short_backward_kernel, _variants(_short_backward_kernel, "short_backward")),
]
