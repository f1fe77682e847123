"""The Triton kernels of DiagAttention: ordinary attention inside non-overlapping blocks, forward and backward.

With s = scale · q k^T inside a block, seen keys only, the kernels compute

    softmax:  P = softmax(s)     relu:  P = max(s, 0)        O = (P ∘ D) V

(D: dropout, 0 or 1 / (1 - p)) and in the backward pass, with everything but the row statistics computed again,

    dV = (P ∘ D)^T dO,   dP = D ∘ (dO V^T),   dS = P ∘ (dP - rowsum(P ∘ dP))  or  dS = [s > 0] ∘ dP,
    dQ = scale · dS K,   dK = scale · dS^T Q,

where Q and K carry LRPE, whose gradient goes on to q, k and theta.

There are two forms. A block that fits into a tile (`"tile"`: the usual one, several small blocks together) belongs to
one program, and its scores never leave the chip: q, k, v in and o out, then q, k, v, dO in and dQ, dK, dV out. A block
that is too large for that (`"split"`) is walked over in tiles as in FlashAttention. In both, what a program reads again
comes from the cache.

Blocks start where a sequence starts. Nothing about that is known on the host: every program finds its own columns from
the position of the first token, or from cu_seqlens.

The definition these must equal is `eager_diag_attention` in `ops_transnormer.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .diag_backward_kernels_transnormer import (
    diag_split_backward_kernel,
    diag_tile_backward_kernel,
)
from .diag_forward_kernels_transnormer import (
    diag_split_forward_kernel,
    diag_table_kernel,
    diag_tile_forward_kernel,
)
from .triton_features_transnormer import (
    KernelSpec,
    KernelVariant,
    dot_precision,
    dot_type,
    padded_dim,
    target_family,
    wide_dot_type,
)

try:
    import triton
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

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


class TileSizes(NamedTuple):
    """Places of a tile, powers of two: the usual number, the most that may hold a block, and that of larger blocks."""

    usual: int
    largest: int
    split: int


def tile_sizes(target: str, dtype: str, head_dim: int) -> TileSizes:
    """The table of tiles: as many places as the registers of the backward pass hold without spilling."""
    if dtype == "fp32":
        return TileSizes(64, 64, 32 if target_family(target) == "amd" else 16)
    return TileSizes(64, 64, 32 if width_of(head_dim) <= 64 else 16)


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


def width_of(head_dim: int) -> int:
    """Channels of a tile: a power of two, of which each half has at least the 16 that `tl.dot` needs."""
    return max(32, padded_dim(head_dim))


def chunk_of(kernel: str, dtype: str, head_dim: int) -> int:
    """Channels that a program has in registers at a time, but for the sums of the split kernels."""
    if kernel == "split_forward":
        return min(width_of(head_dim), 64 if dtype == "fp32" else 256)
    if kernel == "split_backward" and dtype != "fp32" and width_of(head_dim) > 64:
        return width_of(head_dim) // 2  # chunks of 32 spill there
    is_wide = dtype == "fp32" or kernel.endswith("backward")
    return min(width_of(head_dim), 32 if is_wide else 64)


def launch_options(kernel: str, target: str, dtype: str, head_dim: int, tile: int) -> dict[str, int]:
    """num_warps and num_stages of a kernel ("tile_forward", "split_backward", ...) for a plan's tile.

    maxnreg: without it the assembler may spill some registers, for as few of them that two programs fit at a time.
    """
    if target_family(target) == "amd":  # whose warps have 64 threads, of up to 512 registers
        warps = 4
    elif kernel == "split_forward":
        warps = 8 if dtype == "fp32" and width_of(head_dim) > 64 else 4
    else:
        few = 32 if dtype == "fp32" else 64
        warps = 8 if kernel.endswith("backward") or width_of(head_dim) > few else 4
    options = {"num_warps": warps, "num_stages": 1}
    if kernel != "tile_forward" and target_family(target) != "amd":
        options["maxnreg"] = 255
    return options


def kernel_constants(
    kernel: str,
    target: str,
    dtype: str,
    head_dim: int,
    tile: int,
    causal: bool,
    relu: bool,
    interpreted: bool = False,
) -> dict[str, Any]:
    """The constexprs of a kernel ("tile_forward", "split_backward", ...).

    float32 products on NVIDIA are sums of three TF32 products; where those would spill, of six bfloat16 products at the
    same speed, whose operands take fewer registers.
    """
    precision = dot_precision(target, dtype)
    if (kernel, dtype) == ("split_backward", "fp32") and target in ("sm_90", "sm_100") and not interpreted:
        precision = "bf16x6"  # the interpreter knows no such product
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": width_of(head_dim),
        "CHUNK": chunk_of(kernel, dtype, head_dim),
        "TILE": tile,
        "DOT_TYPE": dot_type(dtype, interpreted),
        # relu scores may outgrow float16, probabilities do not
        "MAP_TYPE": wide_dot_type(dtype, interpreted) if relu else dot_type(dtype, interpreted),
        "PRECISION": precision,
        "CAUSAL": causal,
        "RELU": relu,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The registry for compiling ahead of time
# ---------------------------------------------------------------------------------------------------------------------


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    relu: bool
    causal: bool
    lrpe: bool = True
    mask: bool = False
    packed: bool = False
    dropout: bool = False


# From the plainest to the one that takes the most registers.
_USES = {
    "softmax, no lrpe": _Use(relu=False, causal=False, lrpe=False),
    "relu, mask, dropout": _Use(relu=True, causal=False, mask=True, dropout=True),
    "softmax, causal, packed, dropout": _Use(relu=False, causal=True, packed=True, dropout=True),
}


def _variants(kernel: Any, name: str) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        sizes = tile_sizes(target, dtype, head_dim)
        tiles = {sizes.split} if name.startswith("split") else {sizes.usual, sizes.largest}
        for tile in sorted(tiles):
            for use_name, use in _USES.items():
                constexprs = kernel_constants(name, target, dtype, head_dim, tile, use.causal, use.relu)
                types: dict[str, str | None] = dict.fromkeys(("scale", "dropout_p", "keep_scale"), "fp32")
                types |= {argument: f"*{dtype}" for argument in kernel.arg_names if argument.endswith("_ptr")}
                types |= dict.fromkeys(
                    ("grad_theta_ptr", "table_ptr", "householder_ptr"), "*fp32" if use.lrpe else None
                )
                types |= {"lse_ptr": None if use.relu else "*fp32", "positions_ptr": "*i64"}
                types |= {"is_real_ptr": "*i1" if use.mask else None, "seed_ptr": "*i64" if use.dropout else None}
                types |= {"cu_seqlens_ptr": "*i64" if use.packed else None}
                if name == "split_backward" and use.relu:
                    types["output_ptr"] = None
                absent = {argument: None for argument, type_ in types.items() if type_ is None}
                yield KernelVariant(
                    f"tile {tile}, {use_name}",
                    {argument: type_ for argument, type_ in types.items() if type_ is not None},
                    {
                        argument: value
                        for argument, value in (constexprs | absent).items()
                        if argument in kernel.arg_names
                    },
                    launch_options(name, target, dtype, head_dim, tile),
                )

    return variants


def _table_variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
    constexprs = {"HEAD_DIM": head_dim, "WIDTH": width_of(head_dim), "TILE": TABLE_TILE}
    yield KernelVariant("", {"table_ptr": "*fp32", "theta_ptr": "*fp32"}, constexprs, {"num_warps": 4, "num_stages": 1})


TABLE_TILE = 16
KERNELS: list[KernelSpec] = [
    KernelSpec("diag_table", diag_table_kernel, _table_variants),
    KernelSpec("diag_tile_forward", diag_tile_forward_kernel, _variants(diag_tile_forward_kernel, "tile_forward")),
    KernelSpec("diag_tile_backward", diag_tile_backward_kernel, _variants(diag_tile_backward_kernel, "tile_backward")),
    KernelSpec("diag_split_forward", diag_split_forward_kernel, _variants(diag_split_forward_kernel, "split_forward")),
    KernelSpec(
        "diag_split_backward", diag_split_backward_kernel, _variants(diag_split_backward_kernel, "split_backward")
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels read and write
# ---------------------------------------------------------------------------------------------------------------------


def diag_attention_traffic(
    batch_size: int,
    num_heads: int,
    seq_len: int,
    head_dim: int,
    dtype: str,
    *,
    block_size: int = 64,
    activation: str = "softmax",
    mask: bool = True,
    target: str = "sm_90",
) -> tuple[int, int]:
    """Bytes through device memory of a forward and of a backward pass with LRPE, counted program by program.

    With U = batch · heads · seq · head_dim · element size, one program of the tile kernels reads the q, k, v of its
    tokens and writes their output: 4 U in all. Its backward reads q, k, v, dO and writes dQ, dK, dV: 7 U. The map and
    its row sums stay in registers. q and k are read again by the program that has just read them, 32 KiB for 64 tokens
    of 128 channels in 16 bits, which its cache still has: they count once. Beside these a program reads one position
    and its part of the mask, and leaves WIDTH / 2 numbers for theta's gradient that are read once more to be summed:
    4 WIDTH bytes per `tokens` tokens of a head, 0.03 U for 64 tokens of 16 bits. The table of LRPE is counted once,
    however many programs read it: it is a few KiB that stay in the caches.

    Blocks larger than a tile: the forward pass writes a log-sum-exp per row as well, the backward pass reads it and O
    (8 U), and its programs for dQ and dK each leave a part of theta's gradient. Programs of one block run next to each
    other, so what they read of each other's tokens is in the second-level cache and counted once.
    """
    element_size, width = (4 if dtype == "fp32" else 2), width_of(head_dim)
    plan = diag_plan(target, dtype, head_dim, seq_len, block_size, None)
    per_block = triton.cdiv(block_size, plan.tile) if plan.is_split else 1
    tokens_of_programs = []
    for program in range(plan.programs_per_row):
        start = program // per_block * (block_size if plan.is_split else plan.tokens)
        part = program % per_block * plan.tile
        end = min(seq_len, start + block_size) if plan.is_split else min(seq_len, start + plan.tokens)
        tokens_of_programs.append(max(0, min(end - start - part, plan.tokens)))

    forward = backward = table = 2 * block_size * (width // 2) * 4
    forward += table  # written, then read
    row_statistics = 4 if plan.is_split and activation == "softmax" else 0
    for tokens in tokens_of_programs:
        program_bytes = 8 + tokens * mask if tokens else 8
        tile_bytes = tokens * head_dim * element_size
        forward += batch_size * num_heads * (program_bytes + 4 * tile_bytes + tokens * row_statistics)
        parts_of_theta = 2 if plan.is_split else 1
        backward += batch_size * num_heads * (program_bytes + 7 * tile_bytes + parts_of_theta * 2 * (width // 2) * 4)
        if row_statistics:
            backward += batch_size * num_heads * (tile_bytes + tokens * row_statistics)
    return forward, backward
