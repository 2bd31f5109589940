"""Exceptions of the package.

Every error that a user can cause is a :class:`TurboQuantError`, so that one ``except`` clause is enough and the command
line can print it without a traceback.
"""

from __future__ import annotations


class TurboQuantError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(TurboQuantError, ValueError):
    """A setting has a value that cannot work; the message names the setting and the allowed values."""


class ShapeError(TurboQuantError, ValueError):
    """A tensor has the wrong shape, dtype or device for the cache it was given to."""


class UnsupportedModelError(TurboQuantError, NotImplementedError):
    """The model cannot be used with a compressed cache; the message names the reason."""


class CacheFileError(TurboQuantError, ValueError):
    """A saved cache or statistics file is damaged or belongs to another model or configuration."""


class KernelError(TurboQuantError, RuntimeError):
    """A CUDA kernel does not compile, load or launch; the message says which one and what the compiler or driver said."""
