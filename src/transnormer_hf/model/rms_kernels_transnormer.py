"""SimpleRMSNorm by Triton kernels: x / (rms(x) + eps) over all heads together, in one read and one write.

The definition is `simple_rms_norm` in `ops_transnormer.py`. eps stands outside of the root, and all is float32 inside:
in float16 an eps of 1e-8 would be zero.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .reference_transnormer import operator_namespace
from .triton_features_transnormer import (
    ELEMENT_TYPES,
    KernelSpec,
    KernelVariant,
    is_interpreted,
    new_empty,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

NAMESPACE = operator_namespace(__name__)
MAX_WIDTH = 16384  # a row is held in the registers of one program, in the backward two of them


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    hidden_ptr, normed_ptr, rms_ptr, num_rows, hidden_stride, normed_stride, eps,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """y = x / (r + eps), r = sqrt(mean x^2), for BLOCK_ROWS rows; also stores r, (rows,) float32."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    hidden = tl.load(hidden_ptr + wide_rows * hidden_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rms = tl.sqrt(tl.sum(hidden * hidden, 1) / WIDTH)  # (BLOCK_ROWS,)
    tl.store(rms_ptr + rows, rms, mask=rows < num_rows)
    normed = hidden / (rms + eps)[:, None]
    normed_ptr += wide_rows * normed_stride + columns[None, :]
    tl.store(normed_ptr, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward_kernel(
    grad_ptr, normed_ptr, rms_ptr, hidden_grad_ptr, num_rows, grad_stride, normed_stride, hidden_grad_stride, eps,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """dx = g / (r + eps) - y mean(g y) / r, from y and r; the second term is zero for a row of zeros."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    grad = tl.load(grad_ptr + wide_rows * grad_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(normed_ptr + wide_rows * normed_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rms = tl.load(rms_ptr + rows, mask=rows < num_rows, other=0.0)
    along = tl.sum(grad * normed, 1) / WIDTH / tl.where(rms > 0, rms, 1.0)  # (BLOCK_ROWS,); y is 0 where r is
    hidden_grad = grad / (rms + eps)[:, None] - normed * along[:, None]
    hidden_grad_ptr += wide_rows * hidden_grad_stride + columns[None, :]
    tl.store(hidden_grad_ptr, hidden_grad.to(hidden_grad_ptr.dtype.element_ty), mask=inside)


def triton_simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """x / (rms(x) + eps) over the last dimension; shape and dtype of hidden_states.

    The backward works from the result and the rms of each row, so that the input need not be kept.

    Raises ValueError for a device, dtype or width that the kernel does not take.
    """
    if not hidden_states.is_cuda and not (hidden_states.device.type == "cpu" and is_interpreted()):
        raise ValueError(
            f"hidden_states is on {hidden_states.device}; the kernel runs on CUDA and ROCm devices (and on the CPU "
            'only where TRITON_INTERPRET=1 was set before the import). Use backend="auto" or "torch" here.'
        )
    if hidden_states.dtype not in ELEMENT_TYPES or hidden_states.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"hidden_states has dtype {hidden_states.dtype} and width {hidden_states.shape[-1]}; the kernel takes "
            f'float32, float16 and bfloat16 up to a width of {MAX_WIDTH}. Use backend="torch" for others.'
        )
    return rms_norm_forward(hidden_states, eps)[0]


@torch.library.custom_op(f"{NAMESPACE}::simple_rms_norm", mutates_args=())
def rms_norm_forward(hidden_states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed states, contiguous, and the rms of each row, shape hidden_states.shape[:-1], float32."""
    normed, rms = _new_results(hidden_states)
    rows = _as_rows(hidden_states)
    _launch(
        norm_kernel,
        rows,
        hidden_ptr=rows,
        normed_ptr=normed,
        rms_ptr=rms,
        hidden_stride=rows.stride(0),
        normed_stride=rows.shape[1],
        eps=eps,
    )
    return normed, rms


@rms_norm_forward.register_fake
def _(hidden_states, eps):
    return _new_results(hidden_states)


@torch.library.custom_op(f"{NAMESPACE}::simple_rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: torch.Tensor, normed: torch.Tensor, rms: torch.Tensor, eps: float) -> torch.Tensor:
    hidden_grad = new_empty(tuple(normed.shape), normed)
    grad_rows, normed_rows = _as_rows(grad), _as_rows(normed)
    _launch(
        norm_backward_kernel,
        normed_rows,
        grad_ptr=grad_rows,
        normed_ptr=normed_rows,
        rms_ptr=rms.contiguous(),
        hidden_grad_ptr=hidden_grad,
        grad_stride=grad_rows.stride(0),
        normed_stride=normed_rows.stride(0),
        hidden_grad_stride=normed_rows.shape[1],
        eps=eps,
    )
    return hidden_grad


@rms_norm_backward.register_fake
def _(grad, normed, rms, eps):
    return new_empty(tuple(normed.shape), normed)


def _save_for_backward(ctx, inputs, output):
    normed, rms = output
    ctx.mark_non_differentiable(rms)
    ctx.save_for_backward(normed, rms)
    ctx.eps = inputs[1]


def _backward(ctx, grad, _):
    normed, rms = ctx.saved_tensors
    return rms_norm_backward(grad, normed, rms, ctx.eps), None


rms_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _new_results(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(hidden_states.shape)
    return new_empty(shape, hidden_states), new_empty(shape[:-1], hidden_states, torch.float32)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, width) with the channels of a row next to each other; a view wherever there is one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def norm_tile(width: int) -> dict[str, int]:
    """BLOCK_WIDTH, BLOCK_ROWS and num_warps for a width: at least 4096 numbers, 32 for a thread."""
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block_width)
    return {
        "BLOCK_WIDTH": block_width,
        "BLOCK_ROWS": block_rows,
        "num_warps": min(16, max(4, block_width * block_rows // 1024)),
    }


def _launch(kernel: Any, rows: torch.Tensor, **arguments: Any) -> None:
    if rows.numel() == 0:
        return
    tile = norm_tile(rows.shape[1])
    with torch.cuda.device_of(rows):
        kernel[(triton.cdiv(rows.shape[0], tile["BLOCK_ROWS"]),)](
            **arguments, num_rows=rows.shape[0], WIDTH=rows.shape[1], **tile
        )


def _variants(kernel: Any) -> Callable[[str, str, int], Iterator[KernelVariant]]:
    """The function that lists a kernel's variants: the norms of 1, 12 and 64 heads."""

    def variants(target: str, dtype: str, head_dim: int) -> Iterator[KernelVariant]:
        types = {argument: f"*{dtype}" for argument in kernel.arg_names if argument.endswith("_ptr")}
        types |= {"rms_ptr": "*fp32", "eps": "fp32"}
        for width in (head_dim, 12 * head_dim, 64 * head_dim):
            tile = norm_tile(width)
            options = {"num_warps": tile.pop("num_warps"), "num_stages": 1}
            yield KernelVariant(f"width {width}", types, {"WIDTH": width, **tile}, options)

    return variants


KERNELS: list[KernelSpec] = [
    KernelSpec("rms_norm", norm_kernel, _variants(norm_kernel)),
    KernelSpec("rms_norm_backward", norm_backward_kernel, _variants(norm_backward_kernel)),
]
