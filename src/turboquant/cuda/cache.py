"""Compiled kernels on disk, so that only the first process on a machine waits for the compiler.

One file per kernel source, macros, target, compiler and package version, named by their digest. Processes that need the same
kernel at once compile it once. A damaged file is compiled again. A folder that cannot be written costs one warning, and kernels
are then kept in memory only. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from .compiler import Compiled, Defines, compile_source, digest, freeze, read_sources, source_path

_MAGIC = b"TQKERN1\n"
_CHECKSUM_BYTES = 16


def folder() -> Path:
    """``$TURBOQUANT_CACHE_DIR``, or ``turboquant`` in the user's cache folder; kernels are in ``kernels`` below it."""
    chosen = os.environ.get("TURBOQUANT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "turboquant" / "kernels"


def load(source: str, defines: Defines, arch: str) -> Compiled:
    """:func:`~turboquant.cuda.compiler.compile_source`, through the folder.

    Raises:
        KernelError: as of ``compile_source``.
    """
    files, frozen = read_sources(source_path(source)), freeze(defines)
    key = digest(files, frozen, arch)
    path = folder() / f"{source_path(source).stem}-{arch}-{key}.bin"
    found = _read(path)
    if found is None:
        with _locked(path.parent, key) as writable:
            found = _read(path) if writable else None  # another process may have written it while this one waited
            if found is None:
                made = compile_source(source, defines, arch, files)
                found = made.cubin, made.log
                if writable:
                    _write(path, *found)
    return Compiled(source, frozen, arch, *found)


def _checksum(data: bytes) -> bytes:
    return blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


def _read(path: Path) -> tuple[bytes, str] | None:
    """(machine code, log) of a file; None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _CHECKSUM_BYTES
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : start] != _checksum(body):
        return None
    count = int.from_bytes(body[:4], "little")
    return body[4 + count :], body[4 : 4 + count].decode()


def _write(path: Path, cubin: bytes, log: str) -> None:
    text = log.encode()
    body = len(text).to_bytes(4, "little") + text + cubin
    # One name: the lock keeps others away, and what a process that died has left is overwritten.
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(_MAGIC + _checksum(body) + body)
        os.replace(temporary, path)
    except OSError as e:
        _warn(str(path.parent), e.strerror or str(e))
        with contextlib.suppress(OSError):
            temporary.unlink()


@functools.cache
def _warn(where: str, why: str) -> None:
    """Once per folder and reason."""
    warnings.warn(
        f"compiled kernels cannot be kept in {where} ({why}); every process compiles its own. "
        "Set TURBOQUANT_CACHE_DIR to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def _locked(where: Path, key: str) -> Iterator[bool]:
    """Exclude other processes that compile the same kernel; False if the folder cannot be written.

    Lock files are never removed (removing one that another process waits for would let two in), hence 256 for all keys.
    """
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle = os.open(where / f"{key[:2]}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        _warn(str(where), e.strerror or str(e))
        yield False
        return
    try:
        # A file system without locks: compiling twice is harmless, files are replaced whole.
        with contextlib.suppress(OSError):
            _lock(handle)
        yield True
    finally:
        os.close(handle)  # releases the lock


def _lock(handle: int) -> None:
    """Wait for the lock; it is released when the process ends, too."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # gives up after 10 s
                return
            except OSError as e:
                if e.errno != 36:  # EDEADLK: still locked
                    raise
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
