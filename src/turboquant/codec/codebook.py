"""Lloyd-Max codebooks, solved from a density (arXiv 2504.19874, section 3.1).

A coordinate of a uniformly random unit vector of R^d, multiplied by sqrt(d), has the density

    f(x) = Gamma(d/2) / (sqrt(pi d) Gamma((d-1)/2)) (1 - x^2/d)^((d-3)/2),   |x| <= sqrt(d)

which tends to N(0, 1). Levels of :func:`lloyd_max` are in these units (unit variance). The optimal scalar quantizer is
the fixed point of two rules: thresholds half-way between levels, levels at the mean of their cell. Cell integrals are
taken by Gauss-Legendre quadrature, so any smooth density works; PolarQuant's angles use the same solver.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError

Array = np.ndarray
Density = Callable[[Array], Array]
MAX_BITS = 6
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_GAUSSIAN_EDGE = 10.0  # N(0,1) mass beyond is 1e-23


@dataclass(frozen=True)
class Codebook:
    """A scalar quantizer.

    Attributes:
        levels: reconstruction levels, ascending, float64.
        thresholds: decision thresholds between neighbours, ascending, float64.
        distortion: mean squared error for data of the density it was solved for.
    """

    levels: Array
    thresholds: Array
    distortion: float


def _cell_moments(density: Density, edges: Array) -> tuple[Array, Array, Array]:
    """Zeroth, first and second moments of ``density`` over the cells between consecutive ``edges``."""
    half, mid = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    x = mid + half * _NODES
    p = density(x) * _WEIGHTS * half
    return p.sum(1), (p * x).sum(1), (p * x * x).sum(1)


def solve(density: Density, low: float, high: float, count: int) -> Codebook:
    """The Lloyd-Max quantizer with ``count`` levels of a density on [low, high].

    Args:
        density: vectorized; need not be normalized.
        low, high: ends of the support, finite.
        count: number of levels, at least 1.
    """
    fine = np.linspace(low, high, 4097)
    mass = _cell_moments(density, fine)[0]
    # Start at quantiles of the cube root of the density (Panter and Dite), near the solution at any rate.
    pull = np.cumsum(np.cbrt(mass))
    levels = np.interp((np.arange(count) + 0.5) / count, pull / pull[-1], fine[1:])
    for _ in range(20_000):
        m0, m1, _ = _cell_moments(density, np.concatenate(([low], (levels[1:] + levels[:-1]) / 2, [high])))
        new = m1 / m0
        moved = float(np.max(np.abs(new - levels)))
        levels = new
        if moved < 1e-12 * (high - low):
            break
    thresholds = (levels[1:] + levels[:-1]) / 2
    return Codebook(levels, thresholds, expected_error(density, low, high, levels))


def expected_error(density: Density, low: float, high: float, levels: Array) -> float:
    """Mean squared error of nearest-level quantization of a density to any ascending ``levels``."""
    edges = np.concatenate(([low], np.clip((levels[1:] + levels[:-1]) / 2, low, high), [high]))
    m0, m1, m2 = _cell_moments(density, edges)
    return float(np.sum(m2 - 2 * levels * m1 + levels**2 * m0) / np.sum(m0))


def coordinate_density(dim: int | None) -> tuple[Density, float]:
    """The density above (None: its Gaussian limit) and the end of its support."""
    if dim is None:
        return (lambda x: np.exp(-x * x / 2) / math.sqrt(2 * math.pi)), _GAUSSIAN_EDGE
    norm = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi * dim)
    edge = min(math.sqrt(dim), _GAUSSIAN_EDGE)
    return (lambda x: norm * np.clip(1 - x * x / dim, 0.0, 1.0) ** ((dim - 3) / 2)), edge


@functools.lru_cache(maxsize=256)
def lloyd_max(bits: int, dim: int | None = None) -> Codebook:
    """The optimal ``bits``-bit codebook for a rotated coordinate in dimension ``dim`` (None: Gaussian limit).

    Raises:
        ConfigError: ``bits`` is not in 1..6, or ``dim`` is below 3 (the density has poles there).
    """
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"a scalar codebook of {bits} bits is not supported; choose 1 to {MAX_BITS}")
    if dim is not None and dim < 3:
        raise ConfigError(f"the coordinate density needs a dimension of at least 3, not {dim}")
    density, edge = coordinate_density(dim)
    book = solve(density, -edge, edge, 2**bits)
    levels = (book.levels - book.levels[::-1]) / 2  # exact symmetry
    return Codebook(levels, (levels[1:] + levels[:-1]) / 2, book.distortion)
