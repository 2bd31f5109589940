"""Write new keys and values into packed pages, in one kernel launch where possible."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS, encoder_bounds, lut_bytes, magnitudes
from ..codec.page import PageCodec
from ..errors import ShapeError
from . import encode_torch, jit
from .pages import DTYPES, rotation_signs

_ALIGNMENT = 16
_WARPS = 4


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


def code_defines(key_bits: int, value_bits: int) -> dict[str, int | str]:
    """Macros of csrc/encode_math.cuh that depend on the bits: bounds, squares and bytes of the levels."""
    _, _, key_bounds = encoder_bounds(key_bits, "key")
    middle, shifts, value_bounds = encoder_bounds(value_bits, "value")
    # Absolute levels of keys by the number of the magnitude.
    key_bytes = lut_bytes(key_bits, "key")[-(2 ** (key_bits - 1)) :]
    value_bytes = lut_bytes(value_bits, "value")
    low = value_bytes[0]
    if value_bits == 1:
        value_bytes = (low, low | 0x80)
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
        "TQ_VALUE_LOW": low,
    }


def _defines(
    codec: PageCodec, units: int, dtype: int, rotate: bool, center: int, pairs: int, interleaved: bool, balance: bool
) -> dict[str, int | str]:
    lay = codec.layout
    return {
        "TQ_D": lay.head_dim,
        "TQ_KB": lay.key_bits,
        "TQ_VB": lay.value_bits,
        "TQ_QJL": int(lay.qjl),
        "TQ_UNITS": units,
        "TQ_DTYPE": dtype,
        "TQ_ROTATE": int(rotate),
        "TQ_CENTER": center,
        "TQ_PAIRS": pairs,
        "TQ_INTERLEAVED": int(interleaved),
        "TQ_BALANCE": int(balance),
        "TQ_QJL_OFFSET": lay.qjl_offset,
        "TQ_VALUE_OFFSET": lay.value_offset,
        "TQ_KEY_SCALES": lay.key_scale_offset,
        "TQ_QJL_NORMS": lay.qjl_norm_offset,
        "TQ_VALUE_SCALES": lay.value_scale_offset,
        **code_defines(lay.key_bits, lay.value_bits),
    }
