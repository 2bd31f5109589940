"""Who does what in a decode launch: pages dealt out evenly to the blocks that fit on the GPU at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """A division of one launch's work, and its scratch memory; any launch of the same shape and page counts may use it.

    Launches that share a plan must run one after another (on one stream), since they share its scratch memory.

    Attributes:
        blocks: thread blocks of the launch.
        slots: partial results.
        work: int32 (entries + 1, 8): item, first page, end page, slot, whether the item's exact tokens belong to the entry,
            the item's first slot (that of its exact tokens, if there are any), its entries, 0. The last entry only keeps
            kernels that look ahead inside the table.
        block_work: int32 (blocks, 12): first entry, end entry, 0, 0, a copy of the first entry.
        part_out, part_ml: float32 scratch, (slots, query rows, head_dim) and (slots, query rows, 2).
        counters: int32 (items), zero between launches.
        exact: whether items have exact tokens.
    """

    blocks: int
    slots: int
    work: Tensor
    block_work: Tensor
    part_out: Tensor
    part_ml: Tensor
    counters: Tensor
    exact: bool


def _cuts(pages: np.ndarray, blocks: int, entry_cost: float, window_cost: float, budget: float) -> list[tuple[int, int]] | None:
    """Greedy cuts (item, page) so that no block costs more than ``budget``; page 0 is before an item's exact tokens, too.

    None if more than ``blocks`` blocks would be needed.
    """
    head = window_cost + entry_cost
    end = np.cumsum(pages + head)
    least = max(4.0, entry_cost)  # fewer pages are not worth an entry of their own
    if budget < head + least:
        return None if len(pages) > 1 or budget < end[-1] else []
    cuts: list[tuple[int, int]] = []
    item, page = 0, 0
    while True:
        # The budget reaches to this place on the line of all costs; a range that continues an item pays for its entry again.
        first = end[item] - pages[item]
        reach = (first + page - entry_cost if page else first - head) + budget
        if reach >= end[-1]:
            return cuts
        if len(cuts) == blocks - 1:
            return None
        last = int(np.searchsorted(end, reach, side="right"))
        inside = int(reach - (end[last] - pages[last]))
        begun = page if last == item else 0
        if inside - begun >= least:
            if pages[last] - inside < least and pages[last] - begun > 2 * least:
                inside = int(pages[last] - least)
            item, page = last, inside
        else:
            item, page = last, 0
        cuts.append((item, page))


def divide(pages: np.ndarray, blocks: int, entry_cost: float, window_cost: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut items into ranges of pages so that the costliest block costs nearly as little as possible.

    Items stand in a row, and blocks take consecutive stretches of it. The exact tokens of an item belong to its first range.

    Args:
        pages: (items,) number of pages of each item.
        blocks: parts to cut into; some may stay empty.
        entry_cost: what beginning and ending a range of pages costs, in pages.
        window_cost: cost of an item's exact tokens in pages; 0 if there are none.

    Returns:
        (work, block_work) as in :class:`DecodePlan`.
    """
    items = len(pages)
    total = float(pages.sum() + items * (entry_cost + window_cost))
    low, high = total / blocks, total + blocks * entry_cost + 8.0
    cuts = _cuts(pages, blocks, entry_cost, window_cost, high) or []
    for _ in range(12):
        if high - low < 0.01 * low:
            break
        # Good budgets are near the lower bound: look there first.
        middle = low + (high - low) * (0.1 if high > 1.5 * low else 0.5)
        found = _cuts(pages, blocks, entry_cost, window_cost, middle)
        if found is None:
            low = middle
        else:
            high, cuts = middle, found
    cut = np.array(cuts, np.int64).reshape(-1, 2)
    every = np.stack([np.arange(items), np.zeros(items, np.int64)], 1)
    begin = np.unique(np.concatenate([every, cut]), axis=0)  # entries begin with items, and at every cut inside one
    item, page = begin[:, 0], begin[:, 1]
    number = np.arange(len(begin))
    last = np.append(item[1:] != item[:-1], True)
    stop = np.where(last, pages[item], np.append(page[1:], 0))
    count = np.bincount(item, minlength=items)
    exact = int(window_cost > 0)
    work = np.zeros((len(begin) + 1, 8), np.int32)
    first_slot = (np.cumsum(count) - count + exact * np.arange(items))[item]
    slot = number + exact * (item + 1)
    work[:-1, :7] = np.stack([item, page, stop, slot, exact * (page == 0), first_slot, count[item]], 1)
    # An entry belongs to the block in whose stretch it begins.
    width = int(pages.max(initial=0)) + 2
    borders = np.searchsorted(item * width + page, cut[:, 0] * width + cut[:, 1])
    borders = np.concatenate([[0], borders, np.full(blocks - len(cut), len(begin))])
    block_work = np.zeros((blocks, 12), np.int32)
    block_work[:, 0], block_work[:, 1], block_work[:, 4:] = borders[:-1], borders[1:], work[borders[:-1]]
    return work, block_work


def make_plan(
    packed_lens: int | Sequence[int],
    rows: int,
    heads: int,
    row_blocks: int,
    query_rows: int,
    head_dim: int,
    blocks: int,
    entry_cost: float,
    window_cost: float,
    first_page: int,
    device: torch.device,
) -> DecodePlan:
    """A :class:`DecodePlan` on ``device``; one copy to the device, nothing is waited for.

    Args:
        packed_lens: tokens in pages of each row, or of all.
        rows, heads: sequences and KV heads.
        row_blocks: blocks of ``query_rows`` query rows per KV head.
        query_rows: query rows that a block handles at once.
        head_dim: of the queries.
        blocks: thread blocks that run at once.
        entry_cost, window_cost: see :func:`divide`.
        first_page: pages before this one are not held.
        device: of the launch.

    Raises:
        ShapeError: as many lengths as rows are needed.
    """
    lens = np.full(rows, packed_lens) if isinstance(packed_lens, int) else np.asarray(packed_lens)
    if lens.shape != (rows,):
        raise ShapeError(f"packed_lens holds {lens.size} lengths for a batch of {rows}")
    pages = np.maximum(-(-lens // 64) - first_page, 0)
    work, block_work = divide(np.repeat(pages, heads * row_blocks), blocks, entry_cost, window_cost)
    for entries in (work, block_work[:, 4:]):
        entries[:, 1:3] += first_page
    flat = torch.from_numpy(np.concatenate([work.reshape(-1), block_work.reshape(-1)]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    slots = int(work[:, 3].max()) + 1
    return DecodePlan(
        blocks,
        slots,
        flat[: work.size].view(-1, 8),
        flat[work.size :].view(-1, 12),
        torch.empty(slots, query_rows, head_dim, device=device),
        torch.empty(slots, query_rows, 2, device=device),
        torch.zeros(rows * heads * row_blocks, dtype=torch.int32, device=device),
        window_cost > 0,
    )
