"""DiagAttention by Triton kernels, as torch sees it: custom operators with fake and derivative, and their launches.

The kernels are in `diag_kernels_transnormer.py`, the definition is `eager_diag_attention` in `ops_transnormer.py`.
"""

from typing import Any

import torch

from .diag_backward_kernels_transnormer import (
    diag_split_backward_kernel,
    diag_tile_backward_kernel,
)
from .diag_forward_kernels_transnormer import (
    diag_split_forward_kernel,
    diag_table_kernel,
    diag_tile_forward_kernel,
)
from .diag_kernels_transnormer import (
    TABLE_TILE,
    diag_plan,
    kernel_constants,
    launch_options,
    tile_sizes,
    width_of,
)
from .reference_transnormer import LRPE, AttentionMetadata, apply_lrpe, operator_namespace
from .triton_features_transnormer import (
    ELEMENT_TYPES,
    check_inputs,
    is_interpreted,
    new_empty,
    strides_of,
    target_of,
    with_rows,
)

NAMESPACE = operator_namespace(__name__)


def triton_diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    lrpe: LRPE | None,
    dropout_p: float,
) -> torch.Tensor:
    """DiagAttention by the kernels; arguments and result as `eager_diag_attention`.

    LRPE is done inside the kernels, with gradients to theta. Where the householder vector wants a gradient too, plain
    torch does it first. Dropout draws one number per call from torch's generator, on the device.

    Raises ValueError for a device, dtype or head_dim that the kernels do not take.
    """
    check_inputs(query, key, value)
    if value.shape[-1] != query.shape[-1] or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key, value have head_dim {query.shape[-1]}, {key.shape[-1]}, {value.shape[-1]} and dtype "
            f"{query.dtype}, {key.dtype}, {value.dtype}; the Triton kernels of DiagAttention need all three alike. "
            'Use backend="torch" for others.'
        )
    if lrpe is not None and lrpe.householder.requires_grad and torch.is_grad_enabled():
        within_block = metadata.positions % block_size
        query, key = (apply_lrpe(states.float(), within_block, lrpe).to(value.dtype) for states in (query, key))
        lrpe = None
    theta, householder = (None, None) if lrpe is None else lrpe
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**62, (1,), device=query.device)
    output, _, _ = diag_attention_forward(
        query,
        key,
        value,
        theta,
        householder,
        metadata.positions,
        metadata.is_real,
        metadata.cu_seqlens,
        seed,
        block_size,
        causal,
        activation,
        scale,
        dropout_p,
    )
    return output


# The operators


