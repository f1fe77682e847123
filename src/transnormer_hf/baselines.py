"""The path of earlier releases: import `transnormer_hf.research.baselines` instead."""

from .research.baselines import *  # noqa: F403
