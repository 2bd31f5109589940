"""One bit more for the channels with the most energy: the paper's 2.5- and 3.5-bit settings."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ..rotation import RotationType
from .base import Encoded, VectorQuantizer, check_dim, check_int, derived_seed
from .mse import TurboQuantMSE

RATES = (2.5, 3.5)
_MIN_PART = 3  # the coordinate density needs three dimensions


@dataclass(frozen=True)
class OutlierChannels(VectorQuantizer):
    """The outlier-channel scheme of TurboQuant (arXiv 2504.19874, LongBench experiments).

    The ``outliers`` channels with the largest energy get one bit more than the others; both groups have their own rotation
    and :class:`TurboQuantMSE` quantizer, and so an fp16 norm of their own. The paper does not say how channels are chosen;
    here by their energy summed over all vectors given to one :meth:`encode`, which share the choice.

    With d = 128, "2.5 bits" are (32*3 + 96*2 + 2*16) / 128 = 2.5. The paper prints (32*3 + 96*2) / 128 = 2.5, which is
    2.25; the missing .25 are the two norms. Likewise (32*4 + 96*3 + 32) / 128 = 3.5. For other ``dim`` or ``outliers``,
    :attr:`bits_per_element` differs from ``bits``, which only names the two bit widths.

    It pays when a few channels carry most of the energy. Where all channels are alike, :class:`TurboQuantMSE` makes
    better use of the same bits.

    Codes: ``outlier_index`` (..., outliers) and ``other_index`` (..., d - outliers) uint8. Scales: ``outlier_norm`` and
    ``other_norm`` (...) fp16. Shared: ``outlier_mask`` (d,) bool, one bit per channel for the whole batch: 1 / n bits per
    element for n vectors, not in :attr:`bits_per_element`. Zero vectors decode to zero.

    Args:
        dim: length ``d`` of the vectors, 6 to 4096.
        bits: 2.5 (2 and 3 bits) or 3.5 (3 and 4 bits).
        outliers: number of outlier channels, 3 to d - 3.
        rotation_type: ``"orthogonal"`` (as in the paper) or ``"hadamard"``.
        seed: of both rotations, which are independent.

    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    bits: float = 2.5
    outliers: int = 32
    rotation_type: RotationType = "orthogonal"

    def __post_init__(self) -> None:
        check_dim(self.dim, low=2 * _MIN_PART)
        check_int("outliers", self.outliers, _MIN_PART, self.dim - _MIN_PART)
        if self.bits not in RATES:
            raise ConfigError(f"bits={self.bits!r} is not an outlier setting; choose one of {', '.join(map(str, RATES))}")
        _ = self._parts  # they check the rest

    @functools.cached_property
    def _parts(self) -> tuple[TurboQuantMSE, TurboQuantMSE]:
        """Quantizers of the outlier channels and of the others."""
        low, rest = math.floor(self.bits), self.dim - self.outliers
        return (
            TurboQuantMSE(self.outliers, low + 1, self.rotation_type, seed=derived_seed(self.seed, 0)),
            TurboQuantMSE(rest, low, self.rotation_type, seed=derived_seed(self.seed, 1)),
        )

    @property
    def bits_per_element(self) -> float:
        """Index bits of both groups plus two fp16 norms, over ``d``; the mask is not counted, see above."""
        outlier, other = self._parts
        return (outlier.bits_per_element * outlier.dim + other.bits_per_element * other.dim) / self.dim

    def _encode(self, x: Tensor) -> Encoded:
        energy = x.square().reshape(-1, self.dim).sum(0)
        mask = torch.zeros(self.dim, dtype=torch.bool, device=x.device)
        # A stable sort: channels of equal energy are chosen from the front on every device.
        mask[torch.argsort(energy, descending=True, stable=True)[: self.outliers]] = True
        outlier, other = (part.encode(x[..., chosen]) for part, chosen in zip(self._parts, (mask, ~mask), strict=True))
        return Encoded(
            {"outlier_index": outlier.codes["index"], "other_index": other.codes["index"]},
            {"outlier_norm": outlier.scales["norm"], "other_norm": other.scales["norm"]},
            {"outlier_mask": mask},
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` returned."""
        mask = encoded.shared["outlier_mask"]
        norm = encoded.scales["outlier_norm"]
        x = torch.empty(*norm.shape, self.dim, device=norm.device)
        for name, part, chosen in zip(("outlier", "other"), self._parts, (mask, ~mask), strict=True):
            codes, scales = {"index": encoded.codes[f"{name}_index"]}, {"norm": encoded.scales[f"{name}_norm"]}
            x[..., chosen] = part.decode(Encoded(codes, scales))
        return x
