"""What a causal TransNormer remembers between two forwards: a state of constant size.

NormAttention keeps S = K^T V, one (head_dim, head_dim) matrix per head. DiagAttention keeps the keys and values of the
current block. Neither grows with the context, and both are held in float32 whatever the dtype of the model (float64 for
a float64 model). Rows that were padded on the left have taken fewer positions than others and stand elsewhere in their
block, so the cache counts positions by row.
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
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticCache

from .reference_transnormer import AttentionMetadata, compute_dtype, zero_padding

# Name of a saved cache inside of a folder.
STATE_FILE = "transnormer_state.safetensors"

# While a cache records, at least so many tokens can be taken back, however often it has been cropped before: candidate
# generators with another tokenizer go back behind what they added last.
RETAINED_TOKENS = 64

# What a saved state depends on: two models that differ here cannot continue each other's states.
FINGERPRINT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_types",
    "block_size",
    "feature_map",
    "diag_activation",
    "norm_type",
    "attention_norm_type",
    "norm_placement",
    "embedding_norm",
    "final_norm",
    "position_embedding",
    "scale_embedding",
    "lrpe",
    "feed_forward",
    "hidden_act",
    "hybrid_combination",
)


class NewTokens(NamedTuple):
    """The tokens of one forward, as the states take them in; made once for all layers.

    metadata: positions (batch, seq), negative in front of a row's first real token, and which tokens are real.
    is_prefill: whether no token came before them.
    is_recorded: whether `crop` may have to take them back.
    slots: (batch, tail) place in the current block of the last columns, `block_size` for tokens outside of it. The
        current block is the one where a row's last column stands.
    visible: (batch, 1, 1, block_size + 1) bool, slots that the last column sees.
    past_slots: (batch, block_size) slots of the block in the state, so turned that it ends where the tokens begin.
    metadata_with_past: metadata of these slots and the tokens behind them, a row of block_size + seq columns padded on the left.
    The last four are None in a model without DiagAttention, and the last two where there is nothing to continue.
    """

    metadata: AttentionMetadata
    is_prefill: bool
    is_recorded: bool
    slots: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    past_slots: torch.Tensor | None = None
    metadata_with_past: AttentionMetadata | None = None

    @property
    def is_step(self) -> bool:
        """One token after others, which goes through the state alone."""
        return not self.is_prefill and self.metadata.positions.shape[1] == 1


class AttentionState:
    """What one attention remembers: `tensors`, batch first, empty before the first token.

    history: keys and values that `crop` may take back.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.history: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(
        self, key: torch.Tensor, value: torch.Tensor, tokens: NewTokens, new_state: torch.Tensor | None = None
    ) -> None:
        """Takes in (batch, heads, seq, head_dim) keys, as they enter the products (mapped and rotated), and values.

        new_state: the state after them, where an attention has worked it out on its way.
        """
        key, value = key.detach(), value.detach()
        if not self.tensors:
            batch_size, num_heads, _, head_dim = key.shape
            self.allocate(batch_size, num_heads, head_dim, compute_dtype(key.dtype), key.device)
        if tokens.is_recorded:
            self.history.append((key, value))
        if new_state is None:
            self.write(key, value, tokens)
        else:
            self.tensors["state"].copy_(new_state.detach())

    def allocate(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        raise NotImplementedError

    def write(self, key: torch.Tensor, value: torch.Tensor, tokens: NewTokens) -> None:
        raise NotImplementedError


class NormAttentionState(AttentionState):
    """state: (batch, heads, head_dim, head_dim), K^T V of all tokens so far."""

    def allocate(self, batch_size, num_heads, head_dim, dtype, device):
        self.tensors["state"] = _zeros(batch_size, num_heads, head_dim, head_dim, dtype=dtype, device=device)

    def write(self, key, value, tokens):
        state = self.tensors["state"]
        key, value = (zero_padding(new.to(state.dtype), tokens.metadata) for new in (key, value))
        if key.shape[2] == 1:
            state.addcmul_(key.transpose(-1, -2), value)
        else:
            state.add_(key.transpose(-1, -2) @ value)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """NormAttention of a query whose own token the state has: (batch, heads, 1, head_dim) to the same."""
        return query @ self.tensors["state"]


class DiagAttentionState(AttentionState):
    """keys, values: (batch, heads, block_size + 1, head_dim), the current block of each row by place.

    Tokens that are not in the current block are written to the last place, which nobody looks at.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def allocate(self, batch_size, num_heads, head_dim, dtype, device):
        shape = (batch_size, num_heads, self.block_size + 1, head_dim)
        self.tensors["keys"] = _zeros(*shape, dtype=dtype, device=device)
        self.tensors["values"] = _zeros(*shape, dtype=dtype, device=device)

    def write(self, key, value, tokens):
        tail = tokens.slots.shape[1]
        for name, new in (("keys", key), ("values", value)):
            new = new[:, :, -tail:].to(self.tensors[name].dtype)
            self.tensors[name].scatter_(2, tokens.slots[:, None, :, None].expand_as(new), new)

    def past(self, tokens: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the current block, to stand in front of new ones: (batch, heads, block_size, head_dim)."""
        keys, values = self.tensors["keys"], self.tensors["values"]
        slots = tokens.past_slots[:, None, :, None].expand(*keys.shape[:2], -1, keys.shape[3])
        return keys.gather(2, slots), values.gather(2, slots)

    def attend(self, query: torch.Tensor, tokens: NewTokens, activation: str, scale: float) -> torch.Tensor:
        """DiagAttention of a query whose own token the state has: (batch, heads, 1, head_dim) to the same."""
        keys, values = self.tensors["keys"], self.tensors["values"]
        if activation == "softmax":
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=tokens.visible, scale=scale)
        scores = (query * scale) @ keys.transpose(-1, -2)  # (batch, heads, 1, block_size + 1)
        return (scores.relu() * tokens.visible) @ values