@torch.library.custom_op(f"{NAMESPACE}::diag_attention", mutates_args=())
def diag_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seed: torch.Tensor | None,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and for the backward pass the log-sum-exp of each row and the cos and sin of LRPE.

    log-sum-exp: (batch, heads, seq) float32, of length 0 but for softmax on blocks larger than a tile.
    cos and sin: (2, block_size, width / 2) float32, of width 0 without LRPE.
    """
    output, lse, table = _empty_forward(query, theta, block_size, activation)
    if theta is not None:
        with torch.cuda.device_of(query):
            diag_table_kernel[(-(-block_size // TABLE_TILE),)](
                table,
                theta.contiguous(),
                block_size,
                HEAD_DIM=query.shape[-1],
                WIDTH=width_of(query.shape[-1]),
                TILE=TABLE_TILE,
            )
    launch = _Launch(query, table, householder, positions, is_real, cu_seqlens, seed, block_size, scale, dropout_p)
    tensors = {"query": query, "key": key, "value": value, "output": output}
    if launch.plan.is_split:
        pointers = {"lse": lse if lse.shape[-1] else None}
        launch(diag_split_forward_kernel, "split_forward", tensors, pointers, causal, activation)
    else:
        launch(diag_tile_forward_kernel, "tile_forward", tensors, {}, causal, activation)
    return output, lse, table


@diag_attention_forward.register_fake
def _(query, key, value, theta, householder, positions, is_real, cu_seqlens, seed, block_size, causal, activation, *_):
    return _empty_forward(query, theta, block_size, activation)


@torch.library.custom_op(f"{NAMESPACE}::diag_attention_backward", mutates_args=())
def diag_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor | None,
    lse: torch.Tensor | None,
    table: torch.Tensor,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seed: torch.Tensor | None,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and theta (of length 0 without LRPE). Output and lse only where lse is needed."""
    grad_query, grad_key, grad_value = (_token_major(query) for _ in range(3))
    launch = _Launch(query, table, householder, positions, is_real, cu_seqlens, seed, block_size, scale, dropout_p)
    # Each program leaves its part of theta's gradient in a row of its own: the sum has one order, and no atomics.
    # Blocks larger than a tile have three programs where others have one, of which those for dQ and dK have a part.
    is_split = launch.plan.is_split
    parts = new_empty((launch.programs * (2 if is_split else 1), width_of(query.shape[-1]) // 2), query, torch.float32)
    tensors = {"grad": grad, "query": query, "key": key, "value": value}
    pointers: dict[str, torch.Tensor | None] = {
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_theta": None if theta is None else parts,
    }
    if is_split:
        pointers |= {"output": output, "lse": lse}
    launch(
        diag_split_backward_kernel if is_split else diag_tile_backward_kernel,
        "split_backward" if is_split else "tile_backward",
        tensors,
        pointers,
        causal,
        activation,
        **_strides("output", grad_query),
    )
    if theta is None:
        return grad_query, grad_key, grad_value, query.new_empty(0, dtype=torch.float32)
    grad_theta = parts[:, : theta.shape[0]].sum(0).to(theta.dtype)
    return grad_query, grad_key, grad_value, grad_theta


@diag_attention_backward.register_fake
def _(grad, query, key, value, output, lse, table, theta, *_):
    grad_theta = query.new_empty(0, dtype=torch.float32) if theta is None else torch.empty_like(theta)
    return _token_major(query), _token_major(query), _token_major(query), grad_theta


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    attention_output, lse, table = output
    needs_rows = lse.shape[-1] > 0
    ctx.save_for_backward(*inputs[:3], *((attention_output, lse) if needs_rows else (None, None)), table, *inputs[3:9])
    ctx.arguments = inputs[9:]


def _backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_query, grad_key, grad_value, grad_theta = diag_attention_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return grad_query, grad_key, grad_value, grad_theta if ctx.needs_input_grad[3] else None, *(None,) * 10


diag_attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


# The launches


class _Launch:
    """What the launches of one call have in common."""

    def __init__(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        householder: torch.Tensor | None,
        positions: torch.Tensor,
        is_real: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        seed: torch.Tensor | None,
        block_size: int,
        scale: float,
        dropout_p: float,
    ) -> None:
        batch_size, num_heads, seq_len, head_dim = query.shape
        self.query, self.head_dim = query, head_dim
        self.target, self.dtype = target_of(query), ELEMENT_TYPES[query.dtype]
        num_sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.plan = diag_plan(
            self.target, self.dtype, head_dim, seq_len, block_size, None if cu_seqlens is None else num_sequences
        )
        self.programs = self.plan.programs_per_row * batch_size * num_heads
        # the kernels take rows of a mask, and of packed positions, to be contiguous
        is_real = is_real if is_real is None or is_real.stride(1) == 1 else is_real.contiguous()
        self.arguments = {
            "table_ptr": None if householder is None else table,
            "householder_ptr": None if householder is None else householder.contiguous(),
            "positions_ptr": positions if cu_seqlens is None else positions.contiguous(),
            "positions_stride_b": positions.stride(0) if positions.dim() == 2 else 0,
            "is_real_ptr": is_real,
            "is_real_stride_b": 0 if is_real is None else is_real.stride(0),
            "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "seed_ptr": seed,
            "scale": scale,
            "dropout_p": dropout_p,
            "keep_scale": 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p),
            "num_heads": num_heads,
            "seq_len": seq_len,
            "num_sequences": num_sequences,
            "programs_per_row": self.plan.programs_per_row,
            "block_size": block_size,
        }
        if not self.plan.is_split:
            self.arguments["tile_tokens"] = self.plan.tokens

    def __call__(
        self,
        kernel: Any,
        name: str,
        tensors: dict[str, torch.Tensor],
        pointers: dict[str, torch.Tensor | None],
        causal: bool,
        activation: str,
        **more: Any,
    ) -> None:
        """Run a kernel. tensors: (batch, heads, seq, head_dim), passed with their strides; pointers: without."""
        if not self.programs:
            return
        arguments = dict(self.arguments, **more)
        for argument, tensor in tensors.items():
            tensor = with_rows(tensor, self.plan.tile)
            arguments[f"{argument}_ptr"] = tensor
            arguments |= _strides(argument, tensor)
        arguments |= {f"{argument}_ptr": tensor for argument, tensor in pointers.items()}
        key = self.target, self.dtype, self.head_dim, self.plan.tile
        arguments |= kernel_constants(name, *key, causal, activation == "relu", is_interpreted())
        options = launch_options(name, *key)
        with torch.cuda.device_of(self.query):
            kernel[(self.programs * (3 if name == "split_backward" else 1),)](**arguments, **options)


def _strides(argument: str, tensor: torch.Tensor) -> dict[str, int]:
    return {f"{argument}_stride_{axis}": stride for axis, stride in zip("bht", strides_of(tensor), strict=True)}


def _empty_forward(
    query: torch.Tensor, theta: torch.Tensor | None, block_size: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch_size, num_heads, seq_len, head_dim = query.shape
    largest = tile_sizes(target_of(query), ELEMENT_TYPES[query.dtype], head_dim).largest
    needs_rows = activation == "softmax" and block_size > largest
    lse = new_empty((batch_size, num_heads, seq_len if needs_rows else 0), query, torch.float32)
    table = new_empty((2, block_size, 0 if theta is None else width_of(head_dim) // 2), query, torch.float32)
    return _token_major(query), lse, table


def _token_major(like: torch.Tensor) -> torch.Tensor:
    """(batch, heads, seq, head_dim) in memory as (batch, seq, heads, head_dim), so that merging the heads is free."""
    batch_size, num_heads, seq_len, head_dim = like.shape
    return new_empty((batch_size, seq_len, num_heads, head_dim), like).transpose(1, 2)
