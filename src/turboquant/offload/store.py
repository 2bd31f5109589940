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
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..cache.cache import TurboQuantCache
from ..cache.layer import PackedLayer
from ..cache.state import export_chunk, export_state, import_state
from ..codec.center import Statistics
from ..codec.layout import PAGE_TOKENS
from ..errors import CacheFileError, ConfigError, TurboQuantError
from .container import TEMPORARY, Kind
from .disk import STATISTICS, SUFFIX, DiskTier
from .keys import CHUNK_TOKENS, chunk_keys, namespace
from .session import SEPARATOR, Session, arrange_like_fed, chunks_at, is_chunked, split_chunk, token_list, unstorable


class TurboQuantStore:
    """A bounded folder of compressed prefixes.

    Example:
        >>> store = TurboQuantStore("kv-store", max_bytes=10 << 30)
        >>> cache = TurboQuantCache.for_model(model, "turboquant_3bit", store=store)
        >>> restored = store.restore(cache, input_ids)  # tokens that need no prefill
        >>> prefill(model, input_ids, cache)  # the rest, in blocks of 256 tokens
        >>> model.generate(input_ids, past_key_values=cache)

    Restored output is token for token that of a run without the store if both feed the prompt in blocks of 256 tokens
    (:func:`turboquant.prefill`; the command line does).

    Args:
        directory: created if missing. Several threads and processes may use it at once.
        max_bytes: bound on the bytes of all stored files.
        salt: tenants with different salts never share objects.
        window_interval: a window object is kept every this many chunks of 256 tokens, besides the last ones of prompt and
            answer.

    Attributes:
        counters: events: ``hits``, ``restored_tokens``, ``miss_<reason>``, ``stored``, ``evicted``, ``refused_<reason>``.

    Raises:
        ConfigError: a setting cannot work, or the directory cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int, *, salt: str = "", window_interval: int = 8) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes!r} must be a positive number of bytes")
        if not isinstance(window_interval, int) or window_interval < 1:
            raise ConfigError(f"window_interval={window_interval!r} must be a positive number of chunks")
        if not isinstance(salt, str):
            raise ConfigError(f"salt={salt!r} must be a string")
        self.counters: Counter[str] = Counter()
        self.tier = DiskTier(Path(directory), max_bytes, self.counters)
        self.salt, self.window_interval = salt, window_interval

    def __repr__(self) -> str:
        return f"TurboQuantStore({str(self.tier.folder)!r}, {self.nbytes} of {self.tier.max_bytes} bytes)"

    def __deepcopy__(self, memo: object) -> TurboQuantStore:
        """Return the store itself: a copied cache goes on using it."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.tier.nbytes

    # -- a cache joins ----------------------------------------------------------------------------------------------

    def attach(self, cache: TurboQuantCache) -> None:
        """Prepare an empty cache: it uses the published statistics, and keeps what a window object needs.

        Raises:
            ConfigError: the cache does not know its model; set ``cache.model_fingerprint`` to a name of the weights. Or it
                does not know its dtype.
        """
        if not cache.model_fingerprint:
            raise ConfigError("the store needs to know the model: set cache.model_fingerprint to a name of its weights")
        if cache._dtype is None:
            raise ConfigError("the store needs to know what it stores: give the cache a dtype")
        session = Session(self.tier.folder / self._namespace(cache).hex()[:32])
        cache._session = session
        if unstorable(cache):
            self.detach(cache, "layers that cannot be stored")
            return
        session.statistics = self._published(session, cache)
        for i, layer in enumerate(cache._stores):
            if isinstance(layer, PackedLayer):
                layer.retain_multiple = CHUNK_TOKENS
                if session.statistics is not None and layer.statistics is None and i in session.statistics.layers:
                    layer.preset_statistics(session.statistics.layers[i])

    def rewind(self, cache: TurboQuantCache, length: int) -> None:
        """Note that ``cache`` was cropped to ``length`` tokens: what follows may differ from what was saved.

        A crop into packed pages leaves decoded values where a fresh cache has exact ones, so nothing is saved from there on.
        """
        session = self._session(cache)
        if not length:
            self.attach(cache)  # its layers have forgotten the statistics that they measured
            return
        if length < session.packed:
            self.detach(cache, "cropped into packed pages")
        border = length // CHUNK_TOKENS * CHUNK_TOKENS
        if session.seen - length >= PAGE_TOKENS:
            session.window = None  # what was there has ended, as a prompt does; fewer are speculative tokens
        session.border = min(session.border, border)
        session.seen = min(session.seen, length)
        session.packed = min(session.packed, length)
        session.chunks = min(session.chunks, border // CHUNK_TOKENS)
        session.tried = session.chunks

    def detach(self, cache: TurboQuantCache, reason: str) -> None:
        """Stop saving ``cache`` until its reset; ``reason`` is counted."""
        session = self._session(cache)
        if not session.off:
            session.off = reason
            self.tier.count(f"refused_{reason}")

    def _session(self, cache: TurboQuantCache) -> Session:
        session = getattr(cache, "_session", None)
        if not isinstance(session, Session):
            self.attach(cache)
            session = cache._session
        assert isinstance(session, Session)
        return session

    def _published(self, session: Session, cache: TurboQuantCache) -> Statistics | None:
        """Load the statistics of this model and configuration; None, and a counter if it is damaged, if there are none."""
        path = session.folder / STATISTICS
        if path not in self.tier:
            return None
        try:
            found: Statistics | None = Statistics.load(path)
        except CacheFileError:
            found = None
        except OSError:
            self.tier.count("miss_unreadable")
            return None
        shapes = {i: (s.num_kv_heads, s.head_dim) for i, s in enumerate(cache._stores) if isinstance(s, PackedLayer)}
        if (
            found is None
            or found.model != cache.model_fingerprint
            or any(tuple(s.mean.shape) != shapes.get(i) for i, s in found.layers.items())
        ):
            self.tier.count("miss_statistics")
            self.tier.remove(path)
            with contextlib.suppress(OSError):
                path.rmdir()
            return None
        self.tier.touch(path, session.when)
        return found

    def _open(self, session: Session, cache: TurboQuantCache, publish: bool) -> bool:
        """Fix the namespace once the cache's statistics are frozen; publish them if they are the first."""
        if session.root is not None:
            return True
        if any(s.transform is None for s in cache._stores if isinstance(s, PackedLayer)):
            return False
        own = cache.statistics
        if session.statistics is None and publish:
            session.statistics = self._publish(session, cache, own)
            if session.statistics is None:
                self.detach(cache, "statistics")
        if session.statistics is None:
            return False
        digest = own.digest()
        if session.statistics.digest() != digest:
            self.detach(cache, "other statistics")
            return False
        session.digest, session.root = digest, self._namespace(cache, statistics=digest, dtype=str(cache._dtype))
        session.objects = session.folder / session.root.hex()[:32]
        return True

    def _namespace(self, cache: TurboQuantCache, **more: str) -> bytes:
        return namespace(model=cache.model_fingerprint, config=cache.config.digest(), salt=self.salt, **more)

    def _publish(self, session: Session, cache: TurboQuantCache, own: Statistics) -> Statistics | None:
        """Write the statistics unless another cache was first; returns those that count."""
        path = session.folder / STATISTICS

        def create() -> None:
            temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
            try:
                own.save(temporary)
                os.replace(temporary, path)
            except SafetensorError as e:
                raise OSError(str(e)) from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()

        size = 1024 + sum(t.nbytes + 256 for t in own.tensors().values())
        return self._published(session, cache) if self.tier.add(path, size, -1, session.when, create) else None

    def _path(self, session: Session, key: bytes, kind: Kind) -> Path:
        assert session.objects is not None
        return session.objects / key.hex()[:2] / f"{key.hex()}-{kind.name.lower()}{SUFFIX}"

    # -- save -------------------------------------------------------------------------------------------------------

    def save(self, cache: TurboQuantCache, tokens: Sequence[int] | Tensor) -> None:
        """Store what is complete and not stored yet: chunks whose pages are packed, and the window at the last border.

        Caches of :meth:`TurboQuantCache.for_model` call it after every forward pass. What cannot be stored is counted.

        Args:
            cache: holds exactly ``tokens``, one sequence.
            tokens: all token ids so far.

        Raises:
            ShapeError: ``tokens`` is not one sequence of integers.
        """
        session = self._session(cache)
        ids = tokens if isinstance(tokens, list) else token_list(tokens)
        border = len(ids) // CHUNK_TOKENS * CHUNK_TOKENS
        if len(ids) - session.seen < PAGE_TOKENS and not session.decoding:
            # The prompt has ended: its last window object is what the same prompt will look for, so it stays.
            session.decoding, session.window = True, None
        elif len(ids) - session.seen >= PAGE_TOKENS:
            session.decoding = False
        session.seen = len(ids)
        packed = [s.packed_tokens for s in cache._stores if isinstance(s, PackedLayer)]
        session.packed = max(packed, default=0)
        if session.off or not border:
            return
        try:
            ready = min(packed, default=len(ids)) // CHUNK_TOKENS
            if self._open(session, cache, publish=True) and (ready > session.tried or border > session.border):
                self._save(session, cache, ids, ready, border)
        except Exception as e:  # nothing that storing does may end a generation
            self.detach(cache, type(e).__name__)

    def _save(self, session: Session, cache: TurboQuantCache, ids: list[int], ready: int, border: int) -> None:
        if reason := self._reason_against(session, cache, len(ids)):
            self.detach(cache, reason)
            return
        keys = chunk_keys(session.root or b"", ids)
        session.tried = max(session.tried, ready)
        while session.chunks < ready and self._save_chunk(session, cache, session.chunks, keys[session.chunks]):
            session.chunks += 1
        if border > session.border:
            session.border = border
            session.tried = session.chunks  # what was refused is tried again once a chunk
            if session.chunks >= chunks_at(cache, border):
                self._save_window(session, cache, border, keys[border // CHUNK_TOKENS - 1])

    def _reason_against(self, session: Session, cache: TurboQuantCache, length: int) -> str:
        if any(s.length != length for s in cache._stores):
            return "token ids that do not match the cache"
        if any(s.batch_size > 1 for s in cache._stores):
            return "only single sequences are stored"
        if any(s.starts is not None for s in cache._stores if isinstance(s, PackedLayer)):
            return "padded sequences are not stored"
        return "" if cache.statistics.digest() == session.digest else "other statistics"

    def _save_chunk(self, session: Session, cache: TurboQuantCache, c: int, key: bytes) -> bool:
        if not any(is_chunked(s) for s in cache._stores):
            return True
        path = self._path(session, key, Kind.CHUNK)
        if path in self.tier:
            self.tier.touch(path, session.when)
            return True
        start, stop = c * CHUNK_TOKENS, (c + 1) * CHUNK_TOKENS
        parts = [export_chunk(s, start, stop) for s in cache._stores if is_chunked(s)]
        payload = [p.reshape(-1).view(torch.uint8).numpy().data for p in parts]
        return self.tier.put(path, Kind.CHUNK, stop, session.root or b"", key, payload, session.when)

    def _save_window(self, session: Session, cache: TurboQuantCache, border: int, key: bytes) -> None:
        path = self._path(session, key, Kind.WINDOW)
        replaced = session.window
        if path in self.tier:
            self.tier.touch(path, session.when)
            session.window = None  # another prompt may end here
        else:
            skip = chunks_at(cache, border) * CHUNK_TOKENS
            states = [export_state(s, border, skip if is_chunked(s) else 0) for s in cache._stores]
            if any(s is None for s in states):
                return
            tensors = {f"{i}{SEPARATOR}{n}": t for i, s in enumerate(states) if s for n, t in s.items()}
            payload = [safetensors.torch.save(tensors)]
            if not self.tier.put(path, Kind.WINDOW, border, session.root or b"", key, payload, session.when):
                return
            session.window = path if border // CHUNK_TOKENS % self.window_interval else None
        if replaced is not None:
            self.tier.remove(replaced)

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
            ShapeError: ``tokens`` is not one sequence of integers.
            ConfigError: a token id is negative or does not fit in 32 bits.
        """
        if any(s.length for s in cache._stores):
            raise TurboQuantError("restore() needs an empty cache; call cache.reset() or make a new one")
        ids = token_list(tokens)
        if not self._session(cache).off:
            self.attach(cache)  # another process may have published statistics since
        session = self._session(cache)
        if session.off or not self._open(session, cache, publish=False):
            self.tier.count("miss_empty")
            return 0
        keys = chunk_keys(session.root or b"", ids[: max(0, len(ids) - 1)])
        chunks: dict[int, list[Tensor | None] | None] = {}
        for m in range(len(keys), 0, -1):
            border = m * CHUNK_TOKENS
            if self._path(session, keys[m - 1], Kind.WINDOW) in self.tier and self._restore_at(session, cache, m, keys, chunks):
                session.chunks = session.tried = chunks_at(cache, border)
                session.border = session.seen = border
                session.packed = max((s.packed_tokens for s in cache._stores if isinstance(s, PackedLayer)), default=0)
                if hasattr(cache, "token_ids"):
                    cache.token_ids = ids[:border]
                self.tier.count("hits")
                self.tier.count("restored_tokens", border)
                return border
        self.tier.count("miss_missing")
        return 0

    def _restore_at(
        self,
        session: Session,
        cache: TurboQuantCache,
        m: int,
        keys: list[bytes],
        loaded: dict[int, list[Tensor | None] | None],
    ) -> bool:
        """Fill the cache with the first ``m`` chunks of 256 tokens; False, counted and the cache empty, if one is damaged."""
        border, root = m * CHUNK_TOKENS, session.root or b""
        path = self._path(session, keys[m - 1], Kind.WINDOW)
        if (payload := self.tier.get(path, Kind.WINDOW, root, keys[m - 1], session.when)) is None:
            return False
        try:
            tensors = safetensors.torch.load(bytes(payload))
            count = chunks_at(cache, border)
            for c in range(count):
                if c not in loaded:
                    loaded[c] = self._load_chunk(session, cache, c, keys[c], tensors)
                if loaded[c] is None:
                    return False
            devices = getattr(cache, "devices", None) or [cache._device] * cache.num_layers
            for i, store in enumerate(cache._stores):
                prefix = f"{i}{SEPARATOR}"
                state = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
                parts = [part for c in range(count) if (part := (loaded[c] or [])[i]) is not None]
                import_state(store, state, parts, devices[i])
                if store.length != border:
                    raise CacheFileError(f"{store.length} tokens instead of {border}")
                arrange_like_fed(store, border)
        except Exception:  # whatever a strange file makes torch or safetensors raise
            self.tier.count("miss_shape")
            self.tier.remove(path)
            for store in cache._stores:
                store.reset()
            return False
        return True

    def _load_chunk(
        self, session: Session, cache: TurboQuantCache, c: int, key: bytes, window: dict[str, Tensor]
    ) -> list[Tensor | None] | None:
        """Load a chunk's tensors by layer (None for layers without); None if it is missing or damaged."""
        path = self._path(session, key, Kind.CHUNK)
        if (payload := self.tier.get(path, Kind.CHUNK, session.root or b"", key, session.when)) is None:
            return None
        if (parts := split_chunk(cache, payload, window)) is None:
            self.tier.count("miss_shape")
            self.tier.remove(path)
        return parts
