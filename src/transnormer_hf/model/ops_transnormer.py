"""The two attentions of TransNormer ("The Devil in Linear Transformer", EMNLP 2022) and its norm, as functions.

Each attention exists three times under one name: its definition (here, `"eager"`: quadratic, the truth for all tests),
a fast path in plain torch (`chunked_transnormer.py`, `"torch"`: linear in length), and Triton kernels for a GPU
(`triton_norm_transnormer.py` and those of DiagAttention, `"triton"`). `backend="auto"` takes the kernels for CUDA
tensors if triton is installed and they support the head_dim, and the fast path everywhere else.

Shapes are (batch, heads, seq, head_dim) throughout. Sums and states are float32 whatever the inputs (float64 for
float64 inputs), and outputs come back in the dtype of the inputs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from .chunked_transnormer import chunked_diag_attention, chunked_norm_attention
from .reference_transnormer import (
    FEATURE_MAPS,
    LRPE,
    AttentionMetadata,
    apply_lrpe,
    attention_metadata,
    compute_dtype,
    prepare_query_key,
    zero_padding,
)

try:
    from .diag_autograd_transnormer import triton_diag_attention
    from .triton_common_transnormer import takes_head_dim, triton_simple_rms_norm
    from .triton_norm_transnormer import triton_norm_attention
except ImportError:  # triton is not installed
    triton_diag_attention = triton_norm_attention = triton_simple_rms_norm = None

BACKENDS = ("auto", "eager", "torch", "triton")
DIAG_ACTIVATIONS = ("softmax", "relu")


def norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    feature_map: str = "identity",
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
    metadata: AttentionMetadata | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NormAttention before its norm: phi(Q) (phi(K)^T V), without a denominator (Eqs. 13-14 of the paper).

    The norm itself runs over the full width, all heads together, and is the caller's: `simple_rms_norm`.

    Args:
        query, key, value: (batch, heads, seq, head_dim), float64, float32, float16 or bfloat16.
        causal: token i sees tokens j <= i only; otherwise all of its sequence.
        feature_map: phi, one of "identity", "elu" (T1), "1+elu" (T2).
        lrpe: None, or (theta (head_dim / 2,), householder (head_dim,)), applied after phi.
        attention_mask: (batch, seq), 1 for real tokens; padding contributes nothing, its own outputs are undefined.
        cu_seqlens: (num_sequences + 1,) boundaries of sequences packed into a batch of one row.
        initial_state: (batch, heads, head_dim, head_dim), K^T V of the tokens before these; with `cu_seqlens` one
            state per sequence in place of the batch.
        return_state: also return the state after the last token, same shape, float32.
        backend: "eager", "torch", "triton" or "auto".
        metadata: positions and padding as `attention_metadata` gives them, in place of attention_mask and cu_seqlens; made
            once, it serves every layer of a model, and it can start at an offset (the tokens of `initial_state`).

    Returns:
        The output, shape and dtype of `value`, and the state or None.

    Raises:
        ValueError: unknown feature_map or backend, shapes that do not fit, or a backend that cannot run here.
    """
    _check_query_key_value(query, key, value)
    _check_choice("feature_map", feature_map, FEATURE_MAPS)
    metadata = _metadata_of(query, attention_mask, cu_seqlens, metadata)
    lrpe = _check_lrpe(lrpe, query)
    states = query.shape[0] if metadata.cu_seqlens is None else metadata.cu_seqlens.shape[0] - 1
    state_shape = (states, query.shape[1], key.shape[-1], value.shape[-1])
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; these inputs need {state_shape}.")
    run = {"eager": eager_norm_attention, "torch": chunked_norm_attention, "triton": triton_norm_attention}[
        resolve_backend(backend, query, query.shape[-1], value.shape[-1])
    ]
    with _without_autocast(query.device):
        output, state = run(
            query,
            key,
            value,
            metadata=metadata,
            causal=causal,
            feature_map=feature_map,
            lrpe=lrpe,
            initial_state=initial_state,
            return_state=return_state,
        )
    return output, state if return_state else None


