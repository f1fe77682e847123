"""BigBird (Zaheer et al., https://arxiv.org/abs/2007.14062): softmax over nearby, global and random blocks.

Tokens of block i see blocks i - 1, i and i + 1, the first, the last, and r random others; those of the first and last
block see all.

Deviations from the authors' code, in transformers too:
- The random blocks are a function of `seed`, the head, and both blocks' numbers: the same in training and evaluation,
  whatever the padding, and in every layer. There they are drawn by numpy's global generator; in evaluation all of them
  are block 0.
- Blocks begin at the first real token, the last block is a text's own, and it may be shorter. There the length must be
  a multiple of the block size, and short inputs raise or are computed by another attention.
- No causal form: the last block is everybody's key. (transformers has one, which sees the future.)
- No dropout on the map.
"""

import torch
import torch.nn.functional as F

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import AttentionMetadata, zero_padding
from .mixer import Mixer, masked_softmax, register_mixer
from .rows import real_tokens, row_lengths
from .seeded import seeded_uniform


@register_mixer("bigbird")
class BigBirdMixer(Mixer):
    """block_size: tokens per block; num_random_blocks: r. The defaults are those of the Long-Range Arena models."""

    has_causal_form = False

    def __init__(self, config: TransNormerConfig, block_size: int = 64, num_random_blocks: int = 3, seed: int = 0):
        super().__init__(config)
        if block_size < 1 or num_random_blocks < 0:
            raise ValueError(
                f"block_size={block_size} must be at least 1, num_random_blocks={num_random_blocks} at least 0."
            )
        self.block_size, self.num_random_blocks, self.seed = block_size, num_random_blocks, seed

    def forward(self, query, key, value, metadata, causal):
        size, seq_len = self.block_size, query.shape[2]
        visible = self.visible_blocks(metadata, seq_len, query.shape[1])  # (rows, heads, blocks, blocks)
        num_seen, num_blocks = 5 + self.num_random_blocks, visible.shape[-1]
        if num_blocks <= num_seen:  # blocks that are not seen are too few to be worth gathering the others
            return self.attention_map(query, key, metadata, causal) @ zero_padding(value, metadata)
        row, head = (torch.arange(n, device=query.device) for n in query.shape[:2])
        query, key, value = (
            F.pad(states, (0, 0, 0, -seq_len % size)).unflatten(2, (-1, size))
            for states in (query * query.shape[-1] ** -0.5, key, zero_padding(value, metadata))
        )  # (rows, heads, blocks, size, head_dim)
        is_key = F.pad(real_tokens(metadata, seq_len), (0, -seq_len % size)).expand(len(row), -1)

        is_seen, index = visible.int().expand(len(row), -1, -1, -1).topk(num_seen, dim=-1)
        place = row[:, None, None, None], head[:, None, None], index  # index (rows, heads, blocks, num_seen)
        keys, values = (states[place].flatten(3, 4) for states in (key, value))
        is_key_seen = is_key.unflatten(1, (-1, size))[place[0], index] & (is_seen > 0)[..., None]
        output = masked_softmax(query @ keys.mT, is_key_seen.flatten(3)[..., None, :]) @ values

        last = (row_lengths(metadata, seq_len) - 1).clamp(min=0) // size
        for block in (torch.zeros_like(last), last):  # they see all
            scores = query[row, :, block] @ key.flatten(2, 3).mT  # (rows, heads, size, all)
            output[row, :, block] = masked_softmax(scores, is_key[:, None, None, :]) @ value.flatten(2, 3)
        return output.flatten(2, 3)[:, :, :seq_len]

    def attention_map(self, query, key, metadata, causal):
        seq_len = query.shape[2]
        visible = self.visible_blocks(metadata, seq_len, query.shape[1])
        visible = visible.repeat_interleave(self.block_size, 2).repeat_interleave(self.block_size, 3)
        visible = visible[:, :, :seq_len, :seq_len] & real_tokens(metadata, seq_len)[:, None, None, :]
        return masked_softmax(query @ key.mT * query.shape[-1] ** -0.5, visible)

    def visible_blocks(self, metadata: AttentionMetadata, seq_len: int, heads: int) -> torch.Tensor:
        """Which blocks see which: (rows or 1, heads, blocks, blocks) bool; none sees what lies behind a row's last."""
        last = ((row_lengths(metadata, seq_len) - 1).clamp(min=0) // self.block_size)[:, None, None]
        blocks = torch.arange(-(-seq_len // self.block_size), device=last.device)
        query, key = blocks[:, None], blocks
        visible = ((query - key).abs() <= 1) | (key == 0) | (key == last) | (query == 0) | (query == last)
        lot = seeded_uniform(self.seed, torch.arange(heads, device=last.device)[:, None, None], query, key)
        lot = lot.masked_fill((visible | (key > last))[:, None], -1)  # (rows or 1, heads, blocks, blocks)
        drawn = lot.topk(min(self.num_random_blocks, len(blocks)), dim=-1)
        is_drawn = torch.zeros_like(lot, dtype=torch.bool).scatter(-1, drawn.indices, drawn.values >= 0)
        return (visible[:, None] | is_drawn) & (key <= last)[:, None]
