"""The path of earlier releases: import `transnormer_hf.tasks.glue` instead."""

from .tasks.glue import *  # noqa: F403
