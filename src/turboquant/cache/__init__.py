"""The compressed cache: pages, exact window, and the operations generation needs."""

from .cache import TurboQuantCache
from .exact import ExactLayer
from .layer import PackedLayer

__all__ = ["ExactLayer", "PackedLayer", "TurboQuantCache"]
