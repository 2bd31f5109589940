r"""The file format of everything stored: a 128-byte header, then the payload.

Little-endian, fixed offsets, so that any language can read it and a payload can be mapped into memory:

    0   magic            8 bytes  b"TQCACHE\0"
    8   header version   u16      1
    10  kind             u16      see Kind
    12  layout version   u16      of the pages (codec/layout.py)
    14  codebook id      u16      of the pages
    16  tokens           u64      tokens of the sequence up to the end of this object
    24  payload bytes    u64
    32  payload crc32    u32
    36  reserved         4 bytes  zero
    40  namespace        32 bytes who may read it: model, configuration, statistics, tenant (offload/keys.py)
    72  key              32 bytes which tokens (offload/keys.py); zero for whole caches
    104 reserved         20 bytes zero
    124 header crc32     u32      of bytes 0 to 123

A file appears under its name only when complete (temporary name, then rename).
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ..codec.layout import CODEBOOK_ID, LAYOUT_VERSION

MAGIC = b"TQCACHE\0"
HEADER_VERSION = 1
HEADER_BYTES = 128
TEMPORARY = ".tmp-"
_FIELDS = struct.Struct("<8sHHHHQQI4x32s32s20x")
_CRC = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a container holds."""

    CHUNK = 1  # pages of 256 tokens, all layers, raw
    WINDOW = 2  # the exact window at the end of a chunk, safetensors
    SNAPSHOT = 3  # a whole cache, safetensors


class Damaged(Exception):  # noqa: N818  (a reason to miss, not an error of a user)
    """A container cannot be used; ``reason`` is a short word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """The checked header of a container."""

    kind: int
    tokens: int
    payload_bytes: int
    payload_crc: int
    namespace: bytes
    key: bytes


def _encode_header(h: Header) -> bytes:
    fields = _FIELDS.pack(
        MAGIC, HEADER_VERSION, h.kind, LAYOUT_VERSION, CODEBOOK_ID, h.tokens, h.payload_bytes, h.payload_crc, h.namespace, h.key
    )
    return fields + _CRC.pack(zlib.crc32(fields))


def decode_header(raw: bytes) -> Header:
    """Parse and check a header.

    Raises:
        Damaged: ``truncated``, ``header`` (checksum), ``magic`` or ``version``.
    """
    if len(raw) < HEADER_BYTES:
        raise Damaged("truncated")
    magic, version, kind, layout, codebook, tokens, size, crc, namespace, key = _FIELDS.unpack(raw[: _FIELDS.size])
    if magic != MAGIC:
        raise Damaged("magic")
    if _CRC.unpack(raw[_FIELDS.size : HEADER_BYTES])[0] != zlib.crc32(raw[: _FIELDS.size]):
        raise Damaged("header")
    if (version, layout, codebook) != (HEADER_VERSION, LAYOUT_VERSION, CODEBOOK_ID):
        raise Damaged("version")
    return Header(kind, tokens, size, crc, namespace, key)


def write(path: Path, kind: Kind, tokens: int, namespace: bytes, key: bytes, payload: Iterable[Buffer]) -> int:
    """Write a container and rename it into place; returns its size in bytes.

    Raises:
        OSError: disk full, no permission, ...; nothing is left behind.
    """
    parts = [memoryview(p).cast("B") for p in payload]
    crc = 0
    for p in parts:
        crc = zlib.crc32(p, crc)
    size = sum(p.nbytes for p in parts)
    header = _encode_header(Header(kind, tokens, size, crc, namespace, key))
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as f:
            f.write(header)
            for part in parts:
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return HEADER_BYTES + size


def read(path: Path, kind: Kind, namespace: bytes | None, key: bytes | None) -> tuple[Header, memoryview]:
    """Read and verify a container. The header and the size are checked before the payload is read.

    Args:
        path: the file.
        kind: what it must hold.
        namespace: what the header must say; None accepts any.
        key: what the header must say; None accepts any.

    Raises:
        Damaged: with the reason ``missing``, ``unreadable``, ``truncated``, ``magic``, ``header``, ``version``, ``kind``,
            ``namespace``, ``key`` or ``payload``.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged("unreadable")
        with open(path, "rb") as f:
            header = decode_header(f.read(HEADER_BYTES))
            if header.kind != kind:
                raise Damaged("kind")
            if namespace is not None and header.namespace != namespace:
                raise Damaged("namespace")
            if key is not None and header.key != key:
                raise Damaged("key")
            if os.fstat(f.fileno()).st_size != HEADER_BYTES + header.payload_bytes:
                raise Damaged("truncated")
            payload = memoryview(f.read(header.payload_bytes))
    except FileNotFoundError:
        raise Damaged("missing") from None
    except (OSError, MemoryError):
        raise Damaged("unreadable") from None
    if payload.nbytes != header.payload_bytes:
        raise Damaged("truncated")
    if zlib.crc32(payload) != header.payload_crc:
        raise Damaged("payload")
    return header, payload
