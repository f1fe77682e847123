"""NormAttention by Triton kernels: o_t = phi(q_t) S, S = sum of phi(k_s)^T v_s, without a denominator (Eqs. 13-14).

The definition is `eager_norm_attention` in `ops_transnormer.py`. Below, q' and k' stand for phi and LRPE applied; both
happen on the tiles as they are loaded, so q' and k' never exist in memory. A sequence is cut into segments of SEGMENT
tokens. With a_s b_s^T summed over a segment as its *sum*, (head_dim, value_dim) float32:

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

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .reference_transnormer import LRPE, AttentionMetadata, prepare_query_key
from .triton_common_transnormer import (
    ELEMENT_TYPES,
    Differentiable,
    apply_lrpe_tile,
    apply_lrpe_tile_backward,
    dot_precision,
    dot_type,
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
    rotation_at,
    split_pairs,
    store_tile,
    target_of,
    token_major,
    wide_dot_type,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

SEGMENT = 256
# Neither lengths nor strides are a reason to compile anew; what the compiler must know of strides, their unit says.
UNSPECIALIZED = [
    "seq_len",
    "segments",
    "num_states",
    "position_batch_stride",
    *(f"{tensor}_row_stride" for tensor in ("query", "key", "value", "output_grad")),
]


# Tiles and states


@triton.jit
def find_segment(segment, table_ptr, position_ptr, position_batch_stride, seq_len, segments, SEGMENT: tl.constexpr):
    """Batch row, sequence, first and end token of a segment, and the position of its first token.

    segments: of each sequence; the rows of packed segments have a table instead (`segment_table`). Positions within a
    sequence follow one by one.
    """
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
    if position_ptr is None:
        position = begin
    else:
        position_ptr += batch.to(tl.int64) * position_batch_stride + begin
        position = tl.load(position_ptr, mask=begin < end, other=0).to(tl.int32)
    return batch, sequence, begin, end, position


@triton.jit
def token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T: tl.constexpr):
    """True for the tokens start, start + 1, ... before `end` that are real: (BLOCK_T,)."""
    tokens = start + tl.arange(0, BLOCK_T)
    mask = tokens < end
    if mask_ptr is not None:
        mask &= tl.load(mask_ptr + batch.to(tl.int64) * seq_len + tokens, mask=mask, other=0) != 0
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
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q' or k' of a tile, float32: phi, then LRPE; zero where masked, for any phi."""
    tile = map_features(tile.to(tl.float32), FEATURE_MAP)
    if FEATURE_MAP == "1+elu":
        tile = tl.where(mask[:, None] & (tl.arange(0, BLOCK_K) < HEAD_DIM)[None, :], tile, 0.0)
    if LRPE:
        tile = apply_lrpe_tile(tile, cos, sin, householder, BLOCK_T, BLOCK_K)
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
    batch, _, begin, end, position = find_segment(
        segment, table_ptr, position_ptr, position_batch_stride, seq_len, segments, SEGMENT
    )
    key_ptr = head_of(key_ptr, batch, head, seq_len, key_row_stride, HEAD_DIM)
    value_ptr = head_of(value_ptr, batch, head, seq_len, value_row_stride, VALUE_DIM)
    high, low, householder = 0, 0, 0
    if LRPE:
        high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
        cos_step, sin_step = rotation_at(tl.full((1, 1), BLOCK_T, tl.int32), high[None, :], low[None, :])
    cos, sin = tile_rotation(position, high, low, LRPE, BLOCK_T)
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
    batch, seq_len, start, begin, end, position, high, low, householder,
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
    cos, sin = tile_rotation(position + farthest - begin, high, low, LRPE, BLOCK_T)
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
    batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """o = q' S + (q' k'^T, as DIRECTION allows) v of the tile at `start`; dv is the same of k, q and do."""
    LRPE: tl.constexpr = theta_ptr is not None
    high, low, householder = 0, 0, 0
    if LRPE:
        high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    mask = token_mask(mask_ptr, batch, seq_len, start, end, BLOCK_T)
    query_ptr = head_of(query_ptr, batch, head, seq_len, query_row_stride, HEAD_DIM)
    query = load_tile(query_ptr, start, mask, query_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K)
    cos, sin = tile_rotation(position + start - begin, high, low, LRPE, BLOCK_T)
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
            batch, seq_len, start, begin, end, position, high, low, householder,
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
    batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr, theta_row,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq of the tile at `start` from left = do, plain = v, mapped = k, own = q and S; dk from v, do, q, k and dS.

    That after phi and LRPE, left S^T + (left plain^T, as DIRECTION allows) mapped', goes back through them.
    """
    LRPE: tl.constexpr = theta_ptr is not None
    high, low, householder = 0, 0, 0
    if LRPE:
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
            batch, seq_len, start, begin, end, position, high, low, householder,
            False, DIRECTION, FEATURE_MAP, LRPE,
            HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    own_ptr = head_of(own_ptr, batch, head, seq_len, own_row_stride, HEAD_DIM)
    own = load_tile(own_ptr, start, mask, own_row_stride, HEAD_DIM, BLOCK_T, BLOCK_K).to(tl.float32)
    if LRPE:
        cos, sin = tile_rotation(position + start - begin, high, low, LRPE, BLOCK_T)
        mapped = map_tile(own, mask, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, BLOCK_T, BLOCK_K)
        grad, angle_grad = apply_lrpe_tile_backward(grad, mapped, cos, sin, householder, BLOCK_T, BLOCK_K)
        positions = (position + start - begin + tl.arange(0, BLOCK_T)).to(tl.float32)
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
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile; grid (segments · tiles of a segment, heads)."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    segment = tile // (SEGMENT // BLOCK_T)
    batch, sequence, begin, end, position = find_segment(
        segment, table_ptr, position_ptr, position_batch_stride, seq_len, segments, SEGMENT
    )
    start = begin + tile % (SEGMENT // BLOCK_T) * BLOCK_T
    index = segment
    if DIRECTION == 0:
        index = sequence
    write_outputs(
        query_ptr, key_ptr, value_ptr, output_ptr, state_ptr, mask_ptr,
        query_row_stride, key_row_stride, value_row_stride,
        batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr,
        DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    query_ptr, key_ptr, value_ptr, output_grad_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr, theta_grad_ptr,
    state_ptr, state_grad_ptr, mask_ptr, position_ptr, theta_ptr, householder_ptr, table_ptr,
    query_row_stride, key_row_stride, value_row_stride, output_grad_row_stride,
    position_batch_stride, seq_len, segments,
    DIRECTION: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq, dk or dv of a tile; grid (segments · tiles of a segment · 3, heads).

    The three programs of a tile stand next to each other, so what they all read comes from memory once.
    """
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile, gradient = program // 3, program % 3
    segment = tile // (SEGMENT // BLOCK_T)
    batch, sequence, begin, end, position = find_segment(
        segment, table_ptr, position_ptr, position_batch_stride, seq_len, segments, SEGMENT
    )
    start = begin + tile % (SEGMENT // BLOCK_T) * BLOCK_T
    index = segment
    if DIRECTION == 0:
        index = sequence
    if gradient == 0:
        write_gradients(
            output_grad_ptr, value_ptr, key_ptr, query_ptr, query_grad_ptr, theta_grad_ptr, state_ptr, mask_ptr,
            output_grad_row_stride, value_row_stride, key_row_stride, query_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr, 2 * tile,
            DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    elif gradient == 1:
        write_gradients(
            value_ptr, output_grad_ptr, query_ptr, key_ptr, key_grad_ptr, theta_grad_ptr, state_grad_ptr, mask_ptr,
            value_row_stride, output_grad_row_stride, query_row_stride, key_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr, 2 * tile + 1,
            -DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip
    else:
        write_outputs(
            key_ptr, query_ptr, output_grad_ptr, value_grad_ptr, state_grad_ptr, mask_ptr,
            key_row_stride, query_row_stride, output_grad_row_stride,
            batch, index, head, heads, seq_len, start, begin, end, position, theta_ptr, householder_ptr,
            -DIRECTION, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_T, BLOCK_K, BLOCK_V, DOT, WIDE, PRECISION, HALVES,
        )  # fmt: skip


# As torch sees it


def triton_norm_attention(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    output, state, _ = _norm_attention(
        query,
        key,
        value,
        metadata.positions,
        metadata.is_real,
        table,
        theta,
        householder,
        initial_state,
        causal,
        feature_map,
    )
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


def norm_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    table: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    causal: bool,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the state after each sequence, and the state before each segment (no rows unless causal)."""
    query, key, value = token_major(query), token_major(key), token_major(value)
    output, final, states = _empty_forward(
        query, key, value, positions, is_real, table, theta, householder, initial_state, causal, feature_map
    )
    run = _Launches(query, value, positions, is_real, table, theta, householder, feature_map)
    run.scan(key, value, initial_state, states, final, DIRECTION=int(causal))
    tensors = {"query": query, "key": key, "value": value, "output": output, "state": states if causal else final}
    run(output_kernel, "output", tensors, DIRECTION=int(causal))
    return output, final, states


def norm_attention_backward(
    output_grad: torch.Tensor,
    final_grad: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    table: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    final: torch.Tensor,
    states: torch.Tensor,
    causal: bool,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, theta (no elements without LRPE) and the state before each sequence."""
    query, key, value, output_grad = (token_major(tensor) for tensor in (query, key, value, output_grad))
    query_grad, key_grad, value_grad = (new_token_major(tensor) for tensor in (query, key, value))
    initial_grad, state_grads = (new_empty(tuple(t.shape), t) for t in (final, states))
    run = _Launches(query, value, positions, is_real, table, theta, householder, feature_map)
    run.scan(query, output_grad, final_grad, state_grads, initial_grad, DIRECTION=-int(causal))
    theta_grads = None
    if theta is not None:  # from a row of each tile's dq and of its dk
        rows = 2 * run.count_tiles("gradient")
        theta_grads = new_empty((rows, query.shape[1], theta.shape[0]), query, torch.float32)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "output_grad": output_grad,
        "query_grad": query_grad,
        "key_grad": key_grad,
        "value_grad": value_grad,
        "theta_grad": theta_grads,
        "state": states if causal else final,
        "state_grad": state_grads if causal else initial_grad,
    }
    run(gradient_kernel, "gradient", tensors, DIRECTION=int(causal))
    theta_grad = query.new_empty(0, dtype=torch.float32)
    if theta is not None and theta_grads is not None:
        theta_grad = theta_grads.flatten(0, 1).sum(0).to(theta.dtype)
    return query_grad, key_grad, value_grad, theta_grad, initial_grad


def _empty_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    table: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    causal: bool,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    segments = _count_segments(query, table)
    shape = (query.shape[1], query.shape[3], value.shape[3])
    final = new_empty((segments.sequences, *shape), query, torch.float32)
    # states are stored as their products read them: in bfloat16 for bfloat16 inputs
    states_dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    states = new_empty((segments.total if causal else 0, *shape), query, states_dtype)
    return new_token_major(value), final, states


def _empty_backward(
    output_grad, final_grad, query, key, value, positions, is_real, table, theta, householder, final, states,
    causal, feature_map,
):  # fmt: skip
    theta_grad = query.new_empty(0, dtype=torch.float32) if theta is None else torch.empty_like(theta)
    return *(new_token_major(tensor) for tensor in (query, key, value)), theta_grad, torch.empty_like(final)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, initial_state, causal, feature_map = inputs
    _, final, states = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, final, states)
    ctx.initial = None if initial_state is None else (initial_state.shape[0], initial_state.dtype)
    ctx.options = causal, feature_map


def _gradients(
    ctx: Any,
    run_backward: Callable[..., tuple[torch.Tensor, ...]],
    output_grad: torch.Tensor | None,
    final_grad: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor | None, ...]:
    value, theta = ctx.saved_tensors[2], ctx.saved_tensors[6]
    if output_grad is None:
        output_grad = torch.zeros_like(value)
    *qkv_grads, theta_grad, initial_grad = run_backward(output_grad, final_grad, *ctx.saved_tensors, *ctx.options)
    if ctx.initial is not None:
        initial_grad = initial_grad[: ctx.initial[0]].to(ctx.initial[1])
    none_or = (None if theta is None else theta_grad), None, (None if ctx.initial is None else initial_grad)
    return *qkv_grads, None, None, None, *none_or, None, None


_norm_attention = Differentiable(
    "norm_attention",
    norm_attention_forward,
    _empty_forward,
    norm_attention_backward,
    _empty_backward,
    _save,
    _gradients,
)


# The launches


class _Segments(NamedTuple):
    """of_sequence: of each sequence, or of the whole packed row; total: of the batch; sequences: of the batch."""

    of_sequence: int
    total: int
    sequences: int


def _count_segments(query: torch.Tensor, table: torch.Tensor | None) -> _Segments:
    batch_size, _, seq_len, _ = query.shape
    if table is None:
        count = (seq_len + SEGMENT - 1) // SEGMENT
        return _Segments(count, batch_size * count, batch_size)
    sequences = (table.shape[0] - seq_len // SEGMENT) // 2  # see segment_table
    return _Segments(table.shape[0] - sequences, table.shape[0] - sequences, sequences)


class _Launches:
    """The launches of one forward or backward pass, with the arguments that they share."""

    def __init__(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        is_real: torch.Tensor | None,
        table: torch.Tensor | None,
        theta: torch.Tensor | None,
        householder: torch.Tensor | None,
        feature_map: str,
    ) -> None:
        self.num_heads, self.table = query.shape[1], table
        self.segments = _count_segments(query, table)
        self.shape = target_of(query), ELEMENT_TYPES[query.dtype], query.shape[3], value.shape[3]
        self.like = query
        self.tensors: dict[str, torch.Tensor | None] = {
            "position": None if theta is None else positions.contiguous(),
            "mask": None if is_real is None else is_real.contiguous().view(torch.uint8),
            "theta": None if theta is None else theta.contiguous(),
            "householder": None if householder is None else householder.contiguous(),
            "table": table,
        }
        self.arguments = {
            "position_batch_stride": positions.shape[-1] if positions.dim() == 2 else 0,
            "seq_len": query.shape[2],
            "segments": self.segments.of_sequence,
            "FEATURE_MAP": feature_map,
            "SEGMENT": SEGMENT,
        }

    def count_tiles(self, name: str) -> int:
        """Tiles of a head in the launch of "output" or "gradient"."""
        return self.segments.total * (SEGMENT // launch_options(name, *self.shape)["BLOCK_T"])

    def __call__(self, kernel: Any, name: str, tensors: Mapping[str, torch.Tensor | None], **constants: Any) -> None:
        programs = self.segments.total if name == "sum" else self.count_tiles(name) * (3 if name == "gradient" else 1)
        arguments = self.arguments | kernel_constants(*self.shape, is_interpreted()) | launch_options(name, *self.shape)
        taken = {name: value for name, value in arguments.items() if name in kernel.arg_names or name in OPTIONS}
        launch(kernel, (programs, self.num_heads), {**self.tensors, **tensors}, **taken, **constants)

    def scan(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        initial: torch.Tensor | None,
        states: torch.Tensor,
        total: torch.Tensor,
        DIRECTION: int,
    ) -> None:
        """Fill `states` and `total` from the sums over key and value."""
        sums = new_empty((self.segments.total, *total.shape[1:]), key, torch.float32)
        self(sum_kernel, "sum", {"key": key, "value": value, "sum": sums})
        size = total.shape[2] * total.shape[3]
        tensors = {"sum": sums, "states": states, "total": total, "table": self.table}
        launch(
            scan_kernel,
            (total.shape[0], self.num_heads, -(-size // SCAN_BLOCK)),
            tensors | {"initial": None if initial is None else initial.contiguous()},
            segments=self.segments.of_sequence,
            num_states=0 if initial is None else initial.shape[0],
            DIRECTION=DIRECTION,
            SIZE=size,
            BLOCK=SCAN_BLOCK,
        )


OPTIONS = ("num_warps", "num_stages")
SCAN_BLOCK = 512  # numbers of a state per program: 16 bytes for each of 128 threads


@lru_cache
def kernel_constants(target: str, dtype: str, head_dim: int, value_dim: int, interpreted: bool) -> dict[str, Any]:
    """The constexprs that follow from target, dtype and widths."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": padded_dim(head_dim),
        "BLOCK_V": padded_dim(value_dim),
        "DOT": dot_type(dtype, interpreted),
        "WIDE": wide_dot_type(dtype, interpreted),
        "PRECISION": dot_precision(target, dtype),
    }


@lru_cache
def launch_options(kernel: str, target: str, dtype: str, head_dim: int, value_dim: int) -> dict[str, int]:
    """BLOCK_T, HALVES, num_warps and num_stages of a kernel ("sum", "output", "gradient").

    No registers spill with these; scripts/compile_kernels.py shows it.
    """
    is_wide, is_float32 = max(head_dim, value_dim) > 64, dtype == "fp32"
    block_t = 64
    if is_float32 or (dtype == "fp16" and is_wide):
        block_t = 16 if is_float32 and is_wide else 32
    # a warp of AMD is twice as wide, and has twice the registers
    few_warps = target.startswith("gfx") or (dtype == "bf16" and not is_wide)
    return {
        "BLOCK_T": min(block_t, SEGMENT),
        "HALVES": is_float32 and min(head_dim, value_dim) > 16,  # a product takes 16 channels or more
        "num_warps": 4 if few_warps else 8,
        "num_stages": 1 if is_float32 else 2,
    }
