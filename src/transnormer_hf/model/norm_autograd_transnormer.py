"""NormAttention by Triton kernels, as torch sees it: custom operators with fake and derivative, and their launches.

The kernels are in `norm_kernels_transnormer.py`, the definition is `eager_norm_attention` in `ops_transnormer.py`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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
from .norm_kernels_transnormer import (
    SEGMENT_MULTIPLE,
    gradients_together,
    is_short,
    kernel_constants,
    launch_options,
    segments_per_sequence,
    step_kernel,
    widest_tile,
)
from .reference_transnormer import LRPE, AttentionMetadata, operator_namespace, prepare_query_key
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


def triton_norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
    initial_state: torch.Tensor | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NormAttention by the kernels; arguments and results as `eager_norm_attention`.

    Up to head_dim 128 (64 in float32) phi and LRPE are done inside the kernels, with gradients to theta. Where the
    householder vector wants a gradient too, or the head is wider, plain torch does them first. A wide head is done in
    parts of its channels: products of parts of the keys' are added up, those of the values' lie next to each other.

    Raises ValueError for a device, dtype or head_dim that the kernels do not take.
    """
    check_inputs(query, key, value)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = widest_tile(ELEMENT_TYPES[query.dtype])
    wide = max(head_dim, value_dim) > width
    if wide or (lrpe is not None and lrpe.householder.requires_grad and torch.is_grad_enabled()):
        dtype = query.dtype
        query, key = prepare_query_key(query.float(), key.float(), metadata, feature_map, lrpe)
        query, key, feature_map, lrpe = query.to(dtype), key.to(dtype), "identity", None
    if not wide:
        return _norm_attention(query, key, value, metadata, causal, feature_map, lrpe, initial_state, return_state)

    outputs, states = [], []
    for columns in _parts(value_dim, width):
        parts = [
            _norm_attention(
                query[..., rows],
                key[..., rows],
                value[..., columns],
                metadata,
                causal,
                feature_map,
                None,
                None if initial_state is None else initial_state[..., rows, columns],
                return_state,
            )
            for rows in _parts(head_dim, width)
        ]
        outputs.append(torch.stack([output.float() for output, _ in parts]).sum(0).to(value.dtype))
        if return_state:
            states.append(torch.cat([state for _, state in parts], -2))
    return torch.cat(outputs, -1), torch.cat(states, -1) if return_state else None


def _parts(size: int, width: int) -> list[slice]:
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]


def _norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
    initial_state: torch.Tensor | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    theta, householder = (None, None) if lrpe is None else lrpe
    packed = metadata.cu_seqlens is not None
    if packed and initial_state is not None:
        # tokens behind the last packed sequence are a sequence of their own, with a state that nobody sees
        initial_state = F.pad(initial_state, (0, 0, 0, 0, 0, 0, 0, 1))
    output, state, _ = norm_attention_forward(
        query,
        key,
        value,
        metadata.positions,
        metadata.is_real,
        metadata.cu_seqlens,
        theta,
        householder,
        initial_state,
        causal,
        feature_map,
        return_state,
    )
    if not return_state:
        return output, None
    return output, state[:-1] if packed else state


# The operators


