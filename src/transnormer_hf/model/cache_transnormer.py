"""What a causal TransNormer remembers between two forwards: a state of constant size.

NormAttention keeps S = K^T V, one (head_dim, head_dim) matrix per head. DiagAttention keeps the keys and values of the
current block. Neither grows with the context, and both are float32 whatever the dtype of the model (float64 for a
float64 model). Full attention, in converted models that have such a layer, keeps every key and value, as any softmax
model does. Left-padded rows have taken in fewer tokens than others and stand elsewhere in their block, so progress is
counted row by row.

The states are the layers of an ordinary transformers `Cache`, which calls them to reorder, crop, repeat or reset. A
`TransNormerCache` has them from the start; an empty `DynamicCache` or `StaticCache` gets them from `adopt_cache`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from .reference_transnormer import AttentionMetadata, compute_dtype, zero_padding

# File name of a saved cache inside of a folder.
STATE_FILE = "transnormer_state.safetensors"

# Minimum number of tokens that stay croppable while recording, however often the cache was cropped before: candidate
# generators with another tokenizer go back further than what they added last.
RETAINED_TOKENS = 64

# What a saved state depends on: two models that differ here cannot continue each other's states.
FINGERPRINT_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_types",
    "block_size", "feature_map", "diag_activation", "norm_type", "attention_norm_type", "norm_placement",
    "embedding_norm", "final_norm", "position_embedding", "scale_embedding", "lrpe", "feed_forward", "hidden_act",
    "hybrid_combination",
)  # fmt: skip


class NewTokens(NamedTuple):
    """The tokens of one forward, made once for all layers.

    metadata: positions (batch, seq), negative in front of a row's first real token, and which tokens are real.
    is_prefill: True if no token came before them.
    is_step: True for one token that meets the state alone, without gradients.
    is_recorded: True if `crop` may take them back.
    has_grad: True while gradients are on: autograd may save the states that the attentions see.
    slots: (batch, tail) slot in the current block for each of the last columns, `block_size` for tokens outside of it.
        The current block is the one that holds a row's last column.
    visible: (batch, 1, 1, block_size + 1) bool, slots that the last column sees.
    past_slots: (batch, block_size) slots of the cached block, rotated to end just before the new tokens.
    with_past: metadata of these slots followed by the new tokens, block_size + seq columns padded on the left.
    columns: (batch, keys) column of the text where each key stands, for attention maps: of every slot at a step, of
        `with_past` else. seen: columns of the text so far.
    visible_keys, key_columns: for full attention, which of all keys each token sees (batch, 1, seq, keys), None where
        it is the causal triangle, and the columns of these keys (batch, keys).
    What belongs to an attention that the model does not have is None, and so are `past_slots` and `with_past` at
    prefill.
    """

    metadata: AttentionMetadata
    is_prefill: bool
    is_step: bool
    is_recorded: bool
    has_grad: bool
    slots: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    past_slots: torch.Tensor | None = None
    with_past: AttentionMetadata | None = None
    columns: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    visible_keys: torch.Tensor | None = None
    key_columns: torch.Tensor | None = None


class Recorded:
    """Tensors with one row per sequence, and what `crop` needs to take tokens back while it records.

    history: of the recorded tokens, tensors with one row per sequence. base: the tensors before these tokens.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.history: list[tuple[torch.Tensor, ...]] = []
        self.base: dict[str, torch.Tensor] = {}

    def begin_history(self, is_recording: bool) -> None:
        self.history, self.base = [], _clone(self.tensors) if is_recording else {}

    def restore_base(self) -> None:
        """Back to the tensors before the recorded tokens: in place, apart from what has grown; zeros if none came."""
        for name, tensor in self.tensors.items():
            if self.base and self.base[name].shape != tensor.shape:
                self.tensors[name] = self.base[name].clone()
            else:
                tensor.copy_(self.base[name]) if self.base else tensor.zero_()
        self.history, self.base = [], {}

    def reset(self) -> None:
        self.history, self.base = [], {}
        for tensor in self.tensors.values():
            tensor.zero_()

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies an indexing function to everything that has one row per sequence."""
        self.tensors, self.base = _map(change, self.tensors), _map(change, self.base)
        self.history = [tuple(map(change, recorded)) for recorded in self.history]


class Progress(Recorded):
    """How far each row of the batch has come; one object, shared by all layers of a cache.

    seen: number of columns so far, padding included: a tensor, because a compiled step would specialise on a number.
    tensors: "lengths" (batch,), positions taken by each row; by slot of the current block (batch, block_size + 1),
        "is_filled", see `NewTokens.visible`, and "columns", where in the text the token stands; and for the keys of
        full attention (batch, keys), "key_positions" from 1 on, 0 where no real token stands, and "key_columns".
    history: positions, which of them are real, and columns, (batch, seq) each.
    block_size: None in a model without DiagAttention. has_full_attention: whether there are such keys.
    """

    def __init__(self, block_size: int | None, has_full_attention: bool = False) -> None:
        super().__init__()
        self.block_size, self.has_full_attention = block_size, has_full_attention
        self.has_begun = False
        self.is_contiguous = True  # of all recorded tokens
        self.seen = _zeros(dtype=torch.long, device=torch.device("cpu"))
        # what `crop` leaves: the number of all columns, and slices of the recorded ones to take in again
        self.rollback: tuple[int, list[tuple[slice, NewTokens]]] | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return self.tensors["lengths"].shape[0] if self.tensors else -1

    @property
    def lengths(self) -> torch.Tensor | int:
        """(batch,) positions taken by each row, 0 before the first token."""
        return self.tensors["lengths"] if self.has_begun else 0

    def allocate(self, batch_size: int, device: torch.device) -> None:
        self.seen = self.seen.to(device)
        if not self.tensors:
            self.tensors["lengths"] = _zeros(batch_size, dtype=torch.long, device=device)
            if self.block_size is not None:
                self.tensors["is_filled"] = _zeros(batch_size, self.block_size + 1, dtype=torch.bool, device=device)
                self.tensors["columns"] = _zeros(batch_size, self.block_size + 1, dtype=torch.long, device=device)
            if self.has_full_attention:
                for name in ("key_positions", "key_columns"):
                    self.tensors[name] = _zeros(batch_size, 0, dtype=torch.long, device=device)

    def advance(self, metadata: AttentionMetadata, is_recorded: bool, columns: torch.Tensor | None = None) -> NewTokens:
        """Moves every row past these tokens and says where they go. columns: (batch, seq), of the text."""
        positions = metadata.positions  # (batch, seq)
        if columns is None:
            here = torch.arange(positions.shape[1], device=positions.device)
            columns = self.seen + (here.expand_as(positions) if metadata.order is None else metadata.order)
        if is_recorded:
            self.is_contiguous = metadata.is_contiguous and (self.is_contiguous or not self.history)
            self.history.append((positions, _real_columns(metadata), columns))
        has_grad = torch.is_grad_enabled()
        is_step = self.has_begun and positions.shape[1] == 1 and not has_grad
        tokens = NewTokens(metadata, not self.has_begun, is_step, is_recorded, has_grad, seen=self.seen)
        if self.block_size is not None:
            tokens = self._assign_slots(tokens, self.block_size, columns)
        if self.has_full_attention:
            tokens = self._show_keys(tokens, columns)
        self.tensors["lengths"].copy_(self._length_after(metadata))
        self.seen.add_(positions.shape[1])
        self.has_begun = True
        return tokens

    def _assign_slots(self, tokens: NewTokens, block_size: int, columns: torch.Tensor) -> NewTokens:
        """Finds the slot of each token in the current block of its row, and moves on to that block."""
        metadata, is_filled, lengths = tokens.metadata, self.tensors["is_filled"], self.tensors["lengths"][:, None]
        positions, is_real = metadata.positions, metadata.is_real
        last = lengths - 1  # (batch, 1) position before the new tokens
        block_start = last - last % block_size
        if not tokens.is_prefill and not tokens.is_step:
            within = positions - block_start.clamp(min=0)  # (batch, seq) counted from the start of the current block
            first = within[:, :1] if metadata.is_contiguous else lengths - block_start.clamp(min=0)
            past = first + torch.arange(-block_size, 0, device=within.device)  # (batch, block_size)
            past_slots = past.clamp(min=0)
            is_visible = torch.cat(((past >= 0) & is_filled.gather(1, past_slots), _real_columns(metadata)), 1)
            with_past = metadata._replace(positions=torch.cat((past, within), 1), is_real=is_visible)
            of_keys = torch.cat((self.tensors["columns"].gather(1, past_slots), columns), 1)
            tokens = tokens._replace(past_slots=past_slots, with_past=with_past, columns=of_keys)

        end = self._length_after(metadata)[:, None]  # (batch, 1)
        start = (end - 1) - (end - 1) % block_size
        if metadata.is_contiguous:  # no earlier column can be in the current block
            positions, columns = positions[:, -block_size:], columns[:, -block_size:]
            is_real = None if is_real is None else is_real[:, -block_size:]
        is_inside = positions >= start.clamp(min=0)
        if is_real is not None:
            is_inside = is_inside & is_real
        slots = torch.where(is_inside, positions - start, block_size)
        is_filled.logical_and_(block_start == start).scatter_(1, slots, is_inside)
        self.tensors["columns"].scatter_(1, slots, columns)
        visible = is_filled
        if is_real is not None:  # a padding token may see nothing: it gets the last slot, not NaN
            visible = torch.cat((is_filled[:, :-1], ~is_filled.any(1, keepdim=True)), 1)
        if tokens.is_step:
            tokens = tokens._replace(columns=self.tensors["columns"])
        return tokens._replace(slots=slots, visible=visible[:, None, None, :])

    def _show_keys(self, tokens: NewTokens, columns: torch.Tensor) -> NewTokens:
        """Counts the new tokens among the keys of full attention: each sees the real ones up to its own position."""
        positions, is_real = tokens.metadata.positions, tokens.metadata.is_real  # (batch, seq)
        key_positions = positions + 1 if is_real is None else (positions + 1).masked_fill(~is_real, 0)
        for name, new in (("key_positions", key_positions), ("key_columns", columns)):
            self.tensors[name] = torch.cat((self.tensors[name], new), 1)
        visible = None
        if not tokens.is_prefill or is_real is not None:
            of_keys = self.tensors["key_positions"][:, None, None, :]  # (batch, 1, 1, keys)
            visible = (of_keys > 0) & (of_keys <= positions[:, None, :, None] + 1)
            visible = visible | ~visible.any(-1, keepdim=True)  # a padding token may see nothing: it sees all, not NaN
        return tokens._replace(visible_keys=visible, key_columns=self.tensors["key_columns"])

    def _length_after(self, metadata: AttentionMetadata) -> torch.Tensor:
        """(batch,) positions taken after these tokens. Padding takes none where positions were given."""
        if metadata.is_contiguous:
            return (metadata.positions[:, -1] + 1).clamp(min=0)
        ends = (metadata.positions + 1).masked_fill(~metadata.is_real, 0).amax(1)
        return torch.maximum(self.tensors["lengths"], ends)

    # Taking tokens back

    def roll_back(self, tokens_to_remove: int) -> None:
        """Goes back to before the recorded tokens and advances over those that stay; `rollback` tells the states how.

        tokens_to_remove: minus the number of tokens to take back, or, as transformers before 5.14 calls it, the
            positive number of tokens to keep.

        Raises RuntimeError if these tokens were not recorded.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(int(self.seen) - tokens_to_remove, 0)
        recorded = sum(columns.shape[1] for *_, columns in self.history)
        if count > recorded:
            raise RuntimeError(
                f"crop({tokens_to_remove}) cannot take back {count} of {int(self.seen)} tokens: the last {recorded} "
                "are recorded. Call activate_past_recording() before adding tokens that may be taken back."
            )
        kept = recorded - count
        settled = max(kept - RETAINED_TOKENS, 0)
        self.rollback = None
        if not count and settled < RETAINED_TOKENS:
            return
        positions, is_real, of_text = (torch.cat(parts, 1) for parts in zip(*self.history, strict=True))
        is_contiguous = self.is_contiguous
        self.restore_base()
        self.seen.sub_(recorded)
        num_columns, replays = int(self.seen) + kept, []
        for part in (slice(settled), slice(settled, kept)):
            metadata = AttentionMetadata(positions[:, part], is_real[:, part], is_contiguous=is_contiguous)
            if not metadata.positions.shape[1]:
                continue
            is_recorded = part.stop == kept
            if is_recorded:
                self.base = _clone(self.tensors)
            replays.append((part, self.advance(metadata, is_recorded, of_text[:, part])))
        self.rollback = num_columns, replays

    def reset(self) -> None:
        super().reset()
        self.has_begun = False
        self.seen.zero_()
        self.tensors |= {name: tensor[:, :0] for name, tensor in self.tensors.items() if name.startswith("key_")}


