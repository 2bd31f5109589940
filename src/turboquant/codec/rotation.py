"""Random rotations that make the coordinates of any vector look alike.

TurboQuant (arXiv 2504.19874, Alg. 1) multiplies every vector by a random orthogonal matrix, after which each coordinate
follows one known density and a fixed scalar codebook is near optimal. Two families are offered:

``hadamard``
    ``y = B (s * x)``: random signs ``s``, then a fixed orthogonal transform ``B``. For ``d = 2^k`` it is the normalized
    Walsh-Hadamard transform. For ``d = 2^k m`` with odd ``m`` it is ``H_{2^k} (x) C_m`` with the orthogonal Hartley matrix
    ``C_m``, so that every output still mixes all inputs and no padding is stored. O(d log d).
``orthogonal``
    A Haar-distributed matrix: QR of a Gaussian matrix with the signs of R's diagonal fixed (the paper's choice). O(d^2).

Random numbers come from SplitMix64, which is a few integer operations on a counter, so the same seed gives the same
rotation on every device, platform and library version: stored bytes stay readable.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

RotationType = Literal["hadamard", "orthogonal"]
ROTATION_TYPES: tuple[RotationType, ...] = ("hadamard", "orthogonal")
MIN_DIM, MAX_DIM = 1, 4096


def splitmix64(seed: int, count: int) -> np.ndarray:
    """``count`` 64-bit outputs of SplitMix64 started at ``seed`` (Steele, Lea, Flood 2014), as uint64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_signs(seed: int, count: int) -> np.ndarray:
    """``count`` values of -1.0 or +1.0 (float32), from the top bit of SplitMix64."""
    return np.where(splitmix64(seed, count) >> np.uint64(63), np.float32(-1), np.float32(1)).astype(np.float32)


def gaussian(seed: int, rows: int, cols: int) -> np.ndarray:
    """A ``(rows, cols)`` float64 matrix of independent N(0, 1) values (Box-Muller on SplitMix64)."""
    n = rows * cols
    bits = splitmix64(seed, 2 * n).astype(np.uint64) >> np.uint64(11)
    u = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return (np.sqrt(-2.0 * np.log(u[:n])) * np.cos(2.0 * np.pi * u[n:])).reshape(rows, cols)


def haar_orthogonal(seed: int, dim: int) -> np.ndarray:
    """A Haar-distributed orthogonal ``(dim, dim)`` matrix in float64 (QR with the sign fix of Mezzadri 2007)."""
    q, r = np.linalg.qr(gaussian(seed, dim, dim))
    return np.asarray(q * np.sign(np.diagonal(r)))


def hartley(m: int) -> np.ndarray:
    """The orthogonal, symmetric Hartley matrix of size ``m``: ``(cos + sin)(2 pi j k / m) / sqrt(m)``, float64."""
    angle = 2.0 * np.pi * np.outer(np.arange(m), np.arange(m)) / m
    return np.asarray((np.cos(angle) + np.sin(angle)) / math.sqrt(m))


def fwht(x: Tensor) -> Tensor:
    """Unnormalized Walsh-Hadamard transform of the last axis (a power of two), in natural order.

    Butterflies run from stride 1 upwards: with this order fixed, every implementation that only adds and subtracts in
    float32 gets the same bits.
    """
    n, shape = x.shape[-1], x.shape
    h = 1
    while h < n:
        x = x.reshape(*shape[:-1], n // (2 * h), 2, h)
        a, b = x[..., 0, :], x[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2)
        h *= 2
    return x.reshape(shape)


class Rotation:
    """An orthogonal map of R^d, applied to the last axis of float32 tensors.

    Args:
        dim: length ``d`` of the vectors.
        kind: ``"hadamard"`` or ``"orthogonal"``.
        seed: any integer; equal seeds give equal rotations everywhere.
    """

    def __init__(self, dim: int, kind: RotationType = "hadamard", seed: int = 0) -> None:
        if kind not in ROTATION_TYPES:
            raise ConfigError(f"rotation_type={kind!r} is unknown; choose one of {', '.join(ROTATION_TYPES)}")
        if not MIN_DIM <= dim <= MAX_DIM:
            raise ConfigError(f"cannot rotate vectors of length {dim}; supported are {MIN_DIM} to {MAX_DIM}")
        self.dim, self.kind, self.seed = dim, kind, seed
        self._pow2 = dim & -dim
        self._odd = dim // self._pow2
        self._tensors: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def __repr__(self) -> str:
        return f"Rotation(dim={self.dim}, kind={self.kind!r}, seed={self.seed})"

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(signs over sqrt(2^k), Hartley matrix or None) or (matrix, None) on ``device``, made once."""
        if device not in self._tensors:
            # Shared by all later calls, so it must not be bound to the inference mode of the first.
            with torch.inference_mode(False):
                odd: Tensor | None = None
                if self.kind == "orthogonal":
                    main = torch.from_numpy(haar_orthogonal(self.seed, self.dim).astype(np.float32))
                else:
                    main = torch.from_numpy(random_signs(self.seed, self.dim)) * (1.0 / math.sqrt(self._pow2))
                    if self._odd > 1:
                        odd = torch.from_numpy(hartley(self._odd).astype(np.float32)).to(device)
                self._tensors[device] = (main.to(device), odd)
        return self._tensors[device]

    def _mix(self, x: Tensor, odd: Tensor | None) -> Tensor:
        """The symmetric transform ``B`` of the ``hadamard`` family, not yet normalized."""
        if odd is None:
            return fwht(x)
        y = x.reshape(*x.shape[:-1], self._pow2, self._odd) @ odd
        return fwht(y.transpose(-1, -2)).transpose(-1, -2).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape (..., d); returns float32 of the same shape."""
        main, odd = self._on(x.device)
        x = x.float()
        return x @ main.T if self.kind == "orthogonal" else self._mix(x * main, odd)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo :meth:`forward` for ``y`` of shape (..., d); returns float32 of the same shape."""
        main, odd = self._on(y.device)
        y = y.float()
        return y @ main if self.kind == "orthogonal" else self._mix(y, odd) * main

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """The rotation as a float32 ``(d, d)`` matrix ``R`` with ``forward(x) = R x``."""
        return self.forward(torch.eye(self.dim, device=device)).T.contiguous()


@functools.lru_cache(maxsize=256)
def get_rotation(dim: int, kind: RotationType, seed: int) -> Rotation:
    """A shared :class:`Rotation`; caches of all layers use one copy of its tensors."""
    return Rotation(dim, kind, seed)
