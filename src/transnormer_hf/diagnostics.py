"""The path of earlier releases: import `transnormer_hf.research.diagnostics` instead."""

from .research.diagnostics import *  # noqa: F403
