"""Linear Log-Normal Attention against softmax and others: concentration of the maps and memory for the backward pass.

The comparison of https://arxiv.org/abs/2311.13541 on queries and keys of independent Gaussian channels, where moment
matching gives both maps the same variance of log p. Entropy and gap are those of `maps.py`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...model.configuration_transnormer import TransNormerConfig
from ...model.reference_transnormer import attention_metadata
from ..baselines import MIXERS
from .maps import row_entropy, spectral_gap

COMPARED = ("softmax", "lln")
UNMATCHED = "lln, alpha = beta = 1"  # without moment matching
# The kernels whose map is a function of queries and keys alone.
OTHERS = ("lln_diag", "1+elu", "performer", "cosformer", "kernelized", "nystromformer", "skyformer")
KERNELS = (*COMPARED, UNMATCHED, *OTHERS)


def _mixer(name: str, head_dim: int) -> Any:
    config = TransNormerConfig(hidden_size=head_dim, num_attention_heads=1, attention_probs_dropout_prob=0.0)
    mixer_class: Any = MIXERS["lln" if name == UNMATCHED else name]
    return mixer_class(config, moments="none") if name == UNMATCHED else mixer_class(config)


def compare_concentration(
    input_scales: Sequence[float],
    tokens: int,
    head_dim: int,
    generator: torch.Generator,
    kernels: Iterable[str] = COMPARED,
) -> list[dict[str, Any]]:
    """For each standard deviation of queries and keys, the "entropy" (bits) and spectral "gap" of each kernel's map."""
    instruments = {
        "entropy": lambda weights: row_entropy(weights).mean().item(),
        "gap": lambda weights: spectral_gap(weights).mean().item(),
    }
    return compare(input_scales, tokens, head_dim, generator, kernels, instruments)


def compare(
    input_scales: Sequence[float],
    tokens: int,
    head_dim: int,
    generator: torch.Generator,
    kernels: Iterable[str],
    instruments: Mapping[str, Callable[[torch.Tensor], float]],
) -> list[dict[str, Any]]:
    """What the instruments say of each kernel's map, one row per standard deviation of queries and keys.

    kernels: of `KERNELS`. A row is {"scale": ..., name of an instrument: {name of a kernel: number}}.
    """
    metadata = attention_metadata(1, tokens, torch.device("cpu"))
    query, key = (torch.randn(1, 1, tokens, head_dim, generator=generator) for _ in range(2))
    mixers = {name: _mixer(name, head_dim) for name in kernels}
    rows = []
    for scale in input_scales:
        maps = {
            name: mixer.attention_map(scale * query, scale * key, metadata, False) for name, mixer in mixers.items()
        }
        measured = {
            kind: {name: measure(weights) for name, weights in maps.items()} for kind, measure in instruments.items()
        }
        rows.append({"scale": scale, **measured})
    return rows


def compare_memory(lengths: Sequence[int], head_dim: int) -> list[dict[str, int]]:
    """For each length, the bytes that autograd keeps for the backward pass of one head.

    "softmax map" forms the map, as in the definition; "softmax" is torch's fused attention, "lln" the linear form.
    """
    softmax, log_normal = (_mixer(name, head_dim) for name in COMPARED)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "softmax map": lambda query, key, value, *args: softmax.attention_map(query, key, *args) @ value,
        "softmax": softmax,
        "lln": log_normal,
    }
    rows = []
    for length in lengths:
        metadata = attention_metadata(1, length, torch.device("cpu"))
        states = [torch.ones(1, 1, length, head_dim, requires_grad=True) for _ in range(3)]
        kept = {name: _kept_bytes(functools.partial(way, *states, metadata, False)) for name, way in ways.items()}
        rows.append({"length": length, **kept})
    return rows


def _kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def log_normal_error(tokens: int, head_dim: int, generator: torch.Generator) -> float:
    """The largest difference between LLN's linear form and its map times the values, relative to the largest output."""
    metadata = attention_metadata(1, tokens, torch.device("cpu"))
    query, key, value = (torch.randn(1, 1, tokens, head_dim, generator=generator) for _ in range(3))
    mixer = _mixer("lln", head_dim)
    wanted = mixer.attention_map(query, key, metadata, False) @ value
    return ((mixer(query, key, value, metadata, False) - wanted).abs().max() / wanted.abs().max()).item()
