"""The bytes of a page against a slow scalar reading of the layout's documentation, and the stored levels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turboquant.codec.codebook import Density, coordinate_density, expected_error, lloyd_max
from turboquant.codec.layout import (
    PAGE_TOKENS,
    PageLayout,
    codes_of,
    encoder_bounds,
    level_gain,
    lut_bytes,
    magnitudes,
    stored_levels,
)
from turboquant.errors import ConfigError

DIMS = [33, 64, 72, 80, 96, 100, 112, 120, 128, 192, 256, 512]
BITS = [1, 2, 3, 4]
ROLES = ["key", "value"]
BITS_AND_ROLES = [pytest.param(b, r, id=f"{r}-{b}bit") for b in BITS for r in ROLES]


def random_codes(dim: int, bits: int, *lead: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(1000 * dim + 10 * bits + seed)
    return torch.randint(0, 2**bits, (*lead, PAGE_TOKENS, dim), dtype=torch.uint8, generator=gen)


# -- the documentation, bit by bit ----------------------------------------------------------------------------------------


def plane_values(codes: np.ndarray, bits: int) -> list[tuple[str, np.ndarray]]:
    """What each plane stores: A the two low bits, B bit 2, C the sign (the top bit; alone for b = 1)."""
    if bits == 1:
        return [("C", codes)]
    planes = [("A", codes & 3)]
    if bits >= 3:
        planes.append(("B", codes >> 2 & 1))
    if bits == 4:
        planes.append(("C", codes >> 3))
    return planes


def put(words: dict[int, int], word: int, bit: int, value: int) -> None:
    assert not words.get(word, 0) >> bit & 1 or not value, "two values in one place"
    words[word] = words.get(word, 0) | value << bit


def scalar_plane(x: np.ndarray, plane: str) -> bytes:
    """One plane of (64, dim) values, one bit at a time."""
    x = x.astype(object)  # Python integers
    dim = x.shape[1]
    width, span = (2, 16) if plane == "A" else (1, 32)
    row_words = dim // span
    words: dict[int, int] = {}
    used = row_words * span
    for t, j in itertools.product(range(PAGE_TOKENS), range(used)):
        w, local = divmod(j, span)
        if plane == "A":
            r, n = divmod(local, 8)
            bit = 4 * n + 2 * r
        elif plane == "B":
            i, n = divmod(local, 8)
            bit = 4 * n + i
        else:
            s, e = divmod(local, 4)
            bit = 8 * e + s
        put(words, t * row_words + w, bit, x[t, j])
    count = PAGE_TOKENS * row_words
    if plane != "A" and dim % 32 >= 16:
        for t, local in itertools.product(range(PAGE_TOKENS), range(16)):
            pair, odd = divmod(t, 2)
            if plane == "B":
                i, n = divmod(local, 8)
                bit = 4 * n + i + 2 * odd
            else:
                s, e = divmod(local, 4)
                bit = 8 * e + s + 4 * odd
            put(words, count + pair, bit, x[t, used + local])
        count += PAGE_TOKENS // 2
        used += 16
    out = b"".join(words.get(i, 0).to_bytes(4, "little") for i in range(count))
    # The left-over dims: first the low bit of each of them, then the high bit.
    for bit, j in itertools.product(range(width), range(used, dim)):
        out += sum((x[t, j] >> bit & 1) << t for t in range(PAGE_TOKENS)).to_bytes(8, "little")
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [33, 64, 72, 80, 96, 100, 120, 128])
def test_bytes_are_those_of_a_scalar_reading_of_the_documentation(dim: int, bits: int) -> None:
    codes = random_codes(dim, bits)
    expected = b"".join(scalar_plane(x, p) for p, x in plane_values(codes.numpy(), bits))
    assert PageLayout(dim, bits, bits).pack(codes, bits).numpy().tobytes() == expected


@pytest.mark.parametrize("dim", [80, 128])
def test_words_line_up_by_nibble_and_byte(dim: int) -> None:
    # The three expressions that kernels rely on, word by word.
    codes = random_codes(dim, 4)
    planes = PageLayout(dim, 4, 4).pack(codes, 4).numpy()
    row_a, row_bc = dim // 16, dim // 32
    a = planes[: PAGE_TOKENS * dim // 4].view(np.uint32).reshape(PAGE_TOKENS, -1)
    b = planes[PAGE_TOKENS * dim // 4 :][: PAGE_TOKENS * row_bc * 4].view(np.uint32).reshape(PAGE_TOKENS, row_bc)
    c = planes[PAGE_TOKENS * dim * 3 // 8 :][: PAGE_TOKENS * row_bc * 4].view(np.uint32).reshape(PAGE_TOKENS, row_bc)
    x = codes.numpy().astype(np.uint32)
    for w, r in itertools.product(range(row_a), range(2)):
        nibbles = (a[:, w] >> np.uint32(2 * r)) & np.uint32(0x33333333)
        for n in range(8):
            np.testing.assert_array_equal(nibbles >> np.uint32(4 * n) & 15, x[:, 16 * w + 8 * r + n] & 3)
    for u, i, n in itertools.product(range(row_bc), range(4), range(8)):
        nibbles = ((b[:, u] >> np.uint32(i)) & np.uint32(0x11111111)) << np.uint32(2)
        np.testing.assert_array_equal(nibbles >> np.uint32(4 * n) & 15, x[:, 32 * u + 8 * i + n] & 4)
    for u, s, e in itertools.product(range(row_bc), range(8), range(4)):
        signs = (c[:, u] << np.uint32(7 - s)) & np.uint32(0x80808080)
        np.testing.assert_array_equal(signs >> np.uint32(8 * e) & 0xFF, (x[:, 32 * u + 4 * s + e] & 8) << 4)


# -- round trip and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_round_trip(dim: int, bits: int) -> None:
    layout, codes = PageLayout(dim, bits, bits), random_codes(dim, bits, 2, 3)
    planes = layout.pack(codes, bits)
    assert planes.dtype == torch.uint8
    assert planes.shape == (2, 3, PAGE_TOKENS * dim * bits // 8)
    assert torch.equal(layout.unpack(planes, bits), codes)


@given(dim=st.integers(32, 512), bits=st.sampled_from(BITS), seed=st.integers(0, 9), lead=st.integers(0, 2))
def test_round_trip_of_every_head_dim(dim: int, bits: int, seed: int, lead: int) -> None:
    layout, codes = PageLayout(dim, bits, bits), random_codes(dim, bits, *range(1, lead + 1), seed=seed)
    planes = layout.pack(codes, bits)
    assert planes.shape[-1] == layout.codes_bytes(bits) == PAGE_TOKENS * dim * bits // 8
    assert torch.equal(layout.unpack(planes, bits), codes)


@given(dim=st.integers(32, 512), bits=st.sampled_from(BITS), data=st.data())
def test_every_stored_bit_belongs_to_one_code(dim: int, bits: int, data: st.DataObject) -> None:
    # Unpacking is a bijection too: no bit of the planes is padding.
    layout = PageLayout(dim, bits, bits)
    planes = torch.zeros(layout.codes_bytes(bits), dtype=torch.uint8)
    at = data.draw(st.integers(0, planes.numel() - 1))
    planes[at] = 1 << data.draw(st.integers(0, 7))
    codes = layout.unpack(planes, bits)
    assert int((codes != 0).sum()) == 1
    assert int(codes.sum()).bit_count() == 1
    assert torch.equal(layout.pack(codes, bits), planes)


def test_pages_do_not_mix() -> None:
    layout, codes = PageLayout(120, 3, 3), random_codes(120, 3, 4)
    together = layout.pack(codes, 3)
    for page, alone in zip(together, codes, strict=True):
        assert torch.equal(page, layout.pack(alone, 3))


def test_input_of_any_memory_order() -> None:
    layout, codes = PageLayout(80, 4, 4), random_codes(80, 4, 2)
    strange = codes.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strange.is_contiguous()
    planes = layout.pack(strange, 4)
    assert torch.equal(planes, layout.pack(codes, 4))
    wide = torch.cat((planes, planes), dim=-1)[..., : planes.shape[-1]]
    assert not wide.is_contiguous()
    assert torch.equal(layout.unpack(wide, 4), codes)


@pytest.mark.parametrize(
    ("key", "value", "qjl", "bits"),
    [
        pytest.param(4, 4, False, 4.125, id="K4V4"),
        pytest.param(4, 3, False, 3.625, id="K4V3"),
        pytest.param(3, 3, False, 3.125, id="K3V3"),
        pytest.param(3, 2, False, 2.625, id="K3V2"),
        pytest.param(2, 2, False, 2.125, id="K2V2"),
        pytest.param(2, 1, False, 1.625, id="K2V1"),
        pytest.param(2, 3, True, 3.1875, id="K2+QJL V3"),  # a third fp16 number per token
        pytest.param(1, 2, True, 2.1875, id="K1+QJL V2"),
    ],
)
def test_bits_per_element_at_head_dim_128(key: int, value: int, qjl: bool, bits: float) -> None:
    layout = PageLayout(128, key, value, qjl)
    assert layout.bits_per_element == bits
    assert layout.page_bytes == bits * 2 * 64 * 128 / 8


@given(dim=st.integers(32, 512), key=st.sampled_from(BITS), value=st.sampled_from(BITS), qjl=st.booleans())
def test_sections_follow_each_other_and_cover_the_page(dim: int, key: int, value: int, qjl: bool) -> None:
    layout = PageLayout(dim, key, value, qjl)
    sections = [
        (layout.key_offset, 64 * dim * key // 8),
        (layout.qjl_offset, 64 * dim // 8 if qjl else 0),
        (layout.value_offset, 64 * dim * value // 8),
        (layout.key_scale_offset, 128),
        (layout.qjl_norm_offset, 128 if qjl else 0),
        (layout.value_scale_offset, 128),
    ]
    at = 0
    for offset, size in sections:
        assert offset == at
        at += size
    assert layout.page_bytes == at
    assert layout.bits_per_element == pytest.approx((key + value + qjl) / 2 + (48 if qjl else 32) / (2 * dim))


@pytest.mark.parametrize("dim", [-1, 0, 16, 31, 513, 1024])
def test_unsupported_head_dim(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"head_dim={dim} .* 32 to 512"):
        PageLayout(dim, 3, 3)


@pytest.mark.parametrize("bits", [0, 5, 8, 16, -1])
def test_unsupported_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"key_bits={bits} .*choose 1, 2, 3 or 4"):
        PageLayout(128, bits, 3)
    with pytest.raises(ConfigError, match=f"value_bits={bits} "):
        PageLayout(128, 3, bits)


# -- levels ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def gaussian() -> tuple[Density, float]:
    return coordinate_density(None)


def error(levels: Sequence[float], gain: float) -> float:
    density, edge = gaussian()
    return expected_error(density, -edge, edge, np.sort(np.asarray(levels, dtype=np.float64)) / gain)


@pytest.mark.parametrize(("bits", "role"), BITS_AND_ROLES)
def test_levels_are_exact_in_half_precision(bits: int, role: str) -> None:
    levels = stored_levels(bits, role)
    assert levels.shape == (2**bits,)
    assert levels.dtype == np.float32
    np.testing.assert_array_equal(levels.astype(np.float16).astype(np.float32), levels)
    assert len(set(levels.tolist())) == 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_value_levels_are_high_bytes_or_byte_pairs(bits: int) -> None:
    raw = stored_levels(bits, "value").astype(np.float16).view(np.uint16)
    high, low = raw >> 8, raw & 0xFF
    np.testing.assert_array_equal(low & 0x7F, high & 0x7F if bits > 2 else 0)
    assert {int(x) & 0x7F for x in high} == {x & 0x7F for x in lut_bytes(bits, "value")}


@pytest.mark.parametrize("role", ["key", "value"])
def test_levels_of_one_and_two_bits_are_uniform(role: str) -> None:
    # Kernels calculate with the codes themselves, and with 3 - code in place of code.
    assert stored_levels(1, role).tolist() == [1.0, -1.0]
    assert stored_levels(2, role).tolist() == [-1.5, -0.5, 0.5, 1.5]


@pytest.mark.parametrize("bits", BITS)
def test_key_levels_are_signed_bytes(bits: int) -> None:
    # What an int8 tensor core is given: look-up bytes, with the sign plane put in by bit 7 (1 bit) or by complement (4 bits).
    looked_up = [x - 256 if x > 127 else x for x in lut_bytes(bits, "key")]
    if bits == 1:
        looked_up += [(x ^ 0x80) - 256 for x in looked_up]
    if bits == 4:
        looked_up += [~x for x in looked_up]
    assert all(-128 <= x <= 127 for x in looked_up)
    levels = (np.array(looked_up) + (0.5 if bits == 4 else 0)) / 64
    np.testing.assert_array_equal(stored_levels(bits, "key"), levels)
    np.testing.assert_array_equal(np.sort(levels), np.sort(-levels))


@pytest.mark.parametrize(("bits", "role"), BITS_AND_ROLES)
def test_order_of_the_codes(bits: int, role: str) -> None:
    levels = stored_levels(bits, role)
    if bits in (2, 3):
        assert (np.diff(levels) > 0).all()
    else:  # sign and magnitude: the top bit of the code is the sign
        half = 2 ** (bits - 1)
        assert (levels[:half] > 0).all()
        assert (levels[half:] < 0).all()
        assert (np.diff(levels[:half]) > 0).all()
        assert (np.diff(levels[half:]) < 0).all()


def test_sign_of_values() -> None:
    # Values flip the sign of both bytes at 4 bits, of the high byte only at 1 bit.
    four, one = (stored_levels(bits, "value").astype(np.float16).view(np.uint16) for bits in (4, 1))
    np.testing.assert_array_equal(four[8:] ^ four[:8], np.full(8, 0x8080))
    assert one[1] ^ one[0] == 0x8000


@pytest.mark.parametrize(
    ("bits", "role", "percent"),
    [
        pytest.param(1, "key", 0.0, id="key-1bit"),
        pytest.param(2, "key", 1.161, id="key-2bit"),
        pytest.param(3, "key", 0.002, id="key-3bit"),
        pytest.param(4, "key", 0.045, id="key-4bit"),
        pytest.param(1, "value", 0.0, id="value-1bit"),
        pytest.param(2, "value", 1.161, id="value-2bit"),
        pytest.param(3, "value", 1.75, id="value-3bit"),
        pytest.param(4, "value", 6.7, id="value-4bit"),
    ],
)
def test_cost_over_lloyd_max(bits: int, role: str, percent: float) -> None:
    cost = error(stored_levels(bits, role), level_gain(bits, role)) / lloyd_max(bits).distortion - 1
    assert 100 * cost == pytest.approx(percent, abs=0.005 if role == "key" or bits <= 2 else 0.1)


def levels_of(table: Sequence[int], bits: int, role: str) -> np.ndarray:
    """Levels of look-up bytes, after the module's description."""
    if role == "key":
        x = np.array(table, dtype=np.uint8).view(np.int8).astype(np.float64)
        if bits == 4:
            return np.concatenate((x + 0.5, -x - 0.5)) / 64
        return (np.concatenate((x, -x)) if bits == 1 else x) / 64
    raw = [x << 8 | (x if bits > 2 else 0) for x in table]
    if bits in (1, 4):
        raw += [r | (0x8080 if bits == 4 else 0x8000) for r in raw]
    return np.array(raw, dtype=np.uint16).view(np.float16).astype(np.float64)