def eager_norm_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of NormAttention: a (seq, seq) map of scores times the values."""
    wide = compute_dtype(query.dtype)
    scores, query_states, key_states = norm_attention_map(
        query, key, metadata=metadata, causal=causal, feature_map=feature_map, lrpe=lrpe
    )
    value_states = zero_padding(value.to(wide), metadata)
    output = scores @ value_states  # (batch, heads, seq, head_dim)

    if metadata.sequence_ids is None:
        state = key_states.transpose(-1, -2) @ value_states  # (batch, heads, head_dim, head_dim)
        if initial_state is not None:
            output = output + query_states @ initial_state.to(wide)
    else:
        sequences = torch.arange(metadata.cu_seqlens.shape[0] - 1, device=query.device)
        belongs = (metadata.sequence_ids == sequences[:, None]).to(wide)[:, None, :, None]  # (sequences, 1, seq, 1)
        state = (key_states * belongs).transpose(-1, -2) @ value_states  # (sequences, heads, head_dim, head_dim)
        if initial_state is not None:
            output = output + (belongs * (query_states @ initial_state.to(wide))).sum(0, keepdim=True)
    if initial_state is not None:
        state = state + initial_state.to(wide)
    return output.to(value.dtype), state


def norm_attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The unnormalised map phi(Q) phi(K)^T of NormAttention, (batch, heads, seq, seq), and the Q and K it is made of.

    A row is one query. Scores may be negative even for a positive phi, because the rotation comes after it.
    """
    wide = compute_dtype(query.dtype)
    query_states, key_states = prepare_query_key(query.to(wide), key.to(wide), metadata, feature_map, lrpe)
    scores = query_states @ key_states.transpose(-1, -2)  # (batch, heads, seq, seq)
    seq_len = query.shape[2]
    if causal:
        scores = scores.masked_fill(_later_keys(seq_len, query.device), 0)
    if metadata.sequence_ids is not None:
        scores = scores.masked_fill(metadata.sequence_ids[:, None] != metadata.sequence_ids, 0)
    return scores, query_states, key_states


def diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    activation: str = "softmax",
    scale: float | None = None,
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    metadata: AttentionMetadata | None = None,
) -> torch.Tensor:
    """DiagAttention: ordinary attention inside non-overlapping blocks of `block_size` tokens.

    Blocks and the positions of LRPE start at the first real token of a row or of a packed sequence. A query that sees
    no real key gets zeros.

    Args:
        query, key, value: (batch, heads, seq, head_dim), float64, float32, float16 or bfloat16.
        block_size: tokens per block, at least 1; the last block may be shorter.
        causal: token i sees tokens j <= i of its block only.
        activation: "softmax" (T2) or "relu" (T1: relu of the scores, not normalised).
        scale: factor of the scores; None means head_dim ** -0.5.
        lrpe: None, or (theta (head_dim / 2,), householder (head_dim,)); positions restart in every block.
        attention_mask, cu_seqlens, metadata, backend: as in `norm_attention`.
        dropout_p: probability of dropping an entry of the map.

    Returns:
        The output, shape and dtype of `value`.

    Raises:
        ValueError: unknown activation or backend, block_size < 1, dropout_p outside of 0 to 1, shapes that do not fit,
            or a backend that cannot run here.
    """
    _check_query_key_value(query, key, value)
    _check_choice("activation", activation, DIAG_ACTIVATIONS)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: a block has at least 1 token.")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p} must be a probability, from 0 to 1.")
    metadata = _metadata_of(query, attention_mask, cu_seqlens, metadata)
    run = {"eager": eager_diag_attention, "torch": chunked_diag_attention, "triton": triton_diag_attention}[
        resolve_backend(backend, query, query.shape[-1], value.shape[-1])
    ]
    with _without_autocast(query.device):
        return run(
            query,
            key,
            value,
            metadata=metadata,
            block_size=block_size,
            causal=causal,
            activation=activation,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            lrpe=_check_lrpe(lrpe, query),
            dropout_p=dropout_p,
        )


