"""The prefix store: compressed caches of earlier prompts, found again by their tokens, in any process.

For a sequence whose first ``256 m`` tokens were stored, restoring needs the packed pages of those tokens (chunks, shared by
all prompts that begin alike) and the exact window as it was at that point (a window object). Chunks are written as their
pages are packed. Window objects are kept at the last chunk border of a prompt, at the last one of the text generated after
it, and every ``window_interval`` chunks, so that prompts which share only a beginning find it too.

Key statistics decide the meaning of packed bytes, so a store holds one set of them per model and configuration: the first
sequence measures and publishes them, all later ones use them.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..cache.cache import TurboQuantCache
from ..cache.exact import ExactLayer
from ..cache.layer import PackedLayer
from ..cache.state import export_chunk, export_state, import_state
from ..codec.center import Statistics
from ..codec.layout import PAGE_TOKENS
from ..errors import CacheFileError, ConfigError, ShapeError, TurboQuantError
from .container import TEMPORARY, Kind
from .disk import SUFFIX, DiskTier
from .keys import CHUNK_TOKENS, chunk_keys, namespace

_CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS
_SEPARATOR = "/"


@dataclass
class _Session:
    """What the store knows of one cache."""

    folder: Path
    statistics: Statistics | None = None
    root: bytes | None = None
    objects: Path | None = None
    chunks: int = 0
    border: int = 0
    seen: int = 0
    window: Path | None = None  # the last one, if the next may replace it
    decoding: bool = False
    off: str = ""


class TurboQuantStore:
    """A folder of compressed prefixes, bounded in bytes.

    Example:
        >>> store = TurboQuantStore("kv-store", max_bytes=10 << 30)
        >>> cache = TurboQuantCache.for_model(model, "turboquant_3bit", store=store)
        >>> restored = store.restore(cache, input_ids)  # tokens that need no prefill
        >>> model.generate(input_ids, past_key_values=cache, prefill_chunk_size=256)

    Restored output is token for token that of a run without the store if both feed the prompt in blocks of 256 tokens
    (``prefill_chunk_size=256``; the command line does).

    Args:
        directory: created if missing. Several processes may use it at once.
        max_bytes: bound on the bytes of all stored objects.
        salt: tenants with different salts never share objects.
        window_interval: a window object is kept every this many chunks of 256 tokens, besides the last ones of prompt and
            answer.

    Attributes:
        counters: events so far: ``hits``, ``restored_tokens``, ``miss_<reason>``, ``stored``, ``evicted``, ``refused_<reason>``.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int, *, salt: str = "", window_interval: int = 8) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes!r} must be a positive number of bytes")
        if not isinstance(window_interval, int) or window_interval < 1:
            raise ConfigError(f"window_interval={window_interval!r} must be a positive number of chunks")
        self.counters: Counter[str] = Counter()
        self.tier = DiskTier(Path(directory), max_bytes, self.counters)
        self.salt, self.window_interval = salt, window_interval

    def __repr__(self) -> str:
        return f"TurboQuantStore({str(self.tier.folder)!r}, {self.nbytes} of {self.tier.max_bytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.tier.nbytes

    # -- a cache joins ----------------------------------------------------------------------------------------------

    def attach(self, cache: TurboQuantCache) -> None:
        """Prepare an empty cache: it uses the published statistics, and keeps what a window object needs.

        Raises:
            ConfigError: the cache does not know its model; set ``cache.model_fingerprint`` to a name of the weights.
        """
        if not cache.model_fingerprint:
            raise ConfigError("the store needs to know the model: set cache.model_fingerprint to a name of its weights")
        session = _Session(self.tier.folder / self._namespace(cache).hex()[:32])
        cache._session = session
        session.statistics = self._published(session)
        for i, layer in enumerate(cache._stores):
            if isinstance(layer, PackedLayer):
                layer.retain_multiple = CHUNK_TOKENS
                if session.statistics is not None and layer.statistics is None and i in session.statistics.layers:
                    layer.preset_statistics(session.statistics.layers[i])

    def rewind(self, cache: TurboQuantCache, length: int) -> None:
        """Note that ``cache`` was cropped to ``length`` tokens: what follows may differ from what was saved."""
        session = self._session(cache)
        border = length // CHUNK_TOKENS * CHUNK_TOKENS
        if border < session.border:
            session.border, session.window = border, None
        session.seen = min(session.seen, length)
        session.chunks = min(session.chunks, border // CHUNK_TOKENS)

    def detach(self, cache: TurboQuantCache, reason: str) -> None:
        """Stop saving ``cache``; ``reason`` is counted."""
        session = self._session(cache)
        if not session.off:
            session.off = reason
            self.counters["refused_" + reason.replace(" ", "_")] += 1

    def _session(self, cache: TurboQuantCache) -> _Session:
        session = getattr(cache, "_session", None)
        if not isinstance(session, _Session):
            self.attach(cache)
            session = cache._session
        assert isinstance(session, _Session)
        return session

    def _published(self, session: _Session) -> Statistics | None:
        path = session.folder / "statistics.safetensors"
        try:
            return Statistics.load(path)
        except CacheFileError:
            if path.exists():
                self.counters["miss_statistics"] += 1
                with contextlib.suppress(OSError):
                    path.unlink()
            return None

    def _open(self, session: _Session, cache: TurboQuantCache, publish: bool) -> bool:
        """Fix the namespace once the cache's statistics are frozen; publish them if they are the first."""
        if session.root is not None:
            return True
        if any(s.transform is None for s in cache._stores if isinstance(s, PackedLayer)):
            return False
        own = cache.statistics
        if session.statistics is None and publish:
            session.statistics = self._publish(session, own)
        if session.statistics is None:
            return False
        digest = own.digest()
        if session.statistics.digest() != digest:
            self.detach(cache, "other statistics")
            return False
        session.root = self._namespace(cache, statistics=digest, dtype=str(cache._dtype))
        session.objects = session.folder / session.root.hex()[:32]
        return True

    def _namespace(self, cache: TurboQuantCache, **more: str) -> bytes:
        return namespace(model=cache.model_fingerprint, config=cache.config.digest(), salt=self.salt, **more)

    def _publish(self, session: _Session, own: Statistics) -> Statistics | None:
        """Write the statistics unless another process was first; returns those that count."""
        path = session.folder / "statistics.safetensors"
        temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{id(session)}")
        try:
            session.folder.mkdir(parents=True, exist_ok=True)
            own.save(temporary)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # fails if it exists: the first one wins
        except (OSError, SafetensorError) as e:
            self.counters["refused_statistics"] += 1
            session.off = str(e)
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return self._published(session)

    def _path(self, session: _Session, key: bytes, kind: Kind) -> Path:
        assert session.objects is not None
        return session.objects / key.hex()[:2] / f"{key.hex()}-{kind.name.lower()}{SUFFIX}"

    # -- save -------------------------------------------------------------------------------------------------------

    def save(self, cache: TurboQuantCache, tokens: Sequence[int] | Tensor) -> None:
        """Store what is complete and not stored yet: chunks whose pages are packed, and the window at the last border.

        Called after every forward pass by caches of :meth:`TurboQuantCache.for_model` with a store.

        Args:
            cache: holds exactly ``tokens``, one sequence.
            tokens: all token ids so far.
        """
        session = self._session(cache)
        ids = _token_list(tokens)
        border = len(ids) // CHUNK_TOKENS * CHUNK_TOKENS
        if len(ids) - session.seen < PAGE_TOKENS and not session.decoding:
            # The prompt has ended: its last window object is what the same prompt will look for, so it stays.
            session.decoding, session.window = True, None
        elif len(ids) - session.seen >= PAGE_TOKENS:
            session.decoding = False
        session.seen = len(ids)
        if session.off or not border or not self._open(session, cache, publish=True):
            return
        if any(s.length != len(ids) for s in cache._stores):
            self.detach(cache, "token ids that do not match the cache")
            return
        ready = min((s.packed_tokens for s in cache._stores if isinstance(s, PackedLayer)), default=len(ids)) // CHUNK_TOKENS
        if ready <= session.chunks and border <= session.border:
            return
        if any(s.batch_size > 1 for s in cache._stores):
            self.detach(cache, "only single sequences are stored")
            return
        keys = chunk_keys(session.root or b"", ids)
        for c in range(session.chunks, min(ready, len(keys))):
            self._save_chunk(session, cache, c, keys[c])
        session.chunks = max(session.chunks, ready)
        if border > session.border:
            self._save_window(session, cache, border, keys[border // CHUNK_TOKENS - 1])
            session.border = border

    def _save_chunk(self, session: _Session, cache: TurboQuantCache, c: int, key: bytes) -> None:
        path = self._path(session, key, Kind.CHUNK)
        if path in self.tier:
            self.tier.touch(path)
            return
        start, stop = c * CHUNK_TOKENS, (c + 1) * CHUNK_TOKENS
        parts = [export_chunk(s, start, stop) for s in cache._stores if _is_chunked(s)]
        payload = [p.reshape(-1).view(torch.uint8).numpy().data for p in parts]
        self.tier.put(path, Kind.CHUNK, stop, session.root or b"", key, payload)

    def _save_window(self, session: _Session, cache: TurboQuantCache, border: int, key: bytes) -> None:
        path = self._path(session, key, Kind.WINDOW)
        if path in self.tier:
            self.tier.touch(path)
        else:
            skip = _chunks_at(cache, border) * CHUNK_TOKENS
            states = [export_state(s, border, skip if _is_chunked(s) else 0) for s in cache._stores]
            if any(s is None for s in states):
                return
            tensors = {f"{i}{_SEPARATOR}{n}": t for i, s in enumerate(states) if s for n, t in s.items()}
            if not self.tier.put(path, Kind.WINDOW, border, session.root or b"", key, [safetensors.torch.save(tensors)]):
                return
        if session.window is not None and session.window != path:
            self.tier.remove(session.window)
        session.window = path if border // CHUNK_TOKENS % self.window_interval else None

    # -- restore ----------------------------------------------------------------------------------------------------

    def restore(self, cache: TurboQuantCache, tokens: Sequence[int] | Tensor) -> int:
        """Fill an empty cache with the longest stored prefix of ``tokens``.

        At least one token is left to feed. Anything missing or damaged is a counted miss, and a shorter prefix is tried.

        Args:
            cache: empty, of the same model and configuration.
            tokens: the prompt's ids, (tokens,) or (1, tokens).

        Returns:
            The number of tokens restored; 0 if none.

        Raises:
            TurboQuantError: the cache is not empty.
        """
        if any(s.length for s in cache._stores):
            raise TurboQuantError("restore() needs an empty cache; call cache.reset() or make a new one")
        session = self._session(cache)
        ids = _token_list(tokens)
        if session.off or not self._open(session, cache, publish=False):
            self.counters["miss_empty"] += 1
            return 0
        keys = chunk_keys(session.root or b"", ids[: max(0, len(ids) - 1)])
        chunks: dict[int, list[Tensor | None] | None] = {}
        for m in range(len(keys), 0, -1):
            window = self._path(session, keys[m - 1], Kind.WINDOW)
            if window in self.tier and self._restore_at(session, cache, m, keys, chunks):
                session.chunks = _chunks_at(cache, m * CHUNK_TOKENS)
                session.border = session.seen = m * CHUNK_TOKENS
                if hasattr(cache, "token_ids"):
                    cache.token_ids = ids[: m * CHUNK_TOKENS]
                self.counters["hits"] += 1
                self.counters["restored_tokens"] += m * CHUNK_TOKENS
                return m * CHUNK_TOKENS
        self.counters["miss_missing"] += 1
        return 0

    def _restore_at(
        self,
        session: _Session,
        cache: TurboQuantCache,
        m: int,
        keys: list[bytes],
        loaded: dict[int, list[Tensor | None] | None],
    ) -> bool:
        border = m * CHUNK_TOKENS
        payload = self.tier.get(self._path(session, keys[m - 1], Kind.WINDOW), Kind.WINDOW, session.root or b"", keys[m - 1])
        if payload is None:
            return False
        try:
            tensors = safetensors.torch.load(bytes(payload))
        except SafetensorError:
            self.counters["miss_payload"] += 1
            return False
        count = _chunks_at(cache, border)
        for c in range(count):
            if c not in loaded:
                loaded[c] = self._load_chunk(session, cache, c, keys[c], tensors)
            if loaded[c] is None:
                return False
        devices = getattr(cache, "devices", None) or [cache._device] * cache.num_layers
        try:
            for i, store in enumerate(cache._stores):
                prefix = f"{i}{_SEPARATOR}"
                state = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
                parts = [part for c in range(count) if (part := (loaded[c] or [])[i]) is not None]
                import_state(store, state, parts, devices[i])
        except CacheFileError:
            self.counters["miss_shape"] += 1
            for store in cache._stores:
                store.reset()
            return False
        return True

    def _load_chunk(
        self, session: _Session, cache: TurboQuantCache, c: int, key: bytes, window: dict[str, Tensor]
    ) -> list[Tensor | None] | None:
        """The chunk's tensors by layer (None for layers without), or None if it is missing or damaged."""
        payload = self.tier.get(self._path(session, key, Kind.CHUNK), Kind.CHUNK, session.root or b"", key)
        if payload is None:
            return None
        raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts: list[Tensor | None] = []
        at = 0
        for i, s in enumerate(cache._stores):
            if not _is_chunked(s):
                parts.append(None)
                continue
            shape, dtype = _chunk_shape(s, window.get(f"{i}{_SEPARATOR}exact"))
            size = int(torch.Size(shape).numel()) * dtype.itemsize
            if at + size > raw.numel():
                break
            parts.append(raw[at : at + size].view(dtype).view(shape))
            at += size
        if at != raw.numel() or len(parts) != cache.num_layers:
            self.counters["miss_shape"] += 1
            return None
        return parts


def _is_chunked(store: Any) -> bool:
    """Whether a layer's old tokens travel as chunks; sliding layers keep few and travel whole in the window object."""
    return isinstance(store, ExactLayer) or (isinstance(store, PackedLayer) and store.sliding_window is None)


def _chunks_at(cache: TurboQuantCache, border: int) -> int:
    """Number of chunks that are packed when a cache holds ``border`` tokens; the window object carries the rest."""
    return max(0, border - cache.config.recent_tokens) // PAGE_TOKENS // _CHUNK_PAGES


def _chunk_shape(store: Any, exact: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a layer's part of a chunk; ``exact`` is what the window object holds of an exact layer."""
    if isinstance(store, PackedLayer):
        return (1, store.num_kv_heads, _CHUNK_PAGES, store.layout.page_bytes), torch.uint8
    return (2, 1, store.num_kv_heads, CHUNK_TOKENS, store.head_dim), torch.uint8 if exact is None else exact.dtype


def _token_list(tokens: Sequence[int] | Tensor) -> list[int]:
    if isinstance(tokens, Tensor):
        if tokens.dim() == 2 and tokens.shape[0] != 1:
            raise ShapeError(f"token ids of shape {tuple(tokens.shape)}: the store takes one sequence, (tokens,) or (1, tokens)")
        return [int(t) for t in tokens.reshape(-1).tolist()]
    return [int(t) for t in tokens]
