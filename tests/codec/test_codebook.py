"""Codebooks against printed tables and against the definition of an optimal scalar quantizer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from turboquant.codec.codebook import MAX_BITS, coordinate_density, expected_error, lloyd_max, solve
from turboquant.errors import ConfigError

# Positive levels for unit variance. The Gaussian ones are those of Max (1960), Table I.
GAUSSIAN = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}
SPHERE_128 = {
    1: [0.7994],
    2: [0.4525, 1.5052],
    3: [0.2444, 0.7533, 1.3366, 2.1315],
    4: [0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889],
}
DIMS = [None, 3, 16, 64, 128, 256, 4096]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "table"), [(None, GAUSSIAN), (128, SPHERE_128)])
def test_levels_match_printed_tables(bits: int, dim: int | None, table: dict[int, list[float]]) -> None:
    levels = lloyd_max(bits, dim).levels
    np.testing.assert_allclose(levels[len(levels) // 2 :], table[bits], atol=5.1e-5)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_gaussian_distortion(bits: int, distortion: float) -> None:
    assert lloyd_max(bits).distortion == pytest.approx(distortion, abs=5.1e-5)


def test_one_bit_closed_form() -> None:
    assert lloyd_max(1).levels[1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    assert lloyd_max(1).distortion == pytest.approx(1 - 2 / math.pi, abs=1e-12)


def test_dimension_three_is_uniform() -> None:
    # A coordinate of a point on the 2-sphere is uniform (Archimedes): equal cells, error step^2 / 12.
    book = lloyd_max(3, 3)
    step = 2 * math.sqrt(3) / 8
    np.testing.assert_allclose(book.levels, (np.arange(8) - 3.5) * step, atol=1e-9)
    assert book.distortion == pytest.approx(step**2 / 12, rel=1e-9)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_symmetric_ascending_with_midpoint_thresholds(bits: int, dim: int | None) -> None:
    book = lloyd_max(bits, dim)
    assert len(book.levels) == 2**bits and len(book.thresholds) == 2**bits - 1
    assert np.all(np.diff(book.levels) > 0)
    np.testing.assert_array_equal(book.levels, -book.levels[::-1])
    np.testing.assert_array_equal(book.thresholds, (book.levels[1:] + book.levels[:-1]) / 2)
    assert book.thresholds[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("dim", [None, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_level_can_be_improved(bits: int, dim: int | None) -> None:
    density, edge = coordinate_density(dim)
    book = lloyd_max(bits, dim)
    best = expected_error(density, -edge, edge, book.levels)
    assert best == pytest.approx(book.distortion, rel=1e-9)
    for i in range(len(book.levels)):
        for shift in (-0.02, -0.002, 0.002, 0.02):
            levels = book.levels.copy()
            levels[i] += shift
            assert expected_error(density, -edge, edge, levels) > best


@pytest.mark.parametrize("dim", [64, 128])
def test_distortion_on_samples_of_the_sphere(dim: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, dim))
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * math.sqrt(dim)
    for bits in (1, 2, 3, 4):
        book = lloyd_max(bits, dim)
        error = np.mean((x - book.levels[np.searchsorted(book.thresholds, x)]) ** 2)
        assert error == pytest.approx(book.distortion, rel=0.02)


@pytest.mark.parametrize("dim", [3, 8, 64, 128, 1024])
def test_density_is_normalized_with_unit_variance(dim: int) -> None:
    density, edge = coordinate_density(dim)
    x = np.linspace(-edge, edge, 400_001)
    p = density(x) * (x[1] - x[0])
    assert p.sum() == pytest.approx(1, abs=1e-4)
    assert (p * x * x).sum() == pytest.approx(1, abs=1e-4)


def test_distortion_tends_to_the_gaussian_limit_from_below() -> None:
    distortions = [lloyd_max(3, dim).distortion for dim in (16, 64, 256, 4096)] + [lloyd_max(3).distortion]
    assert distortions == sorted(distortions)
    assert distortions[-2] == pytest.approx(distortions[-1], rel=2e-3)


def test_more_bits_stay_between_the_bounds_of_the_paper() -> None:
    for bits in range(1, MAX_BITS + 1):
        distortion = lloyd_max(bits, 128).distortion
        assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_solve_takes_any_density() -> None:
    # Exponential on [0, 40]: the one-level codebook is the mean, and scaling the density changes nothing.
    one = solve(lambda x: np.exp(-x), 0.0, 40.0, 1)
    assert one.levels == pytest.approx([1.0], abs=1e-9) and one.thresholds.size == 0
    assert one.distortion == pytest.approx(1.0, abs=1e-6)
    a, b = solve(lambda x: np.exp(-x), 0.0, 40.0, 4), solve(lambda x: 7 * np.exp(-x), 0.0, 40.0, 4)
    np.testing.assert_allclose(a.levels, b.levels, atol=1e-9)
    assert a.distortion == pytest.approx(b.distortion, rel=1e-9)


@pytest.mark.parametrize("bits", [0, -1, MAX_BITS + 1])
def test_unsupported_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match="choose 1 to 6"):
        lloyd_max(bits, 128)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_dimension_too_small(dim: int) -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        lloyd_max(2, dim)