class AttentionState(Recorded):
    """What one attention remembers: `tensors`, empty before the first token. Subclasses `allocate` them, and `write`
    new keys and values to them; the history holds keys and values.

    is_saved: True if autograd may have saved the tensors: they are then replaced, not overwritten.
    """

    allocate: Callable[..., None]
    write: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        self.is_saved = False

    def append(
        self, key: torch.Tensor, value: torch.Tensor, tokens: NewTokens, new_state: torch.Tensor | None = None
    ) -> None:
        """Takes in (batch, heads, seq, head_dim) keys, as they enter the products (mapped and rotated), and values.

        new_state: the state after them, if the attention has computed it on its way.
        """
        key, value = key.detach(), value.detach()
        if not self.tensors:
            batch_size, num_heads, _, head_dim = key.shape
            self.allocate(batch_size, num_heads, head_dim, key.dtype, key.device)
        self._detach_from_autograd(tokens.has_grad)
        if tokens.is_recorded:
            self.history.append((key, value))
        if new_state is None:
            self.write(key, value, tokens)
        else:
            self.tensors["state"].copy_(new_state.detach())

    def _detach_from_autograd(self, is_saved: bool = False) -> None:
        """Makes the tensors safe to overwrite. is_saved: True if autograd may save the result."""
        if is_saved or self.is_saved:
            self.tensors = _clone(self.tensors)
        self.is_saved = is_saved

    def roll_back(self, num_columns: int, replays: list[tuple[slice, NewTokens]]) -> None:
        self._detach_from_autograd()
        key, value = (torch.cat(parts, 2) for parts in zip(*self.history, strict=True))
        self.restore_base()
        for columns, tokens in replays:
            if tokens.is_recorded:
                self.base = _clone(self.tensors)
            self.append(key[:, :, columns], value[:, :, columns], tokens)

    def reset(self) -> None:
        self._detach_from_autograd()
        super().reset()


