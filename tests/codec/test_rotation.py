"""Rotations: exactly orthogonal, reproducible everywhere, and mixing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from turboquant.codec.rotation import (
    MAX_DIM,
    ROTATION_TYPES,
    Rotation,
    RotationType,
    fwht,
    gaussian,
    get_rotation,
    haar_orthogonal,
    hartley,
    random_signs,
    splitmix64,
)
from turboquant.errors import ConfigError

DIMS = [32, 33, 48, 64, 72, 80, 96, 100, 112, 120, 128, 192, 200, 256, 320, 512]


@pytest.mark.parametrize("kind", ROTATION_TYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, *DIMS])
def test_orthogonal_with_inverse(dim: int, kind: RotationType) -> None:
    rotation = Rotation(dim, kind, seed=11)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=5e-6, rtol=0)
    x = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(dim))
    y = rotation.forward(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    torch.testing.assert_close(y, x @ matrix.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.inverse(y), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.forward(rotation.inverse(x)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=0, rtol=1e-5)


@pytest.mark.parametrize("kind", ROTATION_TYPES)
def test_equal_seeds_give_equal_rotations_and_others_do_not(kind: RotationType) -> None:
    first = Rotation(96, kind, seed=5).matrix()
    assert torch.equal(first, Rotation(96, kind, seed=5).matrix())
    assert not torch.allclose(first, Rotation(96, kind, seed=6).matrix(), atol=0.05)
    assert get_rotation(96, kind, 5) is get_rotation(96, kind, 5)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        # Published outputs of the reference implementation (Vigna, splitmix64.c).
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]),
    ],
)
def test_splitmix64_matches_the_reference(seed: int, expected: list[int]) -> None:
    assert [int(z) for z in splitmix64(seed, 5)] == expected


def test_splitmix64_takes_any_integer() -> None:
    assert [int(z) for z in splitmix64(2**64, 3)] == [int(z) for z in splitmix64(0, 3)]
    assert [int(z) for z in splitmix64(-1, 3)] == [int(z) for z in splitmix64(2**64 - 1, 3)]


def test_random_signs_are_pinned() -> None:
    # Stored caches depend on these: top bits of E2.., 6E.., 06.., F8.., 1B..
    assert random_signs(0, 5).tolist() == [-1.0, 1.0, 1.0, -1.0, 1.0]
    signs = random_signs(3, 100_000)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / math.sqrt(100_000)


def test_gaussian_is_pinned_and_normal() -> None:
    # Box-Muller by hand from the four outputs for seed 0 above.
    u1, u2 = ((z >> 11) * 2.0**-53 + 2.0**-54 for z in (0xE220A8397B1DCDAF, 0x06C45D188009454F))
    first = math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)
    assert gaussian(0, 1, 2)[0, 0] == pytest.approx(first, abs=1e-12)
    g = gaussian(1, 400, 500)
    n = g.size
    assert abs(g.mean()) < 4 / math.sqrt(n)
    assert abs((g**2).mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs((g**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_haar_moments() -> None:
    dim, count = 6, 4000
    q = np.stack([haar_orthogonal(seed, dim) for seed in range(count)])
    assert abs(q.mean(0)).max() < 5 / math.sqrt(dim * count)
    np.testing.assert_allclose((q**2).mean(0), 1 / dim, rtol=0.12)
    assert (q**4).mean() == pytest.approx(3 / (dim * (dim + 2)), rel=0.02)
    # Traces of powers tell Haar from a bare QR, whose R would have signs of LAPACK's choosing (Diaconis, Shahshahani 1994).
    trace = np.trace(q, axis1=1, axis2=2)
    assert abs(trace.mean()) < 0.08
    assert (trace**2).mean() == pytest.approx(1, abs=0.1)
    assert np.trace(q @ q, axis1=1, axis2=2).mean() == pytest.approx(1, abs=0.1)
    assert (np.linalg.det(q) > 0).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_spreads_a_single_channel(dim: int) -> None:
    # Every entry of the transform is at most sqrt(2 / d): 1 / sqrt(d) for a power of two, sqrt(2) more for Hartley.
    bound = 1.0 if dim & (dim - 1) == 0 else math.sqrt(2)
    assert Rotation(dim, "hadamard", seed=2).matrix().abs().max().item() <= bound / math.sqrt(dim) * (1 + 1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_orthogonal_spreads_a_single_channel(dim: int) -> None:
    # Entries are about N(0, 1/d); the largest of d^2 of them is near sqrt(4 ln d / d).
    peak = Rotation(dim, "orthogonal", seed=2).matrix().abs().amax(0)
    assert peak.max().item() <= 6 / math.sqrt(dim)
    assert peak.median().item() <= 3.5 / math.sqrt(dim)


@pytest.mark.parametrize("kind", ROTATION_TYPES)
def test_signs_spread_the_constant_vector(kind: RotationType) -> None:
    # Without random signs a Hadamard transform would gather it in one coordinate.
    y = Rotation(128, kind, seed=0).forward(torch.ones(128))
    assert y.abs().max().item() <= 4.5


def test_fwht_is_the_sylvester_matrix() -> None:
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.kron(h2, torch.kron(h2, h2))
    assert torch.equal(fwht(torch.eye(8)), matrix)


def test_hartley_is_a_symmetric_involution() -> None:
    for m in (1, 3, 5, 25):
        c = hartley(m)
        np.testing.assert_allclose(c, c.T, atol=1e-12)
        np.testing.assert_allclose(c @ c, np.eye(m), atol=1e-12)
    # cos + sin, not cos - sin, which would do as well: stored caches depend on it.
    np.testing.assert_allclose(math.sqrt(3) * hartley(3)[1], [1, -0.5 + math.sqrt(0.75), -0.5 - math.sqrt(0.75)], atol=1e-12)


@pytest.mark.parametrize("kind", ROTATION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_is_taken_as_float32(kind: RotationType, dtype: torch.dtype) -> None:
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotation = Rotation(80, kind)
    assert torch.equal(rotation.forward(x), rotation.forward(x.float()))
    assert rotation.inverse(x).dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ConfigError, match="choose one of hadamard, orthogonal"):
        Rotation(64, "fourier")  # type: ignore[arg-type]
    for dim in (0, -4, MAX_DIM + 1):
        with pytest.raises(ConfigError, match="supported are 1 to 4096"):
            Rotation(dim)
