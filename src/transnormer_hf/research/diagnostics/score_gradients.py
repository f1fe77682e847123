"""How large the gradients of attention weights with respect to scores are in a model as it is (Section 3 of the paper).

With p_ij = s_ij / d_i and d_i = sum_k s_ik, scaled linear attention has dp_ij/ds_ik = (1{j=k} - p_ij) / d_i: without
bound only as the whole sum of a row shrinks, not as a single score does. Softmax has p_ij (1{j=k} - p_ik), 1/4 at most.
"""

import statistics

import torch
from torch import nn

from ..baselines.mixer import FeatureMixer, Mixer
from ..baselines.softmax import SoftmaxMixer


@torch.no_grad()
def score_gradients(model: nn.Module, input_ids: torch.Tensor) -> dict[str, float]:
    """The largest |dp_ij/ds_ik| of each row of an attention map, of which the "largest" and the "median".

    Over all layers that are softmax or have features; the model is in eval mode. Rows of one visible token, whose
    weight is constant, do not count. `input_ids`: (batch, seq), without padding.

    Raises:
        ValueError: the model has no such mixer.
    """
    rows: list[float] = []

    def look(mixer: Mixer, inputs: tuple) -> None:
        query, key, _, metadata, causal = inputs
        weights = mixer.attention_map(query, key, metadata, causal)  # (batch, heads, seq, seq)
        assert weights is not None  # both kinds have a map
        visible = torch.ones(weights.shape[-2:], dtype=torch.bool)
        visible = visible.tril() if causal else visible
        if isinstance(mixer, FeatureMixer):
            # the largest of 1 - p_ij (j = k) and p_ij (j != k), over the row's sum
            phi_query, phi_key = mixer.features(query, key, metadata, causal)
            sums = (phi_query @ phi_key.mT * visible).sum(-1)  # (batch, heads, seq)
            least = weights.masked_fill(~visible, 1).amin(-1)
            gradients = torch.maximum(1 - least, weights.amax(-1)) / sums
        else:
            gradients = (weights * (1 - weights)).amax(-1)
        rows.extend(gradients[..., visible.sum(-1) > 1].flatten().tolist())

    mixers = [module for module in model.modules() if isinstance(module, FeatureMixer | SoftmaxMixer)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no softmax and no mixer with features to look at.")
    hooks = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    try:
        model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {"largest": max(rows), "median": statistics.median(rows)}
