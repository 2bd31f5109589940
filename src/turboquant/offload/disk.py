"""A bounded folder of containers: the disk tier.

Files are the truth; the index is rebuilt from their headers when the folder is opened and before every write, because another
process may have changed it. Writers exclude each other, so that the bound holds for all of them together. Eviction is least
recently used first and, among equals, the deepest prefix first, because a chunk is useless without those before it; callers
give everything that belongs to one prompt the same time. Every failure is a counted miss; nothing is raised into generation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .container import HEADER_BYTES, TEMPORARY, Buffer, Damaged, Kind, decode_header, read, write

SUFFIX = ".tqc"
STATISTICS = "statistics.safetensors"
#: Space on the disk that is never used up.
MIN_FREE_BYTES = 256 << 20
#: A writer renames its temporary file within seconds; older ones were left by a process that died.
_STALE_SECONDS = 600.0
#: Writers wait this long for each other, then give up storing.
_LOCK_SECONDS = 5.0


@dataclass
class _Entry:
    size: int
    used: int  # nanoseconds
    tokens: int

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.used, -self.tokens


class DiskTier:
    """Files below one folder, at most ``max_bytes`` of them: containers, and the statistics that they depend on.

    Args:
        folder: created if missing.
        max_bytes: bound on the bytes of all files.
        counters: ``miss_<reason>``, ``stored``, ``stored_bytes``, ``evicted``, ``refused_<reason>`` are counted here.

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
        self._threads = threading.RLock()
        self._index: dict[Path, _Entry] = {}
        self._unfinished = 0
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all files, as last seen."""
        with self._threads:
            return sum(e.size for e in self._index.values()) + self._unfinished

    def __len__(self) -> int:
        """Count the containers, as last seen."""
        with self._threads:
            return sum(p.suffix == SUFFIX for p in self._index)

    def __contains__(self, path: Path) -> bool:
        return os.path.exists(path)

    def count(self, event: str, n: int = 1) -> None:
        """Add to a counter."""
        with self._threads:
            self.counters[event.lower().replace(" ", "_")] += n

    def refresh(self) -> None:
        """Rebuild the index from the files, and remove what dead writers left."""
        now = time.time_ns()
        with self._threads:
            seen: dict[Path, _Entry] = {}
            self._unfinished = 0
            for path, unfinished in self._files():
                with contextlib.suppress(OSError):
                    found = path.stat()
                    if not stat.S_ISREG(found.st_mode):
                        continue
                    if not unfinished:
                        old = self._index.get(path)
                        tokens = old.tokens if old is not None else _depth(path)
                        seen[path] = _Entry(found.st_size, min(found.st_mtime_ns, now), tokens)
                    elif now - found.st_mtime_ns > _STALE_SECONDS * 1e9:
                        path.unlink()
                    else:
                        self._unfinished += found.st_size
            self._index = seen

    def _files(self) -> Iterator[tuple[Path, bool]]:
        """Every file of ours, and whether it is a temporary one."""
        for root, _, names in os.walk(self.folder):  # skips folders that it cannot read or that vanish
            for name in names:
                final, mark, _ = name.partition(TEMPORARY)
                if final.endswith(SUFFIX) or final == STATISTICS:
                    yield Path(root, name), bool(mark)

    def put(
        self, path: Path, kind: Kind, tokens: int, namespace: bytes, key: bytes, payload: Iterable[Buffer], when: int
    ) -> bool:
        """Store a container, evicting others; False (and a counter) if it could not be. ``when`` as in :meth:`touch`."""
        parts = list(payload)
        size = HEADER_BYTES + sum(memoryview(p).nbytes for p in parts)
        if not self.add(path, size, tokens, when, lambda: write(path, kind, tokens, namespace, key, parts)):
            return False
        self.count("stored")
        self.count("stored_bytes", size)
        return True

    def add(self, path: Path, size: int, tokens: int, when: int, create: Callable[[], object]) -> bool:
        """Let ``create`` write ``path``, at most ``size`` bytes, unless it is there; False if it could not be."""
        with self._exclusive() as free:
            if not free:
                self.count("refused_locked")
                return False
            if not os.path.isfile(path):
                if not self._make_room(size, (when, -tokens)):
                    return False
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    create()
                    size = path.stat().st_size
                except (OSError, MemoryError) as e:
                    self.count(f"refused_{getattr(e, 'strerror', None) or 'error'}")
                    return False
                self._index[path] = _Entry(size, when, tokens)
                _set_time(path, when)
            else:
                self.touch(path, when)
            return True

    def get(self, path: Path, kind: Kind, namespace: bytes, key: bytes, when: int) -> memoryview | None:
        """Read the verified payload; None, and a counter, if there is none.

        A damaged file is deleted and thereby repaired by the next put. ``when`` as in :meth:`touch`.
        """
        try:
            _, payload = read(path, kind, namespace, key)
        except Damaged as e:
            self.count(f"miss_{e.reason}")
            if e.reason == "unreadable":
                with contextlib.suppress(OSError):
                    path.rmdir()  # an empty folder in its place; a file that may be readable later stays
            elif e.reason != "missing":
                self.remove(path)
            return None
        self.touch(path, when)
        return payload

    def touch(self, path: Path, when: int) -> None:
        """Mark as used at ``when`` (:func:`time.time_ns`), if that is later than its last use."""
        with contextlib.suppress(OSError), self._threads:
            if path.stat().st_mtime_ns < when:
                _set_time(path, when)
                if path in self._index:
                    self._index[path].used = when

    def remove(self, path: Path) -> bool:
        """Delete a file; True if it is gone."""
        with self._threads:
            with contextlib.suppress(OSError):
                path.unlink()
            if gone := not os.path.exists(path):
                self._index.pop(path, None)
            return gone

    def _make_room(self, size: int, rank: tuple[int, int]) -> bool:
        """Evict what ranks below a file that is to come; nothing, and False, if that is not enough."""
        if size > self.max_bytes:
            self.count("refused_larger_than_store")
            return False
        self.refresh()
        over, reason = self.nbytes + size - self.max_bytes, "refused_store_full"
        with contextlib.suppress(OSError):
            lacking = size + MIN_FREE_BYTES - shutil.disk_usage(self.folder).free
            if lacking > max(over, 0):
                over, reason = lacking, "refused_disk_full"
        victims = sorted(((e.rank, e.size, p) for p, e in self._index.items() if e.rank < rank))
        if sum(n for _, n, _ in victims) < over:
            self.count(reason)
            return False
        for _, n, path in victims:
            if over <= 0:
                break
            if self.remove(path):
                self.count("evicted")
                over -= n
        if over > 0:
            self.count("refused_not_removable")
        return over <= 0

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Keep other threads and processes from writing; False if another one holds on for too long.

        Where folders cannot be locked (Windows, some network disks), only threads exclude each other.
        """
        with self._threads:
            try:
                handle = os.open(self.folder, os.O_RDONLY)
            except OSError:
                yield True
                return
            try:
                yield _lock(handle)
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    if sys.platform != "win32":
        import fcntl

        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.005)
            except OSError:
                break
    return True


def _set_time(path: Path, when: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, ns=(when, when))


def _depth(path: Path) -> int:
    """Tokens of a file by its header.

    An unreadable one counts as deepest and is evicted first; statistics are evicted after all that depends on them.
    """
    if path.name == STATISTICS:
        return -1
    try:
        with open(path, "rb") as f:
            return decode_header(f.read(HEADER_BYTES)).tokens
    except (OSError, Damaged):
        return 1 << 62
