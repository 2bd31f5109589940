"""Vector quantizers against their papers: stored bits, distortion, bias and variance."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant.codec.codebook import lloyd_max
from turboquant.codec.quantizers import (
    QJL,
    QUANTIZERS,
    Encoded,
    OutlierChannels,
    PolarQuant,
    TurboQuantMSE,
    TurboQuantProd,
    VectorQuantizer,
)
from turboquant.codec.quantizers.mse import SCALES, Scale
from turboquant.codec.quantizers.qjl import SKETCHES, SketchType
from turboquant.codec.rotation import ROTATION_TYPES, RotationType
from turboquant.errors import ConfigError, ShapeError

NAMES = sorted(QUANTIZERS)
DIMS = [64, 96, 128]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: waiting for a second thread costs more than it saves, on a busy machine many times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=8)
def unit_vectors(count: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(randn(count, dim, seed=dim), dim=-1)


@functools.lru_cache(maxsize=16)
def pairs(count: int, dim: int, rho: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random unit vectors x and y with <x, y> = rho."""
    x, z = (randn(count, dim, seed=2 * seed + i) for i in (0, 1))
    x = torch.nn.functional.normalize(x, dim=-1)
    z = torch.nn.functional.normalize(z - (z * x).sum(-1, keepdim=True) * x, dim=-1)
    return x, rho * x + math.sqrt(1 - rho * rho) * z


def distortion(quantizer: VectorQuantizer, x: Tensor) -> float:
    """Squared error relative to the energy of x."""
    return float((quantizer.decode(quantizer.encode(x)) - x).square().sum() / x.square().sum())


def tensors(encoded: Encoded) -> dict[str, Tensor]:
    return encoded.codes | encoded.scales | encoded.shared


def assert_same(a: Encoded, b: Encoded) -> None:
    assert tensors(a).keys() == tensors(b).keys()
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, tensors(b)[name]), name


# -- every quantizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_bits_per_element_is_what_the_tensors_hold(name: str, dim: int) -> None:
    quantizer = QUANTIZERS[name](dim)
    encoded = quantizer.encode(randn(2048, dim))
    assert all(t.dtype == torch.uint8 for t in encoded.codes.values())
    assert all(t.dtype == torch.float16 for t in encoded.scales.values())
    # With this many vectors every code occurs, so the largest one tells the width of an index.
    bits = sum(t.numel() * int(t.max()).bit_length() for t in encoded.codes.values())
    bits += sum(t.numel() * 16 for t in encoded.scales.values())
    assert quantizer.bits_per_element == bits / (2048 * dim)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_everything(name: str, dim: int) -> None:
    cls, x = QUANTIZERS[name], randn(50, dim)
    first, again, other = (cls(dim, seed=seed) for seed in (7, 7, 8))
    assert first == again and first != other
    encoded = first.encode(x)
    assert_same(encoded, again.encode(x))
    assert torch.equal(first.decode(encoded), again.decode(encoded))
    for code, index in other.encode(x).codes.items():
        assert (encoded.codes[code] != index).float().mean() > 0.2
    assert not torch.allclose(first.decode(encoded), other.decode(encoded), atol=0.1)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_points_at_the_input(name: str, dim: int) -> None:
    x = randn(200, dim)
    quantizer = QUANTIZERS[name](dim)
    cosine = torch.nn.functional.cosine_similarity(quantizer.decode(quantizer.encode(x)), x)
    # One sign per element (QJL) gives about sqrt(1 / (pi/2 + 1)) = .62; the others store two bits and more.
    assert cosine.min() > (0.4 if name == "qjl" else 0.9)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_decode_to_zero_among_others(name: str, dim: int) -> None:
    quantizer = QUANTIZERS[name](dim)
    x = randn(4, dim)
    x[1] = 0
    decoded = quantizer.decode(quantizer.encode(x))
    assert torch.equal(decoded[1], torch.zeros(dim))
    assert decoded.isfinite().all() and (decoded[[0, 2, 3]].norm(dim=-1) > 1).all()
    assert torch.equal(quantizer.decode(quantizer.encode(torch.zeros(dim))), torch.zeros(dim))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [1, 3])
def test_zero_vectors_decode_to_zero_with_every_scale(bits: int, scale: Scale) -> None:
    quantizer = TurboQuantMSE(64, bits, "hadamard", scale)
    assert torch.equal(quantizer.decode(quantizer.encode(torch.zeros(2, 64))), torch.zeros(2, 64))