class NormAttentionState(AttentionState):
    """state: (batch, heads, head_dim, head_dim), K^T V of all tokens so far."""

    def allocate(self, batch_size, num_heads, head_dim, dtype, device):
        shape = (batch_size, num_heads, head_dim, head_dim)
        self.tensors["state"] = _zeros(*shape, dtype=compute_dtype(dtype), device=device)

    def write(self, key, value, tokens):
        state = self.tensors["state"]
        key, value = (zero_padding(new.to(state.dtype), tokens.metadata) for new in (key, value))
        state.view(-1, *state.shape[2:]).baddbmm_(key.flatten(0, 1).mT, value.flatten(0, 1))

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """NormAttention of a query whose own token is in the state: (batch, heads, 1, head_dim) to the same."""
        return query @ self.tensors["state"]


class DiagAttentionState(AttentionState):
    """keys, values: (batch, heads, block_size + 1, head_dim), the current block of each row by slot.

    Tokens outside of the current block are written to the last slot, which no query sees.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def allocate(self, batch_size, num_heads, head_dim, dtype, device):
        shape = (batch_size, num_heads, self.block_size + 1, head_dim)
        for name in ("keys", "values"):
            self.tensors[name] = _zeros(*shape, dtype=compute_dtype(dtype), device=device)

    def write(self, key, value, tokens):
        tail = tokens.slots.shape[1]
        for name, new in (("keys", key), ("values", value)):
            new = new[:, :, -tail:].to(self.tensors[name].dtype)
            self.tensors[name].scatter_(2, tokens.slots[:, None, :, None].expand_as(new), new)

    def attend(self, query: torch.Tensor, tokens: NewTokens, activation: str, scale: float) -> torch.Tensor:
        """DiagAttention of a query whose own token is in the state: (batch, heads, 1, head_dim) to the same."""
        keys, values = self.tensors["keys"], self.tensors["values"]
        if activation == "softmax":
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=tokens.visible, scale=scale)
        scores = (query * scale) @ keys.transpose(-1, -2)  # (batch, heads, 1, block_size + 1)
        return (scores.relu() * tokens.visible) @ values


class FullAttentionState(AttentionState):
    """keys, values: (batch, heads, tokens, head_dim) of all tokens so far, keys rotated, in the dtype of the model.

    This state grows. Nothing is recorded for `crop`, which only has to cut off the last keys.
    """

    def allocate(self, batch_size, num_heads, head_dim, dtype, device):
        for name in ("keys", "values"):
            self.tensors[name] = _zeros(batch_size, num_heads, 0, head_dim, dtype=dtype, device=device)

    def append(self, key, value, tokens, new_state=None):
        past = self.tensors or {"keys": key[:, :, :0], "values": value[:, :, :0]}
        new = {"keys": key.detach(), "values": value.detach()}
        self.tensors = {name: torch.cat((past[name].to(new[name].dtype), new[name]), 2) for name in past}

    def roll_back(self, num_columns, replays):
        self.tensors = _map(lambda tensor: tensor[:, :, :num_columns], self.tensors)

    def reset(self):
        self.tensors = {}


class StateUpdate:
    """One attention's state during one forward.

    past: the tensors before the new tokens. Gradient checkpointing runs a layer again in the backward pass; it then
    finds the same past, and the tokens are not taken in twice.
    """

    def __init__(self, state: AttentionState, tokens: NewTokens) -> None:
        self.state, self.tokens = state, tokens
        self.past = state.tensors
        self.is_done = False

    def append(self, key: torch.Tensor, value: torch.Tensor, new_state: torch.Tensor | None = None) -> None:
        """As `AttentionState.append`, once."""
        if not self.is_done:
            self.state.append(key, value, self.tokens, new_state)
        self.is_done = True

    def past_block(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cached block, to stand in front of new ones: (batch, heads, block_size, head_dim)."""
        keys, values = self.past["keys"], self.past["values"]
        slots = self.tokens.past_slots[:, None, :, None].expand(*keys.shape[:2], -1, keys.shape[3])
        return keys.gather(2, slots), values.gather(2, slots)

    def with_new(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """The "keys" or "values" of full attention, past and new: (batch, heads, keys, head_dim).

        new: (batch, heads, seq, head_dim), to which gradients go back.
        """
        if self.tokens.is_prefill:
            return new
        if self.is_done and not self.tokens.has_grad:
            return self.state.tensors[name].to(new.dtype)
        return torch.cat((self.past[name].to(new.dtype), new), 2)

    def attention_map(self, weights: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Weights (batch, heads, seq, keys) on these columns of the text, as a map (batch, heads, seq, seen)."""
        batch_size, heads, seq_len, _ = weights.shape
        whole = weights.new_zeros(batch_size, heads, seq_len, int(self.tokens.seen))
        return whole.scatter_add_(3, columns[:, None, None, :].expand_as(weights), weights)


class TransNormerCacheLayer(CacheLayerMixin):
    """The states of one layer (two in a hybrid layer), as a layer of a transformers cache.

    progress: shared by all layers. The first layer moves it wherever transformers calls all layers in turn.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, states: tuple[AttentionState, ...], progress: Progress, is_first: bool, is_compileable: bool):
        super().__init__()
        self.states, self.progress, self.is_first = states, progress, is_first
        self.is_compileable = is_compileable
        self.record_past = False  # `generate` reads and unsets it

    def __repr__(self) -> str:
        return " + ".join(type(state).__name__ for state in self.states)

    @property
    def _parts(self) -> tuple[Recorded, ...]:
        return (self.progress, *self.states) if self.is_first else self.states

    def activate_past_recording(self) -> None:
        """From now on keeps the keys and values of new tokens as well, so that `crop` can take them back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens; see `Progress.roll_back`."""
        if self.is_first:
            self.progress.roll_back(tokens_to_remove)
        if self.progress.rollback is not None:
            for state in self.states:
                state.roll_back(*self.progress.rollback)

    def reset(self) -> None:
        """Back to the beginning; the tensors stay where they are, for a compiled step."""
        for part in self._parts:
            part.reset()

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for part in self._parts:
            part.change_rows(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_rows(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        for state in self.states:
            state.tensors = _map(lambda tensor: tensor.to("cpu"), state.tensors)

    def prefetch(self) -> None:
        for state in self.states:
            state.tensors = _map(lambda tensor: tensor.to(self.progress.seen.device), state.tensors)

    @property
    def batch_size(self) -> int:
        return self.progress.batch_size

    def get_seq_length(self) -> int:
        """Number of columns taken in, padding included."""
        return int(self.progress.seen)

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the states for keys (batch, heads, any, head_dim) before the first token."""
        batch_size, num_heads, _, head_dim = key_states.shape
        self.progress.allocate(batch_size, key_states.device)
        for state in self.states:
            state.allocate(batch_size, num_heads, head_dim, key_states.dtype, key_states.device)
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("A TransNormer state takes tokens in by `receive`, not keys and values by `update`.")


def make_layers(config: PreTrainedConfig, is_compileable: bool = False) -> list[TransNormerCacheLayer]:
    """An empty state for each layer of a model; one that grows is not compileable."""
    kinds = set(config.layer_types)
    new_states: dict[str, Callable[[], tuple[AttentionState, ...]]] = {
        "linear_attention": lambda: (NormAttentionState(),),
        "chunked_attention": lambda: (DiagAttentionState(config.block_size),),
        "hybrid": lambda: (DiagAttentionState(config.block_size), NormAttentionState()),
        "full_attention": lambda: (FullAttentionState(),),
    }
    has_full_attention = "full_attention" in kinds
    progress = Progress(config.block_size if kinds & {"chunked_attention", "hybrid"} else None, has_full_attention)
    is_compileable = is_compileable and not has_full_attention
    return [
        TransNormerCacheLayer(new_states[layer_type](), progress, index == 0, is_compileable)
        for index, layer_type in enumerate(config.layer_types)
    ]


class TransNormerCache(Cache):
    """The states of all layers of a causal TransNormer.

    ```python
    cache = TransNormerCache(model.config)
    model(prompt, past_key_values=cache)
    cache.save_pretrained("prompt.safetensors")  # a long prompt is paid for once
    cache = TransNormerCache.from_pretrained("prompt.safetensors", model.config)
    ```

    `cache.get_seq_length()` is the number of columns it has taken in. `copy.deepcopy(cache)` branches off from there at
    the cost of the state, whatever the length of the prompt. The state is small and stays on the device of its layer:
    `cache_implementation="offloaded"` has nothing to offload.

    Args:
        config: Configuration of the model.
        is_compileable: Whether `generate` may compile the decoding step; `cache_implementation="static"` sets it. A
            model with a layer of full attention, whose state grows, is not compiled.
    """

    layers: list[TransNormerCacheLayer]

    def __init__(self, config: PreTrainedConfig, is_compileable: bool = False):
        super().__init__(layers=make_layers(config, is_compileable))
        self.fingerprint = {field: getattr(config, field) for field in FINGERPRINT_FIELDS}

    def activate_past_recording(self) -> None:
        """From now on keeps the keys and values of new tokens as well, so that `crop` can take them back."""
        for layer in self.layers:
            layer.activate_past_recording()

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.layers[0].progress.has_begun

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves a layer's state, which `offload` has moved to the CPU, back to the device of the tokens."""
        self.layers[layer_idx].prefetch()

    @property
    def states(self) -> list[AttentionState]:
        return [state for layer in self.layers for state in layer.states]

    def _tensors(self) -> list[dict[str, torch.Tensor]]:
        return [self.layers[0].progress.tensors, *(state.tensors for state in self.states)]

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensors in self._tensors() for tensor in tensors.values())
        return (
            f"{type(self).__name__}(layers={self.layers}, batch_size={self.layers[0].batch_size}, "
            f"seq_length={self.get_seq_length()}, bytes={size})"
        )

    def save_pretrained(self, path: str | os.PathLike) -> Path:
        """Writes the state to a .safetensors file, or to a file in a folder. Returns the file.

        What is recorded for `crop` is left out. The file appears under its name once it is complete.

        Raises ValueError for an empty cache.
        """
        progress = self.layers[0].progress
        if not progress.has_begun:
            raise ValueError("This cache is empty; run the model on a prompt with it before saving it.")
        file = _state_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{index}.{name}": tensor.contiguous()
            for index, tensors in enumerate(self._tensors())
            for name, tensor in tensors.items()
        }
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            save_file(tensors | {"seen": progress.seen}, partial, {"fingerprint": json.dumps(self.fingerprint)})
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        return file

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        config: PreTrainedConfig,
        device: str | torch.device = "cpu",
        is_compileable: bool = False,
    ) -> "TransNormerCache":
        """Reads what `save_pretrained` has written, to go on with a model of this configuration on this device.

        Raises ValueError if the state was saved with another configuration. Weights are not compared: a state means
        nothing to a model that was trained further.
        """
        cache, file = cls(config, is_compileable), _state_file(path)
        progress = cache.layers[0].progress
        with safe_open(file, "pt", device=str(device)) as saved:
            fingerprint = json.loads((saved.metadata() or {}).get("fingerprint", "{}"))
            differences = [
                f"{field}={fingerprint.get(field)!r}, here {here!r}"
                for field, here in cache.fingerprint.items()
                if fingerprint.get(field) != here
            ]
            if differences:
                raise ValueError(f"{file} was saved with another configuration: {'; '.join(differences)}.")
            progress.seen = saved.get_tensor("seen").clone()
            tensors = cache._tensors()
            for key in set(saved.keys()) - {"seen"}:
                index, name = key.split(".")
                tensors[int(index)][name] = saved.get_tensor(key).clone()  # not a view of the file
        progress.has_begun = True
        if progress.block_size is not None and "columns" not in progress.tensors:  # of version 0.1.0
            last, size = progress.tensors["lengths"][:, None] - 1, progress.block_size
            of_slots = torch.arange(size + 1, device=last.device)
            progress.tensors["columns"] = (progress.seen - 1 - last % size + of_slots).clamp(min=0)
        return cache


