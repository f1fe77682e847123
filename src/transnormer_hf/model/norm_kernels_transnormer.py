"""The Triton kernels of NormAttention: o_t = phi(q_t) S, S = sum of phi(k_s)^T v_s, without a denominator (Eqs. 13-14).

Below, q' and k' stand for phi and LRPE applied; both happen on the tiles as they are loaded, so that q' and k' never
exist in memory. A program works on one *segment* of one sequence and one head: it walks over the segment in tiles of
BLOCK_T tokens with the (head_dim, head_dim) state in registers. Segments of a sequence meet through *partials*, the
sums K'^T V of each segment, (segments, heads, head_dim, head_dim) float32 in memory; they are added up in order, so
that two runs give the same bits.

    bidirectional   state_kernel                partials of K'^T V
                    output_kernel               S = all partials, o = q' S
      backward      query_backward_kernel       dq' = do S^T, and partials of dS = Q'^T dO
                    key_value_backward_kernel   dk' = v dS^T, dv = k' dS
    causal          state_kernel                as above, where there is more than one segment
                    scan_kernel                 o = (q' k'^T below the diagonal) v + q' S, S before the tile
      backward      state_kernel                partials of Q'^T dO, where there is more than one segment
                    scan_backward_kernel        dq, dk, dv in one pass from the last tile to the first
    short           short_kernel                all of it in one launch, for sequences of up to 128 tokens
      backward      short_backward_kernel       so too
    decoding        step_kernel                 one token: S += k'^T v, o = q' S

Tiles lie with their channels along the first axis, (head_dim, BLOCK_T), and the products are written for that:
o^T = S^T q'^T. So the state is always the left operand, whose rows the warps share out among them, however short the
tile of tokens; as the right operand every warp would hold the whole of it.

The launches, and the derivatives as torch sees them, are in `norm_autograd_transnormer.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .norm_bidirectional_kernels_transnormer import (
    key_value_backward_kernel,
    output_kernel,
    query_backward_kernel,
    short_backward_kernel,
    short_kernel,
    state_kernel,
)
from .norm_causal_kernels_transnormer import (
    scan_backward_kernel,
    scan_kernel,
)
from .norm_tiles_transnormer import (
    UNSPECIALIZED,
    head_of,
    load_lrpe,
    load_tile,
    map_tile,
)
from .rms_kernels_transnormer import KERNELS as RMS_KERNELS
from .triton_features_transnormer import (
    KernelSpec,
    KernelVariant,
    dot_precision,
    dot_type,
    padded_dim,
    rotation_at,
    wide_dot_type,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error


@triton.jit(do_not_specialize=UNSPECIALIZED)
def step_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, real_ptr, theta_ptr, householder_ptr,
    initial_ptr, output_ptr, state_ptr,
    query_batch_stride, query_head_stride, key_batch_stride, key_head_stride, value_batch_stride, value_head_stride,
    output_batch_stride, output_head_stride, position_batch_stride,
    FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token: S = initial + k'^T v, o = q' S, on BLOCK_COLUMNS columns of S; grid (batch, heads, column blocks).

    state_ptr may be initial_ptr: each element is read once, and written by the program that read it.
    """
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    LRPE: tl.constexpr = theta_ptr is not None
    row = tl.zeros((1,), tl.int32)
    inside = row == 0
    keep = inside
    if real_ptr is not None:
        keep = tl.load(real_ptr + batch + row) != 0
    high, low, householder = load_lrpe(theta_ptr, householder_ptr, HEAD_DIM, BLOCK_K)
    cos, sin = 0, 0
    if LRPE:
        position = tl.load(position_ptr + batch.to(tl.int64) * position_batch_stride + row)
        cos, sin = rotation_at(position[None, :], high[:, None], low[:, None])
    query_ptr = head_of(query_ptr, batch, head, query_batch_stride, query_head_stride)
    query = load_tile(query_ptr, batch * 0, inside, 0, HEAD_DIM, BLOCK_K, 1)
    query = map_tile(query, inside, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, 1, BLOCK_K)  # (BLOCK_K, 1)
    key_ptr = head_of(key_ptr, batch, head, key_batch_stride, key_head_stride)
    key = load_tile(key_ptr, batch * 0, keep, 0, HEAD_DIM, BLOCK_K, 1)
    key = map_tile(key, keep, cos, sin, householder, FEATURE_MAP, LRPE, HEAD_DIM, 1, BLOCK_K)

    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    value_ptr = head_of(value_ptr, batch, head, value_batch_stride, value_head_stride)
    value = tl.load(value_ptr + columns[None, :], mask=(columns < VALUE_DIM)[None, :] & keep[:, None], other=0.0)
    inside = (rows < HEAD_DIM)[:, None] & (columns < VALUE_DIM)[None, :]
    offsets = (
        (batch.to(tl.int64) * heads + head) * (HEAD_DIM * VALUE_DIM) + rows[:, None] * VALUE_DIM + columns[None, :]
    )
    state = key * value.to(tl.float32)  # (BLOCK_K, BLOCK_COLUMNS)
    if initial_ptr is not None:
        state += tl.load(initial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if state_ptr is not None:
        tl.store(state_ptr + offsets, state, mask=inside)
    output = tl.sum(query * state, 0)
    output_ptr = head_of(output_ptr, batch, head, output_batch_stride, output_head_stride)
    tl.store(output_ptr + columns, output.to(output_ptr.dtype.element_ty), mask=columns < VALUE_DIM)


# How sequences are divided, and what that moves

PROGRAMS = 128  # that a launch should have at least: about the multiprocessors of a large GPU
SHORT_LENGTH = 128  # bidirectional sequences up to here are one launch, without a state in memory
SEGMENT_MULTIPLE = 64  # a segment is whole tiles of every kernel


def segments_per_sequence(sequences: int, seq_len: int, head_dim: int) -> int:
    """Into how many segments a sequence is cut, for `sequences` = batch · heads of them: a power of two up to 16.

    As many as give PROGRAMS programs, as long as a segment has 16 · head_dim tokens: then writing and reading a
    partial, 8 · head_dim^2 bytes, is at most a quarter of the segment's part in U (see `norm_attention_traffic`). It
    depends on no device, so that results are the same on all of them.
    """
    segments = 1
    while segments < 16 and segments * sequences < PROGRAMS and seq_len >= 32 * head_dim * segments:
        segments *= 2
    return segments


def norm_attention_traffic(
    batch_size: int, num_heads: int, seq_len: int, head_dim: int, dtype: str, *, causal: bool, mask: bool = False
) -> tuple[int, int]:
    """Bytes that forward and backward read from and write to device memory, counted from the kernels' grids and tiles.

    Per kernel, everything it touches is counted once: what several of its programs read (the partials of a sequence,
    the mask and positions that all heads share, and q, k, v, do where a segment has programs side by side) comes
    from the cache after the first. With U = batch · heads · seq · head_dim elements, S segments of a sequence, and a
    state of head_dim^2 float32 for each head:

        bidirectional
            forward    state kernel   reads k, v, writes S states                      2 U + S states
                       output kernel  reads q and S states, writes o and 1 state       2 U + (S + 1) states
            backward   dq kernel      reads q, do, 1 state, writes dq and S states     3 U + (S + 1) states
                       dk, dv kernel  reads k, v, S states, writes dk, dv              4 U + S states
        causal
            forward    state kernel   reads k, v, but for the last segment             2 U (S - 1) / S + S states
                       scan kernel    reads q, k, v, S - 1 states, writes o, 1 state   4 U + S states
            backward   state kernel   reads q, do, but for the first segment           2 U (S - 1) / S + S states
                       scan kernel    reads q, k, v, do, 2 (S - 1) + 1 states,
                                      writes dq, dk, dv                                7 U + (2 S - 1) states
        short          one kernel each, no states                                      4 U and 7 U

    A causal sequence of one segment needs no state kernel; no head is wider than `widest_tile`. Added to that: theta
    and the householder vector for each kernel, 8 bytes of position for each program, the parts of theta's gradient
    (written, and read by their sum), and with `mask` a byte for each token in the kernels that read k.
    """
    unit = batch_size * num_heads * seq_len * head_dim * {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    state = batch_size * num_heads * head_dim * head_dim * 4
    short = not causal and is_short(dtype, head_dim, head_dim, seq_len)
    segments = 1 if short else segments_per_sequence(batch_size * num_heads, seq_len, head_dim)
    programs = batch_size * num_heads * segments
    segment_length = -(-seq_len // (segments * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE
    in_last = max(seq_len - (segments - 1) * segment_length, 0)
    per_kernel = 6 * head_dim + 8 * programs  # theta, householder, positions
    mask_bytes = batch_size * seq_len * mask
    theta_parts = 2 * programs * (head_dim // 2) * 4

    if short:
        return 4 * unit + per_kernel + mask_bytes, 7 * unit + per_kernel + mask_bytes + theta_parts
    if not causal:
        forward = 4 * unit + (2 * segments + 1) * state
        backward = 7 * unit + (2 * segments + 1) * state
        kernels = 2
        theta_parts *= 2
    else:
        forward, backward, kernels = 4 * unit + state, 7 * unit + state, 1
        if segments > 1:
            forward += 2 * unit * (seq_len - in_last) // seq_len + (2 * segments - 1) * state
            backward += 2 * unit * (seq_len - segment_length) // seq_len + (3 * segments - 2) * state
            kernels = 2
        if not gradients_together(dtype, head_dim, head_dim):
            theta_parts *= 2
    forward += kernels * per_kernel + (kernels if causal else 1) * mask_bytes
    backward += kernels * per_kernel + mask_bytes + theta_parts
    return forward, backward


# Configurations, and the registry for compiling ahead of time


def widest_tile(dtype: str) -> int:
    """The widest head whose state fits into the registers of one program; float32 is multiplied as several parts."""
    return 64 if dtype == "fp32" else 128


def is_short(dtype: str, head_dim: int, value_dim: int, seq_len: int) -> bool:
    """Whether a bidirectional sequence is done in one launch.

    Not so for wide heads in float16, whose states are float32 in the products too: two of them, which the backward pass
    has, are more than the registers of one program.
    """
    fits = dtype != "fp16" or max(head_dim, value_dim) <= 64
    return fits and seq_len <= SHORT_LENGTH


def gradients_together(dtype: str, head_dim: int, value_dim: int) -> bool:
    """Whether one program does all gradients of a segment of a causal scan, or each of three one of them."""
    return max(head_dim, value_dim) <= widest_tile(dtype) // 2


def launch_options(kernel: str, target: str, dtype: str, head_dim: int, value_dim: int) -> dict[str, int]:
    """BLOCK_T, num_warps, num_stages and PARTS of a kernel ("state", ...) on a target ("sm_90", "gfx942", ...)."""
    is_wide = max(head_dim, value_dim) > 64
    options: tuple[int, ...] = _TILES[kernel][is_wide]
    options = _SMALLER_TILES.get((_generation(target), dtype, is_wide), {}).get(kernel, options)
    block_t, num_warps, num_stages, parts = (*options, 1)[:4]
    if padded_dim(value_dim) <= 32:
        parts = 1  # a product is over 16 channels at least
    return {"BLOCK_T": block_t, "num_warps": num_warps, "num_stages": num_stages, "PARTS": parts}


def _generation(target: str) -> str:
    """Targets with the same matrix instructions: those that go through registers, sm_80, are of four kinds."""
    if target.startswith("gfx"):
        return "gfx"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(target, "sm_80")


# BLOCK_T, num_warps, num_stages, and PARTS where it is not 1; up to head_dim 64, and above.
# scripts/compile_kernels.py shows whether they fit.
_TILES = {
    "state": ((64, 4, 2), (64, 8, 2)),
    "output": ((64, 4, 2), (64, 8, 2)),
    "query_backward": ((32, 4, 1), (32, 8, 1)),
    "key_value_backward": ((32, 4, 1), (32, 8, 1)),
    "scan": ((32, 4, 2), (32, 8, 2)),
    "scan_backward": ((16, 4, 1), (16, 8, 1)),
    "step": ((1, 4, 1), (1, 4, 1)),
    "short": ((32, 4, 1), (32, 8, 1)),
    "short_backward": ((32, 4, 1), (32, 8, 1)),
}
# Where registers would spill with these: by generation, dtype, and whether head_dim is above 64.
_SMALLER_TILES: dict[tuple[str, str, bool], dict[str, tuple[int, ...]]] = {
    ("sm_80", "bf16", True): {
        "state": (32, 8, 2),
        "query_backward": (16, 8, 1),
        "key_value_backward": (16, 8, 1),
        "scan": (16, 8, 2),
        "scan_backward": (16, 8, 1, 2),
        "short_backward": (16, 8, 1),
    },
    ("sm_80", "fp16", True): {
        "state": (32, 8, 2),
        "output": (32, 8, 2),
        "query_backward": (16, 8, 1, 2),
        "key_value_backward": (16, 8, 1, 2),
        "scan": (16, 8, 2),
        "scan_backward": (16, 8, 1, 2),
    },
    ("sm_80", "fp16", False): {"short": (32, 8, 1), "scan": (32, 8, 2), "short_backward": (32, 8, 1)},
    ("sm_80", "fp32", False): {
        "state": (32, 8, 2, 2),
        "output": (64, 8, 2, 2),
        "query_backward": (16, 8, 1, 2),
        "key_value_backward": (16, 8, 1),
        "scan": (16, 8, 2),
        "scan_backward": (16, 8, 1, 4),
        "short": (16, 4, 1),
        "short_backward": (16, 8, 1, 2),
    },
    ("sm_90", "fp16", True): {"key_value_backward": (16, 8, 1)},
    ("sm_90", "fp32", False): {
        "state": (32, 4, 2),
        "output": (64, 8, 2),
        "query_backward": (16, 8, 1),
        "key_value_backward": (16, 8, 1),
        "scan": (16, 8, 2),
        "scan_backward": (16, 8, 1, 2),
        "short": (16, 4, 1),
        "short_backward": (16, 8, 1),
    },
    ("sm_100", "bf16", False): {"key_value_backward": (16, 4, 1)},
    ("sm_100", "fp16", False): {"key_value_backward": (16, 4, 1), "scan": (32, 8, 2)},
    ("sm_100", "fp32", False): {
        "state": (32, 4, 2),
        "output": (64, 8, 2),
        "query_backward": (32, 8, 1),
        "key_value_backward": (32, 8, 1),
        "scan": (16, 8, 2),
        "scan_backward": (16, 8, 1),
        "short": (16, 4, 1),
        "short_backward": (16, 8, 1),
    },
    ("gfx", "fp16", True): {
        "query_backward": (16, 8, 1),
        "key_value_backward": (16, 8, 1),
        "scan": (16, 8, 2, 2),
        "scan_backward": (16, 8, 1, 2),
    },
    ("gfx", "bf16", True): {
        "key_value_backward": (16, 8, 1),
        "scan": (32, 8, 1),
        "short_backward": (16, 8, 1),
    },
}


def kernel_constants(
    target: str, dtype: str, head_dim: int, value_dim: int, feature_map: str, interpreted: bool = False
) -> dict[str, Any]:
    """The constexprs that all kernels take the same way.

    Products of float32 inputs are sums of three TF32 products on NVIDIA. Where operands lie in registers, they are sums
    of six bfloat16 products (error below 2^-22, at the same speed): those of TF32 take a third more of them. AMD has a
    float32 matrix instruction.
    """
    precision = dot_precision(target, dtype)
    in_registers = target.startswith("sm_") and _generation(target) != "sm_100"
    if dtype == "fp32" and in_registers and not interpreted:  # the interpreter knows no such product
        precision = "bf16x6"
    return {
        "FEATURE_MAP": feature_map,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": padded_dim(head_dim),
        "BLOCK_V": padded_dim(value_dim),
        "BLOCK_COLUMNS": min(padded_dim(value_dim), 32),
        "DOT": dot_type(dtype, interpreted),
        "WIDE": wide_dot_type(dtype, interpreted),
        "PRECISION": precision,
    }


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    name: str
    feature_map: str
    lrpe: bool
    mask: bool
    packed: bool
    states: bool  # an initial state, and the gradients of both states


# From the plainest to the one that takes the most registers.
_USES = (
    _Use("identity", "identity", lrpe=False, mask=False, packed=False, states=False),
    _Use("1+elu, lrpe, packed, states", "1+elu", lrpe=True, mask=False, packed=True, states=True),
    _Use("1+elu, lrpe, mask, states", "1+elu", lrpe=True, mask=True, packed=False, states=True),
)
_INPUTS = ("query", "key", "value", "output", "output_grad", "query_grad", "key_grad", "value_grad")


def _variants(kernel: Any, name: str, **constants: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    """The function that lists a kernel's variants; constants are the constexprs that are this kernel's own."""

    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        if head_dim > widest_tile(dtype) and name != "step":
            return  # wider heads go through these kernels in parts
        if name.startswith("short") and not is_short(dtype, head_dim, head_dim, 1):
            return
        options = launch_options(name, target, dtype, head_dim, head_dim)
        names = set(kernel.arg_names)
        for use in _USES:
            if use.packed and "table_ptr" not in names:
                continue
            constexprs = kernel_constants(target, dtype, head_dim, head_dim, use.feature_map)
            constexprs |= constants | {
                "BLOCK_T": options["BLOCK_T"],
                "PARTS": options["PARTS"],
                "TOGETHER": gradients_together(dtype, head_dim, head_dim),
            }
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
            if name in ("short", "step"):
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
    *RMS_KERNELS,
    KernelSpec("norm_state", state_kernel, _variants(state_kernel, "state", SKIP="none")),
    KernelSpec("norm_output", output_kernel, _variants(output_kernel, "output")),
    KernelSpec("norm_query_backward", query_backward_kernel, _variants(query_backward_kernel, "query_backward")),
    KernelSpec(
        "norm_key_value_backward",
        key_value_backward_kernel,
        _variants(key_value_backward_kernel, "key_value_backward"),
    ),
    KernelSpec("norm_scan", scan_kernel, _variants(scan_kernel, "scan")),
    KernelSpec("norm_scan_backward", scan_backward_kernel, _variants(scan_backward_kernel, "scan_backward")),
    KernelSpec("norm_short", short_kernel, _variants(short_kernel, "short")),
    KernelSpec("norm_short_backward", short_backward_kernel, _variants(short_backward_kernel, "short_backward")),
    KernelSpec("norm_step", step_kernel, _variants(step_kernel, "step")),
]
