"""Tiles: the pieces of a sequence that the chunked attentions walk over, and what is done to queries and keys in them.

What is computed on the way (mapped and rotated queries, scores, weights) is as long as a tile and stays in the cache.
A tile is copied out of the inputs, which may be any views, in chunks (the blocks, in DiagAttention),

    (chunks, rows · heads, chunk, head_dim)

so that all products of a tile, and also those of one of its chunks, are one contiguous batch of small matrices.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, repeat
from typing import NamedTuple

import torch

# In tokens. Long enough that calling torch costs little, short enough for the cache: with one thread and 32 MB of cache
# the time is flat from 256 to 1024 and longer outside.
TILE_SIZE = 512
# The same where a tile is of one head.
HEAD_TILE_SIZE = 2048


class Span(NamedTuple):
    """Tokens [begin, end) of some rows of the batch, in chunks of which the first may be shorter; and their states."""

    rows: slice
    begin: int
    end: int
    states: slice
    first: int = 0

    def tiles(self, tensors: tuple[torch.Tensor | None, ...], chunk: int) -> list[tuple[torch.Tensor | None, ...]]:
        """The tiles of tensors (batch or 1, heads or 1, seq, channels), one tuple for each step of the walk.

        A tile is a view (chunks, rows or 1, heads or 1, chunk, channels), and None for a tensor that is None.
        """
        first = min(self.first, self.end - self.begin)
        last = (self.end - self.begin - first) % chunk
        parts = [(first, first), (self.end - self.begin - first - last, chunk), (last, last)]
        columns: list[Iterable[torch.Tensor | None]] = []
        for tensor in tensors:
            if tensor is None:
                columns.append(repeat(None))
                continue
            if tensor.shape[0] > 1:
                tensor = tensor[self.rows]
            rows, heads, _, channels = tensor.shape
            tiles: list[torch.Tensor] = []
            begin = self.begin
            for length, size in parts:
                if length:
                    part = tensor.narrow(2, begin, length).view(rows, heads, -1, size, channels)
                    tiles += part.permute(2, 0, 1, 3, 4).split(max(TILE_SIZE // chunk, 1))
                    begin += length
            columns.append(tiles)
        return list(zip(*columns))  # noqa: B905 (repeat has no end)


def spans_of(
    query: torch.Tensor, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None = None, block_size: int = 1
) -> list[Span]:
    """What can be walked together: each packed sequence and what lies behind the last one; otherwise as many rows of
    the batch as fill a tile, if their blocks begin at the same places.

    With `cu_seqlens` their values are read, and those of the positions with them: wherever these live, the host waits
    for the device once. Without, only positions are read, and those should be on the CPU; see `Alignment`.
    """
    batch_size, _, seq_len, _ = query.shape
    if cu_seqlens is not None:
        begins = torch.cat((cu_seqlens.long(), cu_seqlens.new_tensor([seq_len], dtype=torch.long)))
        if positions is None:
            cuts, starts = begins.tolist(), [0] * len(begins)
        else:
            firsts = -positions[begins.clamp(max=seq_len - 1)] % block_size
            cuts, starts = torch.stack((begins, firsts)).tolist()
        spans = [Span(slice(0, 1), cuts[i], cuts[i + 1], slice(i, i + 1), starts[i]) for i in range(len(cuts) - 1)]
        return [span for span in spans if span.begin < span.end]
    starts = [0] * batch_size
    if positions is not None:
        read = positions[..., 0].tolist()
        starts = [-first % block_size for first in (read if isinstance(read, list) else [read])]
        if len(starts) == 1:
            starts *= batch_size
    step = max(TILE_SIZE // max(seq_len, 1), 1)
    spans = []
    for first, group in groupby(range(batch_size), key=starts.__getitem__):
        same = list(group)
        for begin in range(same[0], same[-1] + 1, step):
            rows = slice(begin, min(begin + step, same[-1] + 1))
            spans.append(Span(rows, 0, seq_len, rows, first))
    return spans


def must_align(positions: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    """Off the CPU a look at the positions would make the host wait for the device, in every layer."""
    return cu_seqlens is None and positions.device.type != "cpu"


def begins_a_block(positions: torch.Tensor, block_size: int) -> bool:
    """Whether the first token of every row does. The host looks at the positions only where that costs nothing."""
    return positions.device.type == "cpu" and not (positions[..., 0] % block_size).any()


def blocks_of_heads(tensors: tuple[torch.Tensor, ...], block_size: int) -> Iterator[list[torch.Tensor]]:
    """Views of the same blocks of (batch, heads, seq, channels) tensors, (blocks, 1, block, channels), head by head.

    The last block of a head may be shorter and then comes alone.
    """
    whole = tensors[0].shape[2] // block_size * block_size
    step = max(HEAD_TILE_SIZE // block_size, 1) * block_size
    for row in zip(*tensors, strict=True):
        for head in zip(*row, strict=True):  # (seq, channels) each
            for begin in range(0, whole, step):
                end = min(begin + step, whole)
                yield [tensor[begin:end].unflatten(0, (-1, 1, block_size)) for tensor in head]
            if whole < head[0].shape[0]:
                yield [tensor[whole:][None, None] for tensor in head]


class Alignment(NamedTuple):
    """Rows of a batch moved to the right, on the device, so that the blocks of all rows begin at the same columns.

    source: (batch or 1, wider), the column that a column is taken from; is_inside: the same shape, False where there
    is none. target: (batch or 1, seq), the column where a column went.
    """

    source: torch.Tensor
    is_inside: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor, block_size: int) -> "Alignment":
        seq_len = positions.shape[-1]
        shift = (positions[..., 0] % block_size).reshape(-1, 1)
        columns = torch.arange(seq_len + block_size - 1, device=positions.device)
        source = columns - shift
        is_inside = (source >= 0) & (source < seq_len)
        return cls(source.clamp(0, seq_len - 1), is_inside, columns[:seq_len] + shift)

    def align(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """(batch, heads, seq, channels) to (batch, heads, wider, channels), with zeros where nothing stands."""
        if tensor is None:
            return None
        return take_columns(tensor, self.source).masked_fill_(~self.is_inside[:, None, :, None], 0)

    def align_padding(self, padding: torch.Tensor | None) -> torch.Tensor:
        outside = ~self.is_inside[:, None, :, None]
        return outside if padding is None else take_columns(padding, self.source) | outside

    def restore(self, aligned: torch.Tensor) -> torch.Tensor:
        return take_columns(aligned, self.target)


def take_columns(tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    batch_size, heads, _, channels = tensor.shape
    return tensor.gather(2, columns[:, None, :, None].expand(batch_size, heads, -1, channels))


def load(tile: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy of a tile."""
    return torch.empty(tile.shape, dtype=dtype, device=tile.device).copy_(tile)


