"""The sequences of a batch as rows that begin with their first token, whichever way they are padded or packed."""

import torch

from ...model.reference_transnormer import AttentionMetadata, count_leading_padding


class Rows:
    """One row per sequence, token 0 in column 0; what a row lacks is padding behind its tokens.

    So blocks, chunks and landmarks of a text lie where they lie without padding, and no attention has to know packing.
    Zeros of the attention mask between real tokens keep their place.

    metadata: that of the rows, with `positions` (length,) that are the columns.
    """

    def __init__(self, metadata: AttentionMetadata, batch_size: int, seq_len: int):
        self.batch_size = batch_size
        self.packed: tuple[torch.Tensor, torch.Tensor] | None = None
        self.columns: torch.Tensor | None = None  # (batch, seq), the column of the input that each column comes from
        device = metadata.positions.device
        is_real, length = metadata.is_real, seq_len
        if metadata.sequence_ids is not None:
            self.packed = metadata.sequence_ids, metadata.positions  # (batch * seq,) both
            length = int(metadata.positions.max()) + 1
            is_real = torch.zeros(int(metadata.sequence_ids.max()) + 1, length, dtype=torch.bool, device=device)
            is_real[self.packed] = True
        elif is_real is not None:
            leading = count_leading_padding(is_real)[:, None]  # (batch, 1)
            columns = (torch.arange(seq_len, device=device) + leading) % seq_len
            is_real = is_real.gather(1, columns)
            self.columns = columns if metadata.order is None else metadata.order.gather(1, columns)
        self.metadata = AttentionMetadata(torch.arange(length, device=device), is_real)

    def split(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, channels) to (rows, length, channels)."""
        if self.packed is not None:
            rows = states.new_zeros(*self.metadata.is_real.shape, states.shape[-1])
            return rows.index_put(self.packed, states.flatten(0, 1))
        return states if self.columns is None else states.take_along_dim(self.columns[..., None], 1)

    def join(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, length, channels) to (batch, seq, channels)."""
        if self.packed is not None:
            return states[self.packed].unflatten(0, (self.batch_size, -1))
        return states if self.columns is None else states.take_along_dim(self.columns.argsort(1)[..., None], 1)

    def join_map(self, weights: torch.Tensor) -> torch.Tensor:
        """(rows, heads, length, length) to (batch, heads, seq, seq); packed sequences to (1, heads, all, all)."""
        if self.packed is not None:
            sequence, position = self.packed
            weights = weights[sequence[:, None], :, position[:, None], position]  # (all, all, heads)
            is_other = sequence[:, None] != sequence
            return weights.masked_fill(is_other[..., None], 0).permute(2, 0, 1)[None]
        if self.columns is None:
            return weights
        back = self.columns.argsort(1)
        weights = weights.take_along_dim(back[:, None, :, None], 2)
        return weights.take_along_dim(back[:, None, None, :], 3)


def row_lengths(metadata: AttentionMetadata, seq_len: int) -> torch.Tensor:
    """Columns up to the last real token of each row: (rows,), or (1,) where all are full."""
    if metadata.is_real is None:
        return torch.full((1,), seq_len, device=metadata.positions.device)
    return (metadata.is_real * (metadata.positions + 1)).amax(1)


def real_tokens(metadata: AttentionMetadata, seq_len: int) -> torch.Tensor:
    """True for real tokens, (rows, seq), or (1, seq) where all are."""
    if metadata.is_real is None:
        return torch.ones(1, seq_len, dtype=torch.bool, device=metadata.positions.device)
    return metadata.is_real


def nth_token(metadata: AttentionMetadata, seq_len: int, rank: torch.Tensor) -> torch.Tensor:
    """The column of a row's real token number `rank`, counted from 0: (rows, count) to the same."""
    seen = real_tokens(metadata, seq_len).long().cumsum(1).expand(len(rank), -1)  # (rows, seq)
    return torch.searchsorted(seen, rank + 1).clamp(max=seq_len - 1)
