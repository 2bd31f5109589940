"""Write new keys and values into packed pages, in one kernel launch where possible."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS, PageLayout, encoder_bounds, lut_bytes, magnitudes
from ..codec.page import PageCodec
from ..errors import ShapeError
from . import encode_torch, jit
from .pages import DTYPES, rotation_signs

_ALIGNMENT = 16
_WARPS = 4
_IDENTITY = KeyTransform(None, None)


class EncodeStruct(ctypes.Structure):
    """Mirror of ``struct Params`` in csrc/encode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "pool", "slots", "token_index", "angles", "centers", "balance")),
        *((name, ctypes.c_void_p) for name in ("key_signs", "value_signs", "qjl_signs")),
        *((f"{x}_{axis}", ctypes.c_int64) for x in ("key", "value") for axis in ("row", "head", "token")),
        *((name, ctypes.c_int64) for name in ("block_stride", "row_stride", "head_stride", "angles_row")),
        *((name, ctypes.c_int32) for name in ("tokens", "total", "first_index", "split")),
    )


def _words(numbers: np.ndarray | list[float]) -> str:
    """float32 numbers as a C list of their bits; one 0 if there are none."""
    raw = np.asarray(numbers, dtype=np.float32).ravel().view(np.uint32)
    return ",".join(f"0x{x:08x}u" for x in raw.tolist()) or "0u"


def _look_up(table: tuple[int, ...]) -> tuple[int, int]:
    """Up to eight bytes as two words for a byte permute."""
    low, high = (sum(x << 8 * i for i, x in enumerate(table[at : at + 4])) for at in (0, 4))
    return low, high


@functools.lru_cache(maxsize=64)
def code_defines(key_bits: int, value_bits: int) -> dict[str, int | str]:
    """Macros of csrc/encode_math.cuh that depend on the bits: bounds, squares and bytes of the levels."""
    _, _, key_bounds = encoder_bounds(key_bits, "key")
    middle, shifts, value_bounds = encoder_bounds(value_bits, "value")
    # Absolute levels of keys by the number of the magnitude.
    key_bytes = lut_bytes(key_bits, "key")[-(2 ** (key_bits - 1)) :]
    # Levels of values by the number of the magnitude, at 1 to 3 bits those of negative ones behind.
    value_bytes = lut_bytes(value_bits, "value")
    if value_bits == 1:
        value_bytes = (value_bytes[0], value_bytes[0] | 0x80)
    elif value_bits < 4:
        half = len(value_bytes) // 2
        value_bytes = value_bytes[half:] + value_bytes[:half][::-1]
    (key0, key1), (value0, value1) = _look_up(key_bytes), _look_up(value_bytes)
    return {
        "TQ_KEY_BOUNDS": _words(key_bounds),
        "TQ_KEY_SQUARES": _words(magnitudes(key_bits, "key").T ** 2),
        "TQ_KEY_LUT0": key0,
        "TQ_KEY_LUT1": key1,
        "TQ_VALUE_MIDDLE": _words([middle]),
        "TQ_VALUE_SHIFTS": _words(shifts),
        "TQ_VALUE_BOUNDS": _words(value_bounds),
        "TQ_VALUE_SQUARES": _words(magnitudes(value_bits, "value").T ** 2),
        "TQ_VALUE_LUT0": value0,
        "TQ_VALUE_LUT1": value1,
    }


def kernel_defines(
    layout: PageLayout,
    dtype: int,
    units: int = 1,
    rotate: bool = True,
    center: int = 0,
    pairs: int = 0,
    interleaved: bool = False,
    balance: bool = False,
) -> dict[str, int | str]:
    """Macros of csrc/encode.cu, which explains them."""
    return {
        "TQ_D": layout.head_dim,
        "TQ_KB": layout.key_bits,
        "TQ_VB": layout.value_bits,
        "TQ_QJL": int(layout.qjl),
        "TQ_UNITS": units,
        "TQ_DTYPE": dtype,
        "TQ_ROTATE": int(rotate),
        "TQ_CENTER": center,
        "TQ_PAIRS": pairs,
        "TQ_INTERLEAVED": int(interleaved),
        "TQ_BALANCE": int(balance),
        "TQ_QJL_OFFSET": layout.qjl_offset,
        "TQ_VALUE_OFFSET": layout.value_offset,
        "TQ_KEY_SCALES": layout.key_scale_offset,
        "TQ_QJL_NORMS": layout.qjl_norm_offset,
        "TQ_VALUE_SCALES": layout.value_scale_offset,
        **code_defines(layout.key_bits, layout.value_bits),
    }


