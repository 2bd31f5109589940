"""The bytes of a page: the single statement that every encoder, kernel and tier follows.

A *page* holds 64 tokens of one KV head of one layer, contiguously:

    K planes | QJL plane | V planes | K scales 64 x fp16 | QJL norms 64 x fp16 | V scales 64 x fp16  (QJL parts only with qjl)

A code of b bits is split over *bit planes*, so that no code straddles a word and 1 to 4 bits share one reader:

    b = 1: C          b = 2: A          b = 3: A B          b = 4: A B C
    A: the two low bits    B: bit 2    C: the sign (1 = negative); b = 1 is a sign alone

Within a plane the bits of one token sit in little-endian 32-bit words, arranged for a byte-permute look-up (one ``prmt`` or
``pshufb`` maps selector nibbles to bytes) and for tensor-core fragments that take any four dims per lane and step:

    A: one word per 16 dims.  dim 16 w + 8 r + n  ->  bits 4 n + 2 r and 4 n + 2 r + 1 of word w    (r < 2, n < 8)
    B: one word per 32 dims.  dim 32 u + 8 i + n  ->  bit 4 n + i of word u                         (i < 4, n < 8)
    C: one word per 32 dims.  dim 32 u + 4 s + e  ->  bit 8 e + s of word u                         (s < 8, e < 4)

so ``(A >> 2 r) & 0x33333333``, ``((B >> i) & 0x11111111) << 2`` and ``(C << (7 - s)) & 0x80808080`` line up by nibble or byte.
A plane starts with the rows of all 64 tokens. Head dims that are no multiple of 32 waste nothing:

    16 dims left over (80, 112, ...): A has its word in the row; B and C follow the rows with one word per *pair* of tokens, in
        which the odd token uses i + 2 (B) or s + 4 (C).
    fewer left over (100, 72, ...): after that, for each bit of the plane (low first) and each such dim, 64 bits, bit t for
        token t.

K and V use the same arrangement. Scales multiply :func:`stored_levels`. Those of 1 and 2 bits are uniform, +-1 and code - 1.5,
so that kernels calculate with the codes as they stand and take the constant off at the end; at 3 and 4 bits a kernel makes each
from one looked-up byte:

    keys: int8 levels in units of 1/64, for int8 tensor cores: byte / 64 at 1 to 3 bits, (byte + 0.5) / 64 at 4 bits, where the
        sign plane complements the byte (~m = -m - 1).
    values: fp16 numbers; at 1 and 2 bits that byte is the high one and the low one is 0, at 3 and 4 bits both are equal (up to
        the sign bit).

All are exact in fp16. Cost over exact Lloyd-Max levels, mean squared error on N(0,1): keys 0 (1 bit), 1.16 % (2 bits), 0.00 %
(3 bits), 0.04 % (4 bits); values 0, 1.16 %, 1.75 %, 6.7 %.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

PAGE_TOKENS = 64
LAYOUT_VERSION = 1
CODEBOOK_ID = 3
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 512
_SCALE_BYTES = 2 * PAGE_TOKENS

#: Bits of a code stored in each of its planes.
PLANES: dict[int, tuple[str, ...]] = {1: ("C",), 2: ("A",), 3: ("A", "B"), 4: ("A", "B", "C")}
_PLANE_BITS = {"A": 2, "B": 1, "C": 1}
_PLANE_SHIFT = {"A": 0, "B": 2, "C": 3}

# Gains below, and the bytes at 3 and 4 bits, were found by search over all byte choices and scales for the least mean squared
# error on N(0,1) (tests/codec/test_layout.py repeats the comparison). Ascending codes for 2 and 3 bits; magnitudes for 1 and 4.
_BYTES: dict[tuple[int, str], tuple[int, ...]] = {
    # int8: level = byte / 64, at 4 bits (byte + 0.5) / 64
    (1, "key"): (0x40,),
    (2, "key"): (0xA0, 0xE0, 0x20, 0x60),  # -96 -32 32 96
    (3, "key"): (0xA8, 0xC9, 0xE1, 0xF6, 0x0A, 0x1F, 0x37, 0x58),  # -88 -55 -31 -10 10 31 55 88
    (4, "key"): (0x05, 0x10, 0x1B, 0x27, 0x34, 0x43, 0x56, 0x72),  # 5 16 27 39 52 67 86 114
    # level = fp16 with bits x << 8
    (1, "value"): (0x3C,),
    (2, "value"): (0xBE, 0xB8, 0x38, 0x3E),
    # byte pairs x: level = fp16 with bits x << 8 | x
    (3, "value"): (0xC0, 0xBD, 0xBA, 0xB4, 0x33, 0x3A, 0x3D, 0x40),
    (4, "value"): (0x31, 0x38, 0x3B, 0x3D, 0x3F, 0x40, 0x41, 0x43),
}
# The number by which unit-variance data is multiplied to meet the levels.
_GAIN = {
    (1, "key"): 1.253314,
    (2, "key"): 1.004332,
    (3, "key"): 0.63916,
    (4, "key"): 0.654051,
    (1, "value"): 1.253314,
    (2, "value"): 1.004332,
    (3, "value"): 1.03719,
    (4, "value"): 1.38139,
}


def lut_bytes(bits: int, role: str) -> tuple[int, ...]:
    """The bytes a kernel looks up: by code for 2 and 3 bits, by magnitude for 4, one magnitude for 1.

    Args:
        bits: 1 to 4.
        role: ``"key"`` (int8, two's complement) or ``"value"`` (the high byte of an fp16 number; at 3 and 4 bits both bytes).
    """
    return _BYTES[bits, role]


def stored_levels(bits: int, role: str) -> np.ndarray:
    """The level of every code, indexed by code, float32 (each is exactly an fp16 number).

    At 2 and 3 bits levels ascend with the code. At 1 and 4 bits the sign plane flips the sign: of keys by bit 7 (1 bit) or by
    complementing the byte (4 bits), of values by the sign bit of the high byte (1 bit) or of both bytes (4 bits; that saves an
    instruction when two tokens are paired).

    Args:
        bits: 1 to 4.
        role: ``"key"`` or ``"value"``.
    """
    table = np.array(lut_bytes(bits, role), dtype=np.uint8)
    if role == "key":
        if bits == 1:
            table = np.concatenate((table, table ^ 0x80))
        elif bits == 4:
            table = np.concatenate((table, ~table))
        return ((table.view(np.int8).astype(np.float32) + (0.5 if bits == 4 else 0.0)) / 64).astype(np.float32)
    pairs = table.astype(np.uint16) * (0x100 if bits <= 2 else 0x101)
    if bits in (1, 4):
        pairs = np.concatenate((pairs, pairs ^ (0x8000 if bits == 1 else 0x8080))).astype(np.uint16)
    return pairs.view(np.float16).astype(np.float32)


def level_gain(bits: int, role: str) -> float:
    """Unit-variance data times this number meets :func:`stored_levels` at the least mean squared error."""
    return _GAIN[bits, role]


def magnitudes(bits: int, role: str) -> np.ndarray:
    """Absolute levels, ascending, of the positive and the negative ones: float32 (2, 2^(bits - 1)).

    They differ for values of 3 and 4 bits.
    """
    levels = np.sort(stored_levels(bits, role))
    half = len(levels) // 2
    return np.stack((levels[half:], -levels[:half][::-1]))


@functools.lru_cache(maxsize=64)
def encoder_bounds(bits: int, role: str) -> tuple[float, np.ndarray, np.ndarray]:
    """(middle, shifts, bounds) that choose the nearest level, in units of the root mean square.

    With all of them multiplied by the rms, a coordinate y is negative if ``y - middle`` has its sign bit set, and takes the
    magnitude whose number is how many k fulfil ``|y - shifts[k]| > bounds[k]``. Shifts and middle are zero for keys, and
    for values of 1 and 2 bits.

    Returns:
        A float32 number, and two float32 arrays (2^(bits - 1) - 1,), bounds ascending.
    """
    positive, negative = magnitudes(bits, role).astype(np.float64) / level_gain(bits, role)
    plus, minus = (positive[1:] + positive[:-1]) / 2, (negative[1:] + negative[:-1]) / 2
    middle = float(np.float32((positive[0] - negative[0]) / 2))
    return middle, ((plus - minus) / 2).astype(np.float32), ((plus + minus) / 2).astype(np.float32)


def codes_of(magnitude: Tensor, negative: Tensor, bits: int) -> Tensor:
    """Codes, uint8, of magnitude numbers (uint8, as in :func:`magnitudes`) and signs (bool, True for negative)."""
    if bits in (1, 4):
        return magnitude | negative.to(torch.uint8) << (bits - 1)
    half = 2 ** (bits - 1)
    codes: Tensor = (magnitude | half) ^ (negative.to(torch.uint8) * (2 * half - 1))
    return codes


def _plane_bytes(plane: str, dim: int) -> int:
    return PAGE_TOKENS * dim * _PLANE_BITS[plane] // 8


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one page.

    Args:
        head_dim: 32 to 512, any integer.
        key_bits, value_bits: bits of the scalar codes, 1 to 4, independently.
        qjl: keys carry a 1-bit QJL plane and a residual norm besides their ``key_bits`` (TurboQuant_prod).
    """

    head_dim: int
    key_bits: int
    value_bits: int
    qjl: bool = False

    def __post_init__(self) -> None:
        if not MIN_HEAD_DIM <= self.head_dim <= MAX_HEAD_DIM:
            raise ConfigError(f"head_dim={self.head_dim} is not supported; pages take {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits not in PLANES:
                raise ConfigError(f"{name}={bits} is not supported in a page; choose 1, 2, 3 or 4")

    @property
    def key_offset(self) -> int:
        """First byte of the K planes."""
        return 0

    @property
    def qjl_offset(self) -> int:
        """First byte of the QJL plane (where it would be, if there is none)."""
        return self.codes_bytes(self.key_bits)

    @property
    def value_offset(self) -> int:
        """First byte of the V planes."""
        return self.qjl_offset + (self.codes_bytes(1) if self.qjl else 0)

    @property
    def key_scale_offset(self) -> int:
        """First byte of the 64 fp16 K scales."""
        return self.value_offset + self.codes_bytes(self.value_bits)

    @property
    def qjl_norm_offset(self) -> int:
        """First byte of the 64 fp16 QJL residual norms (where they would be, if there are none)."""
        return self.key_scale_offset + _SCALE_BYTES

    @property
    def value_scale_offset(self) -> int:
        """First byte of the 64 fp16 V scales."""
        return self.qjl_norm_offset + (_SCALE_BYTES if self.qjl else 0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.value_scale_offset + _SCALE_BYTES

    @property
    def bits_per_element(self) -> float:
        """Stored bits per cached number (keys and values alike), scales included."""
        return self.page_bytes * 8 / (2 * PAGE_TOKENS * self.head_dim)

    def codes_bytes(self, bits: int) -> int:
        """Bytes of the planes of 64 tokens at ``bits`` bits."""
        return sum(_plane_bytes(p, self.head_dim) for p in PLANES[bits])

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """Codes (..., 64, head_dim) uint8, each below 2^bits -> planes (..., bytes) uint8."""
        lead = codes.shape[:-2]
        out = [_pack_plane((codes >> _shift(p, bits)) & (2 ** _PLANE_BITS[p] - 1), p) for p in PLANES[bits]]
        return torch.cat([o.reshape(*lead, -1) for o in out], dim=-1)

    def unpack(self, planes: Tensor, bits: int) -> Tensor:
        """Planes (..., bytes) uint8 -> codes (..., 64, head_dim) uint8."""
        codes: Tensor | None = None
        start = 0
        for p in PLANES[bits]:
            stop = start + _plane_bytes(p, self.head_dim)
            part = _unpack_plane(planes[..., start:stop], p, self.head_dim)
            part = part << _shift(p, bits) if _shift(p, bits) else part
            codes = part if codes is None else codes | part
            start = stop
        assert codes is not None
        return codes


def _shift(plane: str, bits: int) -> int:
    return 0 if bits == 1 else _PLANE_SHIFT[plane]


def _split(dim: int, plane: str) -> tuple[int, bool, int]:
    """(dims in whole words of a row, whether 16 dims form paired words, dims stored token-transposed)."""
    if plane == "A":
        return dim // 16 * 16, False, dim % 16
    return dim // 32 * 32, dim % 32 >= 16, dim % 16


#: Left shifts of the bits that share a byte, by slot and nibble, in the order of :func:`_group`.
_SHIFTS = {"A": ((0, 4), (2, 6)), "B": ((0, 4), (1, 5), (2, 6), (3, 7)), "C": tuple((s,) for s in range(8))}


def _group(x: Tensor, plane: str) -> Tensor:
    """Dims (..., k * word dims) -> (..., words, slot, byte, hi): slot and hi share the byte."""
    lead = x.shape[:-1]
    shape = {"A": (2, 4, 2), "B": (4, 4, 2), "C": (8, 4, 1)}[plane]
    return x.reshape(*lead, -1, *shape)


def _pack_words(x: Tensor, plane: str) -> Tensor:
    """Bits (..., dims) -> bytes (..., words * 4)."""
    g = _group(x, plane) << torch.tensor(_SHIFTS[plane], dtype=torch.uint8, device=x.device)[:, None, :]
    # Bits do not overlap, so a sum is an OR; uint8 sums would widen, hence the explicit dtype.
    return g.sum(dim=(-3, -1), dtype=torch.uint8).flatten(-2)


def _unpack_words(b: Tensor, plane: str) -> Tensor:
    """Bytes (..., words * 4) -> bits (..., dims)."""
    lead = b.shape[:-1]
    words = b.reshape(*lead, -1, 4)
    mask = 2 ** _PLANE_BITS[plane] - 1
    # One shift by a number per slot is 2.5 times as fast as one broadcast shift: the inner loops stay long.
    slots = [torch.stack([(words >> s) & mask for s in row], dim=-1) for row in _SHIFTS[plane]]
    return torch.stack(slots, dim=-3).reshape(*lead, -1)


def _pair_tokens(x: Tensor, plane: str) -> Tensor:
    """(..., 64, 16) bits -> (..., 32, 32): the odd token of a pair follows the even one in slot order."""
    return x.reshape(*x.shape[:-2], PAGE_TOKENS // 2, 32)


def _pack_plane(x: Tensor, plane: str) -> Tensor:
    main, paired, rest = _split(x.shape[-1], plane)
    lead = x.shape[:-2]
    parts = [_pack_words(x[..., :main], plane).reshape(*lead, -1)]
    if paired:
        parts.append(_pack_words(_pair_tokens(x[..., main : main + 16], plane), plane).reshape(*lead, -1))
    if rest:
        tail = x[..., x.shape[-1] - rest :].transpose(-1, -2)  # (..., rest, 64)
        for bit in range(_PLANE_BITS[plane]):
            b = ((tail >> bit) & 1).reshape(*lead, rest, 8, 8)
            parts.append(
                (b << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8).reshape(*lead, -1)
            )
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _unpack_plane(b: Tensor, plane: str, dim: int) -> Tensor:
    main, paired, rest = _split(dim, plane)
    lead = b.shape[:-1]
    start = PAGE_TOKENS * main * _PLANE_BITS[plane] // 8
    parts = [_unpack_words(b[..., :start].reshape(*lead, PAGE_TOKENS, -1), plane)]
    if paired:
        stop = start + PAGE_TOKENS * 16 // 8
        words = b[..., start:stop].reshape(*lead, PAGE_TOKENS // 2, 4)
        parts.append(_unpack_words(words, plane).reshape(*lead, PAGE_TOKENS, 16))
        start = stop
    if rest:
        bits = b[..., start:].reshape(*lead, _PLANE_BITS[plane], rest, 8, 1)
        bits = ((bits >> torch.arange(8, dtype=torch.uint8, device=b.device)) & 1).reshape(*lead, -1, rest, PAGE_TOKENS)
        value = bits[..., 0, :, :]
        for k in range(1, _PLANE_BITS[plane]):
            value = value | (bits[..., k, :, :] << k)
        parts.append(value.transpose(-1, -2))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
