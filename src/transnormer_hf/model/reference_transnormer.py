"""The definitions of TransNormer ("The Devil in Linear Transformer", EMNLP 2022), in plain torch. Read this file first.

In order: the feature maps and LRPE that queries and keys go through, the positions and padding of a batch, the two
attentions (their arguments are explained, and checked, in `norm_attention` and `diag_attention` of
`ops_transnormer.py`) and SimpleRMSNorm. The attentions here form whole (seq, seq) maps: they are quadratic in length,
and every faster form, in torch or in Triton, must equal them.

Shapes are (batch, heads, seq, head_dim) throughout. Sums and states are float32 whatever the inputs (float64 for
float64 inputs), and outputs have the dtype of `value`.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

FEATURE_MAPS = ("identity", "elu", "1+elu")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an attention accumulates: float32, or float64 where the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def apply_feature_map(hidden_states: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi of NormAttention, elementwise: `"elu"` in T1 (it may be negative), `"1+elu"` in T2 (positive).

    Raises ValueError for an unknown feature_map.
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    if feature_map == "identity":
        return hidden_states
    if feature_map == "elu":
        return F.elu(hidden_states)
    return 1 + F.elu(hidden_states)


class LRPE(NamedTuple):
    """Parameters of the learned relative position encoding of one attention layer.

    theta: (head_dim / 2,) rotation angle per position for each pair of channels, learned.
    householder: (head_dim,) unit vector v of the reflection I - 2 v v^T, frozen.
    """

    theta: torch.Tensor
    householder: torch.Tensor


def apply_lrpe(hidden_states: torch.Tensor, positions: torch.Tensor, lrpe: LRPE) -> torch.Tensor:
    """Reflect, then rotate: x at position t becomes R_t(theta) (I - 2 v v^T) x.

    The rotation acts on the channel pairs (0, 1), (2, 3), ...: (a, b) -> (a cos - b sin, a sin + b cos). The score of
    two vectors encoded this way depends only on the distance between their positions; at distance 0 it is the plain
    dot product.

    hidden_states: (batch, heads, seq, head_dim); positions: (seq,) or (batch, seq). Returns hidden_states' shape.
    """
    theta, householder = (parameter.to(hidden_states.dtype) for parameter in lrpe)
    hidden_states = torch.addcmul(hidden_states, (hidden_states @ householder)[..., None], householder, value=-2)
    cos, sin = rotation_table(positions, theta)  # (seq, head_dim / 2) or (batch, seq, head_dim / 2)
    if positions.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]  # (batch, 1, seq, head_dim / 2)
    is_plain = hidden_states.device.type == "cpu" and hidden_states.stride(-1) == 1
    if is_plain and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        # As complex numbers, in a tenth of the time on a CPU; compilers and exporters do not know them.
        pairs = torch.view_as_complex(hidden_states.unflatten(-1, (-1, 2)))  # (batch, heads, seq, head_dim / 2)
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    even, odd = hidden_states[..., 0::2], hidden_states[..., 1::2]  # (batch, heads, seq, head_dim / 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotation_table(positions: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `rotation_angles`: two tensors (*positions.shape, head_dim / 2)."""
    angles = rotation_angles(positions, theta)
    return angles.cos(), angles.sin()


