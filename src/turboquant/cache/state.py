"""Layers as plain tensors and back: what saving, loading and offloading move. No pickle anywhere.

The state of a :class:`~turboquant.cache.layer.PackedLayer` is ``meta`` (length, first page, packed pages), ``pages``, the
exact ``tail`` and ``sinks``, and ``starts`` (padding). A state may leave out leading pages that travel as chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codec.center import KeyStatistics
from ..codec.layout import PAGE_TOKENS
from ..errors import CacheFileError
from .exact import ExactLayer
from .layer import PackedLayer

State = dict[str, Tensor]


def pages_at(layer: PackedLayer, length: int) -> int:
    """Number of packed pages of a layer that holds exactly ``length`` tokens."""
    return max(0, (length - layer.config.recent_tokens) // PAGE_TOKENS)


def export_state(store: Any, length: int, skip_tokens: int = 0) -> State | None:
    """The state that ``store`` had when it held ``length`` tokens, without what chunks of the first tokens carry.

    Args:
        store: a layer.
        length: at most the tokens it holds.
        skip_tokens: leading tokens whose pages (or exact tokens, in an exact layer) are left out.

    Returns:
        Contiguous CPU tensors, or None if the exact tokens of that time are no longer held.
    """
    if isinstance(store, PackedLayer):
        store.commit()
        return _packed_state(store, length, skip_tokens // PAGE_TOKENS)
    if isinstance(store, ExactLayer):
        if store.length < length or store.key is None or store.value is None:
            return None
        return {"exact": torch.stack([t[:, :, skip_tokens:length] for t in (store.key, store.value)]).cpu().contiguous()}
    # transformers' own layers keep only what the next token needs.
    found: State | None = store.export_state() if store.length == length else None
    return found


def _packed_state(layer: PackedLayer, length: int, skip_pages: int) -> State | None:
    pages = layer.packed_pages if length == layer.length else pages_at(layer, length)
    if layer.length < length or pages > layer.packed_pages or not layer.length:
        return None
    start = pages * PAGE_TOKENS
    needed = 0 if layer.sliding_window is None else max(0, length - layer.sliding_window + 1)
    if not layer.holds_exact(start) or layer.first_page * PAGE_TOKENS > needed:
        return None
    first = max(layer.first_page, skip_pages)
    state = {
        "meta": torch.tensor([length, layer.first_page, pages], dtype=torch.int64),
        "tail": torch.stack(layer.exact(start, length)).cpu().contiguous(),
    }
    if pages > first:
        state["pages"] = layer.slabs.read(first - layer.first_page, pages - layer.first_page).cpu().contiguous()
    if (sinks := layer.sinks()) is not None:
        state["sinks"] = torch.stack(sinks[:2]).cpu().contiguous()
    if layer.transform is None and layer.queries.total is not None:
        state["queries"] = layer.queries.total.cpu().clone()
        state["query_count"] = torch.tensor([layer.queries.count], dtype=torch.float64)
    if layer.starts is not None:
        state["starts"] = layer.starts.cpu().clone()
    return state


def export_chunk(store: PackedLayer | ExactLayer, start: int, stop: int) -> Tensor:
    """Tokens ``start`` to ``stop`` (whole pages) as stored, a contiguous CPU tensor: pages, or exact keys and values."""
    if isinstance(store, PackedLayer):
        pages = store.slabs.read(start // PAGE_TOKENS - store.first_page, stop // PAGE_TOKENS - store.first_page)
        return pages.cpu().contiguous()
    return torch.stack([t[:, :, start:stop] for t in store.get()]).cpu().contiguous()


def import_state(
    store: Any, state: State, chunks: list[Tensor], device: torch.device | None, statistics: KeyStatistics | None = None
) -> None:
    """Replace the content of ``store`` by ``state``, preceded by ``chunks`` (in order), with ``statistics`` if given.

    Raises:
        CacheFileError: the tensors do not fit the layer.
    """
    store.reset()
    try:
        if isinstance(store, PackedLayer):
            if statistics is not None:
                store.use_statistics(statistics)
            _import_packed(store, state, chunks, device)
        elif isinstance(store, ExactLayer):
            both = torch.cat([*chunks, state["exact"]], dim=3).to(device)
            store.append(both[0], both[1])
        else:
            store.import_state(state, device)
    except (KeyError, RuntimeError, IndexError, ValueError) as e:
        store.reset()
        raise CacheFileError(f"stored tensors do not fit this layer: {e}") from None


def _import_packed(layer: PackedLayer, state: State, chunks: list[Tensor], device: torch.device | None) -> None:
    length, first_page, packed = (int(v) for v in state["meta"])
    tail = state["tail"]
    heads, dim = layer.num_kv_heads, layer.head_dim
    pages = torch.cat([*chunks, *([state["pages"]] if "pages" in state else [])], dim=2) if chunks or "pages" in state else None
    count = 0 if pages is None else pages.shape[2]
    fits = (
        tail.dim() == 5
        and (tail.shape[0], tail.shape[2], tail.shape[4]) == (2, heads, dim)
        and tail.shape[3] == length - packed * PAGE_TOKENS
        and 0 <= first_page <= packed == first_page + count
        and (pages is None or tuple(pages.shape) == (tail.shape[1], heads, count, layer.layout.page_bytes))
    )
    if not fits:
        raise ValueError("shapes disagree")
    if packed and layer.transform is None:
        raise ValueError("packed pages without their key statistics")
    if "queries" in state:
        layer.queries.total = state["queries"].to(device)
        layer.queries.count = float(state["query_count"][0])
    layer.restore(
        length,
        first_page,
        packed,
        None if pages is None else pages.to(device),
        tail.to(device),
        state["sinks"].to(device) if "sinks" in state else None,
        state["starts"].to(device) if "starts" in state else None,
    )