class _Plan:
    """What calls with one codec, transform, device and type share: macros, loaded kernels, device tables."""

    def __init__(self, codec: PageCodec, transform: KeyTransform, dtype: torch.dtype, device: torch.device) -> None:
        layout, rotation, rotary = codec.layout, codec.key_rotation, transform.rotary
        d = layout.head_dim
        centred = transform.statistics is not None
        turned = centred and rotary is not None
        pairs = rotary.rotary_dim // 2 if turned and rotary is not None else 0
        #: The kernel rotates; otherwise torch centres, balances and rotates in front.
        self.rotate = rotation.kind == "hadamard" and d & (d - 1) == 0 and pairs % 4 == 0
        #: A kernel writes the pages; otherwise torch does.
        self.supported = codec.per_head_scale and d % 32 == 0 and (self.rotate or not layout.qjl)
        #: Angles of page starts are needed.
        self.turned = turned
        # Not the transform: plans live as long as it does.
        self.codec, self.device, self.head_dim, self.page_bytes = codec, device, d, layout.page_bytes
        self.pairs = pairs
        self._kernels: dict[tuple[Callable[..., Any], int], Any] = {}
        self.struct = EncodeStruct()
        balance = transform.balance(device) if self.rotate else None
        centers = transform.table(device) if self.rotate else None
        self._defines = {
            "dtype": DTYPES[dtype] if self.rotate else DTYPES[torch.float32],
            "rotate": self.rotate,
            "center": 0 if centers is None else 1 if turned else 2,
            "pairs": pairs if centers is not None else 0,
            "interleaved": turned and self.rotate and rotary is not None and rotary.pairing == "interleaved",
            "balance": balance is not None,
        }
        if self.rotate:
            rotations = (codec.key_rotation, codec.value_rotation, codec.sketch)
            self._tables = [centers, balance, *(rotation_signs(r, device) for r in rotations)]
            names = ("centers", "balance", "key_signs", "value_signs", "qjl_signs")
            for name, t in zip(names, self._tables, strict=True):
                setattr(self.struct, name, None if t is None else t.data_ptr())
        self.wide = _most_units(layout)
        self.blocks = 2 * jit.multiprocessors(device) if self.supported else 0
        #: By units: vectors of a warp, and bytes of shared memory of a warp for the rows of the centring table.
        self.vectors = {units: _vectors(d, units) for units in (1, self.wide)} if d % 32 == 0 else {}
        self.shared = {units: 4 * d * n if centers is not None else 0 for units, n in self.vectors.items()}

    def kernel(self, units: int) -> Any:
        """The kernel whose lanes have ``units`` of 32 dims."""
        key = (jit.get_kernel, units)
        if key not in self._kernels:
            defines = kernel_defines(self.codec.layout, units=units, **self._defines)  # type: ignore[arg-type]
            self._kernels[key] = jit.get_kernel("encode", defines, self.device)
        return self._kernels[key]


_plans: weakref.WeakKeyDictionary[KeyTransform, dict[tuple[PageCodec, torch.dtype, torch.device], _Plan]]
_plans = weakref.WeakKeyDictionary()


def _plan(codec: PageCodec, transform: KeyTransform, dtype: torch.dtype, device: torch.device) -> _Plan:
    plans = _plans.setdefault(transform, {})
    found = plans.get((codec, dtype, device))
    if found is None:
        if dtype not in DTYPES:
            raise ShapeError(f"keys and values are float16, bfloat16 or float32, not {dtype}")
        found = plans[codec, dtype, device] = _Plan(codec, transform, dtype, device)
    return found


