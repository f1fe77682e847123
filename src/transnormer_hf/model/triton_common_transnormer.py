"""What the Triton kernels share: feature maps, LRPE, loads and stores, input checks and launches; SimpleRMSNorm.

The tile functions follow `reference_transnormer.py`, which is the definition: phi, then the Householder reflection,
then the rotation. A tile is (BLOCK_T tokens, BLOCK_D channels) of one head, padded with zeros to powers of two.
Query, key and value are (batch, heads, seq, head_dim) and *token-major*: in memory (batch, seq, heads, head_dim), as
projections write them, so one row stride says where everything is.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .reference_transnormer import operator_namespace

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

NAMESPACE = operator_namespace(__name__)
MAX_HEAD_DIM = 128
MAX_NORM_WIDTH = 16384  # one program holds a row in registers, two of them in the backward pass
ELEMENT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Kernels get row strides in units of 8 elements. The compiler then knows that rows are 16-byte aligned without
# specializing on (and recompiling for) each stride; head_dim is a multiple of 8 as well.
STRIDE_UNIT = tl.constexpr(8)


# Feature maps


@triton.jit
def map_features(tile, FEATURE_MAP: tl.constexpr):
    """phi on a float32 tile. 1 + elu(0) is 1: rows and columns that hold nothing must be zeroed after this."""
    if FEATURE_MAP == "elu":
        return tl.where(tile > 0, tile, tl.exp(tl.minimum(tile, 0.0)) - 1)
    elif FEATURE_MAP == "1+elu":
        return tl.where(tile > 0, tile + 1, tl.exp(tl.minimum(tile, 0.0)))
    else:
        return tile


@triton.jit
def map_features_backward(grad, tile, FEATURE_MAP: tl.constexpr):
    """grad · phi'(tile); both elus have the derivative 1 above zero and exp(x) below."""
    if FEATURE_MAP == "identity":
        return grad
    else:
        return tl.where(tile > 0, grad, grad * tl.exp(tl.minimum(tile, 0.0)))


# LRPE


