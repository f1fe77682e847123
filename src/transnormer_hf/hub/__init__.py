"""The way to the Hub and back: cards, checked pushes, results read from cards, conversion of released checkpoints."""

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
