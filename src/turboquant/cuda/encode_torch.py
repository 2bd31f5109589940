"""What :func:`~turboquant.cuda.encode.encode_pages` leaves to torch: preparing keys, and writing tokens of odd layouts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS, PageLayout
from ..codec.page import PageCodec


def coded_keys(key: Tensor, transform: KeyTransform, index: Tensor, slots: Tensor | None, angles: Tensor | None) -> Tensor:
    """Centred and balanced keys, float32, with the operations of :class:`KeyTransform` for tokens in any order.

    Args:
        key: (rows, heads, tokens, head_dim).
        transform: of the keys.
        index: (rows, tokens) int64, index of each token in its sequence.
        slots: int64 (rows * tokens,) or None; where negative, ``index`` may be anything.
        angles: (rows or 1, pages, pairs, 2), or None for a constant mean.
    """
    x = key.float()
    table, balance = transform.table(key.device), transform.balance(key.device)
    if slots is not None:
        index = index * (slots.view(index.shape) >= 0)
    if table is not None:
        offset = table[:, index % PAGE_TOKENS].transpose(0, 1)  # (rows, heads, tokens, head_dim)
        if transform.rotary is not None and angles is not None:
            row = torch.arange(index.shape[0] if angles.shape[0] > 1 else 1, device=index.device)[:, None]
            at = angles[row, index // PAGE_TOKENS]
            offset = transform.rotary.apply(offset, at[:, None, ..., 0], at[:, None, ..., 1])
        x = x - offset
    return x if balance is None else x * balance[:, None, :]


def write_tokens(coded: Tensor, value: Tensor, pool: Tensor, slots: Tensor | None, codec: PageCodec) -> None:
    """Quantize and write tokens by reading, changing and writing back the pages that they touch.

    Args:
        coded, value: (rows, heads, tokens, head_dim).
        pool: (blocks, heads, page_bytes) with ``slots``, else (pages, rows, heads, page_bytes).
        slots: int64 (rows * tokens,), negative to skip.
        codec: layout and rotations.
    """
    rows, heads, tokens, d = coded.shape
    if slots is None:
        for row in range(rows):
            own = torch.arange(tokens, device=coded.device)
            write_tokens(coded[row : row + 1], value[row : row + 1], pool[:, row], own, codec)
        return
    flat = [x.transpose(0, 1).reshape(1, heads, rows * tokens, d) for x in (coded.float(), value.float())]
    pad = -rows * tokens % PAGE_TOKENS
    pages = codec.encode(*(functional.pad(x, (0, 0, 0, pad)) for x in flat))[0]  # (heads, pages, bytes)
    new = [f.flatten(1, 2)[:, : rows * tokens] for f in _fields(pages, codec.layout)]
    used = slots >= 0
    blocks, which = torch.unique(slots[used] // PAGE_TOKENS, return_inverse=True)
    old = _fields(pool[blocks].transpose(0, 1), codec.layout)  # (heads, blocks, 64, ...)
    for a, b in zip(old, new, strict=True):
        a[:, which, slots[used] % PAGE_TOKENS] = b[:, used]
    pool[blocks] = _join(old, codec.layout).transpose(0, 1)


def _fields(pages: Tensor, layout: PageLayout) -> list[Tensor]:
    """Pages (..., bytes) as what each token owns: codes (..., 64, head_dim) and scales (..., 64, 2 bytes)."""
    parts = [(layout.key_offset, layout.key_bits), (layout.value_offset, layout.value_bits)]
    scales = [layout.key_scale_offset, layout.value_scale_offset]
    if layout.qjl:
        parts.insert(1, (layout.qjl_offset, 1))
        scales.insert(1, layout.qjl_norm_offset)
    codes = [layout.unpack(pages[..., at : at + layout.codes_bytes(bits)], bits) for at, bits in parts]
    return codes + [pages[..., at : at + 2 * PAGE_TOKENS].reshape(*pages.shape[:-1], PAGE_TOKENS, 2).clone() for at in scales]


def _join(fields: list[Tensor], layout: PageLayout) -> Tensor:
    """Inverse of :func:`_fields`."""
    bits = [layout.key_bits, *([1] if layout.qjl else []), layout.value_bits]
    planes = [layout.pack(codes, b) for codes, b in zip(fields, bits, strict=False)]
    return torch.cat([*planes, *(s.flatten(-2) for s in fields[len(bits) :])], dim=-1)
