"""The kernels of DiagAttention: their variants for compiling ahead of time, and the bytes they move."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transnormer_hf.model.triton_common_transnormer import MAX_HEAD_DIM
from transnormer_hf.model.triton_diag_transnormer import (
    MAX_BLOCK_SIZE,
    count_tiles,
    diag_backward_kernel,
    diag_constants,
    diag_forward_kernel,
    launch_options,
)

from .registry import KernelSpec, KernelVariant, make_variant


class _Use(NamedTuple):
    """One way in which the operators launch the kernels."""

    name: str
    relu: bool
    causal: bool
    lrpe: bool = True
    mask: bool = False
    packed: bool = False
    dropout: bool = False


# From the plainest to the one that takes the most registers.
_USES = (
    _Use("softmax, no lrpe", relu=False, causal=False, lrpe=False),
    _Use("relu, mask, dropout", relu=True, causal=False, mask=True, dropout=True),
    _Use("softmax, causal, packed, dropout", relu=False, causal=True, packed=True, dropout=True),
)
_INPUTS = ("query", "key", "value", "output", "grad", "query_grad", "key_grad", "value_grad")


def _variants(kernel: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        if head_dim > MAX_HEAD_DIM:
            return
        for use in _USES:
            constexprs = diag_constants(target, dtype, head_dim) | {"CAUSAL": use.causal, "RELU": use.relu}
            types: dict[str, str | None] = {f"{tensor}_ptr": f"*{dtype}" for tensor in _INPUTS}
            types |= dict.fromkeys(("theta_ptr", "householder_ptr", "theta_grad_ptr"), "*fp32" if use.lrpe else None)
            types |= {"positions_ptr": "*i64", "scale": "fp32", "dropout_p": "fp32"}
            types |= {"is_real_ptr": "*i1" if use.mask else None, "seed_ptr": "*i64" if use.dropout else None}
            types |= {"cu_seqlens_ptr": "*i64" if use.packed else None}
            yield make_variant(kernel, use.name, types, constexprs, launch_options(target, dtype, head_dim))

    return variants


KERNELS: list[KernelSpec] = [
    KernelSpec("diag_forward", diag_forward_kernel, _variants(diag_forward_kernel)),
    KernelSpec("diag_backward", diag_backward_kernel, _variants(diag_backward_kernel)),
]


def diag_attention_traffic(
    batch_size: int,
    num_heads: int,
    seq_len: int,
    head_dim: int,
    dtype: str,
    *,
    block_size: int = MAX_BLOCK_SIZE,
    mask: bool = True,
) -> tuple[int, int]:
    """Bytes through device memory of a forward and of a backward pass with LRPE, counted program by program.

    With U = batch · heads · seq · head_dim · element size, the programs of the forward pass read q, k, v and write o:
    4 U. Those of the backward pass read q, k, v, dO and write dQ, dK, dV: 7 U. What a program reads again is in its
    cache, 32 KiB for 64 tokens of 128 channels in 16 bits, and counts once. A program also reads one position and its
    part of the mask, and in the backward pass leaves head_dim / 2 numbers for theta's gradient, which are read once
    more to be summed: 4 head_dim bytes per tile, 0.03 U for 64 tokens of 16 bits.
    """
    element_size = 4 if dtype == "fp32" else 2
    tokens = MAX_BLOCK_SIZE // block_size * block_size
    forward = backward = 0
    for tile in range(count_tiles(seq_len, block_size, None)):
        rows = max(0, min(seq_len - tile * tokens, tokens))
        other = 8 + rows * mask
        forward += other + 4 * rows * head_dim * element_size
        backward += other + 7 * rows * head_dim * element_size + 2 * head_dim // 2 * 4
    return batch_size * num_heads * forward, batch_size * num_heads * backward
