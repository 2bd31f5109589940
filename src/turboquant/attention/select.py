"""Which back-end does a call."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import Tensor

from ..errors import ConfigError
from .base import Backend, Call
from .cuda import CudaBackend
from .reference import attend_packed


class ReferenceBackend(Backend):
    """Plain torch on any device: the statement of what the others compute."""

    name = "reference"

    def why_not(self, call: Call) -> str | None:
        """Never hindered."""
        return None

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """See :func:`turboquant.attention.reference.attend_packed`."""
        return attend_packed(call.query, call.layer, call.mask, call.scaling, call.softcap, call.sink_logits)


#: By preference; a new back-end is one more entry.
BACKENDS: list[Backend] = [CudaBackend(), ReferenceBackend()]
_forced: list[Backend] = []
_warned: set[str] = set()


def backend_for(call: Call) -> Backend:
    """The first back-end that can do the call. What hindered a faster one is said once."""
    for backend in _forced[-1:] or BACKENDS:
        reason = backend.why_not(call)
        if reason is None:
            return backend
        if reason and reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"attention falls back to plain torch, which is slow: {reason}", stacklevel=3)
    return BACKENDS[-1]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have calls inside the ``with`` block done by one back-end where it can (for tests and comparisons).

    Raises:
        ConfigError: there is no such back-end.
    """
    found = [b for b in BACKENDS if b.name == name]
    if not found:
        raise ConfigError(f"there is no attention back-end {name!r}; choose one of {', '.join(b.name for b in BACKENDS)}")
    _forced.append(found[0])
    try:
        yield
    finally:
        _forced.pop()
