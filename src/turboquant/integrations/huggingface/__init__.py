"""Hugging Face transformers: a ``Cache`` over packed pages and the attention function that reads them."""

from .cache import HuggingFaceCache, cache_for_model
from .prefill import prefill

__all__ = ["HuggingFaceCache", "cache_for_model", "prefill"]