def is_exporting() -> bool:
    """Inside torch.export (of torch 2.6 with strict=False alone), torch.onnx.export or torch.jit.trace."""
    if torch.jit.is_tracing() or hasattr(torch.compiler, "is_exporting"):
        return torch.jit.is_tracing() or torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def rotation_angles(positions: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """`positions · theta` modulo one turn: (*positions.shape, head_dim / 2) in the dtype of `theta`.

    positions: integers of any shape; theta: (head_dim / 2,). The reduction is done in float64 (except on MPS, which has
    none): the bare product, rounded to float32, would be off by 0.008 rad at position 131,072.
    """
    wide = torch.float32 if theta.device.type == "mps" else torch.float64
    turn: torch.Tensor | float = 2 * torch.pi
    if is_exporting():  # ONNX rounds a number of Python's to float32
        turn = torch.tensor(turn, dtype=wide)
    turns = positions.to(wide)[..., None] * (theta.to(wide) / turn)
    return ((turns - turns.detach().floor()) * turn).to(theta.dtype)


class AttentionMetadata(NamedTuple):
    """Where the tokens of a batch stand. A model makes it once per forward, for all of its layers.

    positions: (seq,) or (batch, seq) integers, counted from the first real token of each sequence, so that padding on
        the left moves nothing: padding tokens in front have negative positions.
    is_real: (batch, seq) bool, False for padding; None where every token is real.
    sequence_ids: (seq,) integers that tell packed sequences apart; None where nothing is packed.
    cu_seqlens: (num_sequences + 1,) boundaries of the packed sequences, or None.
    order: (batch, seq) columns of the input with the padding of each row moved to its front, where everything above is
        in this order; None where the input is left as it is. See `positioned_metadata`.
    is_contiguous: False if the positions of a row may do anything but count its columns.
    segments: where the kernels of NormAttention find the packed sequences; see `with_segments`.
    """

    positions: torch.Tensor
    is_real: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    order: torch.Tensor | None = None
    is_contiguous: bool = True
    segments: torch.Tensor | None = None


def attention_metadata(
    batch_size: int, seq_len: int, device: torch.device, attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, position_offset: int | torch.Tensor = 0,
) -> AttentionMetadata:  # fmt: skip
    """The metadata of a batch, computed on the device: the host reads no value and never waits.

    attention_mask: (batch, seq), 1 for real tokens. Zeros in front of the first real token of a row move the start of
        the row; any later zero keeps its position but is no key.
    cu_seqlens: (num_sequences + 1,) boundaries of the sequences packed into the one row of the batch.
    position_offset: number of positions taken by earlier tokens, which the state of the attention holds: a number, or
        (batch,), or (num_sequences,) with `cu_seqlens`. A row with an offset has begun: its zeros keep their position.

    Raises ValueError where shapes do not fit, or where both attention_mask and cu_seqlens are given.
    """
    columns = torch.arange(seq_len, device=device)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens were both given; a packed row has no padding, give one.")
        if cu_seqlens.dim() != 1 or batch_size != 1:
            shapes = f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and the batch size is {batch_size}"
            raise ValueError(f"{shapes}; packed sequences lie in one row, with cu_seqlens (num_sequences + 1,).")
        sequence_ids = torch.searchsorted(cu_seqlens.long(), columns, right=True) - 1
        positions = columns - cu_seqlens.long()[sequence_ids]
        if isinstance(position_offset, torch.Tensor) and position_offset.dim() == 1:
            # Columns past the last boundary form a sequence of their own, which has no offset.
            position_offset = F.pad(position_offset, (0, 1))[sequence_ids]
        return AttentionMetadata(positions + position_offset, None, sequence_ids, cu_seqlens)

    if isinstance(position_offset, torch.Tensor) and position_offset.dim() == 1:
        position_offset = position_offset[:, None]
    if attention_mask is None:
        return AttentionMetadata(columns + position_offset)
    if attention_mask.shape != (batch_size, seq_len):
        supported = f"(batch, seq) = {(batch_size, seq_len)} with 1 for real tokens and 0 for padding"
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; supported is {supported}.")
    is_real = attention_mask.bool()
    leading = count_leading_padding(is_real)[:, None]  # (batch, 1)
    if isinstance(position_offset, torch.Tensor):  # multiplied: the host must not read an offset on the device
        return AttentionMetadata(columns - leading * (position_offset == 0) + position_offset, is_real)
    return AttentionMetadata(columns - leading if position_offset == 0 else columns + position_offset, is_real)


def positioned_metadata(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, has_past: bool, has_cache: bool
) -> AttentionMetadata:
    """The metadata of a batch whose positions are given: (batch, seq) `position_ids` and `attention_mask`.

    They are those of a text without its padding, as `generate` passes them: whatever the mask hides, also in the middle
    of a row, takes no position. The attentions want positions that count the columns, so padding between real tokens
    is moved to the front of its row (`order`); where a state already precedes the row, the positions are left as they
    are. Behind the last real token padding only matters to a cache, which goes on from there.

    Raises ValueError if the positions of real tokens do not count up by one. The host looks at them once.
    """
    if attention_mask is None:
        return AttentionMetadata(position_ids)
    is_real = attention_mask.bool()
    if position_ids.shape[1] == 1:
        return AttentionMetadata(position_ids, is_real, is_contiguous=False)
    rank = is_real.cumsum(1) - 1  # (batch, seq) real tokens before this one; -1 in front of the first
    first = position_ids.gather(1, is_real.int().argmax(1, keepdim=True))  # (batch, 1)
    follows = is_real | (rank < 0) if has_cache else is_real | (rank < 0) | (rank == rank[:, -1:])
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not bool(((position_ids == first + rank) | ~is_real).all()):
        wanted = "position_ids must count up by one over the tokens that attention_mask shows"
        raise ValueError(f"{wanted}; for packed sequences pass position_ids without attention_mask, or cu_seq_lens_q.")
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    if not is_compiling and bool(follows.all()):
        return AttentionMetadata(first + columns - count_leading_padding(is_real)[:, None], is_real)
    if has_past:
        return AttentionMetadata(position_ids, is_real, is_contiguous=False)
    order = is_real.int().argsort(dim=1, stable=True)  # (batch, seq)
    positions = first + rank[:, -1:] - columns.flip(0)
    return AttentionMetadata(positions, is_real.gather(1, order), order=order)


def count_leading_padding(is_real: torch.Tensor) -> torch.Tensor:
    """Number of tokens in front of each row's first real one; the whole length for a row of padding. (batch,)"""
    return (is_real.cumsum(-1) == 0).sum(-1)


def check_inputs(query, key, value, lrpe, attention_mask, cu_seqlens, metadata):
    """The inputs of `norm_attention` or `diag_attention`, checked once for all backends.

    Returns query, key and value in their widest dtype, lrpe as an LRPE or None, and the AttentionMetadata.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if len(shapes[0]) != 4 or shapes[0] != shapes[1] or shapes[0][:3] != shapes[2][:3] or len(shapes[2]) != 4:
        found = ", ".join(map(str, shapes))
        raise ValueError(f"query, key, value have shapes {found}; all three are (batch, heads, seq, head_dim).")
    batch_size, _, seq_len, head_dim = query.shape
    dtype = query.dtype
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; move them to one device.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; use float64, float32, float16 or bfloat16.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    if metadata is None:
        metadata = attention_metadata(batch_size, seq_len, query.device, attention_mask, cu_seqlens)
    elif attention_mask is not None or cu_seqlens is not None:
        raise ValueError("metadata was given together with attention_mask or cu_seqlens, which it replaces; give one.")
    elif metadata.positions.shape[-1] != seq_len:
        shape = tuple(metadata.positions.shape)
        raise ValueError(f"metadata has positions of shape {shape}; these inputs need {seq_len} columns.")
    if lrpe is not None:
        lrpe = LRPE(*lrpe)
        if head_dim % 2:
            raise ValueError(f"lrpe rotates pairs and head_dim={head_dim} is odd; use an even one or lrpe=None.")
        theta, householder = (tuple(tensor.shape) for tensor in lrpe)
        if theta != (head_dim // 2,) or householder != (head_dim,):
            needed = f"head_dim={head_dim} needs theta ({head_dim // 2},) and householder ({head_dim},)"
            raise ValueError(f"lrpe has shapes {theta} and {householder}; {needed}.")
    return query.to(dtype), key.to(dtype), value.to(dtype), lrpe, metadata


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def prepare_query_key(
    query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, feature_map: str, lrpe: LRPE | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi, then LRPE, then the mask: the query and key of NormAttention, (batch, heads, seq, head_dim) each.

    Padding keys become zero last, because 1 + elu(0) is 1.
    """
    query, key = apply_feature_map(query, feature_map), apply_feature_map(key, feature_map)
    if lrpe is not None:
        query, key = apply_lrpe(query, metadata.positions, lrpe), apply_lrpe(key, metadata.positions, lrpe)
    return query, zero_padding(key, metadata)


def zero_padding(hidden_states: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """Replaces padding tokens by zeros; (batch, heads, seq, head_dim) to the same."""
    if metadata.is_real is None:
        return hidden_states
    return hidden_states.masked_fill(~metadata.is_real[:, None, :, None], 0)


def eager_norm_attention(query, key, value, *, metadata, causal, feature_map, lrpe, initial_state, return_state):
    """NormAttention before its norm, O = phi(Q) (phi(K)^T V), without a denominator (Eqs. 13-14 of the paper).

    Computed as (phi(Q) phi(K)^T) V, with a mask on the scores if causal. LRPE follows phi. The state is phi(K)^T V.

    query, key: (batch, heads, seq, head_dim); value: (batch, heads, seq, value_dim); the others as in `norm_attention`,
    whose checks come first. Both states: (batch or num_sequences, heads, head_dim, value_dim); returned in any case.
    """
    wide = compute_dtype(query.dtype)
    options = {"metadata": metadata, "causal": causal, "feature_map": feature_map, "lrpe": lrpe}
    scores, query_states, key_states = norm_attention_map(query, key, **options)
    value_states = zero_padding(value.to(wide), metadata)
    output = scores @ value_states  # (batch, heads, seq, value_dim)

    if metadata.sequence_ids is not None:  # each sequence of the one row gets a row of its own, zero outside of it
        sequences = torch.arange(metadata.cu_seqlens.shape[0] - 1, device=query.device)
        belongs = (metadata.sequence_ids == sequences[:, None]).to(wide)[:, None, :, None]  # (sequences, 1, seq, 1)
        query_states, key_states = query_states * belongs, key_states * belongs  # (sequences, heads, seq, head_dim)
    state = key_states.mT @ value_states  # (batch or num_sequences, heads, head_dim, value_dim)
    if initial_state is not None:
        past = query_states @ initial_state.to(wide)  # (batch or num_sequences, heads, seq, value_dim)
        output = output + (past if metadata.sequence_ids is None else past.sum(0, keepdim=True))
        state = state + initial_state.to(wide)
    return output.to(value.dtype), state


def norm_attention_map(query, key, *, metadata, causal, feature_map, lrpe):
    """The unnormalised map phi(Q) phi(K)^T, (batch, heads, seq, seq), one row per query; and the Q and K it is made of.

    Scores may be negative even for a positive phi, because the rotation of LRPE comes after it.
    """
    wide = compute_dtype(query.dtype)
    query_states, key_states = prepare_query_key(query.to(wide), key.to(wide), metadata, feature_map, lrpe)
    scores = query_states @ key_states.mT  # (batch, heads, seq, seq)
    if causal:
        scores = scores.tril()
    if metadata.sequence_ids is not None:
        scores = scores.masked_fill(metadata.sequence_ids[:, None] != metadata.sequence_ids, 0)
    return scores, query_states, key_states


def eager_diag_attention(query, key, value, *, metadata, block_size, causal, activation, scale, lrpe, dropout_p):
    """DiagAttention, O_b = softmax(scale Q_b K_b^T) V_b in each block b of `block_size` tokens (T2), or with relu (T1).

    A (seq, seq) map that is zero outside of the blocks, times the values: (batch, heads, seq, value_dim).
    """
    options = {"causal": causal, "activation": activation, "scale": scale, "lrpe": lrpe}
    weights = diag_attention_map(query, key, metadata=metadata, block_size=block_size, **options)
    weights = F.dropout(weights, dropout_p)
    value_states = zero_padding(value.to(weights.dtype), metadata)
    return (weights @ value_states).to(value.dtype)


def hidden_keys(metadata: AttentionMetadata, causal: bool) -> torch.Tensor:
    """(batch or 1, 1, seq, seq) bool, True where a query may not see a key, whatever its block.

    That is padding, another packed sequence and, if causal, a later token.
    """
    seq_len = metadata.positions.shape[-1]
    hidden = torch.zeros(1, 1, seq_len, seq_len, dtype=torch.bool, device=metadata.positions.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)
    if metadata.sequence_ids is not None:
        hidden = hidden | (metadata.sequence_ids[:, None] != metadata.sequence_ids)
    if metadata.is_real is not None:
        hidden = hidden | ~metadata.is_real[:, None, None, :]
    return hidden


def diag_attention_map(query, key, *, metadata, block_size, causal, activation, scale, lrpe):
    """The map of DiagAttention, (batch, heads, seq, seq): zero outside of the blocks on the diagonal.

    The positions of LRPE restart in every block. A query that sees no real key has a row of zeros.
    """
    wide = compute_dtype(query.dtype)
    query_states, key_states = query.to(wide) * scale, key.to(wide)
    if lrpe is not None:
        within_block = metadata.positions % block_size  # (seq,) or (batch, seq)
        query_states = apply_lrpe(query_states, within_block, lrpe)
        key_states = apply_lrpe(key_states, within_block, lrpe)
    scores = query_states @ key_states.mT  # (batch, heads, seq, seq)

    blocks = metadata.positions.div(block_size, rounding_mode="floor")  # (seq,) or (batch, seq)
    hidden = hidden_keys(metadata, causal) | (blocks[..., :, None] != blocks[..., None, :]).unsqueeze(-3)
    if activation == "relu":
        return scores.relu().masked_fill(hidden, 0)
    # The lowest finite number and not -inf: a row without any key must become zeros and not NaN.
    weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(-1)
    return weights.masked_fill(hidden, 0)


def eager_simple_rms_norm(hidden_states: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """SimpleRMSNorm, x / (rms(x) + eps) over the last dimension, without weights; shape and dtype of hidden_states.

    This is the released code's form; the paper's algebra (Eq. 14) has eps inside the root, x / sqrt(rms(x)^2 + eps).
    Computed in float32 at least: in float16 an eps of 1e-8 would be zero and a row of zeros would become NaN.
    """
    wide = hidden_states.to(compute_dtype(hidden_states.dtype))
    # vector_norm has gradient 0 at the origin, where sqrt(mean(x^2)) has none
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
    return (wide / (rms + eps)).to(hidden_states.dtype)


def operator_namespace(module: str) -> str:
    """The namespace in torch.ops for the operators of this module's package.

    The installed package and each revision of a model repository have their own: one process may load them all.
    """
    return re.sub(r"\W", "_", module.rpartition(".")[0] or module)
