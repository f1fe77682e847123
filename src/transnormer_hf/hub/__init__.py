"""The Hub: model cards, checked pushes, results read back from cards, conversion of the released checkpoints."""

from .push import HubError, Publication, UploadPlan, load_metric_table, plan_upload, push_model, push_to_hub

__all__ = [
    "HubError",
    "Publication",
    "UploadPlan",
    "load_metric_table",
    "plan_upload",
    "push_model",
    "push_to_hub",
]
