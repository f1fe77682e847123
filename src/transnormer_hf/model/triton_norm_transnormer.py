"""NormAttention by Triton kernels: o_t = phi(q_t) S, S = sum of phi(k_s)^T v_s, without a denominator (Eqs. 13-14).

The definition is `eager_norm_attention` in `reference_transnormer.py`. Below, q' and k' stand for phi and LRPE
applied; both happen on the tiles as they are loaded, so q' and k' never exist in memory. A sequence is cut into
segments of SEGMENT tokens. With a_s b_s^T summed over a segment as its *sum*, (head_dim, value_dim) float32:

    forward    sum_kernel       sums of k'^T v, all segments in parallel
               scan_kernel      S: of the segments before each one (causal), or of the whole sequence
               output_kernel    o = q' S, and (q' k'^T below the diagonal) v within the segment
    backward   sum_kernel       sums of q'^T do
               scan_kernel      dS: of the segments after each one, or of the whole sequence
               gradient_kernel  dq' = do S^T, and (do v^T below the diagonal) k' within the segment
                                dk' = v dS^T, and (v do^T above the diagonal) q'
                                dv = k' dS, and (k' q'^T above the diagonal) do

So o and dv are one computation, dq and dk another: a tile of tokens meets the state at the border of its segment, and
then those tiles of the segment that the direction allows. The part within a segment is what makes it causal; without
it the same kernels are bidirectional. No state is ever obtained by subtraction, and sums are added in a fixed order, so
two runs give the same bits. A causal forward and backward pass writes and reads a state per segment: for 256 tokens of
64 channels in 16 bits its float32 sum is as large as half of the segment's keys.

Padding is zero in every tile: it contributes nothing, and its outputs and gradients are zeros.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .reference_transnormer import prepare_query_key
from .triton_common_transnormer import (
    ELEMENT_TYPES,
    Differentiable,
    angle_gradient,
    contiguous,
    dot_constants,
    head_of,
    is_interpreted,
    launch,
    load_lrpe,
    load_tile,
    map_features,
    map_features_backward,
    new_empty,
    new_token_major,
    padded_dim,
    reflect,
    rotate,
    rotation_at,
    split_pairs,
    store_tile,
    target_of,
    tl,
    token_major,
    triton,
)

SEGMENT = 256
SCAN_BLOCK = 512  # numbers of a state per program of the scan: 16 bytes for each of 128 threads
# Neither lengths nor strides are a reason to compile anew; what the compiler must know of strides, their unit says.
UNSPECIALIZED = ["seq_len", "segments", "num_states", "position_batch_stride"]
UNSPECIALIZED += [f"{tensor}_row_stride" for tensor in ("query", "key", "value", "output_grad")]


# Tiles and states


@triton.jit
def find_tile(
    tile, table_ptr, position_ptr, position_batch_stride, seq_len, segments,
    DIRECTION: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile's batch row, the row of its state, its segment's first and end token, its own first token, and its offset.

    The position of a token is its number plus the offset: positions within a sequence follow one by one.
    segments: of each sequence; the rows of packed segments have a table instead (`segment_table`).
    """
    segment = tile // (SEGMENT // BLOCK_T)
    if table_ptr is None:
        sequence = segment // segments
        batch = sequence
        begin = (segment - sequence * segments) * SEGMENT
        end = tl.minimum(begin + SEGMENT, seq_len)
    else:
        batch = segment * 0
        begin = tl.load(table_ptr + 3 * segment)
        end = tl.load(table_ptr + 3 * segment + 1)
        sequence = tl.load(table_ptr + 3 * segment + 2)
    offset = 0
    if position_ptr is not None:
        position_ptr += batch.to(tl.int64) * position_batch_stride + begin
        offset = tl.load(position_ptr, mask=begin < end, other=0).to(tl.int32) - begin
    index = segment
    if DIRECTION == 0:
        index = sequence
    return batch, index, begin, end, begin + tile % (SEGMENT // BLOCK_T) * BLOCK_T, offset


@triton.jit
def token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T: tl.constexpr):
    """True for the tokens start, start + 1, ... before `end` that are real: (BLOCK_T,)."""
    tokens = tl.arange(0, BLOCK_T)
    mask = tokens < end - start  # written like this, no float32 kernel spills registers
    if mask_ptr is not None:
        mask &= tl.load(mask_ptr + batch.to(tl.int64) * seq_len + (start + tokens), mask=mask, other=0) != 0
    return mask


