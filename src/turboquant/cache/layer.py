"""One attention layer's cache: packed pages, exact sinks and an exact tail.

    token index   0 ... sink | 64 ........... 64 * pages | ................ length
                  [ pages of 64 tokens, packed           ][ exact tail, >= recent ]
                  [ sinks: exact copies, read instead ]

A page is packed when all its tokens have left the exact window of every later query. Tokens of the call in progress are
*pending*: attention reads them exactly, in place, and :meth:`PackedLayer.commit` then packs what has left the window, so
a long prefill never copies its keys and values at full precision.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from ..codec.center import KeyStatistics, KeyTransform, QuerySquares, measure
from ..codec.layout import PAGE_TOKENS, PageLayout
from ..codec.page import PageCodec
from ..codec.rotary import PageAngles, Rotary
from ..config import MAX_STATISTICS_TOKENS, TurboQuantConfig
from ..cuda.encode import encode_pages
from ..errors import ShapeError, TurboQuantError
from .checks import check_tokens
from .kernels import kernels_run_on
from .slab import PageSlabs

#: Pages coded or decoded at once; bounds the float32 copies (1,024 tokens).
BLOCK_PAGES = 16
#: Sliding layers keep this many tokens beyond their window, so that speculative tokens can be taken back.
_SLIDING_SLACK = PAGE_TOKENS


_handles = itertools.count()
#: Layers by their handle: operators inside compiled graphs are given numbers.
LAYERS: weakref.WeakValueDictionary[int, PackedLayer] = weakref.WeakValueDictionary()


class PackedLayer:
    """Keys and values of one layer, for a batch of sequences of equal length.

    Args:
        num_kv_heads, head_dim: shape of the layer.
        config: the recipe.
        bits: (key bits, value bits) of this layer.
        rotary: the layer's rotary embedding, or None.
        sliding_window: the layer attends to at most this many last tokens; older pages are dropped.
        statistics: frozen statistics to use instead of measuring.

    Attributes:
        handle: a number of this layer alone in the process.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        config: TurboQuantConfig,
        bits: tuple[int, int],
        rotary: Rotary | None = None,
        sliding_window: int | None = None,
        statistics: KeyStatistics | None = None,
    ) -> None:
        qjl = config.quantizer == "lloyd_max_qjl"
        self.num_kv_heads, self.head_dim, self.config, self.bits = num_kv_heads, head_dim, config, bits
        self.layout = PageLayout(head_dim, bits[0] - qjl, bits[1], qjl)
        self.codec = PageCodec(self.layout, config.rotation_type, config.seed, config.per_head_scale)
        self.rotary = rotary if config.key_center == "rope_mean" else None
        self.sliding_window = sliding_window
        # Sinks of a sliding layer leave its window like any other token.
        self.sink_tokens = config.sink_tokens if sliding_window is None else 0
        self.retain_multiple = 0
        self.handle = next(_handles)
        LAYERS[self.handle] = self
        self._preset_statistics = statistics
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and measured statistics; statistics given at construction stay."""
        self.length = 0
        self.packed_pages = 0
        self.first_page = 0
        self.slabs = PageSlabs()
        self.starts: Tensor | None = None
        self.transform: KeyTransform | None = None
        self.queries = QuerySquares()
        self._pending: tuple[Tensor, Tensor] | None = None
        self._open = False  # between append and commit
        self._tail: Tensor | None = None  # (2, batch, heads, capacity, head_dim)
        self._tail_start = 0
        self._sinks: Tensor | None = None  # (2, batch, heads, sinks, head_dim)
        self._angles: tuple[Tensor | None, PageAngles] | None = None
        if self.config.key_center == "none":
            self.transform = KeyTransform(None, None)
        elif self._preset_statistics is not None:
            self.use_statistics(self._preset_statistics)

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of rows; 0 before the first token."""
        return 0 if self._tail is None else int(self._tail.shape[1])

    @property
    def packed_tokens(self) -> int:
        """Tokens before this index are read from pages (sinks apart)."""
        return self.packed_pages * PAGE_TOKENS

    @property
    def first_token(self) -> int:
        """Index of the first token still held (0 unless the layer slides)."""
        return min(self.first_page * PAGE_TOKENS, self.length)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, in which exact tokens are held."""
        return torch.get_default_dtype() if self._tail is None else self._tail.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all storage really held: pages, exact tail, sinks, statistics, and a call in progress."""
        held = [t for t in (self._tail, self._sinks, self.starts, *(self._pending or ())) if t is not None]
        transform = 0 if self.transform is None else self.transform.nbytes
        return self.slabs.nbytes + sum(int(t.nbytes) for t in held) + transform

    @property
    def statistics(self) -> KeyStatistics | None:
        """The frozen statistics, or None before they are measured."""
        return None if self.transform is None else self.transform.statistics

    def preset_statistics(self, statistics: KeyStatistics) -> None:
        """Use the given statistics now and after every :meth:`reset`."""
        self.use_statistics(statistics)
        self._preset_statistics = statistics

    def use_statistics(self, statistics: KeyStatistics) -> None:
        """Freeze the given statistics.

        Raises:
            ShapeError: they are of another shape.
        """
        want = (self.num_kv_heads, self.head_dim)
        if tuple(statistics.mean.shape) != want:
            raise ShapeError(
                f"statistics of shape {tuple(statistics.mean.shape)} do not fit a layer of {want} (heads, head_dim)"
            )
        self.transform = KeyTransform(statistics, self.rotary)

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Positions (rows, stop - start) of tokens by index; negative at left padding. One row serves all without padding."""
        index = torch.arange(start, stop, device=device)[None]
        return index if self.starts is None else index - self.starts[:, None]

    # -- append and pack --------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens, (batch, heads, tokens, head_dim) each; they stay pending until :meth:`commit`.

        Raises:
            ShapeError: another shape, dtype or device than the cache holds.
        """
        self.commit()
        want = (self.num_kv_heads, self.head_dim)
        check_tokens(key, value, *want, None if self._tail is None else self._tail[0])
        if self._tail is None:
            self._tail = key.new_empty(2, key.shape[0], want[0], 0, want[1])
        held, new = self.length - self._tail_start, key.shape[2]
        if held + new <= self._tail.shape[3]:
            self._tail[0, :, :, held : held + new], self._tail[1, :, :, held : held + new] = key, value
        else:
            self._pending = (key, value)
        self._open = True
        self.length += new

    def observe_queries(self, query: Tensor) -> None:
        """Count the queries (batch, query heads, tokens, head_dim) of the pending tokens for the balance, until frozen."""
        if self.transform is None and self.config.key_balance:
            p = self.positions(self.length - query.shape[2], self.length, query.device).expand(query.shape[0], -1)
            self.queries.add(query, self.num_kv_heads, p)

    def commit(self) -> None:
        """Take in the pending tokens and pack every page that has left the exact window."""
        if not self._open:
            return
        self._open = False
        pages = max(0, (self.length - self.config.recent_tokens) // PAGE_TOKENS)
        if pages > self.packed_pages and self._ready():
            if (first := min(self._first_needed(), pages)) > self.packed_pages:
                # A long prompt of a sliding layer: what no later query sees is not packed at all.
                self.slabs, self.first_page, self.packed_pages = PageSlabs(), first, first
            if pages > self.packed_pages:
                self._pack(pages)
        keep = self.packed_tokens
        if self.retain_multiple:
            boundary = self.length // self.retain_multiple * self.retain_multiple
            page = (boundary - self.config.recent_tokens) // PAGE_TOKENS * PAGE_TOKENS
            keep = max(self._tail_start, min(keep, page))
        self._absorb(keep)
        self._drop_old()

    def _ready(self) -> bool:
        """Freeze the statistics if enough tokens were seen; True once they are frozen."""
        if self.transform is not None:
            return True
        seen = self.length - (int(self.starts.min()) if self.starts is not None else 0)
        if seen < self.config.statistics_tokens:
            return False
        key, _ = self.exact(0, min(self.length, MAX_STATISTICS_TOKENS))
        positions = self.positions(0, key.shape[2], key.device).expand(key.shape[0], -1)
        self.use_statistics(measure(key, positions, self.rotary, self.queries.mean(), float(self.config.key_balance)))
        return True

    def _pack(self, pages: int) -> None:
        assert self._tail is not None and self.transform is not None
        count = pages - self.packed_pages
        new = self._tail.new_empty((count, self.batch_size, self.num_kv_heads, self.layout.page_bytes), dtype=torch.uint8)
        first = self.packed_tokens
        self._save_sinks(first, pages * PAGE_TOKENS)
        if kernels_run_on(new.device):
            key, value = self.exact(first, pages * PAGE_TOKENS)
            angles = self.page_angles(pages)
            encode_pages(key, value, new, codec=self.codec, transform=self.transform, first_index=first, angles=angles)
        else:
            for p in range(0, count, BLOCK_PAGES):
                start, stop = first + p * PAGE_TOKENS, first + min(p + BLOCK_PAGES, count) * PAGE_TOKENS
                key, value = self.exact(start, stop)
                coded = self.transform.forward(key, self.positions(start, stop, key.device))
                new[p : p + BLOCK_PAGES] = self.codec.encode(coded, value).permute(2, 0, 1, 3)
        self.slabs.append(new.permute(1, 2, 0, 3))
        self.packed_pages = pages

    def page_angles(self, pages: int) -> Tensor | None:
        """Cos and sin of the first ``pages`` page starts, float32 (rows or 1, >= pages, pairs, 2); None without rotary."""
        if self.rotary is None or self._tail is None:
            return None
        if self._angles is None or self._angles[0] is not self.starts:
            self._angles = self.starts, self.rotary.page_angles(self._tail.device, self.starts)
        return self._angles[1].get(pages)

    def _save_sinks(self, start: int, stop: int) -> None:
        """Copy the sink tokens with index in [start, stop) before they are packed."""
        index = self.sink_index()
        if index is None or start > int(index.max()):
            return
        assert self._tail is not None
        if self._sinks is None:
            self._sinks = self._tail.new_zeros(2, self.batch_size, self.num_kv_heads, self.sink_tokens, self.head_dim)
        here = ((index >= start) & (index < stop))[:, None, :, None]
        local = (index - start).clamp(0, stop - start - 1)[:, None, :, None]
        shape = (self.batch_size, self.num_kv_heads, self.sink_tokens, self.head_dim)
        exact = torch.stack([t.gather(2, local.expand(shape)) for t in self.exact(start, stop)])
        self._sinks = torch.where(here, exact, self._sinks)

    def _absorb(self, keep: int) -> None:
        """Make the tail hold tokens [keep, length): move what stays, add the pending ones."""
        assert self._tail is not None
        count = self.length - keep
        if keep != self._tail_start or self._pending is not None:
            exact = self.exact(keep, self.length)
            # Whole pages of room: the tail of a decoding sequence is then reallocated once in 64 tokens.
            room = -(-count // PAGE_TOKENS) * PAGE_TOKENS
            tail = self._tail.new_empty(2, self.batch_size, self.num_kv_heads, room, self.head_dim)
            tail[0, :, :, :count], tail[1, :, :, :count] = exact
            self._tail, self._tail_start = tail, keep
        self._pending = None

    def _first_needed(self) -> int:
        """First page that later queries may see (with some slack for tokens that are taken back)."""
        if self.sliding_window is None:
            return 0
        return max(0, self.length - self.sliding_window + 1 - _SLIDING_SLACK) // PAGE_TOKENS

    def _drop_old(self) -> None:
        first = min(self._first_needed(), self.packed_pages)
        if first > self.first_page:
            self.slabs.keep(first - self.first_page, self.packed_pages - self.first_page)
            self.first_page = first

    # -- read -----------------------------------------------------------------------------------------------------

    def tail(self) -> tuple[Tensor, int]:
        """(2, batch, heads, slots, head_dim) with all exact tokens, pending ones too, and the index of the token in slot 0."""
        if self._pending is not None:
            self._absorb(self._tail_start)
        assert self._tail is not None
        return self._tail, self._tail_start

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(key, value) views or copies of the exact tokens [start, stop), (batch, heads, tokens, head_dim)."""
        assert self._tail is not None and start >= self._tail_start
        pending = self._pending[0].shape[2] if self._pending is not None else 0
        border = self.length - pending
        parts = []
        if start < border:
            parts.append(self._tail[:, :, :, start - self._tail_start : min(stop, border) - self._tail_start])
        if stop > border and self._pending is not None:
            a, b = max(start, border) - border, stop - border
            if not parts:
                return self._pending[0][:, :, a:b], self._pending[1][:, :, a:b]
            parts.append(torch.stack([t[:, :, a:b] for t in self._pending]))
        if not parts:
            parts.append(self._tail[:, :, :, :0])
        both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        return both[0], both[1]

    def holds_exact(self, start: int) -> bool:
        """Whether all tokens from ``start`` on are still held exactly."""
        return start >= self._tail_start

    def sink_index(self) -> Tensor | None:
        """Token indices of the sinks, (batch, sinks): the first tokens of each row after its padding. None without sinks."""
        if not self.sink_tokens or self._tail is None:
            return None
        first = torch.arange(self.sink_tokens, device=self._tail.device)[None].expand(self.batch_size, -1)
        return first if self.starts is None else first + self.starts.clamp_min(0)[:, None]

    def sinks(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(key, value, index) of sinks; valid where ``index < packed_tokens``. None while all are in the tail."""
        index = self.sink_index()
        if self._sinks is None or index is None:
            return None
        return self._sinks[0], self._sinks[1], index

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(key, value) of packed pages ``start`` to ``stop`` as tokens, in the model's dtype, sinks exact."""
        assert self.transform is not None and self._tail is not None
        first = self.first_page
        shape = (2, self.batch_size, self.num_kv_heads, (stop - start) * PAGE_TOKENS, self.head_dim)
        out = self._tail.new_empty(shape)
        for page, view in self.slabs.blocks(BLOCK_PAGES, start - first, stop - first):
            a = (page + first) * PAGE_TOKENS
            b = a + view.shape[2] * PAGE_TOKENS
            coded, value = self.codec.dequantize(view)
            o = start * PAGE_TOKENS
            out[0, :, :, a - o : b - o] = self.transform.inverse(coded, self.positions(a, b, view.device)).to(out.dtype)
            out[1, :, :, a - o : b - o] = value.to(out.dtype)
        if (sinks := self.sinks()) is not None:
            key, value, index = sinks
            for row, slot in ((index >= start * PAGE_TOKENS) & (index < stop * PAGE_TOKENS)).nonzero().tolist():
                at = int(index[row, slot]) - start * PAGE_TOKENS
                out[0, row, :, at], out[1, row, :, at] = key[row, :, slot], value[row, :, slot]
        return out[0], out[1]

    def get(self) -> tuple[Tensor, Tensor]:
        """(key, value) of all tokens held, dequantized, (batch, heads, length - first_token, head_dim), model's dtype.

        Raises:
            TurboQuantError: the layer is empty.
        """
        if self._tail is None:
            raise TurboQuantError("the cache is empty: nothing was stored yet")
        key, value = self.exact(self.packed_tokens, self.length)
        if self.packed_pages > self.first_page:
            old_key, old_value = self.decode(self.first_page, self.packed_pages)
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        return key, value

    # -- edit -----------------------------------------------------------------------------------------------------

    def check_crop(self, length: int) -> None:
        """Raise what :meth:`crop` would, without changing anything."""
        if self.sliding_window is not None and 0 < length < self.length:
            needed = max(0, length - self.sliding_window + 1)
            if self.first_page * PAGE_TOKENS > needed:
                raise TurboQuantError(
                    f"cannot crop to {length} tokens: this layer slides over {self.sliding_window} tokens and has dropped "
                    f"those before {self.first_page * PAGE_TOKENS}"
                )

    def crop(self, length: int) -> None:
        """Forget all tokens from index ``length`` on. Tokens before it keep their stored values.

        A crop into packed pages turns the page that is cut back into exact tokens of the decoded values.

        Raises:
            TurboQuantError: the layer slides and no longer holds the tokens that its window would need.
        """
        self.commit()
        length = int(length)
        if length >= self.length or self._tail is None:
            return
        if not length:
            self.reset()
            return
        self.check_crop(length)
        if length < self.packed_tokens:
            page = length // PAGE_TOKENS
            if length % PAGE_TOKENS:
                self._tail = torch.stack(self.decode(page, page + 1))
            else:
                self._tail = self._tail.new_empty(*self._tail.shape[:3], 0, self.head_dim)
            self._tail_start = page * PAGE_TOKENS
            self.slabs.keep(0, page - self.first_page)
            self.packed_pages = page
        self.length = length

    def restore(
        self,
        length: int,
        first_page: int,
        packed_pages: int,
        pages: Tensor | None,
        tail: Tensor,
        sinks: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        """Take over stored content (see :mod:`turboquant.cache.state`); frozen statistics stay."""
        self.length, self.first_page, self.packed_pages = length, first_page, packed_pages
        self.slabs = PageSlabs()
        if pages is not None:
            self.slabs.append(pages)
        self._pending, self._open, self._tail, self._tail_start = None, False, tail, packed_pages * PAGE_TOKENS
        self._sinks, self.starts = sinks, starts

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows by rows ``index`` (beam search, repeat, select)."""
        self.commit()
        if self._tail is None:
            return
        index = index.to(self._tail.device)
        self.slabs.select_rows(index)
        self._tail = self._tail.index_select(1, index)
        self._sinks = None if self._sinks is None else self._sinks.index_select(1, index)
        self.starts = None if self.starts is None else self.starts.index_select(0, index)
