"""A bounded folder of containers: the disk tier.

Files are the truth; the index is rebuilt from their headers when the folder is opened and whenever another process may have
changed it. Eviction is least recently used first and, among equals, the deepest prefix first, because a chunk is useless
without those before it. Every failure is a counted miss; nothing is ever raised into generation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .container import HEADER_BYTES, TEMPORARY, Buffer, Damaged, Kind, decode_header, read, write

SUFFIX = ".tqc"
#: A writer renames its temporary file within seconds; older ones were left by a process that died.
_STALE_SECONDS = 600.0
#: Space on the disk that is never used up.
MIN_FREE_BYTES = 256 << 20


@dataclass
class _Entry:
    size: int
    used: float
    tokens: int


class DiskTier:
    """Containers below one folder, at most ``max_bytes`` of them.

    Args:
        folder: created if missing.
        max_bytes: bound on the bytes of all containers.
        counters: ``hits``, ``miss_<reason>``, ``stored``, ``stored_bytes``, ``evicted``, ``refused_<reason>`` are counted here.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int, counters: Counter[str]) -> None:
        self.folder, self.max_bytes, self.counters = folder, max_bytes, counters
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"cannot use {folder} as a store: {e.strerror or e}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot use {folder} as a store: no permission to write")
        self._index: dict[Path, _Entry] = {}
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all containers, as last seen."""
        return sum(e.size for e in self._index.values())

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Rebuild the index from the files, and remove what dead writers left."""
        seen: dict[Path, _Entry] = {}
        for path in self.folder.rglob(f"*{SUFFIX}*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if TEMPORARY in path.name:
                    if time.time() - stat.st_mtime > _STALE_SECONDS:
                        path.unlink()
                elif path.suffix == SUFFIX:
                    old = self._index.get(path)
                    tokens = old.tokens if old is not None else _depth(path)
                    seen[path] = _Entry(stat.st_size, stat.st_mtime, tokens)
        self._index = seen

    def __contains__(self, path: Path) -> bool:
        return path.exists()

    def put(self, path: Path, kind: Kind, tokens: int, namespace: bytes, key: bytes, payload: Iterable[Buffer]) -> bool:
        """Store a container, evicting others; False (and a counter) if it could not be."""
        parts = list(payload)
        size = HEADER_BYTES + sum(memoryview(p).nbytes for p in parts)
        if not self._make_room(size, keep=path):
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, kind, tokens, namespace, key, parts)
        except OSError as e:
            self.counters[f"refused_{e.strerror or 'error'}".lower().replace(" ", "_")] += 1
            return False
        self._index[path] = _Entry(size, time.time(), tokens)
        self.counters["stored"] += 1
        self.counters["stored_bytes"] += size
        return True

    def get(self, path: Path, kind: Kind, namespace: bytes, key: bytes) -> memoryview | None:
        """The verified payload, or None; a damaged file is counted, deleted and thereby repaired by the next put."""
        try:
            _, payload = read(path, kind, namespace, key)
        except Damaged as e:
            self.counters[f"miss_{e.reason}"] += 1
            if e.reason not in ("missing", "unreadable"):
                self.remove(path)
            return None
        self.touch(path)
        return payload

    def touch(self, path: Path) -> None:
        """Mark as used now."""
        with contextlib.suppress(OSError):
            os.utime(path)
            if path in self._index:
                self._index[path].used = time.time()

    def remove(self, path: Path) -> None:
        """Delete a container, if it is there."""
        with contextlib.suppress(OSError):
            path.unlink()
        self._index.pop(path, None)

    def _make_room(self, size: int, keep: Path) -> bool:
        if size > self.max_bytes:
            self.counters["refused_larger_than_store"] += 1
            return False
        self.refresh()
        over = self.nbytes - (self._index[keep].size if keep in self._index else 0) + size - self.max_bytes
        with contextlib.suppress(OSError):
            over = max(over, size + MIN_FREE_BYTES - shutil.disk_usage(self.folder).free)
        for path, entry in sorted(self._index.items(), key=lambda item: (item[1].used, -item[1].tokens)):
            if over <= 0:
                break
            if path != keep:
                self.remove(path)
                self.counters["evicted"] += 1
                over -= entry.size
        if over > 0:
            self.counters["refused_disk_full"] += 1
        return over <= 0


def _depth(path: Path) -> int:
    """Tokens of a container by its header; an unreadable one counts as deepest and is evicted first."""
    try:
        with open(path, "rb") as f:
            return decode_header(f.read(HEADER_BYTES)).tokens
    except (OSError, Damaged):
        return 1 << 62