@pytest.mark.parametrize(("bits", "role"), BITS_AND_ROLES)
def test_no_neighbouring_table_is_better(bits: int, role: str) -> None:
    table, gain = lut_bytes(bits, role), level_gain(bits, role)
    np.testing.assert_array_equal(levels_of(table, bits, role), stored_levels(bits, role))
    best = error(stored_levels(bits, role), gain)
    tables = [table]
    for i, step in itertools.product(range(len(table)), (-1, 1) if bits > 2 else ()):
        tables.append((*table[:i], table[i] + step, *table[i + 1 :]))
    # Uniform levels are given, so their gain can be exact.
    factors = (0.99, 0.995, 1.0, 1.005, 1.01) if bits > 2 else (0.99, 0.999, 1.001, 1.01)
    for t, factor in itertools.product(tables, factors):
        levels = levels_of(t, bits, role)
        if len(set(levels)) == 2**bits:
            assert error(levels, gain * factor) >= best * (0.999 if bits > 2 else 1), (t, factor)


@pytest.mark.parametrize(("bits", "role"), BITS_AND_ROLES)
def test_encoder_picks_the_nearest_level(bits: int, role: str) -> None:
    middle, shifts, bounds = encoder_bounds(bits, role)
    assert bounds.dtype == shifts.dtype == np.float32
    assert bounds.shape == shifts.shape == (2 ** (bits - 1) - 1,)
    if role == "key":
        assert middle == 0
        assert not shifts.any()
    x = np.linspace(-4, 4, 10_007)
    number = (np.abs(x[:, None] - shifts) > bounds).sum(1).astype(np.uint8)
    negative = x < middle
    codes = codes_of(torch.from_numpy(number), torch.from_numpy(negative), bits)
    assert codes.dtype == torch.uint8
    assert sorted(set(codes.tolist())) == list(range(2**bits))
    levels, (above, below) = stored_levels(bits, role), magnitudes(bits, role)
    np.testing.assert_array_equal(levels[codes.numpy()], np.where(negative, -below[number], above[number]))
    distance = np.abs(x[:, None] - levels[None] / level_gain(bits, role))
    picked = np.take_along_axis(distance, codes.numpy()[:, None].astype(np.int64), axis=1)[:, 0]
    np.testing.assert_allclose(picked, distance.min(1), atol=1e-6)
