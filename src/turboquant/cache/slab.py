"""Storage of pages that grows without waste."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Slabs of up to this many pages are merged; larger ones are left where they are.
MERGE_PAGES = 64


class PageSlabs:
    """Pages of one layer: uint8 (batch, heads, pages, page_bytes), held as a list of slabs in order.

    A prefill allocates one slab of exactly the pages it brings. Decoding adds one page at a time; equal neighbours are
    merged like the digits of a binary counter, so a page is copied at most six times, no byte is allocated that holds no
    page, and the list stays short.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []

    def __len__(self) -> int:
        return sum(s.shape[2] for s in self.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(s.nbytes for s in self.slabs)

    def append(self, pages: Tensor) -> None:
        """Add a slab of its own memory, (batch, heads, n, page_bytes)."""
        self.slabs.append(pages)
        while len(self.slabs) > 1:
            a, b = self.slabs[-2:]
            if a.shape[2] > b.shape[2] or a.shape[2] + b.shape[2] > MERGE_PAGES:
                break
            self.slabs[-2:] = [torch.cat((a, b), dim=2)]

    def blocks(self, max_pages: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(index of the first page, view of at most ``max_pages`` pages), covering pages ``start`` to ``stop``."""
        stop = len(self) if stop is None else stop
        base = 0
        for slab in self.slabs:
            first, last = max(start - base, 0), min(stop - base, slab.shape[2])
            for i in range(first, last, max_pages):
                yield base + i, slab[:, :, i : min(i + max_pages, last)]
            base += slab.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of pages ``start`` to ``stop`` (at least one) as one tensor."""
        return torch.cat([view for _, view in self.blocks(1 << 30, start, stop)], dim=2)

    def keep(self, start: int, stop: int) -> None:
        """Drop the pages before ``start`` and from ``stop`` on, and free their memory."""
        kept: list[Tensor] = []
        base = 0
        for slab in self.slabs:
            n = slab.shape[2]
            first, last = max(start - base, 0), min(stop - base, n)
            if (first, last) == (0, n):
                kept.append(slab)
            elif first < last:
                kept.append(slab[:, :, first:last].clone())
            base += n
        self.slabs = kept

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows by rows ``index``."""
        self.slabs = [s.index_select(0, index) for s in self.slabs]
