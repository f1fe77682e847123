"""Tiles in the Triton kernels of DiagAttention: which tokens they hold, vectors loaded, turned and stored, and scores.

An overview of the kernels is in `diag_kernels_transnormer.py`.
"""

from .triton_features_transnormer import STRIDE_UNIT

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# The length, what follows from it, and strides must not make Triton compile anew. What it has to know of strides, their
# unit says.
LENGTHS = ["seq_len", "num_sequences", "programs_per_row", "block_size", "tile_tokens"]
TENSORS = ["grad", "query", "key", "value", "output"]
UNSPECIALIZED = [
    *LENGTHS,
    *(f"{tensor}_stride_{axis}" for tensor in TENSORS for axis in "bht"),
    "positions_stride_b",
    "is_real_stride_b",
]

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


@triton.jit
def find_vectors(pointer, row, head, token, stride_b, stride_h, stride_t):
    """The pointer to one head's vector of a token, and the elements from there to the next token's."""
    stride_t *= STRIDE_UNIT
    return pointer + ((row * stride_b + head * stride_h) * STRIDE_UNIT + token * stride_t), stride_t


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
    pointer, tokens, exists, stride_t, chunk, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """One head's vectors of some tokens, zeros where there is none: two (tokens, CHUNK / 2) float32."""
    rows = pointer + tokens[:, None] * stride_t
    channels = chunk + tl.arange(0, CHUNK // 2)[None, :]
    first = tl.load(rows + channels, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
    channels += CHUNK // 2
    second = tl.load(rows + channels, mask=exists[:, None] & (channels < HEAD_DIM), other=0.0)
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
    pointer, tokens, exists, stride_t, householder_ptr, chunk, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """A chunk of some vectors x, (tokens, CHUNK), of the reflection v, (1, CHUNK), and 2 x · v of that chunk."""
    channels = chunk + tl.arange(0, CHUNK)
    householder = tl.load(householder_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    pointers = pointer + tokens[:, None] * stride_t + channels[None, :]
    whole = tl.load(pointers, mask=exists[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    return whole, householder, 2 * tl.sum(whole * householder, 1)


@triton.jit
def project(
    pointer, tokens, exists, stride_t, householder_ptr,
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
            along += load_and_project(pointer, tokens, exists, stride_t, householder_ptr, chunk, HEAD_DIM, CHUNK)[2]
        return along


@triton.jit
def load_turned(
    pointer, tokens, exists, stride_t, places, table_ptr, householder_ptr, block_size, along,
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
            pointer, tokens, exists, stride_t, householder_ptr, chunk, HEAD_DIM, CHUNK
        )
        if along is None:
            along = along_chunk
        whole -= along[:, None] * householder
        even, odd = tl.split(tl.reshape(whole, (tokens.shape[0], CHUNK // 2, 2)))
        return tl.sum(tl.join(even * cos, -odd * sin), 2), tl.sum(tl.join(even * sin, odd * cos), 2)
    else:
        return load_halves(pointer, tokens, exists, stride_t, chunk, HEAD_DIM, WIDTH, CHUNK)


@triton.jit
def add_inner_products(
    products, row_first, row_second, column_first, column_second, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """products + rows columns^T over a chunk of the channels: (rows, columns) float32."""
    products = tl.dot(row_first.to(DOT_TYPE), tl.trans(column_first.to(DOT_TYPE)), products, input_precision=PRECISION)
    return tl.dot(row_second.to(DOT_TYPE), tl.trans(column_second.to(DOT_TYPE)), products, input_precision=PRECISION)


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
def masked_softmax(scores, visible):
    """Softmax of each row over its visible entries, zeros for a row that has none."""
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.max(scores, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - highest[:, None])
    total = tl.sum(weights, 1)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


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