def receive(cache: Cache, metadata: AttentionMetadata, batch_size: int) -> list[StateUpdate | tuple[StateUpdate, ...]]:
    """Counts the tokens of a forward; returns what each layer needs to take them in, two updates for a hybrid layer.

    metadata: as `attention_metadata` gives it, with `position_offset=cache_lengths(cache)`.

    Raises ValueError if the cache holds another number of rows.
    """
    progress: Progress = cache.layers[0].progress
    states = [state for layer in cache.layers for state in layer.states]
    if not progress.has_begun:
        device = metadata.positions.device
        if progress.tensors and (progress.batch_size != batch_size or progress.seen.device != device):
            for part in (progress, *states):
                part.tensors.clear()  # left by a reset, of another shape
        progress.allocate(batch_size, device)
    elif batch_size != progress.batch_size:
        raise ValueError(
            f"the cache holds {progress.batch_size} rows and the input has {batch_size}; beams and several sequences "
            "per prompt need cache.batch_repeat_interleave(...) first."
        )
    is_recording = any(layer.record_past for layer in cache.layers)
    metadata = metadata._replace(positions=metadata.positions.expand(batch_size, -1))
    if not is_recording or not progress.history:
        for part in (progress, *states):
            part.begin_history(is_recording)
    tokens = progress.advance(metadata, is_recording)
    updates = [tuple(StateUpdate(state, tokens) for state in layer.states) for layer in cache.layers]
    return [update if len(update) > 1 else update[0] for update in updates]


