"""What the prefix store knows of one cache, and how a cache's layers travel."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import TurboQuantCache
from ..cache.exact import ExactLayer
from ..cache.layer import PackedLayer
from ..cache.slab import PageSlabs
from ..cache.state import pages_at
from ..codec.center import Statistics
from ..codec.layout import PAGE_TOKENS
from ..errors import ShapeError
from .keys import CHUNK_TOKENS

#: Between a layer's index and a tensor's name in window objects.
SEPARATOR = "/"
_CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS


@dataclass
class Session:
    """State of one cache in a store, from empty to reset.

    Attributes:
        folder: of this model and configuration.
        statistics: those published there.
        digest: of the statistics of the cache's pages, once they are known.
        root: namespace, known then.
        objects: folder of the namespace.
        chunks: leading chunks that are stored.
        tried: chunks for which that was tried.
        border: where the last window object was due.
        seen: tokens at the last save.
        packed: of these, in pages.
        window: the last window object, if the next may replace it.
        decoding: tokens come one by one.
        off: why nothing is saved any more, or "".
        when: time of last use of all that belongs to the prompt (nanoseconds); equal, so that its end is evicted first.
    """

    folder: Path
    statistics: Statistics | None = None
    digest: str = ""
    root: bytes | None = None
    objects: Path | None = None
    chunks: int = 0
    tried: int = 0
    border: int = 0
    seen: int = 0
    packed: int = 0
    window: Path | None = None
    decoding: bool = False
    off: str = ""
    when: int = field(default_factory=time.time_ns)


def is_chunked(store: Any) -> bool:
    """Whether a layer's old tokens travel as chunks; sliding layers keep few and travel whole in the window object."""
    return isinstance(store, ExactLayer) or (isinstance(store, PackedLayer) and store.sliding_window is None)


def unstorable(cache: TurboQuantCache) -> bool:
    """Whether an empty cache has layers of transformers whose state cannot be exported."""
    return any(not isinstance(s, (PackedLayer, ExactLayer)) and s.export_state() is None for s in cache._stores)


def chunks_at(cache: TurboQuantCache, border: int) -> int:
    """Count the chunks that are packed when a cache holds ``border`` tokens; the window object carries the rest."""
    if not any(is_chunked(s) for s in cache._stores):
        return 0
    return max(0, border - cache.config.recent_tokens) // PAGE_TOKENS // _CHUNK_PAGES


def split_chunk(cache: TurboQuantCache, payload: memoryview, window: dict[str, Tensor]) -> list[Tensor | None] | None:
    """Take a chunk apart.

    Args:
        cache: of its layers.
        payload: of the chunk.
        window: tensors of a window object; its exact layers have the dtype of those in the chunk.

    Returns:
        By layer, None for those that are not chunked; None if the payload has another size.
    """
    shapes: list[tuple[tuple[int, ...], torch.dtype] | None] = []
    for i, s in enumerate(cache._stores):
        if not is_chunked(s):
            shapes.append(None)
        elif isinstance(s, PackedLayer):
            shapes.append(((1, s.num_kv_heads, _CHUNK_PAGES, s.layout.page_bytes), torch.uint8))
        else:
            exact = window[f"{i}{SEPARATOR}exact"]
            shapes.append(((2, 1, s.num_kv_heads, CHUNK_TOKENS, s.head_dim), exact.dtype))
    sizes = [0 if shape is None else math.prod(shape[0]) * shape[1].itemsize for shape in shapes]
    if sum(sizes) != payload.nbytes:
        return None
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    parts: list[Tensor | None] = []
    at = 0
    for shape, size in zip(shapes, sizes, strict=True):
        # Cloned, because a view as wider numbers must begin at a multiple of their size.
        parts.append(None if shape is None else raw[at : at + size].clone().view(shape[1]).view(shape[0]))
        at += size
    return parts


def arrange_like_fed(store: Any, border: int) -> None:
    """Divide the pages of a restored layer as if ``border`` tokens had been fed in blocks of 256.

    Attention adds up slab by slab, so only then it rounds as in a run that was not restored.
    """
    if not isinstance(store, PackedLayer) or store.first_page or not store.packed_pages:
        return
    model = PageSlabs()
    fed = 0
    for length in range(CHUNK_TOKENS, border + 1, CHUNK_TOKENS):
        pages = pages_at(store, length)
        if pages > fed:
            model.append(torch.empty(1, 1, pages - fed, 0))
            fed = pages
    if fed == store.packed_pages and len(model.slabs) > 1:
        store.slabs.split([slab.shape[2] for slab in model.slabs])


def token_list(tokens: Sequence[int] | Tensor) -> list[int]:
    """List the ids of one sequence, (tokens,) or (1, tokens).

    Raises:
        ShapeError: several sequences, or not integers.
    """
    if isinstance(tokens, Tensor):
        if tokens.dim() > 2 or (tokens.dim() == 2 and tokens.shape[0] != 1) or tokens.is_floating_point():
            raise ShapeError(
                f"token ids {tuple(tokens.shape)} {tokens.dtype}: the store takes the integers of one sequence, "
                "(tokens,) or (1, tokens)"
            )
        return [int(t) for t in tokens.reshape(-1).tolist()]
    try:
        return [int(t) for t in tokens]
    except TypeError:
        raise ShapeError("the store takes the token ids of one sequence, not a list of lists") from None