def product(left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> torch.Tensor:
    """`factor * left @ right` of contiguous (chunks, rows · heads, ., .) or their transposes, with no broadcasting."""
    left, right, shape = left.flatten(0, 1), right.flatten(0, 1), (*left.shape[:-1], right.shape[-1])
    if factor == 1:
        return torch.bmm(left, right).view(shape)
    total = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return total.baddbmm_(left, right, beta=0, alpha=factor).view(shape)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), alpha=factor)


class Preparation(NamedTuple):
    """`prepare_query_key` for tiles, in place: load, phi, LRPE, padding; and the gradients of these."""

    dtype: torch.dtype
    feature_map: str
    householder: torch.Tensor | None
    grad_householder: torch.Tensor | None = None

    def values(self, tile: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        if padding is not None:
            return load(tile, self.dtype).masked_fill_(padding, 0).flatten(1, 2)
        if len(tile) == 1:
            return tile.to(self.dtype).flatten(1, 2)  # one chunk can be multiplied as it lies
        return load(tile, self.dtype).flatten(1, 2)

    def states(
        self, tile: torch.Tensor, rotation: torch.Tensor | None, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.feature_map == "identity" and rotation is None:
            return self.values(tile, padding)
        states = self.turn(self.map(load(tile, self.dtype)), rotation)
        if padding is not None:
            states.masked_fill_(padding, 0)
        return states.flatten(1, 2)

    def states_twice(
        self, tile: torch.Tensor, rotation: torch.Tensor | None, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states after phi, and at the end, for `backward`."""
        mapped = self.map(load(tile, self.dtype))
        states = mapped if rotation is None and padding is None else self.turn(mapped.clone(), rotation)
        if padding is not None:
            states.masked_fill_(padding, 0)
        return mapped, states.flatten(1, 2)

    def map(self, states: torch.Tensor) -> torch.Tensor:
        """phi. 1 + elu(x) as exp(min(x, 0)) + max(x, 0) takes half the time of F.elu, and exp2 half that of exp."""
        if self.feature_map == "identity":
            return states
        negative = (states * math.log2(math.e)).clamp_(max=0).exp2_()
        states.clamp_(min=0).add_(negative)
        return states if self.feature_map == "1+elu" else states.sub_(1)

    def turn(self, states: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """LRPE by a tile of the table of rotations."""
        if rotation is not None and self.householder is not None:
            reflect(states, self.householder)
            as_complex(states).mul_(rotation)
        return states

    def backward(
        self,
        grad: torch.Tensor,
        mapped: torch.Tensor,
        states: torch.Tensor,
        rotation: torch.Tensor | None,
        grad_rotation: torch.Tensor | None,
        into: torch.Tensor,
    ) -> None:
        """The gradient of `states` back to that of the tile, which is stored there."""
        grad = grad.view(into.shape)
        if rotation is not None and self.householder is not None:
            if grad_rotation is not None:
                along = as_complex(states.view(into.shape)).conj_physical().mul_(as_complex(grad))
                grad_rotation += along.sum_to_size(grad_rotation.shape)
            as_complex(grad).mul_(rotation.conj())
            if self.grad_householder is not None:
                rows, grad_rows = mapped.flatten(0, -2), grad.flatten(0, -2)
                self.grad_householder.addmv_(rows.T, grad_rows.mv(self.householder), alpha=-2)
                self.grad_householder.addmv_(grad_rows.T, rows.mv(self.householder), alpha=-2)
            reflect(grad, self.householder)
        if self.feature_map != "identity":
            # exp below zero, which is 1 + elu and its own derivative; above, 1 + elu is more than its derivative, 1
            grad.mul_((mapped if self.feature_map == "1+elu" else mapped + 1).clamp(max=1))
        into.copy_(grad)


def reflect(states: torch.Tensor, householder: torch.Tensor) -> None:
    rows = states.view(-1, states.shape[-1])
    rows.addr_(rows.mv(householder), householder, alpha=-2)


def as_complex(states: torch.Tensor) -> torch.Tensor:
    """Channel pairs as complex numbers, a view. To rotate a pair is to multiply it by a number of modulus 1."""
    return torch.view_as_complex(states.unflatten(-1, (-1, 2)))


def rotation_table(angles: torch.Tensor | None) -> torch.Tensor | None:
    return None if angles is None else torch.polar(torch.ones_like(angles), angles)


def padding_of(is_real: torch.Tensor | None) -> torch.Tensor | None:
    return None if is_real is None else ~is_real[:, None, :, None]  # (batch, 1, seq, 1)
