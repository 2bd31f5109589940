"""Packed pages with everything that a layer can have, and what they decode to, for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant.codec.center import KeyStatistics, KeyTransform
from turboquant.codec.layout import PAGE_TOKENS, PageLayout
from turboquant.codec.page import PageCodec
from turboquant.codec.rotary import Pairing, Rotary
from turboquant.codec.rotation import RotationType
from turboquant.cuda.pages import PackedPages


@dataclass(frozen=True)
class Case:
    """One layer.

    center: 0 none, 1 R_p mu, 2 a constant. addresses: an int64 table in place of a block table. packed_len: of all rows, of
    each row, or None (all pages are full).
    """

    dim: int = 64
    key_bits: int = 3
    value_bits: int = 3
    qjl: bool = False
    rotation: RotationType = "hadamard"
    center: int = 1
    balance: bool = True
    pairing: Pairing = "half"
    rotary_dim: int | None = None
    rows: int = 2
    heads: int = 2
    max_pages: int = 2
    first_page: int = 0
    packed_len: int | tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    addresses: bool = False
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def lens(self) -> Tensor:
        """(rows,) tokens of each row that are packed."""
        full = (self.first_page + self.max_pages) * PAGE_TOKENS
        return torch.as_tensor(full if self.packed_len is None else self.packed_len).expand(self.rows)


@dataclass(frozen=True)
class Packed:
    """``pages`` on the device, and what they decode to: float64 (rows, heads, max_pages * 64, dim) on the CPU."""

    pages: PackedPages
    key: Tensor
    value: Tensor
    pool: Tensor
    blocks: Tensor


def make(case: Case, device: torch.device, seed: int = 0) -> Packed:
    """The case's pages, random; whatever no row holds is NaN."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    layout = PageLayout(case.dim, case.key_bits, case.value_bits, case.qjl)
    codec = PageCodec(layout, case.rotation, seed)
    statistics, rotary = None, None
    if case.center:
        balance = randn(case.heads, case.dim).mul(0.3).exp() if case.balance else None
        statistics = KeyStatistics(3.0 * randn(case.heads, case.dim), balance)
    if case.center == 1:
        pairs = (case.rotary_dim or case.dim) // 2
        rotary = Rotary(10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs), case.pairing)
    transform = KeyTransform(statistics, rotary)

    tokens, first = case.max_pages * PAGE_TOKENS, case.first_page * PAGE_TOKENS
    starts = None if case.starts is None else torch.tensor(case.starts, dtype=torch.int32)
    positions = torch.arange(first, first + tokens)[None]
    positions = positions if starts is None else positions - starts[:, None].long()
    shape = (case.rows, case.heads, tokens, case.dim)
    spread = case.key_scale * (1 + torch.rand(case.heads, 1, case.dim, generator=g))
    key, value = randn(*shape) * spread, case.value_scale * randn(*shape)
    offset = transform.offset(positions)
    data = codec.encode(transform.forward(key if offset is None else key + offset, positions), value)
    coded, value = codec.dequantize(data)
    key = transform.inverse(coded, positions)
    _poison(data, layout, case.lens - first)

    # Blocks in any order, between others that no row uses.
    count = case.rows * case.max_pages
    blocks = torch.randperm(count + 3, generator=g)[:count].view(case.rows, case.max_pages)
    pool = torch.full((count + 3, case.heads, layout.page_bytes), 0xFF, dtype=torch.uint8)
    pool[blocks] = data.transpose(1, 2)
    pool = pool.to(device)
    where: dict[str, Any] = dict(table=blocks.int().to(device), pool=pool, block_stride=pool.stride(0))
    if case.addresses:
        where = dict(table=(pool.data_ptr() + blocks * pool.stride(0)).to(device))
    pages = PackedPages(
        codec,
        transform,
        case.heads,
        packed_len=case.packed_len if isinstance(case.packed_len, int) else case.lens.int().to(device),
        head_stride=pool.stride(1),
        first_page=case.first_page,
        starts=None if starts is None else starts.to(device),
        **where,
    )
    return Packed(pages, key.double(), value.double(), pool, blocks)


def _poison(data: Tensor, layout: PageLayout, lens: Tensor) -> None:
    """NaN scales for tokens that are not held, in pages (rows, heads, pages, page_bytes)."""
    pages = torch.arange(data.shape[2])[None] * PAGE_TOKENS
    beyond = (pages[..., None] + torch.arange(PAGE_TOKENS) >= lens[:, None, None]).repeat_interleave(2, -1)[:, None]
    offsets = [layout.key_scale_offset, layout.value_scale_offset, *([layout.qjl_norm_offset] if layout.qjl else [])]
    for offset in offsets:
        scales = data[..., offset : offset + 2 * PAGE_TOKENS]
        scales.masked_fill_(beyond, 0xFF)
