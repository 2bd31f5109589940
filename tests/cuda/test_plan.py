"""The division of a decode launch's work: nothing lost, nothing twice, blocks of nearly equal cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.cuda.decode_plan import divide


@settings(max_examples=200, deadline=None)
@given(
    pages=st.lists(st.integers(0, 300), min_size=1, max_size=60),
    blocks=st.sampled_from([1, 2, 7, 16, 132]),
    entry_cost=st.sampled_from([0.5, 3.0, 10.0, 170.0]),
    window_cost=st.sampled_from([0.0, 0.5, 12.0, 60.0]),
)
def test_every_page_once(pages: list[int], blocks: int, entry_cost: float, window_cost: float) -> None:
    counts = np.array(pages)
    work, block_work = divide(counts, blocks, entry_cost, window_cost)
    entries = work[:-1]
    seen = [np.zeros(n, int) for n in pages]
    for item, begin, end, *_ in entries:
        assert 0 <= begin <= end <= pages[item]
        seen[item][begin:end] += 1
    assert all((s == 1).all() for s in seen)
    # Exact tokens once per item, with its first pages; slots are all different, the item's first one is for exact tokens.
    window = int(window_cost > 0)
    assert (np.bincount(entries[:, 0], weights=entries[:, 4], minlength=len(pages)) == window).all()
    assert (
        np.bincount(entries[:, 0], minlength=len(pages)) == [entries[entries[:, 0] == i][0, 6] for i in range(len(pages))]
    ).all()
    assert len({*entries[:, 3]} | ({*entries[:, 5]} if window else set())) == len(entries) + window * len(pages)
    for item in range(len(pages)):
        mine = entries[entries[:, 0] == item]
        assert (mine[:, 5] == mine[0, 5]).all() and mine[0, 3] == mine[0, 5] + window
        assert (mine[:, 3] == mine[0, 3] + np.arange(len(mine))).all()
    # Blocks take consecutive entries, all of them, and know a copy of their first.
    assert block_work[0, 0] == 0 and block_work[-1, 1] == len(entries)
    assert (block_work[1:, 0] == block_work[:-1, 1]).all() and (block_work[:, 1] >= block_work[:, 0]).all()
    assert (block_work[:, 4:] == work[block_work[:, 0]]).all()
    # No block costs more than twice what an even division would, or what the least piece of work costs.
    cost = [sum(e[2] - e[1] + entry_cost + window_cost * e[4] for e in entries[a:b]) for a, b in block_work[:, :2]]
    even = (counts.sum() + len(pages) * (entry_cost + window_cost)) / blocks
    assert max(cost) <= 2 * max(even, 2 * entry_cost + 4 + window_cost)


def test_equal_rows_are_divided_evenly() -> None:
    work, block_work = divide(np.full(64, 512), 132, 10.0, 0.0)
    assert len(work) - 1 == 128 and (work[:-1, 2] - work[:-1, 1] == 256).all()
    used = block_work[block_work[:, 1] > block_work[:, 0]]
    assert len(used) == 128