@triton.jit
def tile_rotation(position, high, low, LRPE: tl.constexpr, BLOCK_T: tl.constexpr):
    """cos and sin of a tile whose first token is at `position`: (BLOCK_T, BLOCK_K / 2)."""
    if LRPE:
        positions = position + tl.arange(0, BLOCK_T)
        return rotation_at(positions[:, None], high[None, :], low[None, :])
    else:
        return 0.0, 0.0


@triton.jit
def map_tile(
    tile, mask, cos, sin, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q' or k' of a tile, float32: phi, then LRPE; zero where masked, for any phi."""
    tile = map_features(tile.to(tl.float32), FEATURE_MAP)
    if FEATURE_MAP == "1+elu":
        tile = tl.where(mask[:, None] & (tl.arange(0, BLOCK_K) < HEAD_DIM)[None, :], tile, 0.0)
    if LRPE:
        tile = rotate(reflect(tile, householder), cos, sin, BLOCK_T, BLOCK_K)
    return tile


@triton.jit
def multiply_state(
    tile, state_ptr, index, exists, head, heads, TRANSPOSED: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """tile S, or tile S^T: (BLOCK_T, BLOCK_V or BLOCK_K).

    HALVES: the even and the odd channels of the tile one after the other, where registers would not hold the operands.
    """
    state_ptr += (index.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM)
    rows_of: tl.constexpr = VALUE_DIM if TRANSPOSED else HEAD_DIM
    columns_of: tl.constexpr = HEAD_DIM if TRANSPOSED else VALUE_DIM
    BLOCK_ROWS: tl.constexpr = BLOCK_V if TRANSPOSED else BLOCK_K
    BLOCK_COLUMNS: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_V
    row_step: tl.constexpr = 1 if TRANSPOSED else VALUE_DIM
    column_step: tl.constexpr = VALUE_DIM if TRANSPOSED else 1
    PARTS: tl.constexpr = 2 if HALVES else 1
    rows = PARTS * tl.arange(0, BLOCK_ROWS // PARTS)[:, None]
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (rows < tl.where(exists, rows_of, 0)) & (columns < columns_of)  # rows come in pairs
    state_ptr += rows * row_step + columns * column_step
    state = tl.load(state_ptr, mask=inside, other=0.0).to(WIDE)
    if HALVES:
        even, odd = split_pairs(tile, BLOCK_T, BLOCK_ROWS)
        total = tl.dot(even.to(WIDE), state, input_precision=PRECISION)
        state = tl.load(state_ptr + row_step, mask=inside, other=0.0).to(WIDE)
        return tl.dot(odd.to(WIDE), state, total, input_precision=PRECISION)
    else:
        return tl.dot(tile.to(WIDE), state, input_precision=PRECISION)


@triton.jit
def score(left, right, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """left right^T: (BLOCK_T, BLOCK_T)."""
    if HALVES:
        left_even, left_odd = split_pairs(left, BLOCK_T, BLOCK_D)
        right_even, right_odd = split_pairs(right, BLOCK_T, BLOCK_D)
        scores = tl.dot(left_even, tl.trans(right_even), input_precision=PRECISION)
        return tl.dot(left_odd, tl.trans(right_odd), scores, input_precision=PRECISION)
    else:
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)


# Sums of segments


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_kernel(
    key_ptr, value_ptr, sum_ptr, mask_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr,
    key_row_stride, value_row_stride, position_batch_stride, seq_len, segments,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum[segment, head] = k'^T v over the segment; grid (segments, heads). In the backward pass q'^T do."""
    segment, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    batch, _, begin, end, _, offset = find_tile(  # all of the segment as one tile
        segment, table_ptr, position_ptr, position_batch_stride, seq_len, segments, 1, SEGMENT, SEGMENT
    )
    key_ptr = head_of(key_ptr, batch, head, seq_len, key_row_stride, HEAD_DIM)
    value_ptr = head_of(value_ptr, batch, head, seq_len, value_row_stride, VALUE_DIM)
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    if LRPE:
        cos_step, sin_step = rotation_at(tl.full((1, 1), BLOCK_T, tl.int32), high[None, :], low[None, :])
    cos, sin = tile_rotation(offset + begin, high, low, LRPE, BLOCK_T)
    total = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for step in range(0, tl.cdiv(end - begin, BLOCK_T)):
        start = begin + step * BLOCK_T
        mask = token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T)
        key = load_tile(key_ptr, start, mask, key_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K)
        value = load_tile(value_ptr, start, mask, value_row_stride, VALUE_DIM, BLOCK_T, BLOCK_V)
        key = map_tile(key, mask, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        total = tl.dot(tl.trans(key.to(DOT)), value.to(DOT), total, input_precision=PRECISION)
        if LRPE:
            cos, sin = cos * cos_step - sin * sin_step, sin * cos_step + cos * sin_step
    rows, columns = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    inside = (rows < tl.where(begin < end, HEAD_DIM, 0)) & (columns < VALUE_DIM)
    sum_ptr += (segment.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM)
    tl.store(sum_ptr + (rows * VALUE_DIM + columns), total, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_kernel(
    sum_ptr, initial_ptr, states_ptr, total_ptr, table_ptr, segments, num_states,
    DIRECTION: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running sums over the segments of a sequence; grid (sequences, heads, blocks of a state's SIZE numbers).

    DIRECTION 1: states[segment] = initial + the sums of the segments before it; -1: of those after it; 0: no states.
    total[sequence] = initial + all sums. Only the first `num_states` sequences have an initial state.
    """
    sequence, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    elements = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < SIZE
    if table_ptr is None:
        first = sequence * segments
        count = segments
    else:
        first = tl.load(table_ptr + 3 * (segments + sequence))
        count = tl.load(table_ptr + 3 * (segments + sequence) + 1) - first
    own = (sequence.to(tl.int64) * heads + head) * SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        given = elements < tl.where(sequence < num_states, SIZE, 0)
        state += tl.load(initial_ptr + own + elements, mask=given, other=0.0).to(tl.float32)
    for step in tl.range(0, count, num_stages=4):
        segment = first + step
        if DIRECTION < 0:
            segment = first + count - 1 - step
        own_segment = (segment.to(tl.int64) * heads + head) * SIZE
        if DIRECTION != 0:
            tl.store(states_ptr + own_segment + elements, state.to(states_ptr.dtype.element_ty), mask=inside)
        state += tl.load(sum_ptr + own_segment + elements, mask=inside, other=0.0)
    tl.store(total_ptr + own + elements, state, mask=inside)


# Outputs and gradients


@triton.jit
def add_tiles(
    total, left, plain_ptr, mapped_ptr, mask_ptr, plain_row_stride, mapped_row_stride,
    batch, seq_len, start, begin, end, offset, high, low, householder,
    SCORE_MAPPED: tl.constexpr, DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """total + (left a^T) b within a segment; a is the mapped tensor and b the plain one, or the other way round.

    left is the tile at `start`. DIRECTION 1: of tokens up to its own, -1: of tokens from its own on. The farthest tile
    comes first and its own last.
    """
    tokens = tl.arange(0, BLOCK_T)
    if DIRECTION > 0:
        farthest = begin
        count = (start - begin) // BLOCK_T + 1
    else:
        count = tl.cdiv(end - start, BLOCK_T)
        farthest = start + (count - 1) * BLOCK_T
    count = tl.where(start < end, count, 0)
    cos, sin = tile_rotation(offset + farthest, high, low, LRPE, BLOCK_T)
    if LRPE:
        cos_step, sin_step = rotation_at(tl.full((1, 1), DIRECTION * BLOCK_T, tl.int32), high[None, :], low[None, :])
    for step in tl.range(0, count, disable_licm=True):
        first = farthest + DIRECTION * BLOCK_T * step
        mask = token_mask(mask_ptr, batch, seq_len, first, end, BLOCK_T)
        plain = load_tile(plain_ptr, first, mask, plain_row_stride, VALUE_DIM, BLOCK_T, BLOCK_V)
        mapped = load_tile(mapped_ptr, first, mask, mapped_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K)
        mapped = map_tile(mapped, mask, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(DOT)
        own = left
        if HALVES:  # adds nothing, but makes it a value of this step: its operand, which every warp holds whole, would
            own += tl.where(step < 0, 1.0, 0.0)  # otherwise stay in registers through the loop, and spill others
        if SCORE_MAPPED:
            scores = score(own, mapped, BLOCK_T, BLOCK_K, PRECISION, HALVES)
        else:
            scores = score(own, plain.to(DOT), BLOCK_T, BLOCK_V, PRECISION, HALVES)
        distance = (start + tokens)[:, None] - (first + tokens)[None, :]
        scores = tl.where(DIRECTION * distance >= 0, scores, 0.0).to(WIDE)
        if SCORE_MAPPED:
            total = tl.dot(scores, plain.to(WIDE), total, input_precision=PRECISION)
        else:
            total = tl.dot(scores, mapped.to(WIDE), total, input_precision=PRECISION)
        if LRPE:
            cos, sin = cos * cos_step - sin * sin_step, sin * cos_step + cos * sin_step
    return total


@triton.jit
def write_outputs(
    query_ptr, key_ptr, value_ptr, output_ptr, state_ptr, mask_ptr,
    query_row_stride, key_row_stride, value_row_stride,
    batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """o = q' S + (q' k'^T, as DIRECTION allows) v of the tile at `start`; dv is the same of k, q and do."""
    LRPE: tl.constexpr = theta_ptr is not None
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    mask = token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T)
    query_ptr = head_of(query_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    query = load_tile(query_ptr, start, mask, query_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K)
    cos, sin = tile_rotation(offset + start, high, low, LRPE, BLOCK_T)
    query = map_tile(query, mask, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K).to(DOT)
    output = multiply_state(
        query, state_ptr, index, start < end, head, heads, False,
        HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, HALVES,
    )  # fmt: skip
    if DIRECTION != 0:
        output = add_tiles(
            output, query,
            head_of(value_ptr, batch, head, seq_len, value_row_stride, VALUE_DIM),
            head_of(key_ptr, batch, head, seq_len, key_row_stride, HEAD_DIM),
            mask_ptr, value_row_stride, key_row_stride,
            batch, seq_len, start, begin, end, offset, high, low, householder,
            True, DIRECTION, FEATURE_MAP, LRPE,
            HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    row_stride = heads * (VALUE_DIM // 8)  # in units of STRIDE_UNIT, like the others
    output_ptr = head_of(output_ptr, batch, head, seq_len, row_stride, VALUE_DIM)
    store_tile(output_ptr, output, start, start + tl.arange(0, BLOCK_T) < end, row_stride, VALUE_DIM, BLOCK_T, BLOCK_V)


@triton.jit
def write_gradients(
    left_ptr, plain_ptr, mapped_ptr, own_ptr, grad_ptr, theta_grad_ptr, state_ptr, mask_ptr,
    left_row_stride, plain_row_stride, mapped_row_stride, own_row_stride,
    batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr, theta_row,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq of the tile at `start` from left = do, plain = v, mapped = k, own = q and S; dk from v, do, q, k and dS.

    That after phi and LRPE, left S^T + (left plain^T, as DIRECTION allows) mapped', goes back through them.
    """
    LRPE: tl.constexpr = theta_ptr is not None
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    mask = token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T)
    left_ptr = head_of(left_ptr, batch, head, seq_len, left_row_stride, VALUE_DIM)
    left = load_tile(left_ptr, start, mask, left_row_stride, VALUE_DIM, BLOCK_T, BLOCK_V)
    grad = multiply_state(
        left, state_ptr, index, start < end, head, heads, True,
        HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, WIDE, PRECISION, HALVES,
    )  # fmt: skip
    if DIRECTION != 0:
        grad = add_tiles(
            grad, left.to(DOT),
            head_of(plain_ptr, batch, head, seq_len, plain_row_stride, VALUE_DIM),
            head_of(mapped_ptr, batch, head, seq_len, mapped_row_stride, HEAD_DIM),
            mask_ptr, plain_row_stride, mapped_row_stride,
            batch, seq_len, start, begin, end, offset, high, low, householder,
            False, DIRECTION, FEATURE_MAP, LRPE,
            HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    own_ptr = head_of(own_ptr, batch, head, seq_len, own_row_stride, HEAD_DIM)
    own = load_tile(own_ptr, start, mask, own_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K).to(tl.float32)
    if LRPE:
        cos, sin = tile_rotation(offset + start, high, low, LRPE, BLOCK_T)
        mapped = map_tile(own, mask, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        angle_grad = angle_gradient(grad, mapped, BLOCK_T, BLOCK_K)
        grad = reflect(rotate(grad, cos, -sin, BLOCK_T, BLOCK_K), householder)
        positions = (offset + start + tl.arange(0, BLOCK_T)).to(tl.float32)
        theta_grad = tl.sum(angle_grad * positions[:, None], 0)  # each program has a row; they are summed outside
        pairs = tl.arange(0, BLOCK_K // 2)
        theta_grad_ptr += (theta_row.to(tl.int64) * heads + head) * (HEAD_DIM // 2)
        tl.store(theta_grad_ptr + pairs, theta_grad, mask=pairs < HEAD_DIM // 2)
    grad = map_features_backward(grad, own, FEATURE_MAP)
    row_stride = heads * (HEAD_DIM // 8)
    grad_ptr = head_of(grad_ptr, batch, head, seq_len, row_stride, HEAD_DIM)
    store_tile(grad_ptr, grad, start, start + tl.arange(0, BLOCK_T) < end, row_stride, HEAD_DIM, BLOCK_T, BLOCK_K)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, state_ptr, mask_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr,
    query_row_stride, key_row_stride, value_row_stride, position_batch_stride, seq_len, segments,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile; grid (segments · tiles of a segment, heads)."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, index, begin, end, start, offset = find_tile(
        tile, table_ptr, position_ptr, position_batch_stride, seq_len, segments, DIRECTION, SEGMENT, BLOCK_T
    )
    write_outputs(
        query_ptr, key_ptr, value_ptr, output_ptr, state_ptr, mask_ptr,
        query_row_stride, key_row_stride, value_row_stride,
        batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr,
        DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    query_ptr, key_ptr, value_ptr, output_grad_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr, theta_grad_ptr,
    state_ptr, state_grad_ptr, mask_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr,
    query_row_stride, key_row_stride, value_row_stride, output_grad_row_stride,
    position_batch_stride, seq_len, segments,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq, dk or dv of a tile; grid (segments · tiles of a segment · 3, heads).

    The three programs of a tile stand next to each other, so what they all read comes from memory once.
    """
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile, gradient = program // 3, program % 3
    batch, index, begin, end, start, offset = find_tile(
        tile, table_ptr, position_ptr, position_batch_stride, seq_len, segments, DIRECTION, SEGMENT, BLOCK_T
    )
    if gradient == 0:
        write_gradients(
            output_grad_ptr, value_ptr, key_ptr, query_ptr, query_grad_ptr, theta_grad_ptr, state_ptr, mask_ptr,
            output_grad_row_stride, value_row_stride, key_row_stride, query_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr, 2 * tile,
            DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    elif gradient == 1:
        write_gradients(
            value_ptr, output_grad_ptr, query_ptr, key_ptr, key_grad_ptr, theta_grad_ptr, state_grad_ptr, mask_ptr,
            value_row_stride, output_grad_row_stride, query_row_stride, key_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr, 2 * tile + 1,
            -DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    else:
        write_outputs(
            key_ptr, query_ptr, output_grad_ptr, value_grad_ptr, state_grad_ptr, mask_ptr,
            key_row_stride, query_row_stride, output_grad_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, offset, theta_ptr, householder_ptr,
            -DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip


# As torch sees it


class NormInputs(NamedTuple):
    """What the operator takes; torch makes its schema of these types."""

    query: torch.Tensor  # (batch, heads, seq, head_dim), like the key
    key: torch.Tensor
    value: torch.Tensor  # (batch, heads, seq, value_dim)
    positions: torch.Tensor  # (seq,) or (batch, seq)
    is_real: torch.Tensor | None  # (batch, seq)
    table: torch.Tensor | None  # of packed sequences, see segment_table
    theta: torch.Tensor | None  # (head_dim / 2,)
    householder: torch.Tensor | None  # (head_dim,)
    initial_state: torch.Tensor | None  # (sequences, heads, head_dim, value_dim)
    causal: bool
    feature_map: str


def triton_norm_attention(query, key, value, *, metadata, causal, feature_map, lrpe, initial_state, return_state):
    """NormAttention by the kernels; arguments and results as `eager_norm_attention`.

    phi and LRPE are applied inside the kernels, with gradients to theta. If the householder vector needs a gradient
    too, plain torch applies them first. What the kernels do not take, `unsupported` tells before.
    """
    cu_seqlens, table = metadata.cu_seqlens, metadata.segments
    if lrpe is not None and lrpe.householder.requires_grad and torch.is_grad_enabled():
        mapped = prepare_query_key(query.float(), key.float(), metadata, feature_map, lrpe)
        query, key = (tensor.to(value.dtype) for tensor in mapped)
        feature_map, lrpe = "identity", None
    if cu_seqlens is not None and table is None:
        table = segment_table(cu_seqlens, query.shape[2])
    theta, householder = (None, None) if lrpe is None else lrpe
    tensors = (query, key, value, metadata.positions, metadata.is_real, table, theta, householder, initial_state)
    output, state, _ = _norm_attention(*tensors, causal, feature_map)
    if not return_state:
        return output, None
    # tokens behind the last packed sequence are a sequence of their own, whose state nobody sees
    return output, state if cu_seqlens is None else state[:-1]


def segment_table(cu_seqlens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Where the segments of packed sequences lie, (segments + sequences, 3) int32, made without asking the device.

    First (first token, end, sequence) of each segment; there are as many as these sequences can have at most, and those
    that do not exist have no tokens. Then (first segment, end, 0) of each sequence; tokens behind the last boundary are
    a sequence too, so there are cu_seqlens.shape[0].
    """
    bounds = F.pad(cu_seqlens.long(), (0, 1), value=seq_len)  # (sequences + 1,)
    counts = (bounds.diff().clamp(min=0) + (SEGMENT - 1)).div(SEGMENT, rounding_mode="floor")
    ends = counts.cumsum(0)  # (sequences,)
    segment = torch.arange(seq_len // SEGMENT + cu_seqlens.shape[0], device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, segment, right=True).clamp(max=cu_seqlens.shape[0] - 1)
    begin = bounds[sequence] + (segment - (ends - counts)[sequence]) * SEGMENT
    end = torch.minimum(begin + SEGMENT, bounds[sequence + 1])
    of_segments = torch.stack((torch.minimum(begin, end), end, sequence), 1)
    of_sequences = torch.stack((ends - counts, ends, torch.zeros_like(ends)), 1)
    return torch.cat((of_segments, of_sequences)).int()


def norm_attention_forward(inputs: NormInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the state after each sequence, and the state before each segment (no rows unless causal)."""
    query, key, value = (token_major(tensor) for tensor in inputs[:3])
    output, final, states = _empty_output(inputs)
    run = _Launches(inputs)
    run.scan(key, value, inputs.initial_state, states, final, DIRECTION=int(inputs.causal))
    tensors = {"query": query, "key": key, "value": value, "output": output}
    run(output_kernel, run.tiles, tensors | {"state": states if inputs.causal else final})
    return output, final, states


def norm_attention_backward(
    grad: torch.Tensor, final_grad: torch.Tensor | None, final: torch.Tensor, states: torch.Tensor, inputs: NormInputs
) -> list[torch.Tensor]:
    """Gradients of query, key, value, theta (no elements without LRPE) and the state before each sequence.

    grad, final_grad: of the output and of the state after each sequence. The initial state itself is not needed.
    """
    query, key, value, grad = (token_major(tensor) for tensor in (*inputs[:3], grad))
    query_grad, key_grad, value_grad = (new_token_major(tensor) for tensor in (query, key, value))
    initial_grad, state_grads = (new_empty(tuple(t.shape), t) for t in (final, states))
    run = _Launches(inputs)
    run.scan(query, grad, final_grad, state_grads, initial_grad, DIRECTION=-int(inputs.causal))
    theta, theta_parts = inputs.theta, None
    if theta is not None:  # from a row of each tile's dq and of its dk
        theta_parts = new_empty((2 * run.tiles, query.shape[1], theta.shape[0]), query, torch.float32)
    state, state_grad = (states, state_grads) if inputs.causal else (final, initial_grad)
    tensors = {"query": query, "key": key, "value": value, "output_grad": grad, "state": state}
    tensors |= {"query_grad": query_grad, "key_grad": key_grad, "value_grad": value_grad, "state_grad": state_grad}
    run(gradient_kernel, 3 * run.tiles, tensors | {"theta_grad": theta_parts})
    theta_grad = query.new_empty(0, dtype=torch.float32)
    if theta is not None and theta_parts is not None:
        theta_grad = theta_parts.flatten(0, 1).sum(0).to(theta.dtype)
    return [query_grad, key_grad, value_grad, theta_grad, initial_grad]


def _empty_output(inputs: NormInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, value = inputs.query, inputs.value
    segments, sequences = _count_segments(query, inputs.table)
    shape = (query.shape[1], query.shape[3], value.shape[3])
    final = new_empty((sequences, *shape), query, torch.float32)
    # states are stored as their products read them: in bfloat16 for bfloat16 inputs
    states_dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    states = new_empty((query.shape[0] * segments if inputs.causal else 0, *shape), query, states_dtype)
    return new_token_major(value), final, states


def _empty_grads(grad, final_grad, final, states, inputs: NormInputs) -> list[torch.Tensor]:
    query, theta = inputs.query, inputs.theta
    theta_grad = query.new_empty(0, dtype=torch.float32) if theta is None else torch.empty_like(theta)
    return [*(new_token_major(tensor) for tensor in inputs[:3]), theta_grad, torch.empty_like(final)]


def _save(ctx, inputs, output):
    *tensors, initial_state, causal, feature_map = inputs
    _, final, states = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(final, states, *tensors)
    ctx.initial = None if initial_state is None else (initial_state.shape[0], initial_state.dtype)
    ctx.options = causal, feature_map


def _gradients(ctx, run_backward, grad, final_grad, _states_grad):
    final, states, *tensors = ctx.saved_tensors
    value, theta = tensors[2], tensors[6]
    grad = torch.zeros_like(value) if grad is None else grad
    *grads, theta_grad, initial_grad = run_backward(grad, final_grad, final, states, *tensors, None, *ctx.options)
    if ctx.initial is not None:
        initial_grad = initial_grad[: ctx.initial[0]].to(ctx.initial[1])
    none_or = (None if theta is None else theta_grad), None, (None if ctx.initial is None else initial_grad)
    return *grads, None, None, None, *none_or, None, None


_norm_attention = Differentiable(
    "norm_attention", norm_attention_forward, _empty_output, norm_attention_backward, _empty_grads, _save, _gradients
)


# The launches


def _count_segments(query: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int]:
    """Segments of each row of the batch, and sequences of the batch."""
    batch_size, _, seq_len, _ = query.shape
    if table is None:
        return (seq_len + SEGMENT - 1) // SEGMENT, batch_size
    sequences = (table.shape[0] - seq_len // SEGMENT) // 2  # see segment_table
    return table.shape[0] - sequences, sequences


class _Launches:
    """The launches of one forward or backward pass, with the arguments that they share."""

    def __init__(self, inputs: NormInputs) -> None:
        query, positions, is_real, theta = inputs.query, inputs.positions, inputs.is_real, inputs.theta
        batch_size, self.num_heads, seq_len, head_dim = query.shape
        segments, _ = _count_segments(query, inputs.table)
        shape = target_of(query), ELEMENT_TYPES[query.dtype], head_dim, inputs.value.shape[3]
        options = launch_options(*shape)
        self.segments = batch_size * segments
        self.tiles = self.segments * (SEGMENT // options["BLOCK_T"])
        self.options = {name: options[name] for name in ("num_warps", "num_stages")}
        self.tensors: dict[str, torch.Tensor | None] = {
            "position": None if theta is None else positions.contiguous(),
            "mask": None if is_real is None else is_real.contiguous().view(torch.uint8),
            "theta": contiguous(theta),
            "householder": contiguous(inputs.householder),
            "table": inputs.table,
        }
        self.arguments: dict[str, Any] = {
            "position_batch_stride": positions.shape[-1] if positions.dim() == 2 else 0,
            "seq_len": seq_len,
            "segments": segments,
            "DIRECTION": int(inputs.causal),
            "FEATURE_MAP": inputs.feature_map,
            "SEGMENT": SEGMENT,
            **kernel_constants(*shape, is_interpreted()),
            **options,
        }

    def __call__(self, kernel: Any, programs: int, tensors: Mapping[str, torch.Tensor | None]) -> None:
        arguments = {name: self.arguments[name] for name in kernel.arg_names if name in self.arguments}
        launch(kernel, (programs, self.num_heads), {**self.tensors, **tensors}, **arguments, **self.options)

    def scan(self, key, value, initial, states, total, DIRECTION):
        """Fill `states` and `total` from the sums over key and value."""
        sums = new_empty((self.segments, *total.shape[1:]), key, torch.float32)
        self(sum_kernel, self.segments, {"key": key, "value": value, "sum": sums})
        size = total.shape[2] * total.shape[3]
        tensors = {"sum": sums, "initial": contiguous(initial), "states": states, "total": total}
        counts = {"segments": self.arguments["segments"], "num_states": 0 if initial is None else initial.shape[0]}
        constants = {"DIRECTION": DIRECTION, "SIZE": size, "BLOCK": SCAN_BLOCK}
        grid = (total.shape[0], self.num_heads, -(-size // SCAN_BLOCK))
        launch(scan_kernel, grid, tensors | {"table": self.tensors["table"]}, **counts, **constants)


@lru_cache
def kernel_constants(target: str, dtype: str, head_dim: int, value_dim: int, interpreted: bool) -> dict[str, Any]:
    """The constexprs that follow from target, dtype and widths."""
    widths = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    blocks = {"BLOCK_K": padded_dim(head_dim), "BLOCK_V": padded_dim(value_dim)}
    return widths | blocks | dot_constants(target, dtype, interpreted)


@lru_cache
def launch_options(target: str, dtype: str, head_dim: int, value_dim: int) -> dict[str, int]:
    """BLOCK_T, HALVES, num_warps and num_stages of all kernels but the scan.

    scripts/compile_kernels.py shows what they take: no registers spill at head_dim 64 and 128.
    """
    is_wide = max(head_dim, value_dim) > 64
    through_registers = target not in ("sm_90", "sm_100", "sm_103")  # operands of products
    block_t = 32 if is_wide and (dtype == "fp16" or through_registers) else 64
    if dtype == "fp32":
        block_t = 16
    return {
        "BLOCK_T": min(block_t, SEGMENT),
        "HALVES": dtype == "fp32" and min(head_dim, value_dim) > 16,  # a product takes 16 channels or more
        "num_warps": 4 if target.startswith("gfx") else 8,  # a warp of AMD is twice as wide
        "num_stages": 1 if dtype == "fp32" else 2,
    }
