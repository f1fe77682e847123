"""Instruments that show what an attention does: its maps, its gradients, and a report on a model.

`maps.py` measures attention maps, `gradients.py` the gradients of scores and over a training run; `report.py` applies
the instruments of `maps.py` to every layer of a model and draws the results.
"""

from .gradients import (
    GradientDeviationCallback,
    ScoreGradientBound,
    measure_norm_attention_gradient,
    norm_attention_gradient_bound,
    scaled_linear_jacobian,
    shrinking_score_gradients,
    softmax_jacobian,
)
from .maps import (
    LogNormalFit,
    accumulated_attention_curve,
    attention_temperature,
    fit_log_normal,
    locally_accumulated_attention,
    mean_over_rows,
    normalize_rows,
    row_entropy,
    spectral_gap,
)
from .report import AttentionReport, attention_report

__all__ = [
    "AttentionReport",
    "GradientDeviationCallback",
    "LogNormalFit",
    "ScoreGradientBound",
    "accumulated_attention_curve",
    "attention_report",
    "attention_temperature",
    "fit_log_normal",
    "locally_accumulated_attention",
    "mean_over_rows",
    "measure_norm_attention_gradient",
    "norm_attention_gradient_bound",
    "normalize_rows",
    "row_entropy",
    "scaled_linear_jacobian",
    "shrinking_score_gradients",
    "softmax_jacobian",
    "spectral_gap",
]
