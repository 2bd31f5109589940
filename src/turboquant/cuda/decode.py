"""Decode attention on packed pages: wrapper of csrc/decode.cu."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codec.layout import PageLayout, lut_bytes, stored_levels
from ..codec.rotation import Rotation
from ..errors import ShapeError
from . import jit
from .decode_plan import DecodePlan, make_plan
from .pages import DTYPES, PackedPages, rotation_signs

MAX_QUERY_TOKENS = 16
#: What a GPU reads while one entry of a plan begins and ends (9 us at 3 TB/s, with the wait for the slowest warp).
ENTRY_BYTES = 27_000_000


class DecodeStruct(ctypes.Structure):
    """Mirror of ``struct Params`` in csrc/decode_params.cuh."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q",)),
        *((n, ctypes.c_int64) for n in ("q_row", "q_head", "q_token")),
        *((n, ctypes.c_void_p) for n in ("pool", "table")),
        *((n, ctypes.c_int64) for n in ("table_row", "block_stride", "row_stride", "head_stride")),
        *((n, ctypes.c_void_p) for n in ("packed_lens", "seq_lens", "starts", "window_k", "window_v")),
        *((n, ctypes.c_int64) for n in ("window_row", "window_head", "window_token")),
        *((n, ctypes.c_void_p) for n in ("sink_k", "sink_v")),
        *((n, ctypes.c_int64) for n in ("sink_row", "sink_head", "sink_token")),
        *((n, ctypes.c_void_p) for n in ("inverse_balance", "key_rotation", "value_rotation", "sketch_rotation")),
        *((n, ctypes.c_void_p) for n in ("angles", "center_table", "mean", "sink_logits")),
        *((n, ctypes.c_int64) for n in ("angles_row",)),
        *((n, ctypes.c_void_p) for n in ("out",)),
        *((n, ctypes.c_int64) for n in ("out_row", "out_head", "out_token")),
        *((n, ctypes.c_void_p) for n in ("lse", "blocks", "work", "part_out", "part_ml", "counters")),
        *((n, ctypes.c_int32) for n in ("table_wide", "first_page", "packed_len", "seq_len", "window_first", "window_slots")),
        *((n, ctypes.c_int32) for n in ("sinks", "heads", "group", "tokens", "row_blocks", "has_window")),
        *((n, ctypes.c_int32) for n in ("pairs", "interleaved", "sliding_window")),
        *((n, ctypes.c_float) for n in ("scale", "softcap")),
    )


@dataclass(frozen=True, eq=False)
class ExactTokens:
    """The exact tokens of a batch: those after the packed ones, the new ones included, and exact copies of packed sinks.

    Args:
        key, value: (rows, heads, slots, head_dim), the queries' dtype, equal strides, the last axis contiguous. Token i of a
            row is in slot ``(i - first) % slots``.
        first: index of the token in slot 0; None means that each row's first exact token (its packed_len) is there.
        sinks: (key, value), (rows, heads, n, head_dim): exact copies of each row's first n real tokens, read in place of
            their packed ones; or None.
    """

    key: Tensor
    value: Tensor
    first: int | None = None
    sinks: tuple[Tensor, Tensor] | None = None


def supports(pages: PackedPages, dtype: torch.dtype, group: int, tokens: int) -> str | None:
    """None if the kernel can take this, else why not."""
    d = pages.codec.layout.head_dim
    if d % 32 or d > 256:
        return f"head_dim {d} is no multiple of 32 up to 256"
    if dtype not in DTYPES:
        return f"queries are {dtype}"
    if pages.codec.layout.qjl and d > 128:
        return f"a QJL residual with head_dim {d}"
    if tokens > MAX_QUERY_TOKENS:
        return f"{tokens} new tokens are more than {MAX_QUERY_TOKENS}"
    if pages.center == 1 and pages.transform.rotary is not None and pages.transform.rotary.rotary_dim % 4:
        return f"a rotary embedding of {pages.transform.rotary.rotary_dim} channels"
    return None


