"""The Hub: model cards, checked pushes, refreshed code, results read from cards, conversion of released checkpoints."""

from .push import HubError, Publication, UploadPlan, load_metric_table, plan_upload, push_model, push_to_hub
from .refresh import Refreshment, refresh_folder, refresh_repository

__all__ = [
    "HubError",
    "Publication",
    "Refreshment",
    "UploadPlan",
    "load_metric_table",
    "plan_upload",
    "push_model",
    "push_to_hub",
    "refresh_folder",
    "refresh_repository",
]
