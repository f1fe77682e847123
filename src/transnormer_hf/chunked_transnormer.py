"""NormAttention and DiagAttention in plain torch, linear in length: the fast path on any device.

The definitions they must equal are `eager_norm_attention` and `eager_diag_attention` in `ops_transnormer.py`.
"""

import torch
import torch.nn.functional as F

from .features_transnormer import LRPE, TokenLayout, apply_lrpe, compute_dtype, prepare_query_key, zero_padding

CHUNK_SIZE = 128


def chunked_norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: TokenLayout,
    causal: bool,
    feature_map: str,
    lrpe: LRPE | None,
    initial_state: torch.Tensor | None,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NormAttention by chunks: inside a chunk the scores, between chunks the state K^T V."""
    wide = compute_dtype(query.dtype)
    query_states, key_states = prepare_query_key(query.to(wide), key.to(wide), layout, feature_map, lrpe)
    value_states = zero_padding(value.to(wide), layout)
    if layout.sequence_ids is not None:
        output, state = _packed(query_states, key_states, value_states, layout, causal, initial_state)
    elif causal:
        output, state = _causal(query_states, key_states, value_states, initial_state)
    else:
        state = key_states.transpose(-1, -2) @ value_states  # (batch, heads, head_dim, head_dim)
        if initial_state is not None:
            state = state + initial_state.to(wide)
        output = query_states @ state
    return output.to(value.dtype), state


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the chunks with a running state; (batch, heads, seq, head_dim) each."""
    if state is None:
        state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    state = state.to(query.dtype)
    outputs = []
    for chunk_query, chunk_key, chunk_value in zip(
        query.split(CHUNK_SIZE, 2), key.split(CHUNK_SIZE, 2), value.split(CHUNK_SIZE, 2), strict=True
    ):
        scores = (chunk_query @ chunk_key.transpose(-1, -2)).tril()  # (batch, heads, chunk, chunk)
        outputs.append(scores @ chunk_value + chunk_query @ state)
        state = state + chunk_key.transpose(-1, -2) @ chunk_value
    return torch.cat(outputs, 2), state


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    causal: bool,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences: every sequence is laid out in chunks of its own, then chunks meet through their states."""
    slots, num_blocks = token_slots(layout, query.shape[2], CHUNK_SIZE)
    query, key, value = (to_blocks(tensor, slots, num_blocks, CHUNK_SIZE) for tensor in (query, key, value))
    num_sequences = layout.cu_seqlens.shape[0] - 1
    lengths = F.pad(layout.cu_seqlens.long().diff(), (0, 1))
    # first chunk of each sequence; empty ones start where the next one does
    ends = lengths.add(CHUNK_SIZE - 1).div(CHUNK_SIZE, rounding_mode="floor").cumsum(0)  # (num_sequences + 1,)
    sequence_of_chunk = torch.searchsorted(ends[:-1], torch.arange(num_blocks, device=query.device), right=True)
    chunk_states = (key.transpose(-1, -2) @ value)[0].transpose(0, 1)  # (chunks, heads, head_dim, head_dim)

    totals = chunk_states.new_zeros(num_sequences + 1, *chunk_states.shape[1:])
    if initial_state is not None:
        totals = totals + F.pad(initial_state.to(query.dtype), (0, 0) * 3 + (0, 1))
    if causal:
        # states before each chunk, taken up anew where a sequence begins
        before, running, starts = [], totals, F.pad(sequence_of_chunk.diff() != 0, (1, 0), value=True)
        state = totals[0]
        for chunk in range(num_blocks):
            state = torch.where(starts[chunk], running[sequence_of_chunk[chunk]], state)
            before.append(state)
            state = state + chunk_states[chunk]
        carried = torch.stack(before).transpose(0, 1)[None]  # (1, heads, chunks, head_dim, head_dim)
    totals = totals.index_add(0, sequence_of_chunk, chunk_states)
    if causal:
        output = (query @ key.transpose(-1, -2)).tril() @ value + query @ carried
    else:
        output = query @ totals[sequence_of_chunk].transpose(0, 1)[None]
    return from_blocks(output, slots), totals[:-1]


def chunked_diag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: TokenLayout,
    block_size: int,
    causal: bool,
    activation: str,
    scale: float,
    lrpe: LRPE | None,
    dropout_p: float,
) -> torch.Tensor:
    """DiagAttention as a batch of small attentions, one per block."""
    wide = compute_dtype(query.dtype)
    query_states, key_states, value_states = query.to(wide) * scale, key.to(wide), value.to(wide)
    if lrpe is not None:
        within_block = layout.positions % block_size
        query_states, key_states = (apply_lrpe(states, within_block, lrpe) for states in (query_states, key_states))
    seq_len = query.shape[2]
    slots, num_blocks = token_slots(layout, seq_len, block_size)
    query_states, key_states, value_states = (
        to_blocks(states, slots, num_blocks, block_size) for states in (query_states, key_states, value_states)
    )
    scores = query_states @ key_states.transpose(-1, -2)  # (batch, heads, blocks, block, block)

    hidden = None
    if slots is not None or seq_len % block_size:
        filled = torch.ones(query.shape[0], 1, seq_len, 1, dtype=torch.bool, device=query.device)
        hidden = ~to_blocks(filled, slots, num_blocks, block_size).transpose(-1, -2)  # (batch, 1, blocks, 1, block)
    if causal:
        later = torch.ones(block_size, block_size, dtype=torch.bool, device=query.device).triu(1)
        hidden = later if hidden is None else hidden | later
    if activation == "relu":
        weights = scores.relu()
        if causal:  # keys that are not there are zero already
            weights = weights.masked_fill(later, 0)
    elif hidden is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(-1).masked_fill(hidden, 0)
    output = F.dropout(weights, dropout_p) @ value_states
    return from_blocks(output, slots, seq_len).to(value.dtype)


def token_slots(layout: TokenLayout, seq_len: int, block_size: int) -> tuple[torch.Tensor | None, int]:
    """Where each token goes when every sequence is laid out in whole blocks of its own.

    Returns the slots, (batch, seq) integers into num_blocks · block_size places with one more behind them for padding
    tokens, and num_blocks. The slots are None where tokens already stand in place.
    """
    if layout.sequence_ids is not None:
        lengths = F.pad(layout.cu_seqlens.long().diff(), (0, 1))
        blocks = lengths.add(block_size - 1).div(block_size, rounding_mode="floor")
        first_block = blocks.cumsum(0) - blocks  # (num_sequences + 1,)
        num_blocks = seq_len // block_size + lengths.shape[0]
        # counted here and not taken from layout.positions, which may start at an offset
        within_sequence = torch.arange(seq_len, device=lengths.device) - layout.cu_seqlens.long()[layout.sequence_ids]
        return (first_block[layout.sequence_ids] * block_size + within_sequence)[None], num_blocks
    num_blocks = -(-seq_len // block_size)
    if layout.is_real is None:
        return None, num_blocks
    return torch.where(layout.is_real, layout.positions, num_blocks * block_size), num_blocks


def to_blocks(
    hidden_states: torch.Tensor, slots: torch.Tensor | None, num_blocks: int, block_size: int
) -> torch.Tensor:
    """(batch, heads, seq, head_dim) to (batch, heads, blocks, block, head_dim), zeros where no token stands."""
    batch_size, _, seq_len, _ = hidden_states.shape
    if slots is None:
        hidden_states = F.pad(hidden_states, (0, 0, 0, num_blocks * block_size - seq_len))
        return hidden_states.unflatten(2, (num_blocks, block_size))
    hidden_states = hidden_states.transpose(1, 2)  # (batch, seq, heads, head_dim)
    places = hidden_states.new_zeros(batch_size, num_blocks * block_size + 1, *hidden_states.shape[2:])
    rows = torch.arange(batch_size, device=slots.device)[:, None]
    places = places.index_put((rows, slots), hidden_states)[:, :-1]
    return places.unflatten(1, (num_blocks, block_size)).permute(0, 3, 1, 2, 4)


def from_blocks(blocks: torch.Tensor, slots: torch.Tensor | None, seq_len: int | None = None) -> torch.Tensor:
    """The inverse of `to_blocks`; padding tokens get zeros."""
    hidden_states = blocks.flatten(2, 3)  # (batch, heads, blocks · block, head_dim)
    if slots is None:
        return hidden_states[:, :, :seq_len]
    places = F.pad(hidden_states, (0, 0, 0, 1)).transpose(1, 2)  # (batch, blocks · block + 1, heads, head_dim)
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return places[rows, slots].transpose(1, 2)
