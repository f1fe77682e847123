"""Reformer's attention by locality-sensitive hashing (Kitaev et al., https://arxiv.org/abs/2001.04451).

Queries are keys, k = q / rms(q) / sqrt(d). A hash puts each token into the bucket argmax [q R | -q R] of a random R;
tokens are sorted by bucket and position and cut into chunks, and each sees its own chunk and the one before. Itself it
sees only if there is nobody else (a score of -1e5). Several hashes are combined by their sums of exponentials. The
chunk before a round's first one is the last of the round before, as in transformers.

Written here and not wrapped: transformers' LSHSelfAttention takes lengths that are multiples of the chunk, resets
torch's global generator or draws anew in each forward, fixes the number of buckets by the first input it sees, and puts
padding into chunks of the text, so that a text's output depends on its padding.

Deviations from it: R is a function of `seed`; the number of buckets, the largest power of 2 up to twice the number of
chunks, is each row's own, and never factorised; chunks divide the real tokens of a row. No dropout on the map. No
causal form: which chunk a token is in depends on all tokens (the original's causal mask leaves that leak).
"""

import torch
import torch.nn.functional as F

from ...model.configuration_transnormer import TransNormerConfig
from .mixer import Mixer, register_mixer
from .rows import real_tokens
from .seeded import seeded_normal

SELF_SCORE = -1e5


@register_mixer("reformer")
class ReformerMixer(Mixer):
    """chunk_size: tokens per chunk; num_hashes: rounds. The defaults are those of the Long-Range Arena models."""

    has_causal_form = has_map = False
    shares_query_and_key = True

    def __init__(self, config: TransNormerConfig, chunk_size: int = 64, num_hashes: int = 2, seed: int = 0):
        super().__init__(config)
        if chunk_size < 1 or num_hashes < 1:
            raise ValueError(f"chunk_size={chunk_size} and num_hashes={num_hashes} must be at least 1.")
        self.chunk_size, self.num_hashes, self.seed = chunk_size, num_hashes, seed

    def forward(self, query, key, value, metadata, causal):
        seq_len = query.shape[2]
        tail = -seq_len % self.chunk_size
        is_real = F.pad(real_tokens(metadata, seq_len), (0, tail)).expand(len(query), -1)
        query, value = (F.pad(states, (0, 0, 0, tail)) for states in (query, value))
        order = self.order(query, is_real)  # (rows, heads, hashes, seq)
        chunks = order.unflatten(3, (-1, self.chunk_size)).flatten(2, 3)  # (rows, heads, hashes * chunks, chunk_size)
        before = self._chunk_before(is_real, chunks.shape[2])
        seen = torch.cat((chunks.take_along_dim(before, 2), chunks), 3)  # (rows, heads, chunks, 2 * chunk_size)

        row, head = (torch.arange(n, device=query.device) for n in query.shape[:2])
        place = row[:, None, None, None], head[:, None, None]
        key = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6) * query.shape[-1] ** -0.5
        scores = query[(*place, chunks)] @ key[(*place, seen)].mT
        scores = scores.masked_fill(chunks[..., :, None] == seen[..., None, :], SELF_SCORE)
        lowest = torch.finfo(scores.dtype).min / 2
        scores = scores.masked_fill(~is_real[place[0], seen][..., None, :], lowest)
        output = scores.softmax(-1) @ value[(*place, seen)]  # (rows, heads, hashes * chunks, chunk_size, head_dim)

        back = order.argsort(-1)
        total = scores.logsumexp(-1).view_as(order).take_along_dim(back, 3)
        output = output.view(*order.shape, -1).take_along_dim(back[..., None], 3)
        return (total.softmax(2)[..., None] * output).sum(2)[:, :, :seq_len]

    @torch.no_grad()
    def order(self, query: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """The columns of each row sorted by bucket, then by position, padding last: (rows, heads, hashes, seq)."""
        longest = query.shape[2]
        buckets = self.buckets(query, is_real).masked_fill(~is_real[:, None, None], longest)
        return (buckets * longest + torch.arange(longest, device=query.device)).argsort(-1)

    def buckets(self, query: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """The bucket of each token in each round: (rows, heads, hashes, seq)."""
        chunks = (is_real.sum(1).clamp(min=1) + self.chunk_size - 1) // self.chunk_size  # (rows,)
        directions = 2 ** chunks.log2().floor().long()  # half the buckets
        most = 2 ** ((query.shape[2] // self.chunk_size).bit_length() - 1)
        sizes = query.shape[1], self.num_hashes, most, query.shape[3]
        places = torch.meshgrid([torch.arange(n, device=query.device) for n in sizes], indexing="ij")
        rotations = seeded_normal(self.seed, *places).to(query.dtype)  # (heads, hashes, directions, head_dim)
        rotated = torch.einsum("bhnd,hrmd->bhrnm", query, rotations)
        is_absent = torch.arange(most, device=query.device) >= directions[:, None, None, None, None]
        return torch.cat([part.masked_fill(is_absent, -torch.inf) for part in (rotated, -rotated)], -1).argmax(-1)

    def _chunk_before(self, is_real: torch.Tensor, chunks: int) -> torch.Tensor:
        """The chunk before each in all rounds, (rows, 1, chunks, 1)."""
        per_round = chunks // self.num_hashes
        last = (is_real.sum(1).clamp(min=1) - 1) // self.chunk_size  # of a row's real tokens, (rows,)
        number = torch.arange(chunks, device=is_real.device)
        begin = (number // per_round - 1) % self.num_hashes * per_round  # of the round before
        before = torch.where(number % per_round == 0, begin + last[:, None], number - 1)
        return before[:, None, :, None]
