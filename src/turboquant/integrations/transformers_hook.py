"""Makes ``attn_implementation="turboquant"`` known to transformers as soon as both packages are imported.

``import turboquant`` must not load transformers (seconds, and it is an optional dependency). So if transformers is there,
the attention function is registered at once, otherwise when its module that holds the registry has been loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY_MODULE = "transformers.modeling_utils"


class _RegisterAfterLoad(MetaPathFinder, Loader):
    """Finds the registry's module once, lets its own loader run, then registers."""

    def __init__(self) -> None:
        self._loader: Loader | None = None

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    from .huggingface.attention import register_attention

    register_attention()


def register_when_loaded() -> None:
    """Register now, or when transformers is imported; does nothing where transformers is not installed."""
    if _REGISTRY_MODULE in sys.modules:
        _register()
    elif not any(isinstance(f, _RegisterAfterLoad) for f in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterLoad())
