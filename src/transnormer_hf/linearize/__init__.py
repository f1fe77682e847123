"""A pretrained start: BERT-like encoders and GPT-2- or Llama-like decoders of transformers become TransNormers."""

from .sources import FAMILIES, SourceError, transfer

__all__ = ["FAMILIES", "SourceError", "transfer"]
