"""Which keys a query may see, told block by block so that no (queries x keys) matrix of a long context is ever made."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Mask(ABC):
    """Visibility of key indices for the queries of one call.

    Results broadcast to (batch, heads, queries, keys): bool (True is visible) or float (added to the scores); None means
    that everything is visible.
    """

    def plain(self) -> CausalMask | None:
        """The same visibility as a :class:`CausalMask`, which kernels know, or None."""
        return None

    @abstractmethod
    def at(self, q0: int, q1: int, index: Tensor) -> Tensor | None:
        """Visibility for queries q0 to q1 of the call of the keys with the given ``index`` (rows, keys)."""

    def block(self, q0: int, q1: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """Visibility of the keys with indices ``start`` to ``stop``."""
        return self.at(q0, q1, torch.arange(start, stop, device=device)[None])


class CausalMask(Mask):
    """Causal attention with an optional sliding window and left padding.

    Args:
        first_query: index of the first query of the call among all tokens.
        sliding_window: a query sees itself and this many minus one tokens before.
        starts: (batch,) index of the first real token of each row, or None.
    """

    def __init__(self, first_query: int, sliding_window: int | None = None, starts: Tensor | None = None) -> None:
        self.first_query, self.sliding_window, self.starts = first_query, sliding_window, starts

    def plain(self) -> CausalMask:
        """See :meth:`Mask.plain`."""
        return self

    def at(self, q0: int, q1: int, index: Tensor) -> Tensor | None:
        """See :meth:`Mask.at`."""
        key = index[:, None, None, :]
        query = torch.arange(self.first_query + q0, self.first_query + q1, device=index.device)[:, None]
        ok = key <= query
        if self.sliding_window is not None:
            ok = ok & (key > query - self.sliding_window)
        if self.starts is not None:
            ok = ok & (key >= self.starts[:, None, None, None])
        return ok

    def block(self, q0: int, q1: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """See :meth:`Mask.block`; a block that lies wholly in every query's past needs no mask."""
        past = stop <= self.first_query + q0 + 1
        near = self.sliding_window is None or start > self.first_query + q1 - 1 - self.sliding_window
        if past and near and self.starts is None:
            return None
        return super().block(q0, q1, start, stop, device)


class TensorMask(Mask):
    """A mask given as a whole: bool or additive, (batch or 1, heads or 1, queries, keys).

    Args:
        mask: its last axis starts at key index ``first_key``.
        first_key: index of the first column.
    """

    def __init__(self, mask: Tensor, first_key: int = 0) -> None:
        self.mask, self.first_key = mask, first_key

    def at(self, q0: int, q1: int, index: Tensor) -> Tensor | None:
        """See :meth:`Mask.at`."""
        part = self.mask[:, :, q0:q1]
        rows = max(part.shape[0], index.shape[0])
        columns = (index - self.first_key)[:, None, None, :].expand(rows, part.shape[1], part.shape[2], -1)
        return part.expand(rows, -1, -1, -1).gather(3, columns)
