"""Tiles and states in the Triton kernels of NormAttention: where they lie, how they are loaded, mapped and stored.

A tile is BLOCK_T tokens of one head, its channels along the first axis: (head_dim, BLOCK_T), padded with zeros to a
power of two. A state is K^T V of one head, (head_dim, head_dim) float32. It is held as PARTS blocks of its columns, a
tuple of (BLOCK_K, BLOCK_V / PARTS), and what is multiplied with it, values or gradients of outputs, is loaded and
multiplied part by part: for some heads and dtypes the operands of a product with all of it are more than a thread has
registers.
"""

from .triton_features_transnormer import (
    STRIDE_UNIT,
    map_features,
    map_features_backward,
    rotation_at,
    turn_fraction,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# The length, what follows from it, and strides must not make Triton compile anew. What it has to know of strides, their
# unit says.
LENGTHS = ["seq_len", "segment_length", "segments_per_sequence", "num_states", "position_batch_stride"]
TENSORS = ["query", "key", "value", "output", "output_grad", "query_grad", "key_grad", "value_grad"]
UNSPECIALIZED = LENGTHS + [f"{tensor}_{axis}_stride" for tensor in TENSORS for axis in ("batch", "head", "row")]


@triton.jit
def find_segment(segment, table_ptr, segments_per_sequence, segment_length, seq_len):
    """Batch row, state row, first and end token of a segment, and the range of segments that its sequence has.

    Packed sequences have a table of them, (segments, 5) integers; one that is not used names no sequence that exists.
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
def head_of(tensor_ptr, batch, head, batch_stride, head_stride):
    """Where a head of a (batch, heads, seq, head_dim) tensor begins; 64-bit, tensors may have over 2^31 elements."""
    return tensor_ptr + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * STRIDE_UNIT


@triton.jit
def row_of(real_ptr, batch, seq_len):
    """Where a row of the (batch, seq) mask begins."""
    if real_ptr is None:
        return real_ptr
    else:
        return real_ptr + batch.to(tl.int64) * seq_len


@triton.jit
def load_tile(head_ptr, start, keep, row_stride, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tokens start, start + 1, ... of a head, one per column: (CHANNELS, BLOCK_T) float32.

    Zeros stand for the tokens that are not kept and for the channels beyond WIDTH. Only the tile's beginning is a
    64-bit offset: one number for the program, where 64 bits for each element would cost it registers.
    """
    channels = tl.arange(0, CHANNELS)
    row_stride *= STRIDE_UNIT
    offsets = tl.arange(0, BLOCK_T)[None, :] * row_stride + channels[:, None]
    tile_ptr = head_ptr + start.to(tl.int64) * row_stride + offsets
    return tl.load(tile_ptr, mask=(channels < WIDTH)[:, None] & keep[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    head_ptr, tile, start, keep, row_stride, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr
):
    channels = tl.arange(0, CHANNELS)
    row_stride *= STRIDE_UNIT
    offsets = tl.arange(0, BLOCK_T)[None, :] * row_stride + channels[:, None]
    tile_ptr = head_ptr + start.to(tl.int64) * row_stride + offsets
    tl.store(tile_ptr, tile.to(head_ptr.dtype.element_ty), mask=(channels < WIDTH)[:, None] & keep[None, :])


@triton.jit
def load_part(
    head_ptr, part, start, keep, row_stride,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`load_tile` of the channels that belong to a part of the state: (BLOCK_V / PARTS, BLOCK_T) float32."""
    PART: tl.constexpr = BLOCK_V // PARTS
    return load_tile(head_ptr + part * PART, start, keep, row_stride, VALUE_DIM - part * PART, PART, BLOCK_T)


@triton.jit
def store_part(
    head_ptr, tile, part, start, keep, row_stride,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = BLOCK_V // PARTS
    store_tile(head_ptr + part * PART, tile, start, keep, row_stride, VALUE_DIM - part * PART, PART, BLOCK_T)


@triton.jit
def state_offsets(
    index, head, heads, exists, part,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a part of a state in (index, heads, head_dim, value_dim), contiguous; `exists` 0 masks it."""
    rows, columns = tl.arange(0, BLOCK_K), part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
    base = (index.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM)
    offsets = base + rows[:, None] * VALUE_DIM + columns[None, :]
    return offsets, (rows < HEAD_DIM * exists)[:, None] & (columns < VALUE_DIM)[None, :]


@triton.jit
def zero_states(BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr):
    states = ()
    for _ in tl.static_range(PARTS):
        states += (tl.zeros((BLOCK_K, BLOCK_V // PARTS), tl.float32),)
    return states


@triton.jit
def cast_states(states, DTYPE: tl.constexpr, PARTS: tl.constexpr):
    operands = ()
    for part in tl.static_range(PARTS):
        operands += (states[part].to(DTYPE),)
    return operands


@triton.jit
def transpose_states(states, PARTS: tl.constexpr):
    operands = ()
    for part in tl.static_range(PARTS):
        operands += (tl.trans(states[part]),)
    return operands


@triton.jit
def sum_of_states(
    partial_ptr, begin, end, initial_ptr, sequence, num_states, head, heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """initial[sequence] + partial[begin] + ... + partial[end - 1]; either may be None."""
    states = ()
    for part in tl.static_range(PARTS):
        state = tl.zeros((BLOCK_K, BLOCK_V // PARTS), tl.float32)
        if initial_ptr is not None:
            exists = (sequence < num_states).to(tl.int32)
            offsets, inside = state_offsets(
                sequence, head, heads, exists, part, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
            )
            state += tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if partial_ptr is not None:
            for step in range(0, end - begin):
                offsets, inside = state_offsets(
                    begin + step, head, heads, 1, part, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS
                )
                state += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
        states += (state,)
    return states


@triton.jit
def store_states(
    state_ptr, states, index, exists, head, heads,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    for part in tl.static_range(PARTS):
        offsets, inside = state_offsets(index, head, heads, exists, part, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, PARTS)
        tl.store(state_ptr + offsets, states[part], mask=inside)


@triton.jit
def add_outer_products(
    states, left, right_ptr, start, keep, row_stride,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states + the sum over a tile's tokens of left_t^T right_t; left: (BLOCK_K, BLOCK_T), right is loaded."""
    sums = ()
    for part in tl.static_range(PARTS):
        tl.debug_barrier()  # else the compiler would load the parts together, and have too few registers for them
        right = load_part(right_ptr, part, start, keep, row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)
        sums += (tl.dot(left, tl.trans(right.to(DOT)), states[part], input_precision=PRECISION),)
    return sums


@triton.jit
def add_state_products(
    total, states, right_ptr, start, keep, row_stride,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + S right_t for each token of a tile, (BLOCK_K, BLOCK_T); right is loaded."""
    for part in tl.static_range(PARTS):
        tl.debug_barrier()
        right = load_part(right_ptr, part, start, keep, row_stride, VALUE_DIM, BLOCK_V, BLOCK_T, PARTS)
        total = tl.dot(states[part].to(WIDE), right.to(WIDE), total, input_precision=PRECISION)
    return total


@triton.jit
def load_lrpe(theta_ptr, householder_ptr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """theta as a fraction of a turn, (BLOCK_K / 2,) twice, and the reflection's vector times sqrt(2), (BLOCK_K,)."""
    if theta_ptr is None:
        return 0, 0, 0
    else:
        pairs, columns = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K)
        high, low = turn_fraction(tl.load(theta_ptr + pairs, mask=pairs < HEAD_DIM // 2, other=0.0).to(tl.float32))
        householder = tl.load(householder_ptr + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
        return high, low, householder * 1.4142135623730951


@triton.jit
def first_position(position_ptr, batch, batch_stride, begin, end):
    """The position of a segment's first token; those of the others follow one by one."""
    if position_ptr is None:
        return 0
    else:
        return tl.load(position_ptr + batch.to(tl.int64) * batch_stride + begin, mask=begin < end, other=0).to(tl.int32)


@triton.jit
def rotation_of_rows(positions, high, low, LRPE: tl.constexpr):
    """cos and sin of positions · theta, (BLOCK_K / 2, BLOCK_T)."""
    if LRPE:
        return rotation_at(positions[None, :], high[:, None], low[:, None])
    else:
        return 0, 0


@triton.jit
def rotation_of_tile(position, cos_in_tile, sin_in_tile, high, low, LRPE: tl.constexpr):
    """cos and sin of a tile whose first token stands at `position`, from those of a tile at 0 (addition theorem)."""
    if LRPE:
        cos, sin = rotation_at(position + tl.zeros((1, 1), tl.int32), high[:, None], low[:, None])  # (BLOCK_K / 2, 1)
        return cos_in_tile * cos - sin_in_tile * sin, sin_in_tile * cos + cos_in_tile * sin
    else:
        return 0, 0


@triton.jit
def split_pairs(tile, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The even and the odd channels of a tile, (BLOCK_K / 2, BLOCK_T) each."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_K // 2, 2, BLOCK_T)), (0, 2, 1)))


@triton.jit
def join_pairs(even, odd, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (BLOCK_K, BLOCK_T))


@triton.jit
def reflect_columns(tile, householder):
    """(I - 2 v v^T) on each column, for sqrt(2) v; its own inverse and gradient."""
    return tile - householder[:, None] * tl.sum(tile * householder[:, None], 0)[None, :]


@triton.jit
def keep_real(real_ptr, rows, inside):
    """Which rows of a tile hold a token that others may see."""
    if real_ptr is None:
        return inside
    else:
        return inside & (tl.load(real_ptr + rows, mask=inside, other=0) != 0)


@triton.jit
def map_tile(
    tile, keep, cos, sin, householder,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q' or k' of a tile: phi, then LRPE; zero for the tokens that are not kept, for any phi."""
    tile = map_features(tile, FEATURE_MAP)
    if FEATURE_MAP == "1+elu":
        tile = tl.where((tl.arange(0, BLOCK_K) < HEAD_DIM)[:, None] & keep[None, :], tile, 0.0)
    if LRPE:
        even, odd = split_pairs(reflect_columns(tile, householder), BLOCK_T, BLOCK_K)
        tile = join_pairs(even * cos - odd * sin, even * sin + odd * cos, BLOCK_T, BLOCK_K)
    return tile


@triton.jit
def map_tile_backward(
    grad, tile, mapped, cos, sin, householder, position,
    FEATURE_MAP: tl.constexpr, LRPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile as loaded, from the gradient of `map_tile`'s result, and each angle's part in theta's.

    With y = R(angle) x, dy/dangle is (-y_odd, y_even); the angle is position · theta. position: the first token's.
    """
    theta_grad = 0.0
    if LRPE:
        grad_even, grad_odd = split_pairs(grad, BLOCK_T, BLOCK_K)
        even, odd = split_pairs(mapped, BLOCK_T, BLOCK_K)
        positions = (position + tl.arange(0, BLOCK_T)).to(tl.float32)
        theta_grad = (grad_odd * even - grad_even * odd) * positions[None, :]  # (BLOCK_K / 2, BLOCK_T)
        grad = join_pairs(grad_even * cos + grad_odd * sin, grad_odd * cos - grad_even * sin, BLOCK_T, BLOCK_K)
        grad = reflect_columns(grad, householder)
    return map_features_backward(grad, tile, FEATURE_MAP), theta_grad


@triton.jit
def store_theta_gradient(theta_grad_ptr, theta_grad, index, head, heads, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each program has a row of its own in (segments, heads, head_dim / 2); the rows are summed outside, in order."""
    pairs = tl.arange(0, BLOCK_K // 2)
    row_ptr = theta_grad_ptr + (index.to(tl.int64) * heads + head) * (HEAD_DIM // 2)
    tl.store(row_ptr + pairs, tl.sum(theta_grad, 1), mask=pairs < HEAD_DIM // 2)
