"""The path of earlier releases: import `transnormer_hf.training.sequence_parallel` instead."""

from .training.sequence_parallel import *  # noqa: F403
