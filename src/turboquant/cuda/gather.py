"""Packed pages back to keys and values, and page bytes to and from one buffer."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS, PageLayout
from ..codec.page import PageCodec
from ..errors import ShapeError
from . import jit
from .pages import DTYPES, PackedPages, PagesStruct, level_defines, max_packed, rotation_signs

_THREADS = 128
#: Pages that torch decodes at once where the kernel cannot.
_BLOCK_PAGES = 16


class GatherParams(ctypes.Structure):
    """Mirror of ``struct Params`` in csrc/gather.cu."""

    _fields_ = (
        ("pages", PagesStruct),
        *((name, ctypes.c_void_p) for name in ("key", "value", "sketch", "key_weight", "value_weight", "sketch_weight")),
        *((name, ctypes.c_int64) for name in ("key_row", "key_head", "key_token", "value_row", "value_head", "value_token")),
        *((name, ctypes.c_int32) for name in ("first_page", "tokens", "type")),
        ("sketch_scale", ctypes.c_float),
    )


class CopyParams(ctypes.Structure):
    """Mirror of ``struct Params`` in csrc/copy.cu."""

    _fields_ = (
        ("pages", PagesStruct),
        ("buffer", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("buffer_page", "buffer_row", "buffer_head")),
        *((name, ctypes.c_int32) for name in ("first_page", "page_bytes", "to_buffer", "wide")),
    )


def _fits(pages: PackedPages) -> bool:
    """Whether the kernel decodes these pages; torch does it otherwise."""
    d = pages.codec.layout.head_dim
    rotary = pages.transform.rotary if pages.center == 1 else None
    fits = _shared_bytes(pages.codec.layout) <= jit.shared_memory(pages.device)[0]
    return d % 32 == 0 and fits and pages.aligned and (rotary is None or rotary.rotary_dim % 4 == 0)


def _shared_bytes(layout: PageLayout) -> int:
    """The page, and 32-bit numbers for its tokens."""
    return layout.page_bytes + PAGE_TOKENS * layout.head_dim * 4


_weights: weakref.WeakKeyDictionary[KeyTransform, dict[tuple[object, ...], Tensor]] = weakref.WeakKeyDictionary()


def _key_weight(pages: PackedPages) -> Tensor:
    """(heads, head_dim) float32: signs / (balance sqrt(d)), made once per layer and device."""
    held = _weights.setdefault(pages.transform, {})
    key = (pages.codec.key_rotation, pages.device)
    if key not in held:
        with torch.inference_mode(False):
            signs, balance = rotation_signs(pages.codec.key_rotation, pages.device), pages.transform.balance(pages.device)
            held[key] = (signs.expand(pages.num_kv_heads, -1) if balance is None else signs / balance).contiguous()
    return held[key]


@functools.lru_cache(maxsize=64)
def _sketch_weight(codec: PageCodec, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return rotation_signs(codec.sketch, device) * _sketch_scale(codec)


def _sketch_scale(codec: PageCodec) -> float:
    return math.sqrt(math.pi / (2 * codec.layout.head_dim))


def _range(pages: PackedPages, start: int | None, stop: int | None) -> tuple[int, int]:
    held = pages.first_page * PAGE_TOKENS, max(max_packed(pages), pages.first_page * PAGE_TOKENS)
    start, stop = held[0] if start is None else start, held[1] if stop is None else stop
    if start % PAGE_TOKENS or not held[0] <= start <= stop <= (pages.first_page + pages.max_pages) * PAGE_TOKENS:
        raise ShapeError(
            f"tokens {start} to {stop} cannot be read: pages hold {held[0]} to {held[1]}, and a page starts at a multiple of 64"
        )
    return start, stop


def gather(
    pages: PackedPages,
    *,
    dtype: torch.dtype,
    start: int | None = None,
    stop: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of packed tokens, as attention reads them: dequantized, rotated back, centring and balance undone.

    The kernel takes head dims that are multiples of 32; where it cannot rotate (Haar matrices, head dims that are no power of
    two) torch finishes, and other head dims are decoded by torch altogether (correct, several times slower).

    Args:
        pages: see :class:`~turboquant.cuda.pages.PackedPages`.
        dtype: fp16, bf16 or fp32.
        start, stop: tokens to read, the first one a multiple of 64; all that are held by default.
        out: (keys, values) of shape (batch, KV heads, stop - start, head_dim) and ``dtype`` to write to, any strides.

    Returns:
        (keys, values). Tokens from a row's ``packed_len`` on are 0.

    Raises:
        ShapeError: a tensor does not fit, or the tokens are not held.
    """
    layout = pages.codec.layout
    if dtype not in DTYPES:
        raise ShapeError(f"pages decode to fp16, bf16 or fp32, not {dtype}")
    rows = pages.batch
    pages.check(rows)
    start, stop = _range(pages, start, stop)
    shape = (rows, pages.num_kv_heads, stop - start, layout.head_dim)
    if out is None:
        out = (torch.empty(shape, dtype=dtype, device=pages.device), torch.empty(shape, dtype=dtype, device=pages.device))
    for x in out:
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ShapeError(f"these tokens are {dtype} {shape}, not {x.dtype} {tuple(x.shape)}")
    if start == stop:
        return out
    if not _fits(pages):
        _by_torch(pages, start, stop, out)
    elif pages.rotates and all(_writable(x) for x in out):
        _launch(pages, start, stop, out, None)
    elif pages.rotates:
        made = (torch.empty(shape, dtype=dtype, device=pages.device), torch.empty(shape, dtype=dtype, device=pages.device))
        _launch(pages, start, stop, made, None)
        for x, y in zip(out, made, strict=True):
            x.copy_(y)
    else:
        _rotated(pages, start, stop, out)
    return out


