"""Small kernels written in a test, for tests of the emulator."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import numpy as np
import torch

from .runner import get_kernel

HEAD = """#include "common.cuh"
struct Params { const uint8_t* in; uint8_t* out; int n; };
"""
KERNEL = """TQ_KERNEL(tq_{name}, Params, 1024, 1) {{
  TQ_SHARED(smem);
  const int t = threadIdx.x, lane = t & 31;
  (void)smem, (void)t, (void)lane;
{body}
}}
"""


class Params(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("n", ctypes.c_int))


def run(
    folder: Path,
    body: str,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: int = 32,
    shared: int = 0,
    n: int = 0,
    **defines: int,
) -> np.ndarray:
    """Launch the statements ``body``, which see p.in, p.out, p.n, smem, t and lane; returns ``outputs``."""
    inputs = np.zeros(1, np.uint8) if inputs is None else np.ascontiguousarray(inputs)
    outputs = np.zeros(block, np.uint32) if outputs is None else outputs
    path = folder / f"k_{hashlib.blake2b(body.encode(), digest_size=4).hexdigest()}.cu"
    if not path.exists():
        path.write_text(HEAD + KERNEL.format(name=path.stem, body=body))
    kernel = get_kernel(str(path), defines, torch.device("cpu"))
    kernel.launch(grid=grid, block=block, shared=shared, params=Params(inputs.ctypes.data, outputs.ctypes.data, n))
    return outputs


def aligned(bytes_: bytes) -> np.ndarray:
    """The bytes at an address that is a multiple of 16."""
    room = np.zeros(len(bytes_) + 16, np.uint8)
    start = -room.ctypes.data % 16
    room[start : start + len(bytes_)] = np.frombuffer(bytes_, np.uint8)
    return room[start : start + len(bytes_)]
