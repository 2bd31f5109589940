"""Storage of pages that grows without waste."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Slabs of up to this many pages are merged; larger ones are left where they are.
MERGE_PAGES = 64


def _page_major(pages: Tensor) -> Tensor:
    """``pages`` (batch, heads, n, page_bytes) with the pages of one index, all rows and heads, next to each other in memory."""
    return pages.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


class PageSlabs:
    """Pages of one layer: uint8 (batch, heads, pages, page_bytes), held as a list of slabs in order.

    In memory a slab is (pages, batch, heads, page_bytes), so that one address per page finds it in every row and head, whatever
    slab it is in; kernels read slabs where they are.

    A prefill allocates one slab of exactly the pages it brings. Decoding adds one page at a time; equal neighbours are
    merged like the digits of a binary counter, so a page is copied at most six times, no byte is allocated that holds no
    page, and the list stays short.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self._addresses: tuple[list[int], Tensor] | None = None

    def __len__(self) -> int:
        return sum(s.shape[2] for s in self.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(s.nbytes for s in self.slabs)

    def append(self, pages: Tensor) -> None:
        """Add a slab of its own memory, (batch, heads, n, page_bytes); it is copied unless it is page-major."""
        self.slabs.append(_page_major(pages))
        while len(self.slabs) > 1:
            a, b = self.slabs[-2:]
            if a.shape[2] > b.shape[2] or a.shape[2] + b.shape[2] > MERGE_PAGES:
                break
            self.slabs[-2:] = [torch.cat((a.permute(2, 0, 1, 3), b.permute(2, 0, 1, 3))).permute(1, 2, 0, 3)]

    def blocks(self, max_pages: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(index of the first page, view of at most ``max_pages`` pages), covering pages ``start`` to ``stop``."""
        stop = len(self) if stop is None else stop
        base = 0
        for slab in self.slabs:
            first, last = max(start - base, 0), min(stop - base, slab.shape[2])
            for i in range(first, last, max_pages):
                yield base + i, slab[:, :, i : min(i + max_pages, last)]
            base += slab.shape[2]

    def addresses(self) -> Tensor:
        """Address of every page of row 0 and head 0, int64 (1, pages), on the slabs' device.

        Further heads follow at multiples of page_bytes, further rows at multiples of heads * page_bytes. Valid until the next
        change of the slabs.
        """
        # Memory of an earlier slab may be used again for one of another batch: the shape is part of what identifies a slab.
        starts = [x for s in self.slabs for x in (s.data_ptr(), *s.shape)]
        if self._addresses is None or self._addresses[0] != starts:
            found = []
            for s in self.slabs:
                step = s.shape[0] * s.shape[1] * s.shape[3]
                found.append(s.data_ptr() + torch.arange(s.shape[2], dtype=torch.int64) * step)
            table = torch.cat(found)[None]
            if self.slabs[0].is_cuda:
                table = table.pin_memory().to(self.slabs[0].device, non_blocking=True)
            self._addresses = starts, table
        return self._addresses[1]

    def split(self, sizes: list[int]) -> None:
        """Divide the pages into slabs of these sizes, in order."""
        whole = self.read(0, len(self))
        self.slabs = [_page_major(part) for part in torch.split(whole, sizes, dim=2)]

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
        self.slabs = [s.permute(2, 0, 1, 3).index_select(1, index).permute(1, 2, 0, 3) for s in self.slabs]
