"""What all Triton kernels here share: feature maps and LRPE on a tile, the target they run on, the registry.

The tile functions follow `reference_transnormer.py`, which is the definition: phi, then the Householder reflection,
then the rotation. Tiles are (rows, columns) float32: rows are tokens, columns channels, padded with zeros to a power of
two.

A `KernelSpec` names a kernel and lists every variant of it that may be launched, so that each can be compiled without
a GPU and its spills and shared memory be read before anybody runs it.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the triton package: pip install triton.") from error

# The kernels get strides in units of so many elements. So the compiler knows that they are multiples of them, and reads
# 16 bytes at a time, without compiling anew for every property of a stride; head_dim is a multiple of 8 as well.
STRIDE_UNIT = tl.constexpr(8)

# Tile functions: all in float32


@triton.jit
def map_features(hidden_states, FEATURE_MAP: tl.constexpr):
    """phi on a float32 tile. 1 + elu(0) is 1: rows and columns that hold nothing must be zeroed after this."""
    if FEATURE_MAP == "elu":
        return tl.where(hidden_states > 0, hidden_states, tl.exp(tl.minimum(hidden_states, 0.0)) - 1)
    elif FEATURE_MAP == "1+elu":
        return tl.where(hidden_states > 0, hidden_states + 1, tl.exp(tl.minimum(hidden_states, 0.0)))
    else:
        return hidden_states


@triton.jit
def map_features_backward(grad, hidden_states, FEATURE_MAP: tl.constexpr):
    """grad · phi'(hidden_states); both elus have the derivative 1 above zero and exp(x) below."""
    if FEATURE_MAP == "identity":
        return grad
    else:
        return tl.where(hidden_states > 0, grad, grad * tl.exp(tl.minimum(hidden_states, 0.0)))


@triton.jit
def turn_fraction(theta):
    """theta / (2 pi) modulo 1 as a 64-bit binary fraction: two uint32, the high and the low word.

    theta: (columns / 2,) float32. Done once per program, in float64; what follows is exact integer arithmetic.
    """
    turns = theta.to(tl.float64) / 6.283185307179586
    turns = (turns - tl.floor(turns)) * 4294967296.0
    high = tl.floor(turns)
    low = tl.floor((turns - high) * 4294967296.0)
    return high.to(tl.int64).to(tl.uint32), low.to(tl.int64).to(tl.uint32)


@triton.jit
def rotation(positions, high, low):
    """cos and sin of positions · theta, (rows, columns / 2), from positions (rows,) and theta's `turn_fraction`."""
    return rotation_at(positions[:, None], high[None, :], low[None, :])


@triton.jit
def rotation_at(positions, high, low):
    """cos and sin of positions · theta, float32, as accurate at position 2^30 as at 0; shapes broadcast.

    The product is taken modulo one turn in 32-bit fixed point (error 2^-32 turns), split into a quadrant and a rest
    within an eighth of a turn of its axis, and the rest goes through the usual polynomials (error below 1e-7).
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
def reflect(hidden_states, householder):
    """(I - 2 v v^T) x for each row x; householder: (columns,) float32. Its own inverse and its own gradient."""
    return hidden_states - 2 * tl.sum(hidden_states * householder[None, :], 1)[:, None] * householder[None, :]


@triton.jit
def rotate(hidden_states, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Turn the channel pairs (0, 1), (2, 3), ...: (a, b) -> (a cos - b sin, a sin + b cos)."""
    even, odd = tl.split(tl.reshape(hidden_states, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, COLUMNS))