def cache_lengths(cache: Cache | None) -> torch.Tensor | int:
    """(batch,) positions taken by each row of the batch so far, 0 before the first token."""
    return 0 if cache is None else cache.layers[0].progress.lengths


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """Puts the states of a TransNormer into an empty `DynamicCache(config=...)` or `StaticCache(config=...)`.

    Their own layers cannot serve: those for linear attention neither count tokens nor follow beams, and a sliding
    window is not a block. It remains the same object, so that the caller's variable holds the state.

    Raises ValueError for a cache that was not made for this configuration, or that holds something else.
    """
    layers = cache.layers if isinstance(cache, Cache) else []
    if len(layers) != len(config.layer_types):
        raise ValueError(
            f"the cache is a {type(cache).__name__} that was made without this model's configuration; use "
            "TransNormerCache(model.config) or DynamicCache(config=model.config)."
        )
    if all(isinstance(layer, TransNormerCacheLayer) for layer in layers):
        return
    if any(_has_tokens(layer) for layer in layers):
        raise ValueError(
            f"the cache is a {type(cache).__name__} that holds keys and values of another kind; begin with an empty "
            "TransNormerCache(model.config)."
        )
    new_layers = make_layers(config, is_compileable=isinstance(cache, StaticCache))
    for old, new in zip(layers, new_layers, strict=True):
        new.record_past = getattr(old, "record_past", False)
    cache.layers[:] = new_layers


def _has_tokens(layer: Any) -> bool:
    """Whether a layer of transformers' caches has taken anything in."""
    if isinstance(layer, CacheLayerMixin) and layer.get_seq_length():
        return True
    has_state = getattr(layer, "has_previous_state", False)  # of linear attention: a dict, or a bool before 5.14
    return any(has_state.values()) if isinstance(has_state, dict) else bool(has_state)


def _real_columns(metadata: AttentionMetadata) -> torch.Tensor:
    if metadata.is_real is None:
        return torch.ones_like(metadata.positions, dtype=torch.bool)
    return metadata.is_real


def _map(change: Callable[[torch.Tensor], torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: change(tensor) for name, tensor in tensors.items()}


def _clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _map(torch.clone, tensors)


def _state_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / STATE_FILE


def _zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is written in place from then on, also where inference mode has been left meanwhile."""
    with torch.inference_mode(False):
        tensor = torch.zeros(shape, dtype=dtype, device=device)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)  # lets CUDA graphs write it in place
    return tensor