@triton.jit
def load_lrpe(theta_ptr, householder_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """theta as a fraction of a turn, two (BLOCK_D / 2,) uint32, and sqrt(2) v of the reflection, (BLOCK_D,) float32.

    The fraction theta / (2 pi) modulo 1 has 64 bits, in a high and a low word: one float64 division per program, after
    which `rotation_at` is exact integer arithmetic. Three zeros without LRPE.
    """
    if theta_ptr is None:
        return 0, 0, 0
    else:
        pairs, channels = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D)
        theta = tl.load(theta_ptr + pairs, mask=pairs < HEAD_DIM // 2, other=0.0).to(tl.float32)
        turns = theta.to(tl.float64) / 6.283185307179586
        turns = (turns - tl.floor(turns)) * 4294967296.0
        high = tl.floor(turns)
        low = tl.floor((turns - high) * 4294967296.0)
        householder = tl.load(householder_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
        return high.to(tl.int64).to(tl.uint32), low.to(tl.int64).to(tl.uint32), householder * 1.4142135623730951


@triton.jit
def rotation_at(positions, high, low):
    """cos and sin of positions · theta, float32, as accurate at position 2^30 as at 0; shapes broadcast.

    The product is taken modulo one turn in 32-bit fixed point (error 2^-32 turns) and split into a quadrant and a rest
    within an eighth of a turn of its axis; the rest goes through the usual polynomials (error below 1e-7).
    """
    factor = positions.to(tl.uint32)
    fraction = factor * high + tl.umulhi(factor, low)  # wraps at a whole turn
    fraction -= tl.where(positions < 0, low, 0)  # a negative factor was read as 2^32 more
    quadrant = (fraction + 0x20000000) >> 30
    rest = (fraction - (quadrant << 30)).to(tl.int32).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = (
        1
        - 0.5 * square
        + square * square * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    )
    swap = (quadrant & 1) != 0
    cos, sin = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    # quadrants 1, 2 have a negative cosine, 2, 3 a negative sine
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def split_pairs(tile, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """The even and the odd channels of a tile, (BLOCK_T, BLOCK_D / 2) each."""
    return tl.split(tl.reshape(tile, (BLOCK_T, BLOCK_D // 2, 2)))


@triton.jit
def rotate(tile, cos, sin, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Turn the channel pairs (0, 1), (2, 3), ...: (a, b) -> (a cos - b sin, a sin + b cos)."""
    even, odd = split_pairs(tile, BLOCK_T, BLOCK_D)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_T, BLOCK_D))


@triton.jit
def angle_gradient(grad, rotated, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradient of the angle of each pair, (BLOCK_T, BLOCK_D / 2): y = R(angle) x has dy/dangle = (-y_odd, y_even).

    Times the position and summed over tokens, it is the gradient of theta.
    """
    grad_even, grad_odd = split_pairs(grad, BLOCK_T, BLOCK_D)
    even, odd = split_pairs(rotated, BLOCK_T, BLOCK_D)
    return grad_odd * even - grad_even * odd


@triton.jit
def reflect(tile, householder):
    """(I - 2 v v^T) x for each row x, from sqrt(2) v; its own inverse and its own gradient."""
    return tile - tl.sum(tile * householder[None, :], 1)[:, None] * householder[None, :]


# Tiles in memory


@triton.jit
def head_of(tensor_ptr, batch, head, seq_len, row_stride, HEAD_DIM: tl.constexpr):
    """Where a head of a token-major tensor begins; 64-bit, because tensors may have over 2^31 elements."""
    return tensor_ptr + batch.to(tl.int64) * seq_len * row_stride * STRIDE_UNIT + head * HEAD_DIM


@triton.jit
def tile_at(head_ptr, start, mask, row_stride, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where tokens start, start + 1, ... of a head lie, and which of them are inside, (BLOCK_T, BLOCK_D) each.

    Only the beginning of the tile takes 64 bits, one number per program; 64 bits per element would cost registers.
    """
    rows, channels = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_D)[None, :]
    row_stride *= STRIDE_UNIT
    pointers = head_ptr + start.to(tl.int64) * row_stride + (rows * row_stride + channels)
    return pointers, mask[:, None] & (channels < HEAD_DIM)


@triton.jit
def load_tile(head_ptr, start, mask, row_stride, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens start, start + 1, ... of a head in the tensor's dtype; zeros where `mask` (BLOCK_T,) is False."""
    pointers, inside = tile_at(head_ptr, start, mask, row_stride, HEAD_DIM, BLOCK_T, BLOCK_D)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(
    head_ptr, tile, start, mask, row_stride, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    pointers, inside = tile_at(head_ptr, start, mask, row_stride, HEAD_DIM, BLOCK_T, BLOCK_D)
    tl.store(pointers, tile.to(head_ptr.dtype.element_ty), mask=inside)


# The target and its number formats


def is_interpreted() -> bool:
    """True if the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(reflect, triton.runtime.JITFunction)


@functools.lru_cache
def _device_target(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target_of(tensor: torch.Tensor) -> str:
    """Name of the tensor's device in the tables of tiles: "sm_80", "sm_90", ..., "gfx942"; "sm_80" on the CPU."""
    return _device_target(tensor.device) if tensor.is_cuda else "sm_80"


def dot_constants(target: str, dtype: str, interpreted: bool) -> dict[str, Any]:
    """How inputs of a dtype ("fp32", "fp16", "bf16") are multiplied by `tl.dot`, on tensor cores in every case.

    DOT: type of the operands that come from inputs. WIDE: of those that are sums (scores, states), which outgrow the
    65,504 of float16: for float16 inputs it is float32, read as TF32, as precise as float16 with the range of float32.
    PRECISION: `input_precision` of products with float32 operands. Float32 inputs keep float32 accuracy: three TF32
    products on NVIDIA (error about 2^-21), the float32 matrix instruction on AMD.
    """
    dot = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    if dtype == "bf16" and interpreted:
        dot = tl.float32  # the interpreter has no bfloat16 arithmetic
    precision = "tf32" if dtype == "fp16" else "tf32x3"
    return {
        "DOT": dot,
        "WIDE": tl.float32 if dtype == "fp16" else dot,
        "PRECISION": precision if target.startswith("sm_") else "ieee",
    }


def padded_dim(head_dim: int) -> int:
    """Columns of a tile for `head_dim` channels: a power of two, at least the 16 that `tl.dot` needs."""
    return max(16, triton.next_power_of_2(head_dim))


# Inputs and outputs


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot run on these tensors, and what would work; None if they can.

    tensors: query, key and value of an attention, or the one input of a norm.
    """
    for tensor in tensors:
        if not tensor.is_cuda and not (tensor.device.type == "cpu" and is_interpreted()):
            return (
                f'backend="triton" got tensors on {tensor.device}: the kernels need a CUDA or ROCm device (or '
                'TRITON_INTERPRET=1 set before the import). Use backend="auto" or "torch" here.'
            )
        if tensor.dtype not in ELEMENT_TYPES:
            return (
                f'backend="triton" got dtype {tensor.dtype}; the kernels take float32, float16 and bfloat16. Use '
                'backend="auto" or "torch" for others.'
            )
        width = tensor.shape[-1]
        if len(tensors) == 1 and width > MAX_NORM_WIDTH:
            return f'backend="triton" got width {width}; the norm takes up to {MAX_NORM_WIDTH}. Use backend="torch".'
        if len(tensors) > 1 and (width % 8 or not 8 <= width <= MAX_HEAD_DIM):
            return (
                f'backend="triton" got head_dim={width}; the kernels take multiples of 8 from 8 to '
                f'{MAX_HEAD_DIM}. Use backend="auto" or "torch" for others.'
            )
    return None


def row_stride(tensor: torch.Tensor) -> int:
    """Elements from one token of a token-major tensor to the next."""
    batch_size, num_heads, seq_len, head_dim = tensor.shape
    if seq_len > 1:
        return tensor.stride(2)
    return tensor.stride(0) if batch_size > 1 else num_heads * head_dim


def token_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor if it is token-major with 16-byte aligned rows, as every view of a projection is; else a copy.

    tensor: (batch, heads, seq, head_dim). A tile of 256 rows must also fit into 32-bit offsets.
    """
    batch_size, num_heads, seq_len, head_dim = tensor.shape
    stride = row_stride(tensor)
    if (
        tensor.stride(3) == 1
        and (num_heads == 1 or tensor.stride(1) == head_dim)
        and (batch_size == 1 or tensor.stride(0) == seq_len * stride)
        and stride % STRIDE_UNIT.value == 0
        and stride * 256 < 2**31
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def new_empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised output; the kernel must write every element. The tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def new_token_major(like: torch.Tensor) -> torch.Tensor:
    """Uninitialised token-major output of the shape of `like`, so that merging the heads copies nothing."""
    batch_size, num_heads, seq_len, head_dim = like.shape
    return new_empty((batch_size, seq_len, num_heads, head_dim), like).transpose(1, 2)


# Launches and operators


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], tensors: Mapping[str, torch.Tensor | None], **arguments: Any) -> None:
    """Run a kernel on the device of its tensors; an empty grid runs nothing.

    tensors: by name; `x` is passed as `x_ptr`, and a token-major one also as `x_row_stride` if the kernel wants that.
    """
    if 0 in grid:
        return
    device_of, parameters = None, frozenset(kernel.arg_names)
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"] = tensor
        if tensor is not None:
            device_of = tensor
            if f"{name}_row_stride" in parameters:
                arguments[f"{name}_row_stride"] = row_stride(tensor) // STRIDE_UNIT.value
    with torch.cuda.device_of(device_of):
        kernel[grid](**arguments)


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its last parameter, if that is a NamedTuple, replaced by its fields: operators take no tuple.

    The result has their names and types in its signature, from which torch makes the operator's schema.
    """
    signature = inspect.signature(function)
    *leading, last = signature.parameters.values()
    if not hasattr(last.annotation, "_fields"):
        return function

    @functools.wraps(function)
    def flat(*values: Any) -> Any:
        return function(*values[: len(leading)], last.annotation(*values[len(leading) :]))

    fields = [last.replace(name=name, annotation=hint) for name, hint in last.annotation.__annotations__.items()]
    result = signature.return_annotation
    result = typing.List[torch.Tensor] if result == list[torch.Tensor] else result  # noqa: UP006 (torch before 2.7)
    signature = signature.replace(parameters=[*leading, *fields], return_annotation=result)
    flat.__signature__ = signature  # type: ignore[attr-defined]
    return flat


class Differentiable:
    """A function with a derivative, from the two functions that launch its kernels.

    forward, backward: plain functions with type hints; each becomes a custom operator, see `spread`. The two fakes
    return empty results of the same shapes. save(ctx, inputs, output) keeps what the derivative needs, and
    gradients(ctx, run_backward, *grads) calls `run_backward` and orders its results like the inputs.

    The operators run under torch.compile, which must not look inside, and for fake tensors. Other calls go through an
    autograd.Function: with nothing to do, its forward takes 13 us of the host where the operator takes 37 (torch 2.13).
    """

    def __init__(self, name: str, forward, forward_fake, backward, backward_fake, save, gradients) -> None:
        run_forward, run_backward = spread(forward), spread(backward)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = run_forward(*inputs)
                save(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx, *grads):
                return gradients(ctx, run_backward, *grads)

        def operator_gradients(ctx, *grads):
            return gradients(ctx, self.backward_operator, *grads)

        self.function = Function
        self.operator = torch.library.custom_op(f"{NAMESPACE}::{name}", run_forward, mutates_args=())
        self.operator.register_fake(spread(forward_fake))
        self.backward_operator = torch.library.custom_op(f"{NAMESPACE}::{name}_backward", run_backward, mutates_args=())
        self.backward_operator.register_fake(spread(backward_fake))
        self.operator.register_autograd(operator_gradients, setup_context=save)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or type(inputs[0]) not in (torch.Tensor, torch.nn.Parameter):
            return self.operator(*inputs)
        return self.function.apply(*inputs)


# SimpleRMSNorm: x / (rms(x) + eps) over all heads together, in one read and one write


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    hidden_ptr, normed_ptr, rms_ptr, num_rows, row_stride, eps,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """y = x / (r + eps), r = sqrt(mean x^2), for BLOCK_ROWS rows; also stores r, (rows,) float32."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    hidden = tl.load(hidden_ptr + wide_rows * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rms = tl.sqrt(tl.sum(hidden * hidden, 1) / WIDTH)  # (BLOCK_ROWS,)
    tl.store(rms_ptr + rows, rms, mask=rows < num_rows)
    normed = hidden / (rms + eps)[:, None]
    normed_ptr += wide_rows * WIDTH + columns[None, :]
    tl.store(normed_ptr, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    grad_ptr, normed_ptr, rms_ptr, hidden_grad_ptr, num_rows, row_stride, eps,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """dx = g / (r + eps) - y mean(g y) / r, from y and r; the second term is zero for a row of zeros."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    grad = tl.load(grad_ptr + wide_rows * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    offsets = wide_rows * WIDTH + columns[None, :]
    normed = tl.load(normed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    rms = tl.load(rms_ptr + rows, mask=rows < num_rows, other=0.0)
    projection = tl.sum(grad * normed, 1) / WIDTH / tl.where(rms > 0, rms, 1.0)  # (BLOCK_ROWS,); y is 0 where r is
    hidden_grad = grad / (rms + eps)[:, None] - normed * projection[:, None]
    tl.store(hidden_grad_ptr + offsets, hidden_grad.to(hidden_grad_ptr.dtype.element_ty), mask=inside)


def triton_simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """x / (rms(x) + eps) over the last dimension; shape and dtype of hidden_states.

    eps stands outside of the root, and everything is float32 inside: in float16 an eps of 1e-8 would be zero. The
    backward pass works from the result and the rms of each row, so the input need not be kept. The definition is
    `eager_simple_rms_norm` in `reference_transnormer.py`.

    What the kernel does not take, `unsupported` tells before.
    """
    return _rms_norm(hidden_states, eps)[0]


def rms_norm_forward(hidden_states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed states, contiguous, and the rms of each row, shape hidden_states.shape[:-1], float32."""
    normed, rms = _empty_rms_norm(hidden_states, eps)
    _launch_rms_norm(rms_norm_kernel, "hidden", hidden_states, eps, normed=normed, rms=rms)
    return normed, rms


def rms_norm_backward(grad: torch.Tensor, normed: torch.Tensor, rms: torch.Tensor, eps: float) -> torch.Tensor:
    hidden_grad = _empty_rms_norm_backward(grad, normed, rms, eps)
    _launch_rms_norm(rms_norm_backward_kernel, "grad", grad, eps, normed=normed, rms=rms, hidden_grad=hidden_grad)
    return hidden_grad


def rms_norm_tile(width: int) -> dict[str, int]:
    """BLOCK_WIDTH, BLOCK_ROWS and num_warps for a width: at least 4096 numbers, 32 per thread."""
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block_width)
    num_warps = min(16, max(4, block_width * block_rows // 1024))
    return {"BLOCK_WIDTH": block_width, "BLOCK_ROWS": block_rows, "num_warps": num_warps}


def _launch_rms_norm(kernel: Any, name: str, states: torch.Tensor, eps: float, **tensors: torch.Tensor) -> None:
    """Run a kernel on the rows of the states, its input `name`: a view wherever their channels are contiguous."""
    if states.numel() == 0:
        return
    rows = states.reshape(-1, states.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (num_rows, width), tile = rows.shape, rms_norm_tile(rows.shape[1])
    arguments = {"num_rows": num_rows, "row_stride": rows.stride(0), "eps": eps, "WIDTH": width, **tile}
    launch(kernel, (-(-num_rows // tile["BLOCK_ROWS"]),), {name: rows, **tensors}, **arguments)


def _empty_rms_norm(hidden_states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(hidden_states.shape)
    return new_empty(shape, hidden_states), new_empty(shape[:-1], hidden_states, torch.float32)


def _empty_rms_norm_backward(grad: torch.Tensor, normed: torch.Tensor, rms: torch.Tensor, eps: float) -> torch.Tensor:
    return new_empty(tuple(normed.shape), normed)


def _save_rms_norm(ctx, inputs, output):
    normed, rms = output
    ctx.mark_non_differentiable(rms)
    ctx.save_for_backward(normed, rms)
    ctx.eps = inputs[1]


def _rms_norm_gradients(ctx, run_backward, grad, _rms_grad):
    return run_backward(grad, *ctx.saved_tensors, ctx.eps), None


_forward, _backward = (rms_norm_forward, _empty_rms_norm), (rms_norm_backward, _empty_rms_norm_backward)
_rms_norm = Differentiable("simple_rms_norm", *_forward, *_backward, _save_rms_norm, _rms_norm_gradients)
