import os

# Before anything imports transformers or triton: no test reaches for the network, kernels run in the interpreter.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import transnormer_hf  # noqa: F401  (registers the Auto classes)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
