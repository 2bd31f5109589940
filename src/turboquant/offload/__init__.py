"""Compressed caches outside the device: the container format, keys, and the prefix store on disk."""

from .store import TurboQuantStore

__all__ = ["TurboQuantStore"]