def eager_diag_attention(
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
    """The definition of DiagAttention: a (seq, seq) map with zeros outside of the blocks, times the values."""
    weights = diag_attention_map(
        query,
        key,
        metadata=metadata,
        block_size=block_size,
        causal=causal,
        activation=activation,
        scale=scale,
        lrpe=lrpe,
    )
    weights = F.dropout(weights, dropout_p)
    value_states = zero_padding(value.to(weights.dtype), metadata)
    return (weights @ value_states).to(value.dtype)


def diag_attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    metadata: AttentionMetadata,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    lrpe: LRPE | None,
) -> torch.Tensor:
    """The map of DiagAttention, (batch, heads, seq, seq): zero outside of the blocks on the diagonal."""
    wide = compute_dtype(query.dtype)
    query_states, key_states = query.to(wide) * scale, key.to(wide)
    if lrpe is not None:
        within_block = metadata.positions % block_size
        query_states, key_states = (
            apply_lrpe(query_states, within_block, lrpe),
            apply_lrpe(key_states, within_block, lrpe),
        )
    scores = query_states @ key_states.transpose(-1, -2)  # (batch, heads, seq, seq)

    blocks = metadata.positions.div(block_size, rounding_mode="floor")  # (seq,) or (batch, seq)
    hidden = blocks[..., :, None] != blocks[..., None, :]
    if metadata.sequence_ids is not None:
        hidden = hidden | (metadata.sequence_ids[:, None] != metadata.sequence_ids)
    if metadata.is_real is not None:
        hidden = hidden | ~metadata.is_real[:, None, :]
    if causal:
        hidden = hidden | _later_keys(query.shape[2], query.device)
    if hidden.dim() == 3:
        hidden = hidden[:, None]  # (batch, 1, seq, seq)
    if activation == "relu":
        return scores.relu().masked_fill(hidden, 0)
    # the lowest finite number, not -inf: a row without any key must become zeros and not NaN
    weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(-1)
    return weights.masked_fill(hidden, 0)


def simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8, backend: str = "auto") -> torch.Tensor:
    """SimpleRMSNorm: x / (rms(x) + eps) over the last dimension, without weights; shape and dtype of hidden_states.

    The released code puts eps outside of the root, where the paper's algebra (Eq. 14) has it inside. Computed in
    float32 at least: in float16 an eps of 1e-8 would be zero and a row of zeros NaN.

    backend: "triton" is one kernel, for CUDA tensors also with "auto"; all others are plain torch.

    Raises ValueError for an unknown backend, or one that cannot run here.
    """
    if resolve_backend(backend, hidden_states) == "triton":
        return triton_simple_rms_norm(hidden_states, eps)
    wide = hidden_states.to(compute_dtype(hidden_states.dtype))
    # vector_norm has gradient 0 at the origin, where sqrt(mean(x^2)) has none
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
    return (wide / (rms + eps)).to(hidden_states.dtype)


def resolve_backend(backend: str, tensor: torch.Tensor, *head_dims: int) -> str:
    """The backend to run; "auto" is "torch" unless triton is installed and takes this device and these head_dims."""
    _check_choice("backend", backend, BACKENDS)
    if backend == "triton" and triton_norm_attention is None:
        raise ValueError('backend="triton" needs the triton package, which is not installed; use backend="auto".')
    if backend != "auto":
        return backend
    if not tensor.is_cuda or triton_norm_attention is None:
        return "torch"
    return "triton" if all(map(takes_head_dim, head_dims)) else "torch"


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Sums stay in float32: autocast would take the products back to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _metadata_of(
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    metadata: AttentionMetadata | None,
) -> AttentionMetadata:
    if metadata is None:
        return attention_metadata(query.shape[0], query.shape[2], query.device, attention_mask, cu_seqlens)
    if attention_mask is not None or cu_seqlens is not None:
        raise ValueError("metadata was given together with attention_mask or cu_seqlens, which it replaces; give one.")
    return metadata


def _later_keys(seq_len: int, device: torch.device) -> torch.Tensor:
    """True where the key stands after the query: (seq, seq)."""
    return torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).triu(1)


def _check_query_key_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if len(shapes[0]) != 4 or shapes[0] != shapes[1] or shapes[0][:3] != shapes[2][:3] or len(shapes[2]) != 4:
        raise ValueError(
            f"query, key, value have shapes {shapes[0]}, {shapes[1]}, {shapes[2]}; all three are "
            "(batch, heads, seq, head_dim)."
        )


def _check_lrpe(lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None, query: torch.Tensor) -> LRPE | None:
    if lrpe is None:
        return None
    lrpe, head_dim = LRPE(*lrpe), query.shape[-1]
    if head_dim % 2:
        raise ValueError(
            f"lrpe rotates pairs of channels and head_dim={head_dim} is odd; use an even one or lrpe=None."
        )
    if lrpe.theta.shape != (head_dim // 2,) or lrpe.householder.shape != (head_dim,):
        raise ValueError(
            f"lrpe has shapes {tuple(lrpe.theta.shape)} and {tuple(lrpe.householder.shape)}; head_dim={head_dim} "
            f"needs theta ({head_dim // 2},) and householder ({head_dim},)."
        )
    return lrpe


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")