class StateView(NamedTuple):
    """What one attention gets of the cache in one forward."""

    state: AttentionState
    tokens: NewTokens


class LayerState:
    """The states of one layer, in the order of its attentions (two in a hybrid layer)."""

    def __init__(self, *states: AttentionState):
        self.states = states
        self.record_past = False  # read and unset by `generate`

    def __repr__(self) -> str:
        return " + ".join(type(state).__name__ for state in self.states)


class TransNormerCache(Cache):
    """The states of all layers: `past_key_values` of a causal TransNormer.

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
        is_compileable: Whether `generate` may compile the decoding step; `cache_implementation="static"` sets it.
    """

    def __init__(self, config: PreTrainedConfig, is_compileable: bool = False):
        new_layer: dict[str, Callable[[], LayerState]] = {
            "linear_attention": lambda: LayerState(NormAttentionState()),
            "chunked_attention": lambda: LayerState(DiagAttentionState(config.block_size)),
            "hybrid": lambda: LayerState(DiagAttentionState(config.block_size), NormAttentionState()),
        }
        super().__init__(layers=[new_layer[layer_type]() for layer_type in config.layer_types])
        self.block_size = None if set(config.layer_types) == {"linear_attention"} else config.block_size
        self.fingerprint = {field: getattr(config, field) for field in FINGERPRINT_FIELDS}
        self._is_compileable = is_compileable
        self.has_begun = False
        # Columns seen, padding included: a tensor, because a compiled step would specialise on a number.
        self.seen = torch.zeros((), dtype=torch.long)
        # "lengths": (batch,) positions taken by each row; "is_filled": (batch, block_size + 1), see `NewTokens.visible`
        self.rows: dict[str, torch.Tensor] = {}
        self._history: list[AttentionMetadata] = []
        self._base: list[dict[str, torch.Tensor]] = []  # every tensor as it was before the recorded tokens

    @property
    def states(self) -> list[AttentionState]:
        return [state for layer in self.layers for state in layer.states]

    def _tensors(self) -> list[dict[str, torch.Tensor]]:
        return [self.rows, *(state.tensors for state in self.states)]

    # Taking tokens in

    def receive(self, metadata: AttentionMetadata, batch_size: int) -> list[StateView | tuple[StateView, ...]]:
        """Counts the tokens of a forward; returns what each layer needs to take them in, two views for a hybrid one.

        metadata: as `attention_metadata` gives it, with `position_offset=cache.lengths`.

        Raises ValueError where the cache holds another number of rows.
        """
        if not self.has_begun:
            self._start(batch_size, metadata.positions.device)
        elif batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values holds {self.batch_size} rows and the input has {batch_size}; beams and several "
                "sequences per prompt need past_key_values.batch_repeat_interleave(...) before."
            )
        is_recording = any(layer.record_past for layer in self.layers)
        if not is_recording:
            self._forget()
        elif not self._history:
            self._base = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in self._tensors()]
        metadata = metadata._replace(positions=metadata.positions.expand(batch_size, -1))
        if is_recording:
            self._history.append(metadata)
        tokens = self._count(metadata, is_recording)
        views = [tuple(StateView(state, tokens) for state in layer.states) for layer in self.layers]
        return [view if len(view) > 1 else view[0] for view in views]

    @property
    def lengths(self) -> torch.Tensor | int:
        """(batch,) positions taken by each row, 0 before the first token."""
        return self.rows["lengths"] if self.has_begun else 0

    def _start(self, batch_size: int, device: torch.device) -> None:
        if self.rows and (self.batch_size != batch_size or self.seen.device != device):
            for tensors in self._tensors():
                tensors.clear()
        self.seen = self.seen.to(device)
        if not self.rows:
            self.rows["lengths"] = _zeros(batch_size, dtype=torch.long, device=device)
            if self.block_size is not None:
                self.rows["is_filled"] = _zeros(batch_size, self.block_size + 1, dtype=torch.bool, device=device)

    def _count(self, metadata: AttentionMetadata, is_recorded: bool) -> NewTokens:
        """Moves the rows on by these tokens."""
        lengths, positions = self.rows["lengths"], metadata.positions  # (batch,), (batch, seq)
        tokens = NewTokens(metadata, is_prefill=not self.has_begun, is_recorded=is_recorded)
        if self.block_size is not None:
            tokens = self._assign_slots(tokens, self.block_size)
        lengths.copy_((positions[:, -1] + 1).clamp(min=0))
        self.seen.add_(positions.shape[1])
        self.has_begun = True
        return tokens

    def _assign_slots(self, tokens: NewTokens, block_size: int) -> NewTokens:
        """Finds the tokens' slots in the current block of each row, and moves on to that block."""
        is_filled, positions = self.rows["is_filled"], tokens.metadata.positions
        last = self.rows["lengths"][:, None] - 1  # (batch, 1) position before the new tokens
        begun = last - last % block_size
        if not tokens.is_prefill and not tokens.is_step:
            within = positions - begun.clamp(min=0)  # (batch, seq) counted from where the current block began
            past = within[:, :1] + torch.arange(-block_size, 0, device=within.device)  # (batch, block_size)
            past_slots = past.clamp(min=0)
            is_real = torch.cat(((past >= 0) & is_filled.gather(1, past_slots), _real_columns(tokens.metadata)), 1)
            tokens = tokens._replace(
                past_slots=past_slots, metadata_with_past=AttentionMetadata(torch.cat((past, within), 1), is_real)
            )

        positions = positions[:, -block_size:]  # no earlier column can stand in the current block
        start = positions[:, -1:] - positions[:, -1:] % block_size  # (batch, 1)
        is_inside = positions >= start.clamp(min=0)
        if tokens.metadata.is_real is not None:
            is_inside = is_inside & tokens.metadata.is_real[:, -block_size:]
        slots = torch.where(is_inside, positions - start, block_size)
        is_filled.logical_and_(begun == start).scatter_(1, slots, is_inside)
        visible = is_filled
        if tokens.metadata.is_real is not None:  # a padding token may see nothing: it gets the last slot, not NaN
            visible = torch.cat((is_filled[:, :-1], ~is_filled.any(1, keepdim=True)), 1)
        return tokens._replace(slots=slots, visible=visible[:, None, None, :])

    # Taking tokens back

    def activate_past_recording(self) -> None:
        """From now on keeps the keys and values of new tokens as well, so that `crop` can take them back."""
        for layer in self.layers:
            layer.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens: goes back to the state before the recorded ones, and builds
        on that those that stay. The last `RETAINED_TOKENS` of them remain history.

        Raises ValueError for a positive number, RuntimeError where the tokens are not history.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to take back as a negative number.")
        history = sum(metadata.positions.shape[1] for metadata in self._history)
        if count > history:
            raise RuntimeError(
                f"crop({tokens_to_remove}) cannot take back {count} of {self.get_seq_length()} tokens: the last "
                f"{history} are recorded. Call activate_past_recording() before adding tokens that may be taken back."
            )
        kept = history - count
        settled = max(kept - RETAINED_TOKENS, 0)
        if not count and settled < RETAINED_TOKENS:
            return
        history_metadata = AttentionMetadata(
            torch.cat([metadata.positions for metadata in self._history], 1),
            torch.cat([_real_columns(metadata) for metadata in self._history], 1),
        )
        records = [tuple(torch.cat(parts, 2) for parts in zip(*state.history, strict=True)) for state in self.states]
        for tensors, base in zip(self._tensors(), self._base, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(base[name]) if base else tensor.zero_()
        self.seen.sub_(history)
        self._forget()
        self._replay(history_metadata, records, slice(settled))
        if kept:
            self._base = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in self._tensors()]
            self._replay(history_metadata, records, slice(settled, kept), is_recorded=True)

    def _replay(
        self,
        history_metadata: AttentionMetadata,
        records: list[tuple[torch.Tensor, ...]],
        columns: slice,
        is_recorded: bool = False,
    ) -> None:
        metadata = AttentionMetadata(history_metadata.positions[:, columns], history_metadata.is_real[:, columns])
        if not metadata.positions.shape[1]:
            return
        if is_recorded:
            self._history.append(metadata)
        tokens = self._count(metadata, is_recorded)
        for state, (key, value) in zip(self.states, records, strict=True):
            state.append(key[:, :, columns], value[:, :, columns], tokens)

    def _forget(self) -> None:
        self._history, self._base = [], []
        for state in self.states:
            state.history = []

    def reset(self) -> None:
        """Back to the beginning; the tensors stay where they are, for a compiled step."""
        self.has_begun = False
        self.seen.zero_()
        self._forget()
        for tensors in self._tensors():
            for tensor in tensors.values():
                tensor.zero_()

    # Rows

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._for_each_row(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._for_each_row(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_each_row(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _for_each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for tensors in (*self._tensors(), *self._base):
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)
        for state in self.states:
            state.history = [(change(key), change(value)) for key, value in state.history]
        self._history = [
            AttentionMetadata(change(metadata.positions), change(_real_columns(metadata))) for metadata in self._history
        ]

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return self.rows["lengths"].shape[0] if self.rows else -1

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns taken in, padding included."""
        return int(self.seen)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.has_begun

    @property
    def is_compileable(self) -> bool:
        return self._is_compileable

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return all(state.tensors for state in self.states)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates everything before the first token; every layer has the same heads."""
        num_heads, head_dim = (size[0] if isinstance(size, list) else size for size in (num_heads, head_dim))
        self._start(batch_size, torch.device(device))
        for state in self.states:
            state.allocate(batch_size, num_heads, head_dim, compute_dtype(dtype), device)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("TransNormerCache takes tokens in by receive(), not keys and values by update().")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves a layer's state to the CPU."""
        for state in self.layers[layer_idx].states:
            state.tensors = {name: tensor.to("cpu") for name, tensor in state.tensors.items()}

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves it back to where the tokens are."""
        for state in self.layers[layer_idx].states:
            state.tensors = {name: tensor.to(self.seen.device) for name, tensor in state.tensors.items()}

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensors in self._tensors() for tensor in tensors.values())
        return (
            f"{type(self).__name__}(layers={self.layers}, batch_size={self.batch_size}, "
            f"seq_length={self.get_seq_length()}, bytes={size})"
        )

    # On disk

    def save_pretrained(self, path: str | os.PathLike) -> Path:
        """Writes the state to a .safetensors file, or to a file in a folder. Returns the file.

        What is history for `crop` is left out. The file appears under its name when it is whole.

        Raises ValueError for an empty cache.
        """
        if not self.has_begun:
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
            save_file(tensors | {"seen": self.seen}, partial, {"fingerprint": json.dumps(self.fingerprint)})
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

        Raises ValueError where the state was saved with another configuration. Weights are not compared: a state says
        nothing to a model that was trained further.
        """
        cache, file = cls(config, is_compileable), _state_file(path)
        with safe_open(file, "pt", device=str(device)) as saved:
            fingerprint = json.loads((saved.metadata() or {}).get("fingerprint", "{}"))
            differences = [
                f"{field}={fingerprint.get(field)!r}, here {here!r}"
                for field, here in cache.fingerprint.items()
                if fingerprint.get(field) != here
            ]
            if differences:
                raise ValueError(f"{file} was saved with another configuration: {'; '.join(differences)}.")
            cache.seen = saved.get_tensor("seen").clone()
            tensors = cache._tensors()
            for key in set(saved.keys()) - {"seen"}:
                index, name = key.split(".")
                tensors[int(index)][name] = saved.get_tensor(key).clone()  # not a view of the file
        cache.has_begun = True
        return cache


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> TransNormerCache:
    """Makes an empty `DynamicCache(config=...)` or `StaticCache(config=...)` of transformers a TransNormerCache.

    Their own layers cannot serve: those for linear attention neither count tokens nor follow beams, and a sliding
    window is not a block. It remains the same object, so that the caller's variable holds the state.

    Raises ValueError for a cache that was not made for this configuration, or that holds something else.
    """
    if isinstance(cache, TransNormerCache):
        return cache
    if not isinstance(cache, Cache) or len(cache.layers) != len(config.layer_types):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} that was made without this model's configuration; use "
            "TransNormerCache(model.config) or DynamicCache(config=model.config)."
        )
    if any(_has_tokens(layer) for layer in cache.layers):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} that holds keys and values of another kind; begin with an "
            "empty TransNormerCache(model.config)."
        )
    is_recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    is_compileable = isinstance(cache, StaticCache)
    cache.__class__ = TransNormerCache
    cache.__init__(config, is_compileable)
    if is_recording:
        cache.activate_past_recording()
    return cache


def _has_tokens(layer: Any) -> bool:
    """Whether a layer of transformers' caches has taken anything in."""
    if isinstance(layer, CacheLayerMixin) and layer.get_seq_length():
        return True
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())


def _real_columns(metadata: AttentionMetadata) -> torch.Tensor:
    return torch.ones_like(metadata.positions, dtype=torch.bool) if metadata.is_real is None else metadata.is_real


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