@pytest.mark.parametrize("name", NAMES)
def test_input_layout_and_dtype_do_not_matter(name: str) -> None:
    quantizer = QUANTIZERS[name](64)
    x = randn(64, 6, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_same(quantizer.encode(x), quantizer.encode(x.contiguous()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = x.to(dtype)
        assert_same(quantizer.encode(rounded), quantizer.encode(rounded.float()))
        assert quantizer.decode(quantizer.encode(rounded)).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_encoding_needs_no_gradient_and_leaves_the_input_alone(name: str) -> None:
    x = randn(3, 64).requires_grad_()
    before = x.detach().clone()
    encoded = QUANTIZERS[name](64).encode(x)
    assert not any(t.requires_grad for t in tensors(encoded).values())
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_inner_product_is_that_of_the_decoded_vectors(name: str) -> None:
    quantizer = QUANTIZERS[name](64)
    encoded = quantizer.encode(randn(7, 64))
    query = randn(3, 1, 64, seed=1)
    expected = (query * quantizer.decode(encoded)).sum(-1)
    assert expected.shape == (3, 7)
    torch.testing.assert_close(quantizer.inner_product(query, encoded), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(quantizer.inner_product(query.double(), encoded), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused_with_advice(name: str) -> None:
    quantizer = QUANTIZERS[name](64)
    encoded = quantizer.encode(randn(2, 64))
    for bad in (randn(2, 63), torch.tensor(1.0), randn(64, 2)):
        with pytest.raises(ShapeError, match="pass \\(\\.\\.\\., 64\\)"):
            quantizer.encode(bad)
        with pytest.raises(ShapeError, match="query has shape"):
            quantizer.inner_product(bad, encoded)
    with pytest.raises(ShapeError, match=r"x\.float\(\)"):
        quantizer.encode(torch.ones(2, 64, dtype=torch.int64))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    dim=st.sampled_from([48, 64]),
    batch=st.lists(st.integers(0, 4), max_size=3),
    exponent=st.integers(-6, 8),
    seed=st.integers(0, 10**6),
)
def test_shape_is_kept_and_powers_of_two_pass_through(name: str, dim: int, batch: list[int], exponent: int, seed: int) -> None:
    quantizer = QUANTIZERS[name](dim, seed=seed)
    x = randn(*batch, dim, seed=seed)
    decoded = quantizer.decode(quantizer.encode(x))
    assert decoded.shape == x.shape
    # Exact: powers of two change no mantissa, here or in the fp16 norms, which stay in fp16's normal range.
    assert torch.equal(quantizer.decode(quantizer.encode(x * 2.0**exponent)), decoded * 2.0**exponent)
    # All codebooks are symmetric.
    torch.testing.assert_close(quantizer.decode(quantizer.encode(-x)), -decoded, atol=1e-4, rtol=0)


Make = Callable[[], VectorQuantizer]


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: TurboQuantMSE(64, 0), "bits=0 cannot work; choose a whole number from 1 to 6"),
        (lambda: TurboQuantMSE(64, 7), "from 1 to 6"),
        (lambda: TurboQuantMSE(64, 2.5), "bits=2.5 cannot work"),  # type: ignore[arg-type]
        (lambda: TurboQuantMSE(2), "dim=2 cannot work; choose a whole number from 3 to 4096"),
        (lambda: TurboQuantMSE(0, codebook="gaussian"), "from 1 to 4096"),
        (lambda: TurboQuantMSE(8192), "from 3 to 4096"),
        (lambda: TurboQuantMSE(64, rotation_type="dct"), "choose one of hadamard, orthogonal"),  # type: ignore[arg-type]
        (lambda: TurboQuantMSE(64, scale="max"), "choose one of plain, norm_corrected"),  # type: ignore[arg-type]
        (lambda: TurboQuantMSE(64, codebook="nf4"), "choose one of beta, gaussian"),  # type: ignore[arg-type]
        (lambda: TurboQuantProd(64, 1), "bits=1 cannot work; choose a whole number from 2 to 7"),
        (lambda: TurboQuantProd(64, 8), "from 2 to 7"),
        (lambda: TurboQuantProd(64, sketch="srht"), "choose one of gaussian, orthogonal"),  # type: ignore[arg-type]
        (lambda: TurboQuantProd(64, rotation_type="dct"), "choose one of hadamard, orthogonal"),  # type: ignore[arg-type]
        (lambda: QJL(0), "from 1 to 4096"),
        (lambda: QJL(64, 0), "sketch_dim=0 cannot work"),
        (lambda: QJL(64, sketch="srht"), "choose one of gaussian, orthogonal"),  # type: ignore[arg-type]
        (lambda: PolarQuant(72), "not a multiple of 2\\^levels = 16; choose fewer levels, or pad the vectors with zeros to 80"),
        (lambda: PolarQuant(64, 3), "give a tuple of 3 numbers"),
        (lambda: PolarQuant(64, 2, (4, 9)), "bits of an angle=9"),
        (lambda: PolarQuant(64, 0, ()), "levels=0 cannot work"),
        (lambda: PolarQuant(64, rotation_type="dct"), "choose one of hadamard, orthogonal"),  # type: ignore[arg-type]
        (lambda: OutlierChannels(128, 3.0), "bits=3.0 is not an outlier setting; choose one of 2.5, 3.5"),
        (lambda: OutlierChannels(32), "outliers=32 cannot work; choose a whole number from 3 to 29"),
        (lambda: OutlierChannels(128, rotation_type="dct"), "choose one of hadamard, orthogonal"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused_with_advice(make: Make, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make()


# -- TurboQuant for squared error -------------------------------------------------------------------------------------------

# Relative squared error at d = 128, measured independently of this code (2, 3, 4 bits).
MSE_128: dict[Scale, tuple[float, float, float]] = {
    "norm_corrected": (0.11900, 0.03380, 0.00918),
    "least_squares": (0.11539, 0.03351, 0.00916),
    "unbiased": (0.13079, 0.03471, 0.00925),
}


@pytest.mark.parametrize("rotation_type", ROTATION_TYPES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_is_that_of_the_codebook_and_within_the_bounds(bits: int, dim: int, rotation_type: RotationType) -> None:
    x = unit_vectors(2048, dim)
    plain = distortion(TurboQuantMSE(dim, bits, rotation_type), x)
    assert plain == pytest.approx(lloyd_max(bits, dim).distortion, rel=0.02)
    # Theorems 1 and 3 of the paper.
    assert 4.0**-bits <= plain <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("rotation_type", ROTATION_TYPES)
@pytest.mark.parametrize("scale", sorted(MSE_128))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_with_other_scales(bits: int, scale: Scale, rotation_type: RotationType) -> None:
    error = distortion(TurboQuantMSE(128, bits, rotation_type, scale), unit_vectors(4096, 128))
    assert error == pytest.approx(MSE_128[scale][bits - 2], rel=0.02)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_one_bit_distortion_in_closed_form(dim: int) -> None:
    # Decoding is a multiple of the signs, so all follows from the 1-norm of a random unit vector: its mean is
    # d Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)) and its mean square 1 + (d - 1) 2 / pi.
    mean = dim * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    x = unit_vectors(2048, dim)
    corrected, best = (distortion(TurboQuantMSE(dim, 1, "orthogonal", s), x) for s in ("norm_corrected", "least_squares"))
    assert corrected == pytest.approx(2 - 2 * mean / math.sqrt(dim), rel=0.02)
    assert best == pytest.approx(1 - (1 + (dim - 1) * 2 / math.pi) / dim, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_scale_does_what_its_name_says(bits: int) -> None:
    x = 3 * randn(500, 96)
    decoded = {}
    for scale in SCALES:
        quantizer = TurboQuantMSE(96, bits, "orthogonal", scale, seed=3)
        decoded[scale] = quantizer.decode(quantizer.encode(x))
    errors = {scale: (y - x).norm(dim=-1) for scale, y in decoded.items()}
    # fp16 rounds the stored number by up to 2^-11.
    torch.testing.assert_close(decoded["norm_corrected"].norm(dim=-1), x.norm(dim=-1), rtol=6e-4, atol=0)
    torch.testing.assert_close((decoded["unbiased"] * x).sum(-1), x.square().sum(-1), rtol=6e-4, atol=0)
    for scale in SCALES:
        assert (errors["least_squares"] <= errors[scale] * (1 + 1e-5)).all()
        # The four only differ in length.
        torch.testing.assert_close(
            torch.nn.functional.normalize(decoded[scale], dim=-1), torch.nn.functional.normalize(decoded["plain"], dim=-1)
        )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_distortion_holds_for_any_vector_over_random_rotations(bits: int) -> None:
    # Theorem 1 is about every input, so also about those that are worst without a rotation.
    dim, count = 32, 300
    x = torch.stack((torch.eye(dim)[5], torch.full((dim,), dim**-0.5)))
    mean = np.mean([distortion(TurboQuantMSE(dim, bits, seed=seed), x) for seed in range(count)])
    assert mean == pytest.approx(lloyd_max(bits, dim).distortion, rel=0.05)


def test_gaussian_codebook_is_slightly_worse_on_vectors() -> None:
    x = unit_vectors(4096, 64)
    exact, limit = (distortion(TurboQuantMSE(64, 4, codebook=c), x) for c in ("beta", "gaussian"))
    assert exact < limit < 1.05 * exact


# -- inner products ---------------------------------------------------------------------------------------------------------

# (slope, variance * d at rho = 0, squared error * d at rho = .7) at 2, 3, 4 bits and d = 128, measured independently.
INNER_PRODUCTS: dict[str, list[tuple[float, float, float]]] = {
    "plain": [(0.884, 0.101, 0.968), (0.966, 0.0331, 0.126), (0.991, 0.0090, 0.0223)],
    "norm_corrected": [(0.941, 0.116, 0.284), (0.983, 0.0342, 0.0360), (0.995, 0.0093, 0.0062)],
    "least_squares": [(0.885, 0.102, 0.903), (0.967, 0.0327, 0.0896), (0.991, 0.0092, 0.0103)],
    "unbiased": [(1, 0.130, 0.0674), (1, 0.0354, 0.0182), (1, 0.0093, 0.0048)],
    "prod-gaussian": [(1, 0.561, 0.499), (1, 0.184, 0.176), (1, 0.0542, 0.0535)],
    "prod-orthogonal": [(1, 0.204, 0.174), (1, 0.0658, 0.062), (1, 0.0189, 0.0187)],
}


def by_name(name: str, bits: int, seed: int) -> VectorQuantizer:
    for sketch in SKETCHES:
        if name == f"prod-{sketch}":
            return TurboQuantProd(128, bits, sketch=sketch, seed=seed)
    scale = next(s for s in SCALES if s == name)
    return TurboQuantMSE(128, bits, "orthogonal", scale, seed=seed)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(INNER_PRODUCTS))
def test_inner_product_slope_and_variance(name: str, bits: int) -> None:
    slope, variance, error = INNER_PRODUCTS[name][bits - 2]
    rho, estimates = 0.7, {}
    for r in (0.0, rho):
        parts: list[Tensor] = []
        for seed in range(6):  # several, because one Gaussian sketch is off by half a percent for all pairs alike
            quantizer = by_name(name, bits, seed)
            x, y = pairs(2000, 128, r, seed)
            parts.append(quantizer.inner_product(y, quantizer.encode(x)))
        estimates[r] = torch.cat(parts)
    assert float(estimates[rho].mean()) / rho == pytest.approx(slope, abs=0.005)
    assert float(estimates[0.0].var()) * 128 == pytest.approx(variance, rel=0.06)
    assert float((estimates[rho] - rho).square().mean()) * 128 == pytest.approx(error, rel=0.06)


def fixed_pair(dim: int) -> tuple[Tensor, Tensor, float]:
    """Two unit vectors that are far from isotropic, and their inner product."""
    x = torch.nn.functional.normalize(0.6 ** torch.arange(float(dim)), dim=-1)
    y = torch.nn.functional.normalize(x + 0.5 * torch.eye(dim)[1], dim=-1)
    return x, y, float(x @ y)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_prod_is_unbiased_for_one_pair_over_seeds(sketch: SketchType) -> None:
    x, y, rho = fixed_pair(16)
    quantizers = [TurboQuantProd(16, 2, sketch=sketch, seed=seed) for seed in range(800)]
    estimates = torch.stack([q.inner_product(y, q.encode(x)) for q in quantizers])
    assert abs(float(estimates.mean()) - rho) < 4 * float(estimates.std()) / math.sqrt(800)


def test_two_bits_with_the_unbiased_scale_beat_prod_at_three() -> None:
    x, y = pairs(4000, 128, 0.0, 1)
    unbiased, prod = TurboQuantMSE(128, 2, scale="unbiased"), TurboQuantProd(128, 3)
    assert unbiased.bits_per_element < prod.bits_per_element - 1
    assert unbiased.inner_product(y, unbiased.encode(x)).var() < 0.8 * prod.inner_product(y, prod.encode(x)).var()


# -- QJL --------------------------------------------------------------------------------------------------------------------


def qjl_estimates(dim: int, rows: int, sketch: SketchType, rho: float) -> Tensor:
    out = []
    for seed in range(40):
        quantizer = QJL(dim, rows, sketch, seed=seed)
        x, y = pairs(500, dim, rho, seed)
        out.append(quantizer.inner_product(y, quantizer.encode(x)))
    return torch.cat(out)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("rows", [8, 16, 40])
def test_qjl_is_unbiased_for_one_pair_over_seeds(rows: int, sketch: SketchType) -> None:
    x, y, rho = fixed_pair(16)
    quantizers = [QJL(16, rows, sketch, seed=seed) for seed in range(600)]
    estimates = torch.stack([q.inner_product(5 * y, q.encode(3 * x)) for q in quantizers]) / 15
    assert abs(float(estimates.mean()) - rho) < 4 * float(estimates.std()) / math.sqrt(600)


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("rows", [32, 64, 128])
def test_qjl_variance_with_gaussian_rows(rows: int, rho: float) -> None:
    # A row contributes sqrt(pi/2) <s, q> sign <s, k>: second moment (pi/2) E <s, q>^2 = pi/2, mean rho, and m are averaged.
    assert float(qjl_estimates(64, rows, "gaussian", rho).var()) == pytest.approx((math.pi / 2 - rho**2) / rows, rel=0.06)


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("dim", [32, 64])
def test_qjl_variance_with_orthogonal_rows(dim: int, rho: float) -> None:
    # m = d: the decoded vector has square norm g^2 d with g = 1 / (m c), and its part along k is g |S k|_1, of mean 1 and
    # mean square g^2 (1 + (d - 1) 2 / pi). What is left is spread evenly over the other d - 1 directions.
    g = math.sqrt(math.pi) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)) / dim
    along = g * g * (1 + (dim - 1) * 2 / math.pi)
    expected = rho**2 * (along - 1) + (1 - rho**2) * (g * g * dim - along) / (dim - 1)
    estimates = qjl_estimates(dim, dim, "orthogonal", rho)
    # The mean is exact enough to tell g from its limit sqrt(pi / (2 d)), which is larger by 1 / (4 d).
    assert float(estimates.mean()) == pytest.approx(rho, abs=4 * math.sqrt(expected / len(estimates)))
    assert float(estimates.var()) == pytest.approx(expected, rel=0.06)
    assert expected < 0.4 * (math.pi / 2 - rho**2) / dim


def test_qjl_bits_follow_the_sketch() -> None:
    # The authors' setting for d = 128: 256 sign bits and a norm.
    quantizer = QJL(128, 256)
    encoded = quantizer.encode(randn(5, 128))
    assert encoded.codes["sign"].shape == (5, 256) and quantizer.bits_per_element == 2.125


@pytest.mark.parametrize("sketch", SKETCHES)
def test_qjl_rows_beyond_the_dimension_are_new(sketch: SketchType) -> None:
    signs = QJL(64, 128, sketch).encode(randn(200, 64)).codes["sign"].float()
    assert (signs[:, :64] - signs[:, 64:]).abs().mean() == pytest.approx(0.5, abs=0.05)


# -- PolarQuant -------------------------------------------------------------------------------------------------------------


def polar_error(bits: tuple[int, ...]) -> float:
    """2 - 2 prod_l E cos(error of the level's angle), with Lloyd's algorithm on a grid of each angle's density.

    The blocks x and x~ have equal norm, so the error is 2 - 2 <u, u~> for their directions. One level up,
    <u, u~> = cos cos~ A + sin sin~ B with A and B of the halves, of equal mean and independent of the angle: the mean is
    E A times E cos(psi - psi~).
    """
    product: float = math.sin(math.pi / 2 ** bits[0]) / (math.pi / 2 ** bits[0])  # uniform error within a cell at level 1
    grid = (np.arange(20_000) + 0.5) * (math.pi / 2 / 20_000)
    for level, width in enumerate(bits[1:], 2):
        weight = np.sin(2 * grid) ** (2 ** (level - 1) - 1)
        levels = np.quantile(grid, (np.arange(2**width) + 0.5) / 2**width)
        for _ in range(300):
            cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
            levels = np.bincount(cell, weight * grid) / np.bincount(cell, weight)
        product *= float(np.sum(weight * np.cos(grid - levels[cell])) / np.sum(weight))
    return 2.0 - 2.0 * product


@pytest.mark.parametrize("rotation_type", ROTATION_TYPES)
@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (3,), (5, 3), (4, 3, 2, 1, 1)])
def test_polar_distortion(bits: tuple[int, ...], rotation_type: RotationType) -> None:
    quantizer = PolarQuant(64, len(bits), bits, rotation_type)
    assert distortion(quantizer, unit_vectors(4096, 64)) == pytest.approx(polar_error(bits), rel=0.02)


@pytest.mark.parametrize("dim", [16, 48, 128, 256])
def test_polar_default_is_62_bits_for_16_coordinates(dim: int) -> None:
    quantizer = PolarQuant(dim)
    encoded = quantizer.encode(randn(3, dim))
    assert quantizer.bits_per_element == 62 / 16 == 3.875
    assert {n: t.shape[-1] for n, t in tensors(encoded).items()} == {
        "angle1": dim // 2,
        "angle2": dim // 4,
        "angle3": dim // 8,
        "angle4": dim // 16,
        "radius": dim // 16,
    }


def test_polar_keeps_the_norm() -> None:
    x = randn(100, 64)
    quantizer = PolarQuant(64)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)).norm(dim=-1), x.norm(dim=-1), rtol=6e-4, atol=0)


