"""KV-cache compression and offloading for LLM inference.

>>> from turboquant import TurboQuantCache
>>> cache = TurboQuantCache.for_model(model, "turboquant_3bit")
>>> model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import PRESETS, TurboQuantConfig
from .errors import CacheFileError, ConfigError, ShapeError, TurboQuantError, UnsupportedModelError
from .integrations.transformers_hook import register_when_loaded

if TYPE_CHECKING:
    from .attention import attend
    from .cache import TurboQuantCache
    from .codec.center import Statistics
    from .codec.rotary import Rotary
    from .integrations.huggingface.prefill import prefill
    from .offload.store import TurboQuantStore

__version__ = "0.1.0.dev0"

# Names that need torch are loaded on first use, so that `turboquant --help` and `turboquant plan` start at once.
_LAZY = {
    "TurboQuantCache": ".cache",
    "TurboQuantStore": ".offload.store",
    "Statistics": ".codec.center",
    "Rotary": ".codec.rotary",
    "attend": ".attention",
    "prefill": ".integrations.huggingface",
}

__all__ = [
    "PRESETS",
    "CacheFileError",
    "ConfigError",
    "Rotary",
    "ShapeError",
    "Statistics",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantError",
    "TurboQuantStore",
    "UnsupportedModelError",
    "__version__",
    "attend",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()
