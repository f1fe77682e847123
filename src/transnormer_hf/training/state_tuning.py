"""State tuning: the model stays as it is, and each NormAttention learns the state that it begins with.

It is to linear attention what prefix tuning is to softmax attention. There, learned keys and values stand in front of
every sequence; here all that a prefix could leave behind is one matrix per head, S, which is learned itself:
O = Norm(phi(Q) (S + phi(K)^T V)).

    add_states(model)              # then train: with the Trainer, as any model
    save_states(model, folder)     # the states alone
    load_states(model, folder)     # into the model that they were trained with
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..model.modeling_transnormer import TransNormerNormAttention
from ..model.reference_transnormer import apply_feature_map, apply_lrpe, compute_dtype
from .files import replacing

STATES_FILE = "initial_states.safetensors"


class StateTunedNormAttention(TransNormerNormAttention):
    """NormAttention that begins with `initial_state`, (heads, head_dim, head_dim), in place of zeros.

    The product with the query is linear in the state, so that its part is added to the output: every sequence of a
    packed row begins with it, a cache stays what it was, and any backend computes the rest.
    """

    initial_state: nn.Parameter

    @classmethod
    def of(cls, layer: TransNormerNormAttention) -> "StateTunedNormAttention":
        """A layer with the projections of another, the same modules, and a state of zeros."""
        with torch.device("meta"):
            tuned = cls(layer.config)
        for name, module in layer.named_children():
            setattr(tuned, name, module)
        shape = (layer.num_heads, layer.head_dim, layer.head_dim)
        tuned.initial_state = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=layer.q_proj.weight.device))
        return tuned.train(layer.training)

    def attend(self, query, key, value, metadata, lrpe, state):
        output = super().attend(query, key, value, metadata, lrpe, state)
        return output + self.from_initial_state(query, metadata, lrpe).to(output.dtype)

    def step(self, query, key, value, metadata, lrpe, state):
        output = super().step(query, key, value, metadata, lrpe, state)
        return output + self.from_initial_state(query, metadata, lrpe).to(output.dtype)

    def from_initial_state(self, query, metadata, lrpe):
        """phi(Q) S of queries (batch, heads, seq, head_dim); the same shape."""
        query = apply_feature_map(query.to(compute_dtype(query.dtype)), self.options["feature_map"])
        if lrpe is not None:
            query = apply_lrpe(query, metadata.positions, lrpe)
        return query @ self.initial_state.to(query.dtype)

    def attention_map(self, query, key, metadata, lrpe):
        return None  # the output is more than the values of the tokens


def add_states(model: nn.Module) -> list[nn.Parameter]:
    """Give each NormAttention of a model a learned initial state of zeros, and freeze everything else.

    Zeros change nothing yet. The states are parameters of the model, named `….initial_state`.

    Returns:
        The states, float32 (heads, head_dim, head_dim) each.

    Raises:
        ValueError: the model has no NormAttention, or its states already.
    """
    modules = model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, TransNormerNormAttention)}
    if not layers:
        raise ValueError("the model has no NormAttention; layer_types needs a 'linear_attention' or 'hybrid' layer.")
    if states_of(model):
        raise ValueError("the model has initial states already; train these, or load others by load_states.")
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, StateTunedNormAttention.of(layer))
    return list(states_of(model).values())


def states_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of each NormAttention with an initial state -> the state."""
    modules = model.named_modules()
    return {name: module.initial_state for name, module in modules if isinstance(module, StateTunedNormAttention)}


def save_states(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the initial states of a model to `initial_states.safetensors` in a folder; returns the file.

    Raises:
        ValueError: the model has none.
    """
    if not (states := states_of(model)):
        raise ValueError("the model has no initial states; add_states gives it some.")
    file = Path(folder) / STATES_FILE
    with replacing(file) as temporary:
        save_file({name: state.detach().cpu().contiguous() for name, state in states.items()}, temporary)
    return file


def load_states(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put what `save_states` has written into a model, which gets initial states where it has none yet.

    Raises:
        ValueError: the layers or their shapes are not those of the states.
    """
    saved = load_file(Path(folder) / STATES_FILE)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TransNormerNormAttention)}
    shapes = {name: (layer.num_heads, layer.head_dim, layer.head_dim) for name, layer in layers.items()}
    found = {name: tuple(state.shape) for name, state in saved.items()}
    if found != shapes:
        raise ValueError(f"the states in {folder} are of another model: {found}, and this one needs {shapes}.")
    if not states_of(model):
        add_states(model)
    with torch.no_grad():
        for name, state in states_of(model).items():
            state.copy_(saved[name])