@torch.library.custom_op(f"{NAMESPACE}::norm_attention", mutates_args=())
def norm_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    causal: bool,
    feature_map: str,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, state and, for the backward of a causal scan, the partials of the segments.

    The state has no rows where it is neither asked for nor needed. With cu_seqlens, states (initial_state too) have one
    row more than there are sequences.
    """
    query, key, value = (with_rows(tensor, SEGMENT_MULTIPLE) for tensor in (query, key, value))
    shapes = _shapes(query, value, cu_seqlens, causal, return_state)
    _, heads, _, value_dim = value.shape
    output = _token_major(value, value_dim)
    state = new_empty((shapes.state_rows, heads, query.shape[-1], value_dim), query, torch.float32)
    partials = new_empty((shapes.partial_rows, heads, query.shape[-1], value_dim), query, torch.float32)
    launch = _Launch(query, value, positions, is_real, cu_seqlens, theta, householder, feature_map, shapes)
    initial_state = None if initial_state is None else initial_state.contiguous()
    if value.shape[2] == 1 and cu_seqlens is None:
        _launch_step(launch, query, key, value, output, initial_state, state if shapes.state_rows else None)
    elif shapes.short:
        launch(
            short_kernel,
            "short",
            tensors={"query": query, "key": key, "value": value, "output": output},
            pointers={"initial": initial_state, "state": state if return_state else None},
        )
    elif causal:
        if shapes.partial_rows:
            launch(
                state_kernel,
                "state",
                tensors={"key": key, "value": value},
                pointers={"partial": partials},
                SKIP="last",
            )
        launch(
            scan_kernel,
            "scan",
            tensors={"query": query, "key": key, "value": value, "output": output},
            pointers={
                "partial": partials if shapes.partial_rows else None,
                "initial": initial_state,
                "state": state,
            },
        )
    else:
        scratch = new_empty((shapes.programs, heads, query.shape[-1], value_dim), query, torch.float32)
        launch(
            state_kernel,
            "state",
            tensors={"key": key, "value": value},
            pointers={"partial": scratch},
            SKIP="none",
        )
        launch(
            output_kernel,
            "output",
            tensors={"query": query, "output": output},
            pointers={"partial": scratch, "initial": initial_state, "state": state},
        )
    return output, state, partials


@norm_attention_forward.register_fake
def _(
    query,
    key,
    value,
    positions,
    is_real,
    cu_seqlens,
    theta,
    householder,
    initial_state,
    causal,
    feature_map,
    return_state,
):
    shapes = _shapes(query, value, cu_seqlens, causal, return_state)
    heads, head_dim, value_dim = query.shape[1], query.shape[-1], value.shape[-1]
    state = new_empty((shapes.state_rows, heads, head_dim, value_dim), query, torch.float32)
    partials = new_empty((shapes.partial_rows, heads, head_dim, value_dim), query, torch.float32)
    return _token_major(value, value_dim), state, partials


@torch.library.custom_op(f"{NAMESPACE}::norm_attention_backward", mutates_args=())
def norm_attention_backward(
    output_grad: torch.Tensor,
    state_grad: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    state: torch.Tensor,
    partials: torch.Tensor,
    causal: bool,
    feature_map: str,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, theta and initial_state; the last two without elements where there is none."""
    query, key, value, output_grad = (
        with_rows(tensor, SEGMENT_MULTIPLE) for tensor in (query, key, value, output_grad)
    )
    shapes = _shapes(query, value, cu_seqlens, causal, return_state)
    heads, head_dim, value_dim = query.shape[1], query.shape[-1], value.shape[-1]
    query_grad, key_grad, value_grad = (_token_major(tensor, tensor.shape[-1]) for tensor in (query, key, value))
    state_grad = None if state_grad is None or not return_state else state_grad.contiguous()
    initial_grad = None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        initial_grad = new_empty((shapes.num_states, heads, head_dim, value_dim), query, torch.float32)
    together = not causal or gradients_together(ELEMENT_TYPES[query.dtype], head_dim, value_dim)
    scratch = None
    if not shapes.short and (not causal or shapes.partial_rows):
        scratch = new_empty((shapes.programs, heads, head_dim, value_dim), query, torch.float32)
    theta_parts = None
    if theta is not None:
        launches = 1 if causal or shapes.short else 2
        rows = shapes.programs * (1 if together else 2)
        theta_parts = new_empty((launches, rows, heads, head_dim // 2), query, torch.float32)
    launch = _Launch(query, value, positions, is_real, cu_seqlens, theta, householder, feature_map, shapes)
    everything = {
        "query": query,
        "key": key,
        "value": value,
        "output_grad": output_grad,
        "query_grad": query_grad,
        "key_grad": key_grad,
        "value_grad": value_grad,
    }
    if shapes.short:
        launch(
            short_backward_kernel,
            "short_backward",
            tensors=everything,
            pointers={
                "initial": initial_state,
                "state_grad": state_grad,
                "initial_grad": initial_grad,
                "theta_grad": None if theta_parts is None else theta_parts[0],
            },
        )
    elif causal:
        if scratch is not None:
            launch(
                state_kernel,
                "state",
                tensors={"key": query, "value": output_grad},
                pointers={"real": None, "partial": scratch},
                SKIP="first",
            )
        launch(
            scan_backward_kernel,
            "scan_backward",
            tensors=everything,
            pointers={
                "partial": partials if shapes.partial_rows else None,
                "initial": initial_state,
                "state": state,
                "grad_partial": scratch,
                "state_grad": state_grad,
                "initial_grad": initial_grad,
                "theta_grad": None if theta_parts is None else theta_parts[0],
            },
            grid=(shapes.programs * (1 if together else 3), heads),
            TOGETHER=together,
        )
    else:
        launch(
            query_backward_kernel,
            "query_backward",
            tensors={"query": query, "output_grad": output_grad, "query_grad": query_grad},
            pointers={
                "state": state,
                "partial": scratch,
                "theta_grad": None if theta_parts is None else theta_parts[0],
            },
        )
        launch(
            key_value_backward_kernel,
            "key_value_backward",
            tensors={"key": key, "value": value, "key_grad": key_grad, "value_grad": value_grad},
            pointers={
                "partial": scratch,
                "state_grad": state_grad,
                "initial_grad": initial_grad,
                "theta_grad": None if theta_parts is None else theta_parts[1],
            },
        )
    theta_grad = query.new_zeros(0, dtype=torch.float32)
    if theta is not None:
        theta_grad = theta_parts.flatten(0, 2).sum(0).to(theta.dtype)
    if initial_grad is None:
        initial_grad = query.new_zeros(0, dtype=torch.float32)
    return query_grad, key_grad, value_grad, theta_grad, initial_grad


@norm_attention_backward.register_fake
def _(
    output_grad, state_grad, query, key, value, positions, is_real, cu_seqlens, theta, householder, initial_state,
    state, partials, causal, feature_map, return_state,
):  # fmt: skip
    nothing = query.new_empty(0, dtype=torch.float32)
    return (
        _token_major(query, query.shape[-1]),
        _token_major(key, key.shape[-1]),
        _token_major(value, value.shape[-1]),
        nothing if theta is None else torch.empty_like(theta),
        nothing.clone() if initial_state is None else new_empty(initial_state.shape, query, torch.float32),
    )


def _save_for_backward(ctx, inputs, output):
    *tensors, causal, feature_map, return_state = inputs
    _, state, partials = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((partials,) if return_state else (state, partials)))
    ctx.save_for_backward(*tensors, state, partials)
    ctx.options = causal, feature_map, return_state


def _backward(ctx, output_grad, state_grad, _):
    query, key, value, positions, is_real, cu_seqlens, theta, householder, initial_state, state, partials = (
        ctx.saved_tensors
    )
    if output_grad is None:
        output_grad = torch.zeros_like(value)
    query_grad, key_grad, value_grad, theta_grad, initial_grad = norm_attention_backward(
        output_grad,
        state_grad,
        query,
        key,
        value,
        positions,
        is_real,
        cu_seqlens,
        theta,
        householder,
        initial_state,
        state,
        partials,
        *ctx.options,
    )
    if theta is None:
        theta_grad = None
    initial_grad = None if initial_state is None else initial_grad.to(initial_state.dtype)
    return query_grad, key_grad, value_grad, None, None, None, theta_grad, None, initial_grad, None, None, None


norm_attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


# Decoding


def triton_norm_attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    feature_map: str,
    lrpe: LRPE | None,
) -> torch.Tensor:
    """One token of causal NormAttention: adds k'^T v to the state in place, and returns q' S, float32.

    query, key, value: (batch, heads, 1, head_dim); state: (batch, heads, head_dim, head_dim) float32, contiguous.
    The state is read once and written once; nothing else of its size is allocated. Not differentiable.

    Raises ValueError for more than one token, and for a state that cannot be changed in place.
    """
    check_inputs(query, key, value)
    if query.shape[2] != 1 or metadata.cu_seqlens is not None:
        raise ValueError(
            f"query has {query.shape[2]} tokens; a step takes one token per row. Use norm_attention for more."
        )
    shape = (*query.shape[:2], query.shape[-1], value.shape[-1])
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"state has shape {tuple(state.shape)} and dtype {state.dtype}; it is changed in place and must be a "
            f"contiguous float32 tensor of shape {shape}."
        )
    theta, householder = (None, None) if lrpe is None else lrpe
    return norm_attention_step(
        query, key, value, state, metadata.positions, metadata.is_real, theta, householder, feature_map
    )


