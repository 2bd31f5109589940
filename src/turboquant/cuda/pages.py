"""Packed pages of one attention layer, as kernels are told of them."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS, stored_levels
from ..codec.page import PageCodec
from ..codec.rotation import Rotation, random_signs
from ..errors import ShapeError

#: TQ_DTYPE and the type numbers in parameters.
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class PagesStruct(ctypes.Structure):
    """Mirror of ``struct Pages`` in csrc/pages.cuh."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("packed_lens", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("centers", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("table_row", ctypes.c_int64),
        ("angles_row", ctypes.c_int64),
        ("table_wide", ctypes.c_int32),
        ("packed_len", ctypes.c_int32),
        ("first_page", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class PackedPages:
    """Packed pages of one layer of a batch: where they are, what they hold, how they are coded.

    The page of token ``i`` of a row, in bytes, for KV head ``head``::

        base + table[row, i // 64 - first_page] * block_stride + row * row_stride + head * head_stride

    with ``base`` the address of ``pool``, or 0 for a table of absolute addresses. Its token is in slot ``i % 64`` and at
    position ``i - starts[row]``. Table entries of tokens that no row reads may hold anything.

    Args:
        codec: layout and rotations.
        transform: frozen key centring and balance.
        num_kv_heads: KV heads of the layer.
        table: int32 (rows, max pages) of blocks of ``pool``, or int64 (rows or 1, max pages) of absolute addresses (then
            ``pool`` is None, ``block_stride`` 1, and whoever made the table keeps the memory alive).
        packed_len: tokens of each row that are in pages, counted from index 0: an int, or int32 (rows,).
        pool: any tensor that starts at the first byte of the pool, or None.
        block_stride, row_stride, head_stride: bytes, multiples of 8 (of 16 for attention). ``row_stride`` is 0 where the table
            names the pages of each row.
        first_page: tokens before ``64 * first_page`` are not held; column 0 of the table is this page.
        starts: int32 (rows,), index of the first real token of each row (left padding), or None.
        angles: float32 (rows or 1, pages, pairs, 2): cos and sin at the first position of page 0, 1, ... of each row, as
            :meth:`~turboquant.codec.rotary.PageAngles.get` makes them. None: taken from the rotary embedding (with ``starts``
            that costs a wait for the GPU, so keep them).
        rows: rows of the batch, where neither the table nor a tensor above says it.
    """

    codec: PageCodec
    transform: KeyTransform
    num_kv_heads: int
    table: Tensor
    packed_len: int | Tensor
    pool: Tensor | None = None
    block_stride: int = 1
    row_stride: int = 0
    head_stride: int = 0
    first_page: int = 0
    starts: Tensor | None = None
    angles: Tensor | None = None
    rows: int | None = None

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        for x in (self.packed_len, self.starts):
            if isinstance(x, Tensor):
                return int(x.shape[0])
        return self.rows or int(self.table.shape[0])

    @property
    def aligned(self) -> bool:
        """Whether pages start at multiples of 16 bytes, as kernels read them (absolute addresses are taken to)."""
        base = 0 if self.pool is None else self.pool.data_ptr() | self.block_stride
        return not (base | self.row_stride | self.head_stride) % 16

    @property
    def device(self) -> torch.device:
        """Where the table is; pages and all else are there too."""
        return self.table.device

    @property
    def max_pages(self) -> int:
        """Columns of the table: at most so many pages of a row are held."""
        return int(self.table.shape[1])

    @property
    def center(self) -> int:
        """TQ_CENTER: 0 keys are not centred, 1 by R_p mu, 2 by a constant."""
        if self.transform.statistics is None:
            return 0
        return 2 if self.transform.rotary is None else 1

    @property
    def rotates(self) -> bool:
        """TQ_ROTATE: whether kernels do the rotations (randomized Hadamard of a power of two)."""
        r = self.codec.key_rotation
        return r.kind == "hadamard" and r.dim & (r.dim - 1) == 0

    def page_angles(self) -> Tensor | None:
        """``angles``, or those of the rotary embedding; None unless :attr:`center` is 1."""
        return self._angles

    @functools.cached_property
    def _angles(self) -> Tensor | None:  # kept: kernels are given its address
        if self.center != 1:
            return None
        if self.angles is not None:
            return self.angles
        assert self.transform.rotary is not None
        return self.transform.rotary.page_angles(self.device, self.starts).get(self.first_page + self.max_pages)

    def check(self, rows: int) -> None:
        """Refuse shapes and types that kernels cannot read.

        Raises:
            ShapeError: says which.
        """
        t, a = self.table, self.page_angles()
        if t.dtype not in (torch.int32, torch.int64) or t.ndim != 2 or (t.stride(1) != 1 and t.shape[1] > 1):
            raise ShapeError(
                f"a page table is int32 or int64 (rows, pages), contiguous in pages, not {t.dtype} {tuple(t.shape)}"
            )
        if t.shape[0] != rows and not (t.shape[0] == 1 and t.dtype == torch.int64):
            raise ShapeError(f"the page table has {t.shape[0]} rows for a batch of {rows}")
        if (self.pool is None) != (t.dtype == torch.int64):
            raise ShapeError("int32 page tables index a pool, int64 ones hold addresses and take none")
        if (self.block_stride | self.row_stride | self.head_stride) % 8 and self.pool is not None:
            raise ShapeError("strides of pages are multiples of 8 bytes")
        for name, x in (("packed_len", self.packed_len), ("starts", self.starts)):
            if isinstance(x, Tensor) and (x.dtype != torch.int32 or tuple(x.shape) != (rows,) or not x.is_contiguous()):
                raise ShapeError(f"{name} is int32 ({rows},), not {x.dtype} {tuple(x.shape)}")
        if a is not None:
            assert self.transform.rotary is not None
            pairs, need = self.transform.rotary.rotary_dim // 2, self.first_page + self.max_pages
            if a.dtype != torch.float32 or a.shape[0] not in (1, rows) or tuple(a.shape[2:]) != (pairs, 2) or a.shape[1] < need:
                raise ShapeError(
                    f"angles are float32 (1 or {rows}, {need} or more, {pairs}, 2), not {a.dtype} {tuple(a.shape)}"
                )
            if not a.is_contiguous():
                raise ShapeError("angles must be contiguous")

    def struct(self) -> PagesStruct:
        """Everything for a kernel; the tensors must outlive the launch, which torch's stream order sees to."""
        s = PagesStruct()
        s.pool = None if self.pool is None else self.pool.data_ptr()
        s.table, s.table_wide = self.table.data_ptr(), int(self.table.dtype == torch.int64)
        s.table_row = self.table.stride(0) if self.table.shape[0] > 1 else 0
        s.block_stride, s.row_stride, s.head_stride = self.block_stride, self.row_stride, self.head_stride
        if isinstance(self.packed_len, Tensor):
            s.packed_lens = self.packed_len.data_ptr()
        else:
            s.packed_len = self.packed_len
        s.starts = None if self.starts is None else self.starts.data_ptr()
        s.first_page = self.first_page
        angles, centers = self.page_angles(), self.transform.table(self.device)
        if angles is not None:
            assert self.transform.rotary is not None
            s.angles, s.pairs = angles.data_ptr(), angles.shape[2]
            s.angles_row = angles.stride(0) if angles.shape[0] > 1 else 0
            s.interleaved = int(self.transform.rotary.pairing == "interleaved")
        s.centers = None if centers is None else centers.data_ptr()
        return s


@functools.lru_cache(maxsize=256)
def rotation_signs(rotation: Rotation, device: torch.device) -> Tensor:
    """Signs of a Hadamard rotation over sqrt(d), float32 (d,): ``forward(x) = H (signs * x)``, ``inverse(y) = signs * H y``."""
    with torch.inference_mode(False):  # shared by all later calls, whatever mode the first was in
        signs = torch.from_numpy(random_signs(rotation.seed, rotation.dim)) * (1.0 / math.sqrt(rotation.dim))
        return signs.to(device)


def level_defines(codec: PageCodec) -> dict[str, int]:
    """Macros of csrc/unpack.cuh: high and low bytes of the fp16 levels, by code (2, 3 bits) or magnitude (1, 4 bits)."""
    out: dict[str, int] = {}
    for role, bits in (("key", codec.layout.key_bits), ("value", codec.layout.value_bits)):
        levels = stored_levels(bits, role).astype("float16").view("uint16")
        count = {1: 1, 2: 4, 3: 8, 4: 8}[bits]
        for part, shift in (("HIGH", 8), ("LOW", 0)):
            table = [int(x) >> shift & 0xFF for x in levels[:count]] + [0] * (8 - count)
            for half in (0, 1):
                word = sum(b << 8 * i for i, b in enumerate(table[4 * half : 4 * half + 4]))
                out[f"TQ_{role.upper()}_{part}{half}"] = word
    return out


def max_packed(pages: PackedPages) -> int:
    """At least the longest ``packed_len`` of the batch, known without asking the GPU."""
    bound = (pages.first_page + pages.max_pages) * PAGE_TOKENS
    return bound if isinstance(pages.packed_len, Tensor) else min(pages.packed_len, bound)