def _writable(x: Tensor) -> bool:
    """Whether the kernel can write 16 bytes at once."""
    return x.stride(3) == 1 and not any(s * x.element_size() % 16 for s in x.stride()[:3]) and not x.data_ptr() % 16


def _launch(pages: PackedPages, start: int, stop: int, out: tuple[Tensor, Tensor], sketch: Tensor | None) -> None:
    codec, device = pages.codec, pages.device
    p = GatherParams()
    p.pages = pages.struct()
    p.key, p.value = (x.data_ptr() for x in out)
    p.key_row, p.key_head, p.key_token = out[0].stride()[:3]
    p.value_row, p.value_head, p.value_token = out[1].stride()[:3]
    p.first_page, p.tokens, p.type, p.sketch_scale = (
        start // PAGE_TOKENS,
        stop - start,
        DTYPES[out[0].dtype],
        _sketch_scale(codec),
    )
    if pages.rotates:
        p.key_weight = _key_weight(pages).data_ptr()
        p.value_weight = rotation_signs(codec.value_rotation, device).data_ptr()
        p.sketch_weight = _sketch_weight(codec, device).data_ptr()
    if sketch is not None:
        p.sketch = sketch.data_ptr()
    kernel = jit.get_kernel("gather", _defines(codec, pages.center if pages.rotates else 0, pages.rotates), device)
    grid = (-(-(stop - start) // PAGE_TOKENS), pages.num_kv_heads, out[0].shape[0])
    kernel.launch(grid, _THREADS, _shared_bytes(codec.layout), p)


def _rotated(pages: PackedPages, start: int, stop: int, out: tuple[Tensor, Tensor]) -> None:
    """The kernel decodes, torch rotates."""
    codec, block = pages.codec, _BLOCK_PAGES * PAGE_TOKENS
    for a in range(start, stop, block):
        b = min(a + block, stop)
        shape = (*out[0].shape[:2], b - a, out[0].shape[3])
        made = [torch.empty(shape, dtype=torch.float32, device=pages.device) for _ in range(2 + codec.layout.qjl)]
        _launch(pages, a, b, (made[0], made[1]), made[2] if codec.layout.qjl else None)
        if codec.layout.qjl:
            made[0] += codec.sketch.inverse(made[2])
        _finish(pages, a, b, start, codec.key_rotation.inverse(made[0]), codec.value_rotation.inverse(made[1]), out)


def _by_torch(pages: PackedPages, start: int, stop: int, out: tuple[Tensor, Tensor]) -> None:
    block = _BLOCK_PAGES * PAGE_TOKENS
    for a in range(start, stop, block):
        b = min(a + block, stop)
        count = -(-(b - a) // PAGE_TOKENS)
        data = torch.empty(
            (count, out[0].shape[0], pages.num_kv_heads, pages.codec.layout.page_bytes), dtype=torch.uint8, device=pages.device
        )
        copy_pages(pages, data, start=a // PAGE_TOKENS)
        key, value = pages.codec.dequantize(data.permute(1, 2, 0, 3))
        _finish(pages, a, b, start, key[:, :, : b - a], value[:, :, : b - a], out)


def _finish(pages: PackedPages, a: int, b: int, start: int, key: Tensor, value: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Balance and centring of tokens [a, b), and zeros where a row holds nothing."""
    index = torch.arange(a, b, device=pages.device)[None]
    transform = pages.transform
    balance = transform.balance(pages.device)
    if balance is not None:
        key = key / balance[:, None]
    angles = pages.page_angles()
    if angles is not None:
        here = angles[:, a // PAGE_TOKENS : -(-b // PAGE_TOKENS)]
        offset = transform.page_offset(here[..., 0], here[..., 1])
        assert offset is not None
        key = key + offset[:, :, : b - a]
    elif (table := transform.table(pages.device)) is not None:
        key = key + table[:, :1]
    held = pages.packed_len if isinstance(pages.packed_len, int) else pages.packed_len[:, None]
    beyond = (index >= held)[:, None, :, None]
    for x, y in zip(out, (key, value), strict=True):
        x[:, :, a - start : b - start] = y.masked_fill(beyond, 0.0).to(x.dtype)


def copy_pages(pages: PackedPages, buffer: Tensor, *, start: int | None = None, to_pages: bool = False) -> None:
    """Copy pages, as they are, between where they are and a buffer (offload, prefix sharing).

    Args:
        pages: the pages; only their place, ``num_kv_heads`` and ``packed_len`` matter.
        buffer: uint8 (pages, batch, KV heads, page_bytes), the last axis contiguous.
        start: first page (counted from token 0); ``pages.first_page`` by default.
        to_pages: from the buffer to the pages. Pages beyond a row's ``packed_len`` are then left alone; the other way they
            are 0 in the buffer.

    Raises:
        ShapeError: the buffer does not fit, or the pages are not held.
    """
    size = pages.codec.layout.page_bytes
    start = pages.first_page if start is None else start
    if (
        buffer.dtype != torch.uint8
        or buffer.ndim != 4
        or tuple(buffer.shape[2:]) != (pages.num_kv_heads, size)
        or buffer.stride(3) != 1
    ):
        raise ShapeError(
            f"a buffer of pages is uint8 (pages, batch, {pages.num_kv_heads}, {size}), not {buffer.dtype} {tuple(buffer.shape)}"
        )
    count, rows = buffer.shape[:2]
    pages.check(rows)
    if not pages.first_page <= start <= start + count <= pages.first_page + pages.max_pages:
        held = f"{pages.first_page} to {pages.first_page + pages.max_pages}"
        raise ShapeError(f"pages {start} to {start + count} are not held, only {held}")
    if not count or not rows:
        return
    offsets = buffer.data_ptr() | buffer.stride(0) | buffer.stride(1) | buffer.stride(2) | size
    if offsets % 8:
        raise ShapeError("a buffer of pages starts at, and has strides of, multiples of 8 bytes")
    p = CopyParams()
    p.pages, p.buffer = pages.struct(), buffer.data_ptr()
    p.buffer_page, p.buffer_row, p.buffer_head = buffer.stride()[:3]
    p.first_page, p.page_bytes, p.to_buffer, p.wide = start, size, int(not to_pages), int(not offsets % 16 and pages.aligned)
    jit.get_kernel("copy", {}, pages.device).launch((count, pages.num_kv_heads, rows), 128, 0, p)


@functools.lru_cache(maxsize=256)
def _defines(codec: PageCodec, center: int, rotates: bool) -> dict[str, int]:
    lay = codec.layout
    out = {"TQ_D": lay.head_dim, "TQ_KB": lay.key_bits, "TQ_VB": lay.value_bits, "TQ_QJL": int(lay.qjl)}
    return out | {"TQ_CENTER": center, "TQ_ROTATE": int(rotates)} | level_defines(codec)


def _instances() -> Iterator[dict[str, int]]:
    for d in (32, 64, 96, 128, 192, 256, 512):
        for key_bits, value_bits in ((1, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)):
            for qjl in (False, True):
                for center in (0, 1, 2):
                    rotates = d & (d - 1) == 0
                    yield _defines(PageCodec(PageLayout(d, key_bits, value_bits, qjl)), center if rotates else 0, rotates)


jit.register_instances("gather", _instances, GatherParams)
jit.register_instances("copy", lambda: [{}], CopyParams)