@torch.library.custom_op(f"{NAMESPACE}::norm_attention_step", mutates_args=("state",))
def norm_attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    theta: torch.Tensor | None,
    householder: torch.Tensor | None,
    feature_map: str,
) -> torch.Tensor:
    query, key, value = (with_rows(tensor, SEGMENT_MULTIPLE) for tensor in (query, key, value))
    shapes = _shapes(query, value, None, True, True)
    output = _token_major(state, value.shape[-1], seq_len=1)
    launch = _Launch(query, value, positions, is_real, None, theta, householder, feature_map, shapes)
    _launch_step(launch, query, key, value, output, state, state)
    return output


@norm_attention_step.register_fake
def _(query, key, value, state, positions, is_real, theta, householder, feature_map):
    return _token_major(state, value.shape[-1], seq_len=1)


# The launches


class _Shapes(NamedTuple):
    """What follows from the shapes alone, so that fake tensors know it too.

    short: a whole sequence is one program's, and its state stays there.
    segments: segments of a sequence, of the whole row where it is packed.
    programs: segments of all sequences, with those that packing may add.
    num_states: sequences, the one behind the last packed one included.
    state_rows, partial_rows: rows of the state and of the partials that the forward returns, 0 where it needs none.
    """

    short: bool
    segments: int
    programs: int
    num_states: int
    state_rows: int
    partial_rows: int


