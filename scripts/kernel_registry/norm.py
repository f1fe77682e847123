"""The kernels of NormAttention and SimpleRMSNorm: variants to compile ahead of time, and the bytes they move."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transnormer_hf.model.triton_common_transnormer import (
    MAX_HEAD_DIM,
    rms_norm_backward_kernel,
    rms_norm_kernel,
    rms_norm_tile,
)
from transnormer_hf.model.triton_norm_transnormer import (
    SCAN_BLOCK,
    SEGMENT,
    gradient_kernel,
    kernel_constants,
    launch_options,
    output_kernel,
    scan_kernel,
    sum_kernel,
)

from .registry import KernelSpec, KernelVariant, make_variant


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    name: str
    feature_map: str
    causal: bool
    lrpe: bool = True
    mask: bool = False
    packed: bool = False
    initial: bool = False


# From the plainest to the one that takes the most registers.
_USES = (
    _Use("identity, bidirectional", "identity", causal=False, lrpe=False),
    _Use("1+elu, lrpe, packed, bidirectional", "1+elu", causal=False, packed=True, initial=True),
    _Use("1+elu, lrpe, packed, causal", "1+elu", causal=True, packed=True, initial=True),
    _Use("1+elu, lrpe, mask, causal", "1+elu", causal=True, mask=True, initial=True),
)
_TENSORS = ("query", "key", "value", "output", "output_grad", "query_grad", "key_grad", "value_grad")


def _variants(kernel: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        if head_dim > MAX_HEAD_DIM:
            return
        options = dict(launch_options(target, dtype, head_dim, head_dim))
        for use in _USES:
            constexprs: dict[str, Any] = kernel_constants(target, dtype, head_dim, head_dim, False) | {
                "BLOCK_T": options["BLOCK_T"],
                "HALVES": options["HALVES"],
                "FEATURE_MAP": use.feature_map,
                "DIRECTION": int(use.causal),
                "SEGMENT": SEGMENT,
            }
            types: dict[str, str | None] = {f"{tensor}_ptr": f"*{dtype}" for tensor in _TENSORS}
            types |= {
                "sum_ptr": "*fp32",
                "state_ptr": "*bf16" if dtype == "bf16" and use.causal else "*fp32",
                "state_grad_ptr": "*bf16" if dtype == "bf16" and use.causal else "*fp32",
                "position_ptr": "*i64" if use.lrpe else None,
                "mask_ptr": "*u8" if use.mask else None,
                "table_ptr": "*i32" if use.packed else None,
            }
            types |= dict.fromkeys(("theta_ptr", "householder_ptr", "theta_grad_ptr"), "*fp32" if use.lrpe else None)
            yield make_variant(
                kernel, use.name, types, constexprs, {option: options[option] for option in ("num_warps", "num_stages")}
            )

    return variants


def _scan_variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
    if head_dim > MAX_HEAD_DIM:
        return
    for use in _USES:
        types: dict[str, str | None] = {
            "sum_ptr": "*fp32",
            "initial_ptr": "*fp32" if use.initial else None,
            "states_ptr": "*bf16" if dtype == "bf16" else "*fp32",
            "total_ptr": "*fp32",
            "table_ptr": "*i32" if use.packed else None,
        }
        constexprs = {"DIRECTION": int(use.causal), "SIZE": head_dim * head_dim, "BLOCK": SCAN_BLOCK}
        yield make_variant(scan_kernel, use.name, types, constexprs, {"num_warps": 4, "num_stages": 3})


def _rms_norm_variants(kernel: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    """The norms of 1, 12 and 64 heads."""

    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        types: dict[str, str | None] = {
            f"{tensor}_ptr": f"*{dtype}" for tensor in ("hidden", "normed", "grad", "hidden_grad")
        }
        types |= {"rms_ptr": "*fp32", "eps": "fp32"}
        for width in (head_dim, 12 * head_dim, 64 * head_dim):
            tile = rms_norm_tile(width)
            options = {"num_warps": tile.pop("num_warps"), "num_stages": 1}
            yield make_variant(kernel, f"width {width}", types, {"WIDTH": width, **tile}, options)

    return variants


def norm_attention_traffic(
    batch_size: int, num_heads: int, seq_len: int, head_dim: int, dtype: str, *, causal: bool, mask: bool = False
) -> tuple[int, int]:
    """Bytes that forward and backward read from and write to device memory, with LRPE, counted launch by launch.

    Per launch everything it touches counts once: what several of its programs read comes from the cache after the
    first. With U = batch · heads · seq · head_dim elements, S segments in a sequence, a float32 state of head_dim^2
    numbers for each head, and 1/2 for the states before segments, which bfloat16 inputs store in bfloat16:

                           bidirectional              causal
        forward   sum      2 U + S states             the same
                  scan     (S + 1) states             (3/2 S + 1) states
                  output   2 U + 1 state              4 U + 1/2 S states
        backward  sum      2 U + S states             the same
                  scan     (S + 1) states             (3/2 S + 1) states
                  gradient 7 U + 2 states             7 U + S states

    Added to that: theta, the householder vector and 8 bytes of position for each program, the parts of theta's gradient
    (written, and read by their sum), and with `mask` a byte for each token and launch.
    """
    unit = batch_size * num_heads * seq_len * head_dim * (4 if dtype == "fp32" else 2)
    state = batch_size * num_heads * head_dim * head_dim * 4
    segments = -(-seq_len // SEGMENT)
    stored = segments * state // (2 if dtype == "bf16" else 1)  # states before all segments
    sums = 2 * unit + 2 * segments * state + state + causal * stored  # and their scan
    forward = sums + (4 * unit + stored if causal else 2 * unit + state)
    backward = sums + 7 * unit + 2 * (stored if causal else state)
    tiles = segments * SEGMENT // launch_options("sm_90", dtype, head_dim, head_dim)["BLOCK_T"]
    tiles *= batch_size * num_heads
    both_launches = 2 * (6 * head_dim + mask * batch_size * seq_len) + 8 * batch_size * num_heads * segments
    forward += both_launches + 8 * tiles
    backward += both_launches + 3 * 8 * tiles + 2 * 2 * tiles * (head_dim // 2) * 4
    return forward, backward


KERNELS: list[KernelSpec] = [
    KernelSpec("rms_norm", rms_norm_kernel, _rms_norm_variants(rms_norm_kernel)),
    KernelSpec("rms_norm_backward", rms_norm_backward_kernel, _rms_norm_variants(rms_norm_backward_kernel)),
    KernelSpec("norm_sum", sum_kernel, _variants(sum_kernel)),
    KernelSpec("norm_scan", scan_kernel, _scan_variants),
    KernelSpec("norm_output", output_kernel, _variants(output_kernel)),
    KernelSpec("norm_gradient", gradient_kernel, _variants(gradient_kernel)),
]
