"""A pretrained start: BERT-like encoders and GPT-2- or Llama-like decoders of transformers become TransNormers."""

from .sources import SourceError, transfer
from .sources_families import FAMILIES

__all__ = ["FAMILIES", "SourceError", "transfer"]