def test_polar_uses_every_angle_equally_at_level_one() -> None:
    angles = PolarQuant(64).encode(unit_vectors(4096, 64)).codes["angle1"].flatten()
    share = torch.bincount(angles.int(), minlength=16).float() / angles.numel()
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), atol=0.003, rtol=0)


# -- outlier channels -------------------------------------------------------------------------------------------------------


def with_outliers(count: int, dim: int, channels: Tensor, factor: float) -> Tensor:
    x = randn(count, dim)
    x[:, channels] *= factor
    return x


@pytest.mark.parametrize(
    ("bits", "dim", "outliers", "expected"), [(2.5, 128, 32, 2.5), (3.5, 128, 32, 3.5), (2.5, 64, 8, 2.625)]
)
def test_outlier_bits_are_exact(bits: float, dim: int, outliers: int, expected: float) -> None:
    assert OutlierChannels(dim, bits, outliers).bits_per_element == expected


def test_outlier_channels_are_those_with_the_most_energy() -> None:
    channels = torch.randperm(128, generator=torch.Generator().manual_seed(4))[:32]
    encoded = OutlierChannels(128).encode(with_outliers(64, 128, channels, 4.0).reshape(4, 16, 128))
    mask = encoded.shared["outlier_mask"]
    assert mask.dtype == torch.bool and mask.nonzero()[:, 0].tolist() == sorted(channels.tolist())
    assert encoded.codes["outlier_index"].shape == (4, 16, 32) and int(encoded.codes["outlier_index"].max()) == 7
    assert encoded.codes["other_index"].shape == (4, 16, 96) and int(encoded.codes["other_index"].max()) == 3


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_outlier_scheme_pays_when_there_are_outliers(bits: float) -> None:
    x = with_outliers(1000, 128, torch.arange(0, 128, 4), 10.0)
    low = math.floor(bits)
    quantizer = OutlierChannels(128, bits)
    # 32 channels hold 3200 of 3296 parts of the energy.
    expected = (3200 * lloyd_max(low + 1, 32).distortion + 96 * lloyd_max(low, 96).distortion) / 3296
    error = distortion(quantizer, x)
    assert error == pytest.approx(expected, rel=0.03)
    # TurboQuantMSE at the same number of bits, from a line through its logarithm at low + 1/8 and low + 9/8 bits.
    below, above = (distortion(TurboQuantMSE(128, b), x) for b in (low, low + 1))
    same_bits = below * (above / below) ** (quantizer.bits_per_element - low - 0.125)
    assert error < 0.6 * same_bits


def test_outlier_scheme_does_not_pay_without_outliers() -> None:
    x = randn(1000, 128)
    below, above = (distortion(TurboQuantMSE(128, b), x) for b in (2, 3))
    assert distortion(OutlierChannels(128), x) > below * (above / below) ** 0.375
