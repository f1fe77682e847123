"""The losses of our trainers, as the Trainer's `compute_loss_func`: one rule for every model that gives logits.

Each is a sum over what is labelled, divided by the labels of the whole update, so that the micro-batches of an update
add up to the gradient of one large batch. What the model itself computes from `labels` is not asked for: many models of
transformers take the mean over a micro-batch, whatever the Trainer tells them.
"""

from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100


def aligned_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of the logits with the labels of the same places, in float32.

    With smoothing, the target of class y among K is (1 - label_smoothing) [k = y] + label_smoothing / K.

    Args:
        outputs: Has `logits`, (batch, classes) or (batch, seq, vocab_size).
        labels: (batch,) or (batch, seq); places with -100 are left out, of the smoothing as well.
        num_items_in_batch: Labels of the whole update; None: those of this batch.
        label_smoothing: From 0 to 1.
    """
    logits = outputs.logits.float().flatten(0, -2)  # (places, classes)
    total = F.cross_entropy(
        logits,
        labels.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return _divide(total, (labels != IGNORED).sum(), num_items_in_batch)


def next_token_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`aligned_loss` for causal models whose labels are the inputs: the logits of a column with the next label."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return aligned_loss(outputs, shifted, num_items_in_batch, label_smoothing=label_smoothing)


def squared_error(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Squared error of logits (batch, 1) against scores (batch,), in float32."""
    logits = outputs.logits.float().flatten()
    total = F.mse_loss(logits, labels.flatten().to(logits), reduction="sum")
    return _divide(total, torch.tensor(labels.numel()), num_items_in_batch)


def _divide(total: torch.Tensor, here: torch.Tensor, whole: torch.Tensor | int | None) -> torch.Tensor:
    """The sum divided by the labels of the update; an update without a label changes nothing."""
    number = torch.as_tensor(here if whole is None else whole, device=total.device)
    return total / number.clamp(min=1)
