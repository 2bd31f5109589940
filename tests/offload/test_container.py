"""The file format: offsets, damage of every kind, nothing left behind."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant.codec.layout import CODEBOOK_ID, LAYOUT_VERSION
from turboquant.offload import container
from turboquant.offload.container import HEADER_BYTES, Damaged, Kind, decode_header, read, write

NAMESPACE = bytes(range(32))
KEY = bytes(range(100, 132))
PARTS = [b"one", bytearray(b"two"), memoryview(b"three" * 100)]
PAYLOAD = b"onetwo" + b"three" * 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "object.tqc"
    assert write(path, Kind.CHUNK, 512, NAMESPACE, KEY, PARTS) == path.stat().st_size
    return path


def reason(path: Path, kind: Kind = Kind.CHUNK, namespace: bytes | None = NAMESPACE, key: bytes | None = KEY) -> str:
    with pytest.raises(Damaged) as found:
        read(path, kind, namespace, key)
    return found.value.reason


def test_header_has_the_documented_layout(path: Path) -> None:
    raw = path.read_bytes()
    assert len(raw) == 128 + len(PAYLOAD)
    at = struct.unpack_from
    assert raw[0:8] == b"TQCACHE\0"
    assert at("<H", raw, 8) == (1,)
    assert at("<H", raw, 10) == (1,)
    assert at("<H", raw, 12) == (LAYOUT_VERSION,)
    assert at("<H", raw, 14) == (CODEBOOK_ID,)
    assert at("<Q", raw, 16) == (512,)
    assert at("<Q", raw, 24) == (len(PAYLOAD),)
    assert at("<I", raw, 32) == (zlib.crc32(PAYLOAD),)
    assert raw[36:40] == bytes(4)
    assert raw[40:72] == NAMESPACE
    assert raw[72:104] == KEY
    assert raw[104:124] == bytes(20)
    assert at("<I", raw, 124) == (zlib.crc32(raw[:124]),)
    assert raw[128:] == PAYLOAD


def test_round_trip(path: Path) -> None:
    header, payload = read(path, Kind.CHUNK, NAMESPACE, KEY)
    assert bytes(payload) == PAYLOAD
    assert (header.kind, header.tokens, header.payload_bytes) == (Kind.CHUNK, 512, len(PAYLOAD))
    assert (header.namespace, header.key, header.payload_crc) == (NAMESPACE, KEY, zlib.crc32(PAYLOAD))


@given(
    payload=st.lists(st.binary(max_size=50), max_size=4),
    tokens=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(Kind),
    namespace=st.binary(min_size=32, max_size=32),
    key=st.binary(min_size=32, max_size=32),
)
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, payload: list[bytes], tokens: int, kind: Kind, namespace: bytes, key: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tqc"
    write(path, kind, tokens, namespace, key, payload)
    header, found = read(path, kind, namespace, key)
    assert (bytes(found), header.tokens) == (b"".join(payload), tokens)
    assert bytes(read(path, kind, None, None)[1]) == b"".join(payload)


def test_every_bit_of_the_header_counts(path: Path) -> None:
    good = path.read_bytes()
    reasons = set()
    for bit in range(8 * HEADER_BYTES):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        reasons.add(reason(path))
        with pytest.raises(Damaged):
            decode_header(bytes(raw))
    assert reasons == {"magic", "header"}


@given(st.integers(0, 8 * len(PAYLOAD) - 1))
def test_bits_of_the_payload_count(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "payload.tqc"
    write(path, Kind.CHUNK, 512, NAMESPACE, KEY, PARTS)
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    assert reason(path) == "payload"


def test_every_truncation_is_damage(path: Path) -> None:
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert reason(path) == "truncated"


@pytest.mark.parametrize("extra", [b"\0", b"x", b"TQCACHE\0" * 30])
def test_appended_bytes_are_damage(path: Path, extra: bytes) -> None:
    path.write_bytes(path.read_bytes() + extra)
    assert reason(path) == "truncated"


def test_other_objects_are_not_taken(path: Path) -> None:
    assert reason(path, kind=Kind.WINDOW) == "kind"
    assert reason(path, namespace=bytes(32)) == "namespace"
    assert reason(path, key=bytes(32)) == "key"


@pytest.mark.parametrize("offset", [8, 12, 14])
def test_other_versions_are_not_taken(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<H", raw, offset, 999)
    struct.pack_into("<I", raw, 124, zlib.crc32(raw[:124]))
    path.write_bytes(raw)
    assert reason(path) == "version"


def test_a_huge_promised_size_is_not_allocated(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<Q", raw, 24, 1 << 60)
    struct.pack_into("<I", raw, 124, zlib.crc32(raw[:124]))
    path.write_bytes(raw)
    assert reason(path) == "truncated"


def test_missing_and_unreadable(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(tmp_path / "no" / "file") == "missing"
    assert reason(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert reason(tmp_path / "pipe") == "unreadable"

    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    assert reason(path) == "unreadable"


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.tqc", Kind.CHUNK, 1, NAMESPACE, KEY, PARTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failing_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: object) -> None:
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(container.os, "fsync", fail)
    with pytest.raises(type(error)):
        write(path, Kind.CHUNK, 1, NAMESPACE, KEY, [b"new"])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failing_payload_leaves_nothing(tmp_path: Path) -> None:
    def payload() -> object:
        yield b"some"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write(tmp_path / "a.tqc", Kind.CHUNK, 1, NAMESPACE, KEY, payload())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_name_appears_when_the_file_is_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    seen = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append((target.read_bytes(), bytes(read(source, Kind.WINDOW, NAMESPACE, KEY)[1])))
        replace(source, target)

    monkeypatch.setattr(container.os, "replace", watch)
    write(path, Kind.WINDOW, 1, NAMESPACE, KEY, [b"new"])
    assert seen == [(before, b"new")]
    assert bytes(read(path, Kind.WINDOW, NAMESPACE, KEY)[1]) == b"new"
