"""PolarQuant: angles of a recursive polar transform, each with the codebook of its own density."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ..codebook import MAX_BITS, solve
from ..rotation import ROTATION_TYPES, RotationType, get_rotation
from .base import FP16_BITS, Encoded, VectorQuantizer, check_choice, check_dim, check_int, to_fp16

_MAX_LEVELS = 8


@functools.lru_cache(maxsize=128)
def _angles(level: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(thresholds, levels) in radians of the angle codebook of a level from 2 on, float32 on ``device``."""
    # Both radii are norms of n = 2^(level-1) Gaussian coordinates, so the density is cos^(n-1) sin^(n-1).
    power = 2 ** (level - 1) - 1
    book = solve(lambda psi: np.sin(2 * psi) ** power, 0.0, math.pi / 2, 2**bits)
    return torch.from_numpy(book.thresholds).float().to(device), torch.from_numpy(book.levels).float().to(device)


@dataclass(frozen=True)
class PolarQuant(VectorQuantizer):
    """PolarQuant (arXiv 2502.02617) with analytic codebooks.

    After a random rotation, neighbouring coordinates become (radius, angle); neighbouring radii again, ``levels`` times,
    until one radius is left for each block of ``2^levels`` coordinates. The angles of a random vector are independent:
    uniform on [0, 2 pi) at level 1, and of density proportional to ``sin(2 psi)^(2^(l-1) - 1)`` on [0, pi/2] at level l,
    ever closer to pi/4. Level 1 gets the uniform codebook, the others the Lloyd-Max codebook of that density (the paper
    fits them by k-means; the density makes that unnecessary). The radius is stored in fp16, so the decoded block keeps its
    norm. The relative squared error is ``2 - 2 prod_l E cos(psi_l - psi~_l)``: .0322 with the default bits.

    With the defaults, 16 coordinates take 16 + 8*4 + 4*2 + 2*2 + 1*2 = 62 bits: 3.875 bits per element.

    Codes: ``angle1``, ``angle2``, ...: (..., d / 2^l) uint8. Scales: ``radius`` (..., d / 2^levels) fp16. Zero vectors
    decode to zero.

    Args:
        dim: length ``d`` of the vectors, a multiple of ``2^levels``, up to 4096.
        levels: recursion depth, 1 to 8.
        bits: of an angle at each level, from level 1; each 1 to 6.
        rotation_type: ``"orthogonal"`` (as in the paper) or ``"hadamard"``.
        seed: of the rotation.

    Raises:
        ConfigError: an argument is out of range or unknown, ``bits`` has not ``levels`` entries, or ``dim`` is not a
            multiple of the block.
    """

    levels: int = 4
    bits: tuple[int, ...] = (4, 2, 2, 2)
    rotation_type: RotationType = "orthogonal"

    def __post_init__(self) -> None:
        check_dim(self.dim)
        check_int("levels", self.levels, 1, _MAX_LEVELS)
        if not isinstance(self.bits, tuple) or len(self.bits) != self.levels:
            raise ConfigError(f"bits={self.bits!r} cannot work; give a tuple of {self.levels} numbers, one for each level")
        for bits in self.bits:
            check_int("bits of an angle", bits, 1, MAX_BITS)
        check_choice("rotation_type", self.rotation_type, ROTATION_TYPES)
        if self.dim % self.block:
            raise ConfigError(
                f"dim={self.dim} is not a multiple of 2^levels = {self.block}; choose fewer levels, or pad the vectors "
                f"with zeros to {-(-self.dim // self.block) * self.block}"
            )

    @property
    def block(self) -> int:
        """Coordinates that share one radius."""
        return int(2**self.levels)

    @property
    def bits_per_element(self) -> float:
        """Angle bits of a block plus 16 for its radius, over its ``2^levels`` coordinates."""
        return (FP16_BITS + sum(b * (self.block >> level) for level, b in enumerate(self.bits, 1))) / self.block

    def _encode(self, x: Tensor) -> Encoded:
        radius = get_rotation(self.dim, self.rotation_type, self.seed).forward(x)
        codes: dict[str, Tensor] = {}
        for level, bits in enumerate(self.bits, 1):
            a, b = radius[..., 0::2], radius[..., 1::2]
            angle = torch.atan2(b, a)
            if level == 1:
                # atan2 is in [-pi, pi]: the floor is negative below zero, and the remainder wraps it around.
                index = torch.floor(angle * (2**bits / (2 * math.pi))).int().remainder(2**bits)
            else:
                index = torch.bucketize(angle, _angles(level, bits, x.device)[0], out_int32=True)
            codes[f"angle{level}"] = index.to(torch.uint8)
            radius = torch.hypot(a, b)
        return Encoded(codes, {"radius": to_fp16(radius)})

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` returned."""
        radius = encoded.scales["radius"].float()
        for level, bits in reversed(list(enumerate(self.bits, 1))):
            index = encoded.codes[f"angle{level}"].int()
            if level == 1:
                angle = (index.float() + 0.5) * (2 * math.pi / 2**bits)
            else:
                angle = _angles(level, bits, index.device)[1][index]
            radius = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)
        return get_rotation(self.dim, self.rotation_type, self.seed).inverse(radius)
