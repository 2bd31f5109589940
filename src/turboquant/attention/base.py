"""What an attention back-end is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..cache.layer import PackedLayer
from .mask import Mask


@dataclass(frozen=True, eq=False)
class Call:
    """One checked call of :func:`turboquant.attention.attend`, which explains the fields."""

    query: Tensor
    layer: PackedLayer
    mask: Mask
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


class Backend(ABC):
    """A way to do attention over packed pages."""

    name: str

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """None if :meth:`attend` can do this call; "" if it is not meant for it; else what hinders it, for a warning."""

    @abstractmethod
    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """(output like the query, log-sum-exp float32 (batch, query heads, tokens))."""