@triton.jit
def rotate_back(hidden_states, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse and the gradient of `rotate`."""
    return rotate(hidden_states, cos, -sin, ROWS, COLUMNS)


@triton.jit
def rotation_gradient(grad, rotated, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """d loss / d angle of each pair, (rows, columns / 2), from the gradient of the rotated tile and that tile.

    y = R(angle) x has dy/dangle = (-y_odd, y_even). Times the position, summed over rows, it is the gradient of theta.
    """
    grad_even, grad_odd = tl.split(tl.reshape(grad, (ROWS, COLUMNS // 2, 2)))
    even, odd = tl.split(tl.reshape(rotated, (ROWS, COLUMNS // 2, 2)))
    return grad_odd * even - grad_even * odd


# The target, and what may run there


@lru_cache
def _device_target(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target_of(tensor: torch.Tensor) -> str:
    """The name under which the tables know this tensor's device: "sm_80", "sm_90", ..., "gfx942", ...

    The interpreter on the CPU takes the numbers of "sm_80".
    """
    return _device_target(tensor.device) if tensor.is_cuda else "sm_80"


def target_family(target: str) -> str:
    """Targets that share a row of a table: "datacenter" (sm_80, 90, 100, 103), "consumer" (other NVIDIA), "amd"."""
    if target.startswith("gfx"):
        return "amd"
    return "datacenter" if target in ("sm_80", "sm_90", "sm_100", "sm_103") else "consumer"


def new_empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a result of a kernel, all of which it must write; the tests make it come full of NaN."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def is_interpreted() -> bool:
    """Whether these kernels were made for Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(rotate, triton.runtime.JITFunction)


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise a ValueError that says what would work where the kernels do not take these tensors."""
    if not query.is_cuda and not (query.device.type == "cpu" and is_interpreted()):
        raise ValueError(
            f'backend="triton" got tensors on {query.device}; the kernels run on CUDA and ROCm devices (and on the CPU '
            'only where TRITON_INTERPRET=1 was set before the import). Use backend="auto" or "torch" here.'
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; move them to one device.")
        if tensor.dtype not in ELEMENT_TYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; the Triton kernels take float32, float16 and bfloat16. "
                'Use backend="torch" for others.'
            )
        if tensor.shape[-1] % 8 or not 8 <= tensor.shape[-1] <= 256:
            raise ValueError(
                f"{name} has head_dim={tensor.shape[-1]}; the Triton kernels take multiples of 8 from 8 to 256. "
                'Use backend="torch" for others.'
            )


def with_rows(tensor: torch.Tensor, tile: int) -> torch.Tensor:
    """The tensor itself where a head's channels lie side by side and begin at multiples of 16 bytes, as they do in any
    view of a projection; a copy where not, or where offsets between `tile` rows need more than 32 bits.
    """
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    fits = tensor.stride(-1) == 1 and tensor.stride(-2) * tile < 2**31 and tensor.data_ptr() % 16 == 0
    if fits and all(stride % STRIDE_UNIT.value == 0 for stride in strides[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Strides of all dimensions but the last, in units of `STRIDE_UNIT`; 0 for dimensions of one element."""
    sizes = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [stride // STRIDE_UNIT.value if size > 1 else 0 for size, stride in sizes]


ELEMENT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def dot_type(dtype: str, interpreted: bool = False) -> tl.dtype:
    """Type of the operands of `tl.dot` that come straight from inputs of this dtype ("fp32", "fp16", "bf16").

    The interpreter has no bfloat16 arithmetic, so there it is float32.
    """
    if dtype == "bf16" and interpreted:
        return tl.float32
    return {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]


def wide_dot_type(dtype: str, interpreted: bool = False) -> tl.dtype:
    """Type of the operands of `tl.dot` that are sums: scores and states, which outgrow the 65,504 of float16.

    For float16 inputs it is float32, read as TF32: as precise as float16, with the range of float32.
    """
    return tl.float32 if dtype == "fp16" else dot_type(dtype, interpreted)


def dot_precision(target: str, dtype: str) -> str:
    """`input_precision` of a dot with float32 operands, on tensor cores in every case.

    For float32 inputs the sums must be float32 in deed: three TF32 products on NVIDIA (error about 2^-21), the float32
    matrix instruction on AMD.
    """
    if not target.startswith("sm_"):
        return "ieee"
    return "tf32" if dtype == "fp16" else "tf32x3"


def padded_dim(head_dim: int) -> int:
    """Columns of the tile that holds `head_dim` channels: a power of two, at least the 16 that `tl.dot` needs."""
    return max(16, triton.next_power_of_2(head_dim))


# The registry for compiling ahead of time


class KernelVariant(NamedTuple):
    """One specialisation of a kernel.

    name: what is switched on in it, for reports, e.g. "elu, lrpe, mask".
    types: type of each pointer and float parameter, e.g. {"query_ptr": "*bf16", "eps": "fp32"}; parameters that are
        neither here nor in constexprs are integers (sizes and strides).
    constexprs: value of each constexpr parameter, and None for each pointer that is not passed.
    options: num_warps and num_stages.
    """

    name: str
    types: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


class KernelSpec(NamedTuple):
    """A kernel and the function that lists its variants for a target ("sm_90"), a dtype ("bf16") and a head_dim."""

    name: str
    function: Any  # a triton.JITFunction
    variants: Callable[[str, str, int], Iterator[KernelVariant]]


class CompileArguments(NamedTuple):
    """What `triton.compiler.ASTSource` takes."""

    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]


def compile_arguments(spec: KernelSpec, variant: KernelVariant) -> CompileArguments:
    """Signature, constants and attributes of a variant, as the run time would specialise it.

    Pointers are multiples of 16, and so are the strides of whole rows; sizes are not, and nothing is known of what a
    kernel does not specialise.
    """
    unknown = set(getattr(spec.function, "do_not_specialize", ()))
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(spec.function.arg_names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.types.get(name, "i32")
        if signature[name].startswith("*") or ("stride" in name and name not in unknown):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return CompileArguments(signature, dict(variant.constexprs), attrs)


def unsupported(*tensors: torch.Tensor) -> str | None:
    """Why the kernels do not take these tensors (query, key and value, or the input of a norm); None where they do."""
    try:
        check_inputs(*(tensors if len(tensors) == 3 else [tensors[0].new_empty(0, 8)] * 3))
    except ValueError as error:
        return str(error)
    if max(tensor.shape[-1] for tensor in tensors) > (128 if len(tensors) == 3 else 16384):
        return f'The last dimension is {tensors[0].shape[-1]}, too wide for the Triton kernels. Use backend="torch".'
    return None