def _check(key: Tensor, value: Tensor, pool: Tensor, slots: Tensor | None, plan: _Plan, index: Tensor | None) -> None:
    b, h, t, d = shape = key.shape
    if value.shape != shape or value.dtype != key.dtype or d != plan.head_dim:
        raise ShapeError(
            f"keys {tuple(shape)} {key.dtype} and values {tuple(value.shape)} {value.dtype} must be alike, with "
            f"head_dim {plan.head_dim}"
        )
    have = tuple(pool.shape)
    if pool.dtype != torch.uint8 or pool.stride(-1) != 1 or have[-2:] != (h, plan.page_bytes):
        raise ShapeError(f"a pool is uint8 (..., {h}, {plan.page_bytes}), contiguous in bytes, not {have} {pool.dtype}")
    if slots is None:
        if len(have) != 4 or have[1] != b or have[0] * PAGE_TOKENS < t:
            raise ShapeError(f"without slot_mapping the pool is (pages for {t} tokens, {b}, {h}, bytes), not {have}")
    elif len(have) != 3:
        raise ShapeError(f"with slot_mapping the pool is (blocks, {h}, bytes), not {have}")
    for name, x, dtype in (("slot_mapping", slots, torch.int64), ("token_index", index, torch.int32)):
        if x is not None and (x.dtype != dtype or x.numel() != b * t or not x.is_contiguous()):
            raise ShapeError(f"{name} is {dtype} with {b * t} numbers, contiguous, not {x.dtype} {tuple(x.shape)}")


