"""TurboQuant for inner products: the MSE quantizer with one bit less, and QJL on what it leaves."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..codebook import MAX_BITS
from ..rotation import RotationType
from .base import Encoded, VectorQuantizer, check_dim, check_int, derived_seed
from .mse import TurboQuantMSE
from .qjl import QJL, SketchType


@dataclass(frozen=True)
class TurboQuantProd(VectorQuantizer):
    """``TurboQuant_prod`` (arXiv 2504.19874, Alg. 2).

    ``x~ = mse(x)`` at ``bits - 1``; then the signs of ``S (x - x~)`` and ``gamma = |x - x~|`` are stored, and decoding adds
    ``sqrt(pi / 2) / d gamma S^T signs``. Inner products are unbiased over the random ``S`` for every pair of vectors.

    The cache does not use it by default, because it pays for that with variance, which the softmax of attention amplifies.
    Variance times d of ``<y, x~>`` for orthogonal unit vectors ``x`` and ``y`` at d = 128:

        =====================  =====  =====  ======
        bits                       2      3       4
        =====================  =====  =====  ======
        mse, plain              .101  .0331   .0090
        mse, unbiased scale     .130  .0354   .0093
        prod, orthogonal S      .204  .0658   .0189
        prod, Gaussian S        .561   .184   .0542
        =====================  =====  =====  ======

    So the unbiased scale of :class:`TurboQuantMSE` at b - 1 bits already beats this class with Gaussian ``S`` at b bits,
    and several independent groups saw worse perplexity with QJL than without.

    Codes: ``index`` (..., d) uint8 of ``bits - 1`` bits, ``sign`` (..., d) uint8, 1 for negative. Scales: ``norm`` and
    ``residual_norm`` (...) fp16. Zero vectors decode to zero.

    Args:
        dim: length ``d`` of the vectors, 3 to 4096.
        bits: per coordinate with the sign bit, 2 to 7.
        rotation_type: of the MSE stage, ``"orthogonal"`` or ``"hadamard"``.
        sketch: rows of ``S``: iid ``"gaussian"`` (the paper) or ``"orthogonal"``, see :class:`QJL`.
        seed: of both the rotation and ``S``, which are independent.

    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    bits: int = 4
    rotation_type: RotationType = "orthogonal"
    sketch: SketchType = "gaussian"

    def __post_init__(self) -> None:
        check_dim(self.dim, low=3)
        check_int("bits", self.bits, 2, MAX_BITS + 1)
        _ = self._mse, self._qjl  # they check the rest

    @functools.cached_property
    def _mse(self) -> TurboQuantMSE:
        return TurboQuantMSE(self.dim, self.bits - 1, self.rotation_type, seed=derived_seed(self.seed, 0))

    @functools.cached_property
    def _qjl(self) -> QJL:
        return QJL(self.dim, sketch=self.sketch, seed=derived_seed(self.seed, 1))

    @property
    def bits_per_element(self) -> float:
        """``bits + 32 / d``."""
        return self._mse.bits_per_element + self._qjl.bits_per_element

    def _encode(self, x: Tensor) -> Encoded:
        coarse = self._mse.encode(x)
        fine = self._qjl.encode(x - self._mse.decode(coarse))
        return Encoded(coarse.codes | fine.codes, coarse.scales | {"residual_norm": fine.scales["norm"]})

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` returned."""
        residual = Encoded({"sign": encoded.codes["sign"]}, {"norm": encoded.scales["residual_norm"]})
        return self._mse.decode(encoded) + self._qjl.decode(residual)
