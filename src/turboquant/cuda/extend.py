"""Attention of many new queries over packed pages: the packed part of a prefill that continues a cache."""

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

LOG2E = math.log2(math.e)
_MAX_SPLITS = 32
#: (TQ_WARPS, TQ_MT) of a block of 16 * TQ_WARPS * TQ_MT query rows. TQ_MT 2 reads keys and values half as often, but needs the
#: registers that long heads and soft capping take.
_SHAPES = ((4, 1), (4, 2), (8, 2))
_LEAN_SHAPES = ((4, 1), (8, 1))
#: Decoding a page costs a block about as much as multiplying this many query rows with it.
_DECODE_ROWS = 96


class ExtendParams(ctypes.Structure):
    """Mirror of ``struct Params`` in csrc/extend_tiles.cuh."""

    _fields_ = (
        ("pages", PagesStruct),
        *((name, ctypes.c_void_p) for name in ("q",)),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "q_token")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "query_weight", "center_weight", "sketch_weight", "value_weight")),
        *((name, ctypes.c_void_p) for name in ("constant", "first_queries", "part_out", "part_lse")),
        *((name, ctypes.c_int32) for name in ("rows", "heads", "group", "tokens", "splits", "out_type")),
        *((name, ctypes.c_int32) for name in ("first_query", "sliding_window", "hidden", "row_tiles")),
        *((name, ctypes.c_float) for name in ("scale", "cap", "inverse_cap", "sketch_scale")),
    )


def _key_parts(pages: PackedPages) -> int:
    """Vectors of head_dim that make a key: one where the kernel rotates."""
    return 1 if pages.rotates else 1 + (pages.center == 1) + pages.codec.layout.qjl


def _shared_bytes(shape: tuple[int, int], layout: PageLayout, parts: int) -> int:
    """Queries, keys, values, the page in flight, its barrier and the range of tokens."""
    rows = 16 * shape[0] * shape[1]
    return 2 * layout.head_dim * ((rows + PAGE_TOKENS) * parts + PAGE_TOKENS) + layout.page_bytes + 48


def _shapes(pages: PackedPages, softcap: bool) -> list[tuple[int, int]]:
    most = jit.shared_memory(pages.device)[0]
    layout, parts = pages.codec.layout, _key_parts(pages)
    return [s for s in _shapes_of(layout.head_dim, softcap) if _shared_bytes(s, layout, parts) <= most]


def _shapes_of(dim: int, softcap: bool) -> tuple[tuple[int, int], ...]:
    return _LEAN_SHAPES if dim > 128 or (softcap and dim > 96) else _SHAPES


def why_not(pages: PackedPages) -> str | None:
    """None if :func:`extend` can read these pages, else the reason (the caller then takes another way)."""
    d = pages.codec.layout.head_dim
    if d % 32 or d > 256:
        return f"head_dim={d} is not a multiple of 32 up to 256"
    rotary = pages.transform.rotary if pages.center == 1 else None
    if rotary is not None and rotary.rotary_dim % 4:
        return f"a rotary embedding of {rotary.rotary_dim} channels, not a multiple of 4"
    if not pages.aligned:
        return "pages do not start at multiples of 16 bytes"
    return None if _shapes(pages, True) else "the tiles do not fit this GPU's shared memory"


_weights: weakref.WeakKeyDictionary[KeyTransform, dict[tuple[object, ...], dict[str, Tensor]]] = weakref.WeakKeyDictionary()


def _prepared(pages: PackedPages) -> dict[str, Tensor]:
    """Vectors that the kernel multiplies with, made once per layer and device (field of the params -> tensor)."""
    codec, transform, device = pages.codec, pages.transform, pages.device
    held = _weights.setdefault(transform, {})
    key = (codec.key_rotation, codec.value_rotation, codec.sketch, device)
    if key not in held:
        with torch.inference_mode(False):
            out: dict[str, Tensor] = {}
            balance = transform.balance(device)
            if balance is None:
                balance = torch.ones(pages.num_kv_heads, codec.layout.head_dim, device=device)
            if pages.rotates:
                signs = rotation_signs(codec.key_rotation, device)
                out["query_weight"] = (signs / balance).contiguous()
                out["center_weight"] = (signs * balance).contiguous()
                out["sketch_weight"] = rotation_signs(codec.sketch, device) * _sketch_scale(codec)
                out["value_weight"] = rotation_signs(codec.value_rotation, device)
            if pages.center == 2:
                table = transform.table(device)
                assert table is not None
                out["constant"] = codec.key_rotation.forward(table[:, 0] * balance).half().contiguous()
        held[key] = out
    return held[key]


def _sketch_scale(codec: PageCodec) -> float:
    return math.sqrt(math.pi / (2 * codec.layout.head_dim))


