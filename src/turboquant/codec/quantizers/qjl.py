"""QJL: the signs of a random projection, an unbiased one-bit sketch of a vector."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..rotation import MAX_DIM, gaussian, haar_orthogonal
from .base import FP16_BITS, Encoded, VectorQuantizer, check_choice, check_dim, check_int, derived_seed, to_fp16

SketchType = Literal["gaussian", "orthogonal"]
SKETCHES: tuple[SketchType, ...] = ("gaussian", "orthogonal")


@functools.lru_cache(maxsize=32)
def _sketch_matrix(kind: SketchType, rows: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """``S`` (rows, dim) as float32 on ``device``: N(0, 1) entries, or blocks of up to ``dim`` orthonormal rows."""
    if kind == "gaussian":
        matrix = gaussian(seed, rows, dim)
    else:
        blocks = -(-rows // dim)
        matrix = np.concatenate([haar_orthogonal(derived_seed(seed, i), dim) for i in range(blocks)])[:rows]
    return torch.from_numpy(matrix.astype(np.float32)).to(device)


def mean_projection(kind: SketchType, dim: int) -> float:
    """``E |<s, u>|`` for a row ``s`` of the sketch and any unit vector ``u``.

    ``sqrt(2 / pi)`` for Gaussian rows. Rows of a Haar matrix are uniform on the unit sphere, where it is
    ``Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))``, close to ``sqrt(2 / (pi d))``.
    """
    if kind == "gaussian":
        return math.sqrt(2 / math.pi)
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


@dataclass(frozen=True)
class QJL(VectorQuantizer):
    """Quantized Johnson-Lindenstrauss transform (arXiv 2406.03482).

    Stores ``sign(S k)`` and ``|k|``. The query is projected but not quantized, and

        <q, k>  ~  |k| / (m c) <S q, sign(S k)>,    c = E |<s, u>| for a row s and a unit vector u

    is unbiased over the random ``S``. With Gaussian rows, ``1 / (m c)`` is the paper's ``sqrt(pi / 2) / m`` and the
    variance for unit vectors at inner product ``rho`` is ``(pi / 2 - rho^2) / m``. With orthogonal rows, which the authors
    found to be almost always better, it is about ``(pi / 2 - 1) / d`` for ``rho = 0`` and ``m = d``. There ``1 / (m c)``
    is ``sqrt(pi / (2 d))`` for large ``m = d``; the exact constant used here is smaller by the factor ``1 - 1 / (4 d)``.

    Decoding gives ``|k| / (m c) S^T sign(S k)``, whose inner products are the same estimates. As a reconstruction it is
    poor: its norm is about ``sqrt(pi / 2) |k|`` with orthogonal rows and ``sqrt(pi / 2 + 1) |k|`` with Gaussian ones.

    Codes: ``sign`` (..., m) uint8, 1 for negative. Scales: ``norm`` (...) fp16. Zero vectors decode to zero.

    Args:
        dim: length ``d`` of the vectors, 1 to 4096.
        sketch_dim: number ``m`` of rows of ``S``, 1 to 65536; None means ``d``.
        sketch: ``"gaussian"`` rows, or ``"orthogonal"``: orthonormal rows, in independent blocks of ``d`` where ``m > d``.
        seed: of ``S``.

    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    sketch_dim: int | None = None
    sketch: SketchType = "gaussian"

    def __post_init__(self) -> None:
        check_dim(self.dim)
        check_choice("sketch", self.sketch, SKETCHES)
        check_int("sketch_dim", self.rows, 1, 16 * MAX_DIM)

    @property
    def rows(self) -> int:
        """Rows ``m`` of the sketch."""
        return self.dim if self.sketch_dim is None else self.sketch_dim

    @property
    def bits_per_element(self) -> float:
        """``(m + 16) / d``."""
        return (self.rows + FP16_BITS) / self.dim

    def _matrix(self, device: torch.device) -> Tensor:
        return _sketch_matrix(self.sketch, self.rows, self.dim, self.seed, device)

    def _encode(self, x: Tensor) -> Encoded:
        sign = (x @ self._matrix(x.device).T < 0).to(torch.uint8)
        return Encoded({"sign": sign}, {"norm": to_fp16(torch.linalg.vector_norm(x, dim=-1))})

    def _signed(self, encoded: Encoded) -> Tensor:
        """``|k| / (m c) sign(S k)``, float32 (..., m)."""
        unit = 1 / (self.rows * mean_projection(self.sketch, self.dim))
        return (1.0 - 2.0 * encoded.codes["sign"].float()) * (encoded.scales["norm"].float() * unit)[..., None]

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` returned."""
        signed = self._signed(encoded)
        return signed @ self._matrix(signed.device)

    def inner_product(self, query: Tensor, encoded: Encoded) -> Tensor:
        """The asymmetric estimator above; projects each query once instead of decoding each key. See the base class."""
        self._check(query, "query")
        return ((query.float() @ self._matrix(query.device).T) * self._signed(encoded)).sum(-1)