# -- instances ------------------------------------------------------------------------------------------------------------


def _shape(layout: PageLayout, center: int, rows: int) -> tuple[int, int, int]:
    """(warps, stages, blocks per multiprocessor): the most warps that 227 KB of shared memory and 64 K registers hold.

    Multiples of 4, one share for each scheduler. One block of 12 warps beat 3 of 4 (an entry is begun and ended once).
    """
    d = layout.head_dim
    most = 12 if d <= 128 and rows <= 8 else 8
    for warps in range(most, 0, -4):
        if shared_bytes(layout, center, 1, max(1, rows // 8), int(rows <= 4), warps, 2) <= 227 << 10:
            return warps, 2, 1
    return 4, 1, 1


def shared_bytes(layout: PageLayout, center: int, rotate: int, nb: int, few: int, warps: int, stages: int) -> int:
    """Shared memory of a block: the sum in csrc/decode_params.cuh, which is checked against it when it is compiled."""
    d = layout.head_dim
    stage = layout.page_bytes + (4 * d if center == 1 else 0)
    words = (4 * (d // 16) * 32 if center == 1 else 0) + nb * (d // 32) * 32 * (2 if layout.qjl else 1)
    words += nb * (d // 16) * 32 if center == 1 else 0
    rows = 4 if few else 8 * nb
    merge = warps * rows * (d + d // 16 * 4 + 2) + rows * (2 * d + 4)
    matrix = 2 * d if rotate else warps * d
    return warps * stages * (stage + 8) + 16 * words + 8 * nb * (d // 16) * 32 + 4 * (merge + matrix + 40 * nb) + 16


def _table(entries: Sequence[int]) -> tuple[int, int]:
    padded = [*entries, *[0] * (8 - len(entries))]
    low, high = (sum(b << 8 * i for i, b in enumerate(padded[k : k + 4])) for k in (0, 4))
    return low, high


@functools.lru_cache(maxsize=256)
def _defines(
    layout: PageLayout, center: int, softcap: int, rotate: int, dtype: int, rows: int, shape: tuple[int, int, int]
) -> dict[str, int | str]:
    warps, stages, blocks = shape
    nb, few = max(1, rows // 8), int(rows <= 4)
    keys, values = _table(lut_bytes(layout.key_bits, "key")), _table(lut_bytes(layout.value_bits, "value"))
    levels = stored_levels(layout.value_bits, "value").tolist()
    return {
        "TQ_D": layout.head_dim,
        "TQ_KB": layout.key_bits,
        "TQ_VB": layout.value_bits,
        "TQ_QJL": int(layout.qjl),
        "TQ_CENTER": center,
        "TQ_SOFTCAP": softcap,
        "TQ_ROTATE": rotate,
        "TQ_DTYPE": dtype,
        "TQ_NB": nb,
        "TQ_FEW": few,
        "TQ_WARPS": warps,
        "TQ_STAGES": stages,
        "TQ_BLOCKS": blocks,
        "TQ_SHARED_BYTES": shared_bytes(layout, center, rotate, nb, few, warps, stages),
        "TQ_QJL_SCALE": f"{math.sqrt(math.pi / (2 * layout.head_dim)):.9g}f",
        "TQ_VALUE_FIRST": f"{levels[0]}f",  # 1 and 2 bits: a level is this plus a step times the code
        "TQ_VALUE_STEP": f"{levels[1] - levels[0]}f",
        "TQ_KLUT0": f"{keys[0]}u",
        "TQ_KLUT1": f"{keys[1]}u",
        "TQ_VLUT0": f"{values[0]}u",
        "TQ_VLUT1": f"{values[1]}u",
    }


def _instances() -> Iterator[dict[str, int | str]]:
    for d, k, v, center, rows in itertools.product((64, 96, 128, 256), (1, 2, 3, 4), (1, 2, 3, 4), (0, 1, 2), (4, 8, 16)):
        for qjl, softcap, rotate, dtype in ((0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 2)):
            if (
                (d == 96 and rotate)
                or (qjl and k == 4)
                or (rows == 16 and (d > (64 if center == 1 else 128) or qjl))
                or (qjl and d > 128)
            ):
                continue
            layout = PageLayout(d, k, v, bool(qjl))
            yield _defines(layout, center, softcap, rotate, dtype, rows, _shape(layout, center, rows))


jit.register_instances("decode", _instances, DecodeStruct)


# -- constant operands ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _rotation(rotation: Rotation, rotate: bool, device: torch.device) -> Tensor:
    if rotate:
        return rotation_signs(rotation, device)
    with torch.inference_mode(False):
        return rotation.matrix().to(device)


def center_fragments(table: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """R_j mu (heads, 64, head_dim) as the fp16 A operands of the kernel, (heads, 4, head_dim / 16, 32, 8)."""
    d = table.shape[2]
    dim = torch.arange(d)
    if interleaved:
        order = torch.cat((dim[0::2], dim[1::2]))
    else:
        rest = dim[2 * pairs :]
        order = torch.cat((dim[:pairs], rest[0::2], dim[pairs : 2 * pairs], rest[1::2]))
    lane = torch.arange(32)
    g, c = lane // 4, lane % 4
    row = (g >> 1) + ((g & 1) << 2)
    token = torch.arange(4)[:, None] * 16 + row  # (4, 32); 8 more in the second row of a fragment
    pair = 2 * c + 8 * torch.arange(d // 16)[:, None]  # (steps, 32)
    words = []
    for second, more in ((0, 0), (0, 8), (1, 0), (1, 8)):
        for slot in (0, 1):
            channel = order[second * (d // 2) + pair + slot]
            words.append(table[:, (token + more)[:, None].to(table.device), channel[None].to(table.device)])
    return torch.stack(words, dim=-1).half().contiguous()


class _Constants:
    """Operands that depend on the layer alone, kept with its key transform."""

    def __init__(self, pages: PackedPages) -> None:
        device, transform = pages.device, pages.transform
        with torch.inference_mode(False):
            balance = transform.balance(device)
            self.inverse_balance = None if balance is None else (1.0 / balance).contiguous()
            self.fragments: Tensor | None = None
            self.mean: Tensor | None = None
            table = transform.table(device)
            if pages.center == 1:
                assert table is not None and transform.rotary is not None
                r = transform.rotary
                self.fragments = center_fragments(table, r.rotary_dim // 2, r.pairing == "interleaved")
            elif pages.center == 2:
                assert table is not None
                self.mean = table[:, 0].contiguous()


def _constants(pages: PackedPages) -> _Constants:
    held: dict[Any, Any] = pages.transform.__dict__.setdefault("_decode", {})
    if pages.device not in held:
        held[pages.device] = _Constants(pages)
    found: _Constants = held[pages.device]
    return found


# -- plan and run -----------------------------------------------------------------------------------------------------------


def _query_rows(group: int, tokens: int, layout: PageLayout, center: int) -> int:
    """Query rows that a thread block handles at once: 4, 8 or 16 (4 are the columns of 8, of which half are left out)."""
    rows = group * tokens
    # Two blocks of 8 need twice the accumulators; with wide heads, a sketch or centring they do not fit the registers.
    wide = layout.head_dim > (64 if center == 1 else 128) or layout.qjl
    return 4 if rows <= 4 else 8 if rows <= 8 or wide else 16


def plan(
    pages: PackedPages,
    packed_lens: int | Sequence[int],
    group: int,
    tokens: int = 1,
    exact_tokens: int = 192,
    rows: int | None = None,
) -> DecodePlan:
    """Divide the work of one decode step; reuse the plan for all layers and for all steps with the same page counts.

    Args:
        pages: of any of the layers.
        packed_lens: tokens in pages, known on the host: of each row, or of all.
        group: query heads per KV head.
        tokens: new tokens per row, 1 to 16.
        exact_tokens: roughly how many exact tokens a row has (sinks and window); 0 if none at all.
        rows: sequences; taken from ``packed_lens`` or the page table if not given.
    """
    layout = pages.codec.layout
    at_once = _query_rows(group, tokens, layout, pages.center)
    _, _, per_sm = _shape(layout, pages.center, at_once)
    if rows is None:
        rows = len(packed_lens) if not isinstance(packed_lens, int) else pages.table.shape[0]
    row_blocks = -(-group * tokens // at_once)
    sms = jit.multiprocessors(pages.device) if pages.device.type == "cuda" else 4
    # Beginning and ending an entry takes some microseconds; in that time a block's share of the bandwidth is so many pages.
    entry = ENTRY_BYTES / (sms * per_sm * layout.page_bytes)
    # Exact tokens are 2 bytes a number, keys and values; waiting for them costs about half an entry.
    exact = exact_tokens * 4 * layout.head_dim / layout.page_bytes + entry / 2 if exact_tokens else 0.0
    return make_plan(
        packed_lens, rows, pages.num_kv_heads, row_blocks, max(8, at_once), layout.head_dim, sms * per_sm, entry, exact,
        pages.first_page, pages.device,
    )  # fmt: skip


def run(
    query: Tensor,
    pages: PackedPages,
    exact: ExactTokens | None,
    seq_lens: int | Tensor,
    work: DecodePlan,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sink_logits: Tensor | None = None,
) -> None:
    """One launch: causal attention of each row's last tokens over all its tokens.

    Allocates nothing and waits for nothing, so it can be captured by a CUDA graph.

    Args:
        query: (rows, query heads, tokens, head_dim), any strides but a contiguous last axis.
        pages: packed tokens [0, packed_len) of each row.
        exact: tokens [packed_len, seq_len), or None if there are none.
        seq_lens: tokens of each row, the new ones included: int, or int32 (rows,).
        work: of :func:`plan` for this shape.
        out: like ``query``, its dtype; written.
        lse: float32 (rows, query heads, tokens), contiguous; written: natural logarithms, -inf for rows that see nothing.
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sliding_window: a query sees itself and this many minus one tokens before.
        sink_logits: float32 (query heads,), logits that only enter the denominator.

    Raises:
        ShapeError: says what does not fit.
        KernelError: the kernel cannot run here.
    """
    rows, hq, tokens, _ = query.shape
    layout = pages.codec.layout
    group = hq // pages.num_kv_heads
    reason = supports(pages, query.dtype, group, tokens)
    if reason is not None:
        raise ShapeError(f"the decode kernel cannot do this: {reason}")
    for name, t in (("query", query), ("out", out)):
        if t.shape != query.shape or t.dtype != query.dtype or t.stride(3) != 1:
            raise ShapeError(f"{name} is {t.dtype} {tuple(t.shape)} with strides {t.stride()}; see decode.run")
    if lse.shape != (rows, hq, tokens) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ShapeError(f"lse is {lse.dtype} {tuple(lse.shape)}, not contiguous float32 {(rows, hq, tokens)}")
    at_once = _query_rows(group, tokens, layout, pages.center)
    row_blocks = -(-group * tokens // at_once)
    if work.exact != (exact is not None):
        raise ShapeError("the plan was made with exact tokens and the launch has none, or the other way round")
    if work.counters.shape[0] != rows * pages.num_kv_heads * row_blocks or work.part_out.shape[1] != max(8, at_once):
        raise ShapeError("the plan is of another shape; make one with decode.plan for this batch, group and tokens")
    shape = _shape(layout, pages.center, at_once)
    rotate = pages.rotates
    defines = _defines(layout, pages.center, int(softcap is not None), int(rotate), DTYPES[query.dtype], at_once, shape)
    s = DecodeStruct()
    s.q, s.q_row, s.q_head, s.q_token = query.data_ptr(), query.stride(0), query.stride(1), query.stride(2)
    s.out, s.out_row, s.out_head, s.out_token = out.data_ptr(), out.stride(0), out.stride(1), out.stride(2)
    s.lse = lse.data_ptr()
    _fill_pages(s, pages, rotate)
    _fill_exact(s, exact, query)
    if isinstance(seq_lens, Tensor):
        s.seq_lens = seq_lens.data_ptr()
    else:
        s.seq_len = seq_lens
    s.blocks, s.work = work.block_work.data_ptr(), work.work.data_ptr()
    s.part_out, s.part_ml, s.counters = work.part_out.data_ptr(), work.part_ml.data_ptr(), work.counters.data_ptr()
    s.heads, s.group, s.tokens, s.row_blocks = pages.num_kv_heads, group, tokens, row_blocks
    s.sliding_window = sliding_window or 0
    s.scale, s.softcap = scaling, softcap or 0.0
    s.sink_logits = None if sink_logits is None else sink_logits.data_ptr()
    kernel = jit.get_kernel("decode", defines, query.device)
    kernel.launch((work.blocks, 1, 1), 32 * shape[0], int(defines["TQ_SHARED_BYTES"]), s)


def _fill_pages(s: DecodeStruct, pages: PackedPages, rotate: bool) -> None:
    p = pages.struct()
    for name in (
        "pool",
        "table",
        "table_row",
        "block_stride",
        "row_stride",
        "head_stride",
        "packed_lens",
        "packed_len",
        "starts",
    ):
        setattr(s, name, getattr(p, name))
    s.table_wide, s.first_page, s.angles, s.angles_row = p.table_wide, p.first_page, p.angles, p.angles_row
    s.pairs, s.interleaved = p.pairs, p.interleaved
    codec, device = pages.codec, pages.device
    s.key_rotation = _rotation(codec.key_rotation, rotate, device).data_ptr()
    s.value_rotation = _rotation(codec.value_rotation, rotate, device).data_ptr()
    s.sketch_rotation = _rotation(codec.sketch, rotate, device).data_ptr() if codec.layout.qjl else None
    held = _constants(pages)
    s.inverse_balance = None if held.inverse_balance is None else held.inverse_balance.data_ptr()
    s.center_table = None if held.fragments is None else held.fragments.data_ptr()
    s.mean = None if held.mean is None else held.mean.data_ptr()


def _fill_exact(s: DecodeStruct, exact: ExactTokens | None, query: Tensor) -> None:
    if exact is None:
        s.window_slots = 1
        return
    pairs = [("window", exact.key, exact.value)]
    if exact.sinks is not None:
        pairs.append(("sink", *exact.sinks))
    for name, k, v in pairs:
        if (
            k.dtype != query.dtype
            or v.dtype != query.dtype
            or k.stride() != v.stride()
            or k.shape != v.shape
            or k.stride(3) != 1
        ):
            raise ShapeError(f"{name} keys and values must be {query.dtype} with equal strides and a contiguous last axis")
        if (k.data_ptr() | v.data_ptr()) % 16 or any(x * k.element_size() % 16 for x in k.stride()[:3]):
            raise ShapeError(f"{name} keys and values must start, row by row, at multiples of 16 bytes")
        setattr(s, f"{name}_k", k.data_ptr())
        setattr(s, f"{name}_v", v.data_ptr())
        for axis, part in enumerate(("row", "head", "token")):
            setattr(s, f"{name}_{part}", k.stride(axis))
    s.window_first = -1 if exact.first is None else exact.first
    s.window_slots = exact.key.shape[2]
    s.sinks = 0 if exact.sinks is None else exact.sinks[0].shape[2]
    s.has_window = 1