def _shapes(
    query: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    return_state: bool,
) -> _Shapes:
    batch, heads, seq_len, head_dim = query.shape
    value_dim = value.shape[-1]
    short = not causal and cu_seqlens is None and is_short(ELEMENT_TYPES[query.dtype], head_dim, value_dim, seq_len)
    segments = 1 if short else segments_per_sequence(batch * heads, seq_len, max(head_dim, value_dim))
    num_states, programs = batch, batch * segments
    if cu_seqlens is not None:
        # each sequence, one of no tokens too, has at least one segment
        num_states, programs = cu_seqlens.shape[0], segments + cu_seqlens.shape[0]
    return _Shapes(
        short=short,
        segments=segments,
        programs=programs,
        num_states=num_states,
        state_rows=num_states if return_state or not short else 0,
        partial_rows=programs if causal and segments > 1 else 0,
    )


class _Launch:
    """Launches kernels on one set of inputs: fills in what their names ask for."""

    def __init__(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        is_real: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        theta: torch.Tensor | None,
        householder: torch.Tensor | None,
        feature_map: str,
        shapes: _Shapes,
    ):
        seq_len, head_dim, value_dim = query.shape[2], query.shape[3], value.shape[3]
        self.query = query
        self.grid = (shapes.programs, query.shape[1])
        segment_length = _round_up(-(-seq_len // shapes.segments), SEGMENT_MULTIPLE)
        positions = positions.contiguous()
        self.arguments: dict[str, Any] = {
            "position_ptr": None if theta is None else positions,
            "position_batch_stride": positions.stride(0) if positions.dim() == 2 else 0,
            "real_ptr": None if is_real is None else is_real.contiguous().view(torch.uint8),
            "theta_ptr": None if theta is None else theta.contiguous(),
            "householder_ptr": None if householder is None else householder.contiguous(),
            "table_ptr": None,
            "seq_len": seq_len,
            "segment_length": segment_length,
            "segments_per_sequence": shapes.segments,
            "num_states": shapes.num_states,
        }
        if cu_seqlens is not None:
            self.arguments["table_ptr"] = _segment_table(cu_seqlens, seq_len, segment_length, shapes.programs)
        self.constants = kernel_constants(
            target_of(query), ELEMENT_TYPES[query.dtype], head_dim, value_dim, feature_map, is_interpreted()
        )

    def __call__(
        self,
        kernel: Any,
        name: str,
        tensors: dict[str, torch.Tensor],
        pointers: dict[str, torch.Tensor | None],
        grid: tuple[int, ...] | None = None,
        **constants: Any,
    ) -> None:
        """tensors are (batch, heads, seq, head_dim) and bring their strides, pointers are taken as they are."""
        head_dim, value_dim = self.constants["HEAD_DIM"], self.constants["VALUE_DIM"]
        options = launch_options(name, target_of(self.query), ELEMENT_TYPES[self.query.dtype], head_dim, value_dim)
        arguments = self.arguments | self.constants | constants | options
        arguments |= {f"{pointer}_ptr": tensor for pointer, tensor in pointers.items()}
        for tensor_name, tensor in tensors.items():
            arguments[f"{tensor_name}_ptr"] = tensor
            for axis, stride in zip(("batch", "head", "row"), strides_of(tensor), strict=True):
                arguments[f"{tensor_name}_{axis}_stride"] = stride
        if self.query.numel() == 0:
            return
        names = set(kernel.arg_names)
        with torch.cuda.device_of(self.query):
            kernel[grid or self.grid](
                **{argument: value for argument, value in arguments.items() if argument in names},
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
            )


def _launch_step(
    launch: _Launch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    initial_state: torch.Tensor | None,
    state: torch.Tensor | None,
) -> None:
    blocks = -(-value.shape[-1] // launch.constants["BLOCK_COLUMNS"])
    launch(
        step_kernel,
        "step",
        tensors={"query": query, "key": key, "value": value, "output": output},
        pointers={"initial": initial_state, "state": state},
        grid=(query.shape[0], query.shape[1], blocks),
    )


def _segment_table(cu_seqlens: torch.Tensor, seq_len: int, segment_length: int, programs: int) -> torch.Tensor:
    """(programs, 5) integers: sequence, first token, end, and the range of segments of the sequence.

    Entries that are not used have no tokens, no other segments and a sequence that does not exist.
    """
    bounds = F.pad(cu_seqlens.long(), (0, 1), value=seq_len)  # tokens behind the last boundary are a sequence too
    counts = (bounds.diff().clamp(min=0) + segment_length - 1).div(segment_length, rounding_mode="floor").clamp(min=1)
    ends = counts.cumsum(0)  # (num_sequences + 1,)
    segment = torch.arange(programs, device=bounds.device)
    sequence = torch.searchsorted(ends, segment, right=True)
    used = sequence < ends.shape[0]
    row = sequence.clamp(max=ends.shape[0] - 1)
    first, last = ends[row] - counts[row], ends[row]
    begin = bounds[row] + (segment - first) * segment_length
    end = torch.minimum(begin + segment_length, bounds[row + 1])
    table = torch.stack((row, begin, torch.maximum(begin, end), first, last), 1)  # (programs, 5)
    unused = torch.stack((ends.new_full((programs,), ends.shape[0]), 0 * segment, 0 * segment, segment, segment), 1)
    return torch.where(used[:, None], table, unused).int()


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _token_major(like: torch.Tensor, head_dim: int, seq_len: int | None = None) -> torch.Tensor:
    """An empty (batch, heads, seq, head_dim) that lies as (batch, seq, heads · head_dim), ready for the projection."""
    batch, heads = like.shape[:2]
    shape = (batch, like.shape[2] if seq_len is None else seq_len, heads, head_dim)
    return new_empty(shape, like).transpose(1, 2)
