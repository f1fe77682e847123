"""What happens to queries and keys before they meet: feature maps, LRPE, and where each token stands.

Both attentions of TransNormer rotate their queries and keys, and NormAttention maps them first. The functions here are
the one definition of these steps; the eager, the chunked and the Triton forms of the attentions all follow them.

A token's *position* is counted from the first real token of its sequence, so padding on the left moves nothing.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

FEATURE_MAPS = ("identity", "elu", "1+elu")


def operator_namespace(module: str) -> str:
    """A namespace of torch.ops for this module's package.

    The installed package and a copy of these files that a model repository brought along each get one of their own, and
    so do two revisions of such a repository.
    """
    return re.sub(r"\W", "_", module.rpartition(".")[0] or module)


class LRPE(NamedTuple):
    """Parameters of the learned relative position encoding of one attention layer.

    theta: (head_dim / 2,) rotation angle per position and pair of channels, learned.
    householder: (head_dim,) unit vector v of the reflection I - 2 v v^T, frozen.
    """

    theta: torch.Tensor
    householder: torch.Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an attention accumulates: float32, or float64 where the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def apply_feature_map(hidden_states: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi of NormAttention, elementwise: `"elu"` in T1 (it may be negative), `"1+elu"` in T2 (positive)."""
    if feature_map == "identity":
        return hidden_states
    if feature_map == "elu":
        return F.elu(hidden_states)
    if feature_map == "1+elu":
        return 1 + F.elu(hidden_states)
    raise ValueError(f"feature_map={feature_map!r} is not known; choose one of {', '.join(map(repr, FEATURE_MAPS))}.")


def rotation_table(positions: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `positions · theta`, in the dtype of `theta`.

    positions: any shape of integers; theta: (head_dim / 2,). Returns two tensors (*positions.shape, head_dim / 2).
    """
    angles = rotation_angles(positions, theta)
    return angles.cos(), angles.sin()


def rotation_angles(positions: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """`positions · theta` modulo one turn: (*positions.shape, head_dim / 2) in the dtype of `theta`.

    The reduction is done in float64: the product alone, rounded to float32, would be off by 0.008 rad at position
    131,072. (MPS has no float64; there the product is float32.)
    """
    wide = torch.float32 if theta.device.type == "mps" else torch.float64
    turns = positions.to(wide)[..., None] * (theta.to(wide) / (2 * torch.pi))
    return ((turns - turns.detach().floor()) * (2 * torch.pi)).to(theta.dtype)


def apply_lrpe(hidden_states: torch.Tensor, positions: torch.Tensor, lrpe: LRPE) -> torch.Tensor:
    """Reflect, then rotate: x at position t becomes R_t(theta) (I - 2 v v^T) x.

    The rotation turns the channel pairs (0, 1), (2, 3), ...: (a, b) -> (a cos - b sin, a sin + b cos). Scores of two
    vectors treated so depend on the distance of their positions only; at distance 0 they are the plain dot product.

    hidden_states: (batch, heads, seq, head_dim); positions: (seq,) or (batch, seq). Returns hidden_states' shape.
    """
    theta, householder = (parameter.to(hidden_states.dtype) for parameter in lrpe)
    hidden_states = hidden_states - 2 * (hidden_states @ householder)[..., None] * householder
    cos, sin = rotation_table(positions, theta)  # (seq, head_dim / 2) or (batch, seq, head_dim / 2)
    if positions.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = hidden_states[..., 0::2], hidden_states[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class AttentionMetadata(NamedTuple):
    """Where the tokens of a batch stand. A model makes it once per forward, for all of its layers.

    positions: (seq,) or (batch, seq) integers, counted from each sequence's first real token. A padding token in
        front of it has a negative position.
    is_real: None where all tokens are, else (batch, seq) bool.
    sequence_ids: None, or (seq,) integers that tell packed sequences apart.
    cu_seqlens: None, or the (num_sequences + 1,) boundaries of the packed sequences.
    """

    positions: torch.Tensor
    is_real: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


def attention_metadata(
    batch_size: int,
    seq_len: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    position_offset: int | torch.Tensor = 0,
) -> AttentionMetadata:
    """Positions, sequences and padding of a batch, worked out on the device without looking at a value from the host.

    attention_mask: (batch, seq), 1 for real tokens. A zero in front of the first real token of a row moves the row's
        start; any later zero keeps its place but is no key.
    cu_seqlens: (num_sequences + 1,) boundaries of the sequences packed into the one row of the batch.
    position_offset: positions already taken by earlier tokens, which the attention has in its state: a number, or
        (batch,), or (num_sequences,) with `cu_seqlens`. A row with an offset has started: its zeros keep their place.

    Raises ValueError where the shapes do not fit or where both descriptions are given.
    """
    columns = torch.arange(seq_len, device=device)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens were both given; a packed row has no padding, give one.")
        if cu_seqlens.dim() != 1 or batch_size != 1:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and the batch size is {batch_size}; packed sequences "
                "lie in one row (batch size 1) with cu_seqlens of shape (num_sequences + 1,)."
            )
        sequence_ids = torch.searchsorted(cu_seqlens.long(), columns, right=True) - 1
        positions = columns - cu_seqlens.long()[sequence_ids]
        if isinstance(position_offset, torch.Tensor) and position_offset.dim() == 1:
            # Columns past the last boundary form a sequence of their own, which no offset belongs to.
            position_offset = F.pad(position_offset, (0, 1))[sequence_ids]
        return AttentionMetadata(positions + position_offset, None, sequence_ids, cu_seqlens)

    offset = position_offset
    if isinstance(offset, torch.Tensor) and offset.dim() == 1:
        offset = offset[:, None]
    if attention_mask is None:
        return AttentionMetadata(columns + offset)
    if attention_mask.shape != (batch_size, seq_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; supported is (batch, seq) = "
            f"{(batch_size, seq_len)} with 1 for real tokens and 0 for padding. Causality is set by `causal`, "
            "packed sequences by `cu_seqlens`."
        )
    is_real = attention_mask.bool()
    leading = count_leading_padding(is_real)[:, None]  # (batch, 1)
    leading = leading * (torch.as_tensor(offset, device=device) == 0)
    return AttentionMetadata(columns - leading + offset, is_real)


def count_leading_padding(is_real: torch.Tensor) -> torch.Tensor:
    """Number of tokens in front of each row's first real one, the whole length for a row of padding: (batch,)."""
    return (is_real.cumsum(-1) == 0).sum(-1)


def prepare_query_key(
    query: torch.Tensor, key: torch.Tensor, metadata: AttentionMetadata, feature_map: str, lrpe: LRPE | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi, then LRPE, then the mask: the query and key of NormAttention, (batch, heads, seq, head_dim) each.

    Padding keys are set to zero last of all, because 1 + elu(0) is 1.
    """
    query, key = apply_feature_map(query, feature_map), apply_feature_map(key, feature_map)
    if lrpe is not None:
        query, key = apply_lrpe(query, metadata.positions, lrpe), apply_lrpe(key, metadata.positions, lrpe)
    return query, zero_padding(key, metadata)


def zero_padding(hidden_states: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """Zeros in place of padding tokens; (batch, heads, seq, head_dim) to the same."""
    if metadata.is_real is None:
        return hidden_states
    return hidden_states.masked_fill(~metadata.is_real[:, None, :, None], 0)
