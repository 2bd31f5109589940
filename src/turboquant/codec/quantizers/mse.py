"""TurboQuant for mean squared error: random rotation, then one scalar codebook for all coordinates."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..codebook import MAX_BITS, lloyd_max
from ..rotation import ROTATION_TYPES, RotationType, get_rotation
from .base import FP16_BITS, Encoded, VectorQuantizer, check_choice, check_dim, check_int, to_fp16

Scale = Literal["plain", "norm_corrected", "least_squares", "unbiased"]
SCALES: tuple[Scale, ...] = ("plain", "norm_corrected", "least_squares", "unbiased")
CodebookType = Literal["beta", "gaussian"]
CODEBOOKS: tuple[CodebookType, ...] = ("beta", "gaussian")


@functools.lru_cache(maxsize=64)
def _tables(bits: int, dim: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(thresholds, levels) of the codebook as float32 on ``device``."""
    book = lloyd_max(bits, dim)
    return torch.from_numpy(book.thresholds).float().to(device), torch.from_numpy(book.levels).float().to(device)


@dataclass(frozen=True)
class TurboQuantMSE(VectorQuantizer):
    """``TurboQuant_mse`` (arXiv 2504.19874, Alg. 1).

    ``y = R x sqrt(d) / |x|`` for a random rotation ``R``; each coordinate of ``y`` is rounded to the nearest level of the
    Lloyd-Max codebook of its density. Decoding is ``N / sqrt(d) R^T q`` with the levels ``q`` and the stored fp16 number
    ``N``, which the paper takes as ``|x|``. The other choices cost no storage:

    ``plain``
        ``N = |x|``. The decoded vector is shorter than ``x``: inner products shrink by the factor ``1 - D`` on average
        (``D`` is the relative squared error: .116, .0340, .0093 at 2, 3, 4 bits and d = 128).
    ``norm_corrected``
        ``N = |x| sqrt(d) / |q|``: the decoded vector has the norm of ``x``.
    ``least_squares``
        ``N = |x| <y, q> / <q, q>``: the smallest squared error that these codes allow.
    ``unbiased``
        ``N = |x| d / <y, q>``: the error is orthogonal to ``x``, which makes inner products with any vector unbiased over
        the random Haar rotation (as in RaBitQ and EDEN), at a larger squared error.

    Codes: ``index`` (..., d) uint8. Scales: ``norm`` (...) fp16. Zero vectors decode to zero.

    Args:
        dim: length ``d`` of the vectors, 1 to 4096 (3 and more for the ``beta`` codebook).
        bits: per coordinate, 1 to 6.
        rotation_type: ``"orthogonal"`` (a Haar matrix, as in the paper) or ``"hadamard"`` (fast).
        scale: one of the above.
        codebook: ``"beta"`` for the exact density in dimension ``d``, ``"gaussian"`` for its limit.
        seed: of the rotation.

    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    bits: int = 4
    rotation_type: RotationType = "orthogonal"
    scale: Scale = "plain"
    codebook: CodebookType = "beta"

    def __post_init__(self) -> None:
        check_choice("codebook", self.codebook, CODEBOOKS)
        check_dim(self.dim, low=3 if self.codebook == "beta" else 1)
        check_int("bits", self.bits, 1, MAX_BITS)
        check_choice("rotation_type", self.rotation_type, ROTATION_TYPES)
        check_choice("scale", self.scale, SCALES)

    @property
    def bits_per_element(self) -> float:
        """``bits + 16 / d``."""
        return (self.bits * self.dim + FP16_BITS) / self.dim

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _tables(self.bits, self.dim if self.codebook == "beta" else None, device)

    def _encode(self, x: Tensor) -> Encoded:
        thresholds, levels = self._on(x.device)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = x / norm.clamp(min=torch.finfo(torch.float32).tiny)
        y = get_rotation(self.dim, self.rotation_type, self.seed).forward(unit) * math.sqrt(self.dim)
        index = torch.bucketize(y, thresholds, out_int32=True)
        factor = self._factor(y, levels[index])
        # A zero vector has y = 0, for which the factor of the unbiased scale is infinite.
        stored = torch.where(norm[..., 0] > 0, norm[..., 0] * factor, torch.zeros_like(factor))
        return Encoded({"index": index.to(torch.uint8)}, {"norm": to_fp16(stored)})

    def _factor(self, y: Tensor, q: Tensor) -> Tensor:
        """``N / |x|`` for rotated vectors ``y`` of norm sqrt(d) and their levels ``q``."""
        if self.scale == "norm_corrected":
            return (self.dim / (q * q).sum(-1)).sqrt()
        if self.scale == "least_squares":
            return (y * q).sum(-1) / (q * q).sum(-1)
        if self.scale == "unbiased":
            return (y * q).sum(-1).reciprocal() * self.dim
        return torch.ones_like(y[..., 0])

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` returned."""
        index = encoded.codes["index"]
        levels = self._on(index.device)[1][index.int()]
        scaled = levels * (encoded.scales["norm"].float() / math.sqrt(self.dim))[..., None]
        return get_rotation(self.dim, self.rotation_type, self.seed).inverse(scaled)