def _rotated(query: Tensor, pages: PackedPages) -> Tensor:
    """Queries as the kernel takes them where it does not rotate: (batch, heads, tokens, parts * head_dim) fp16."""
    b, hq, t, d = query.shape
    plain = query.float().reshape(b, pages.num_kv_heads, -1, t, d)
    coded = pages.codec.key_rotation.forward(pages.transform.scale_query(plain))
    parts = [coded]
    if pages.center == 1:
        parts.append(plain)
    if pages.codec.layout.qjl:
        parts.append(pages.codec.sketch.forward(coded))
    return torch.cat(parts, dim=-1).half().view(b, hq, t, -1)


def _choose(
    pages: PackedPages,
    softcap: bool,
    blocks_of_one_tile: int,
    lines: int,
    count: int,
    splits: int | None,
    shape: tuple[int, int] | None,
) -> tuple[tuple[int, int], int]:
    """(shape, splits over pages) for ``lines`` query rows and ``count`` pages."""

    def work(shape: tuple[int, int]) -> int:
        rows = 16 * shape[0] * shape[1]
        return -(-lines // rows) * (rows + _DECODE_ROWS)

    shape = shape or min(_shapes(pages, softcap), key=work)
    if splits is not None:
        return shape, splits
    blocks = blocks_of_one_tile * -(-lines // (16 * shape[0] * shape[1]))
    shared = _shared_bytes(shape, pages.codec.layout, _key_parts(pages)) + 1024
    each = max(1, min(jit.shared_memory(pages.device)[1] // shared, 2 if shape[0] == 4 else 1))
    slots = jit.multiprocessors(pages.device) * each
    # A block's fixed cost (queries, output) is that of about three pages, and so is merging.
    cost = {
        s: -(-blocks * s // slots) * (-(-count // s) + 3) + 3 * (s > 1) for s in range(1, min(_MAX_SPLITS, max(count, 1)) + 1)
    }
    return shape, min(cost, key=cost.__getitem__)


def extend(
    query: Tensor,
    pages: PackedPages,
    *,
    scaling: float,
    softcap: float | None = None,
    first_query: int | Tensor = 0,
    sliding_window: int | None = None,
    hidden_sinks: int = 0,
    out_dtype: torch.dtype | None = None,
    splits: int | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the packed tokens of ``pages``, to be merged with that over exact tokens by the log-sum-exps.

    Query ``t`` of a row sees packed token ``i`` if ``start + hidden_sinks <= i < packed_len`` and, with a sliding window,
    ``i > first_query + t - sliding_window``; ``start`` is that of ``pages.starts``, or 0.

    Args:
        query: (batch, query heads, tokens, head_dim), fp16, bf16 or fp32, any strides.
        pages: see :class:`~turboquant.cuda.pages.PackedPages`; :func:`why_not` tells whether the kernel can read them.
        scaling: of the scores, above 0.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        first_query: index of the first query token, an int or int32 (batch,); used with a sliding window.
        sliding_window: see above.
        hidden_sinks: so many first real tokens of each row are held exactly elsewhere, and not read here.
        out_dtype: of the output; the query's by default.
        splits: blocks that share the pages of one query tile; chosen by default.
        shape: warps of a block, and tiles of 16 query rows of a warp; chosen by default.

    Returns:
        (output (batch, query heads, tokens, head_dim), natural log-sum-exp float32 (batch, query heads, tokens)); 0 and -inf
        for queries that see nothing.

    Raises:
        ShapeError: a tensor does not fit, or the kernel cannot read these pages.
    """
    codec, layout = pages.codec, pages.codec.layout
    if query.ndim != 4 or query.dtype not in DTYPES or query.shape[3] != layout.head_dim:
        raise ShapeError(
            f"queries are fp16, bf16 or fp32 (batch, heads, tokens, {layout.head_dim}), not {query.dtype} {tuple(query.shape)}"
        )
    b, hq, t, d = query.shape
    if hq % pages.num_kv_heads or not hq:
        raise ShapeError(f"{hq} query heads cannot share {pages.num_kv_heads} KV heads")
    if (reason := why_not(pages)) is not None:
        raise ShapeError(f"the extend kernel cannot read these pages: {reason}")
    if splits is not None and not 1 <= splits <= _MAX_SPLITS:
        raise ShapeError(f"splits={splits}: give 1 to {_MAX_SPLITS}")
    if isinstance(first_query, Tensor) and (first_query.dtype != torch.int32 or first_query.shape != (b,)):
        raise ShapeError(f"first_query is an int or int32 ({b},), not {first_query.dtype} {tuple(first_query.shape)}")
    if shape is not None and shape not in (able := _shapes(pages, softcap is not None)):
        raise ShapeError(f"shape={shape} is none of {able}")
    pages.check(b)
    out_dtype = out_dtype or query.dtype
    inner = out_dtype if pages.rotates else torch.float32
    out = query.new_empty((b, hq, t, d), dtype=inner)
    lse = query.new_empty((b, hq, t), dtype=torch.float32)
    if not out.numel():
        return out.to(out_dtype), lse

    q = query if pages.rotates else _rotated(query, pages)
    if q.stride(3) != 1 or any(s * q.element_size() % 16 for s in q.stride()[:3]) or q.data_ptr() % 16:
        q = q.contiguous()
    group = hq // pages.num_kv_heads
    count = -(-max_packed(pages) // PAGE_TOKENS) - pages.first_page
    if sliding_window:
        count = min(count, (sliding_window + t) // PAGE_TOKENS + 2)
    shape, splits = _choose(pages, softcap is not None, b * pages.num_kv_heads, group * t, max(count, 0), splits, shape)

    p = ExtendParams()
    p.pages = pages.struct()
    p.q, (p.q_row, p.q_head, p.q_token) = q.data_ptr(), q.stride()[:3]
    p.out, p.lse, p.out_type = out.data_ptr(), lse.data_ptr(), DTYPES[inner]
    for name, tensor in _prepared(pages).items():
        setattr(p, name, tensor.data_ptr())
    p.rows, p.heads, p.group, p.tokens, p.splits = b, pages.num_kv_heads, group, t, splits
    p.hidden, p.sliding_window = hidden_sinks, sliding_window or 0
    if isinstance(first_query, Tensor):
        p.first_queries = first_query.data_ptr()
    else:
        p.first_query = first_query
    p.scale, p.sketch_scale = scaling * LOG2E, _sketch_scale(codec)
    if softcap is not None:
        p.cap, p.inverse_cap = softcap * LOG2E, 2 * LOG2E * scaling / softcap
    rows = 16 * shape[0] * shape[1]
    p.row_tiles = -(-group * t // rows)
    defines = _defines(codec, pages.center, pages.rotates, softcap is not None, q.dtype, shape)
    parts: tuple[Tensor, ...] = ()
    if splits > 1:
        parts = (
            query.new_empty((splits, b, hq, t, d), dtype=torch.float32),
            query.new_empty((splits, b, hq, t), dtype=torch.float32),
        )
        p.out, p.lse, p.out_type = parts[0].data_ptr(), parts[1].data_ptr(), DTYPES[torch.float32]
    shared = _shared_bytes(shape, layout, _key_parts(pages))
    grid = (p.row_tiles * splits, pages.num_kv_heads, b)
    jit.get_kernel("extend", defines, pages.device).launch(grid, 32 * shape[0], shared, p)
    if parts:
        p.part_out, p.part_lse = (x.data_ptr() for x in parts)
        p.out, p.lse, p.out_type = out.data_ptr(), lse.data_ptr(), DTYPES[inner]
        jit.get_kernel("extend:merge", defines, pages.device).launch((-(-b * hq * t // 4), 1, 1), 128, 0, p)
    if not pages.rotates:
        out = codec.value_rotation.inverse(out).to(out_dtype)
    return out, lse


@functools.lru_cache(maxsize=256)
def _defines(
    codec: PageCodec, center: int, rotates: bool, softcap: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> dict[str, int]:
    lay = codec.layout
    out = {"TQ_D": lay.head_dim, "TQ_KB": lay.key_bits, "TQ_VB": lay.value_bits, "TQ_QJL": int(lay.qjl), "TQ_CENTER": center}
    out |= {"TQ_ROTATE": int(rotates), "TQ_SOFTCAP": int(softcap), "TQ_DTYPE": DTYPES[dtype]}
    return out | {"TQ_WARPS": shape[0], "TQ_MT": shape[1]} | level_defines(codec)


def _instances() -> Iterator[dict[str, int]]:
    """Every block shape, head dim and pair of bits; the other choices in turn."""
    turn = 0
    for d in (32, 64, 96, 128, 192, 256):
        for key_bits, value_bits in ((1, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)):
            for qjl, center in ((0, 0), (0, 1), (0, 2), (1, 1)):
                for shape in _shapes_of(d, turn % 7 == 6):
                    rotates = d & (d - 1) == 0 and turn % 5 != 4
                    parts = 1 if rotates else 1 + (center == 1) + qjl
                    layout = PageLayout(d, key_bits, value_bits, bool(qjl))
                    if _shared_bytes(shape, layout, parts) > 227 << 10:
                        continue
                    dtype = (torch.float16, torch.bfloat16, torch.float32)[turn % 3] if rotates else torch.float16
                    yield _defines(
                        PageCodec(layout), center, rotates, shape in _shapes_of(d, True) and turn % 7 == 6, dtype, shape
                    )
                    turn += 1


jit.register_instances("extend", _instances, ExtendParams)
jit.register_instances("extend:merge", _instances, ExtendParams)
