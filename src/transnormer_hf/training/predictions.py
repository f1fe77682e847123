"""Predictions as the Trainer hands them over: joined, and checked to be numbers.

A model that has diverged gives NaN, and `argmax` of NaN is class 0: without the check it would be scored, chosen as the
best checkpoint and submitted as one that always answers class 0.
"""

from typing import Any

import numpy as np


class DivergedError(ValueError):
    """The model gives NaN or infinity."""


def logits_of(predictions: Any) -> np.ndarray:
    """The logits (rows, ...) in the predictions of the Trainer.

    Args:
        predictions: An array; a tuple of outputs, of which the logits are the first; or, with
            `eval_do_concat_batches=False`, a list of either, one for each batch.
    """
    if isinstance(predictions, list):
        return np.concatenate([logits_of(batch) for batch in predictions])
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def labels_of(label_ids: Any) -> np.ndarray:
    """The labels (rows, ...), of which there is a list, too, where there is one of predictions."""
    return np.concatenate(label_ids) if isinstance(label_ids, list) else np.asarray(label_ids)


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise DivergedError, a ValueError, where a row of predictions holds NaN or infinity.

    Args:
        values: (rows, ...), numbers of any kind.
        what: What the rows are of, for the message.
    """
    is_finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))  # (rows,)
    if is_finite.all():
        return
    rows = [str(row) for row in np.flatnonzero(~is_finite)[:5] + 1]
    more = ", ..." if len(is_finite) - is_finite.sum() > len(rows) else ""
    raise DivergedError(
        f"{what}: the model's outputs are not finite numbers in {len(is_finite) - is_finite.sum()} of {len(is_finite)}"
        f" rows (row {', '.join(rows)}{more}): it has diverged, and nothing was scored or written. Take an earlier"
        " checkpoint, or train with a lower --learning_rate, a longer --warmup_steps or --max_grad_norm 1."
    )