def _angles(given: Tensor | None, transform: KeyTransform, plan: _Plan, rows: int, tokens: int | None) -> Tensor:
    """The angles to use, checked; ``tokens``: the length of the sequences, or None if unknown."""
    if given is None:
        if tokens is None:
            raise ShapeError("token_index needs angles: PageAngles.get(pages) of as many pages as the longest sequence has")
        assert transform.rotary is not None
        return transform.rotary.page_angles(plan.device).get(-(-tokens // PAGE_TOKENS))
    n, pages, *pair = given.shape
    if n not in (1, rows) or pair != [plan.pairs, 2] or given.dtype != torch.float32 or not given.is_contiguous():
        raise ShapeError(
            f"angles are float32 (1 or {rows}, pages, {plan.pairs}, 2), contiguous, not {given.dtype} {tuple(given.shape)}"
        )
    if tokens is not None and pages * PAGE_TOKENS < tokens:
        raise ShapeError(f"angles of {pages} pages do not reach token {tokens - 1}")
    return given


def _readable(x: Tensor) -> Tensor:
    """``x``, or a copy, with rows that 16-byte loads can read."""
    size = x.element_size()
    s = x.stride()
    if s[3] == 1 and not (x.data_ptr() | s[0] * size | s[1] * size | s[2] * size) % _ALIGNMENT:
        return x
    return x.contiguous()


def encode_pages(
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slot_mapping: Tensor | None = None,
    *,
    codec: PageCodec,
    transform: KeyTransform | None = None,
    first_index: int = 0,
    token_index: Tensor | None = None,
    angles: Tensor | None = None,
) -> None:
    """Code new tokens into their pages, in place; other tokens of these pages keep their bytes.

    Writes the bytes that ``codec.encode(transform.forward(key, ...), value)`` gives. Nothing is waited for. One launch
    does all where head_dim is a power of two, 32 to 512, with Hadamard rotations. Other multiples of 32, and Haar rotations,
    are centred and rotated by torch in front. Other head dims, QJL with such rotations, and scales shared by heads are
    written by torch alone: correct, much slower, and it waits for the GPU.

    Args:
        key, value: (rows, heads, tokens, head_dim) float16, bfloat16 or float32, any strides (copied if the last is not 1 or
            the others are not multiples of 16 bytes). A serving engine passes views (1, heads, tokens, head_dim).
        pool: uint8. With ``slot_mapping``: (blocks, heads, page_bytes). Without: (pages, rows, heads, page_bytes), token t of a
            row goes to page t / 64.
        slot_mapping: int64, rows * tokens: block * 64 + slot of each token; negative tokens are skipped. Slots must differ, and
            are not checked.
        codec: layout and rotations.
        transform: centring and balance of the keys, None for neither.
        first_index: index of token 0 of every row in its sequence, left padding counted; a multiple of 64 without
            ``slot_mapping``.
        token_index: int32, rows * tokens, in place of ``first_index``: the index of each token (index % 64 is its slot's).
        angles: cos and sin of page starts, float32 (rows or 1, pages, pairs, 2), from
            :meth:`~turboquant.codec.rotary.PageAngles.get`. By default those without padding; needed with ``token_index``.

    Raises:
        ShapeError: tensors do not fit.
        KernelError: the kernel does not compile or run here.
    """
    transform = _IDENTITY if transform is None else transform
    plan = _plan(codec, transform, key.dtype, key.device)
    _check(key, value, pool, slot_mapping, plan, token_index)
    rows, heads, tokens, _ = key.shape
    total = rows * tokens
    if not total:
        return
    if plan.turned:
        angles = _angles(angles, transform, plan, rows, first_index + tokens if token_index is None else None)
    strides, address = pool.stride(), pool.data_ptr()
    unaligned = (address | strides[0] | strides[-2] | strides[-3]) % _ALIGNMENT
    if unaligned or not plan.supported or not plan.rotate:
        if token_index is None:
            index = torch.arange(tokens, device=key.device).expand(rows, -1) + first_index
        else:
            index = token_index.view(rows, tokens).long()
        coded = encode_torch.coded_keys(key, transform, index, slot_mapping, angles)
        if unaligned or not plan.supported:
            encode_torch.write_tokens(coded, value, pool, slot_mapping, codec)
            return
        key, value = codec.key_rotation.forward(coded), codec.value_rotation.forward(value)
    key, value = _readable(key), _readable(value)
    s = EncodeStruct.from_buffer_copy(plan.struct)
    s.key, s.value, s.pool = key.data_ptr(), value.data_ptr(), address
    s.key_row, s.key_head, s.key_token, _ = key.stride()
    s.value_row, s.value_head, s.value_token, _ = value.stride()
    s.block_stride, s.head_stride = strides[0], strides[-2]
    s.tokens, s.total, s.first_index = tokens, total, first_index
    if slot_mapping is not None:
        s.slots = slot_mapping.data_ptr()
    else:
        s.row_stride = strides[1]
    if token_index is not None:
        s.token_index = token_index.data_ptr()
    if plan.turned and angles is not None:
        s.angles, s.angles_row = angles.data_ptr(), angles.stride(0) if angles.shape[0] > 1 else 0
    # Lanes with more dims do less work in all; small calls need many warps instead.
    units, warps = plan.wide, _WARPS
    groups = -(-total // (plan.vectors[units] * warps))
    if groups * heads < plan.blocks:
        s.split, units, warps = 1, 1, 1
        groups = 2 * -(-total // plan.vectors[1])
    plan.kernel(units).launch((groups, heads, 1), 32 * warps, warps * plan.shared[units], s)


def _vectors(head_dim: int, units: int) -> int:
    """Vectors of a warp."""
    lanes = head_dim // (32 * units)
    return 32 >> (lanes - 1).bit_length()


def _most_units(layout: PageLayout) -> int:
    """Units of 32 dims that a lane can hold; with QJL two would not fit the registers."""
    return 2 if layout.head_dim % 64 == 0 and not layout.qjl else 1


def _instances() -> Iterator[dict[str, int | str]]:
    """All bits at every head_dim, and every kind of input at one of them: what real models ask for, and all macros' values."""
    plain = [(k, v, False) for k in (1, 2, 3, 4) for v in (1, 2, 3, 4)]
    bits = plain + [(k, v, True) for k in (1, 2, 3) for v in (1, 2, 3, 4)]
    for d in (32, 64, 128, 256, 512):
        for layout in (PageLayout(d, k, v, qjl) for k, v, qjl in bits):
            for units in range(1, _most_units(layout) + 1):
                yield kernel_defines(layout, 1, units, True, 1, d // 2, False, True)
    centers = [(1, 64, False), (1, 64, True), (1, 32, False), (1, 32, True), (1, 16, False), (2, 0, False), (0, 0, False)]
    for dtype in (0, 1, 2):
        for units in (1, 2):
            for center, pairs, interleaved in centers:
                for balance in (True, False) if center else (False,):
                    yield kernel_defines(PageLayout(128, 3, 3), dtype, units, True, center, pairs, interleaved, balance)
    for d in range(32, 513, 32):
        for units in range(1, _most_units(PageLayout(d, 3, 3)) + 1):
            yield kernel_defines(PageLayout(d, 3, 3), 2, units, rotate=False)
    for k, v, _ in plain:
        yield kernel_defines(PageLayout(96, k, v), 2, 1, rotate=False)


jit.register_instances("encode", _instances, EncodeStruct)
