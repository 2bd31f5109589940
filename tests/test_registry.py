"""Every preset, end to end: sizes, error, files and attention. A new preset must be added to the table here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turboquant import PRESETS, ConfigError, Rotary, TurboQuantCache, TurboQuantConfig, attend

HEADS, LENGTH = 2, 700


@dataclass(frozen=True)
class Expected:
    """What a preset promises.

    Attributes:
        codes: mean bits of a code; the scales add 16 / head_dim.
        key, value: bounds of the squared error of packed tokens relative to their energy, for Gaussian data.
    """

    codes: float
    key: float
    value: float


TABLE = {
    "turboquant_4bit": Expected(4.0, 0.0103, 0.0104),
    "turboquant_3.5bit": Expected(3.5, 0.0103, 0.036),
    "turboquant_3bit": Expected(3.0, 0.037, 0.036),
    "turboquant_2.5bit": Expected(2.5, 0.037, 0.122),
    "turboquant_2bit": Expected(2.0, 0.126, 0.122),
    "turboquant_1.5bit": Expected(1.5, 0.126, 0.375),
}
PRESET = pytest.mark.parametrize("preset", list(PRESETS))
HEAD_DIM = pytest.mark.parametrize("dim", [64, 128], ids=["d64", "d128"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(preset: str, dim: int) -> tuple[TurboQuantCache, Tensor, Tensor]:
    rotary = Rotary(10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2)))
    cache = TurboQuantCache(1, HEADS, dim, preset, rotary=rotary)
    cos, sin = rotary.cos_sin(torch.arange(LENGTH)[None])
    key = rotary.apply(randn(1, HEADS, LENGTH, dim) + 3 * randn(HEADS, 1, dim, seed=1), cos, sin)
    value = randn(1, HEADS, LENGTH, dim, seed=2)
    cache.update(key, value, 0)
    return cache, key, value


def test_the_table_names_every_preset() -> None:
    assert list(PRESETS) == list(TABLE)
    for name in PRESETS:
        config = TurboQuantConfig.preset(name)
        assert config.name == name
        assert (config.key_bits, config.value_bits) == PRESETS[name]
        assert TurboQuantConfig(*PRESETS[name][:1], *PRESETS[name]) == config
        assert TurboQuantConfig.preset(name, seed=5).name == f"K{PRESETS[name][0]}V{PRESETS[name][1]}"


def test_unknown_presets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(TABLE)):
        TurboQuantConfig.preset("turboquant_1bit")


def test_default_is_three_bits() -> None:
    assert TurboQuantConfig().name == "turboquant_3bit"


@HEAD_DIM
@PRESET
def test_nominal_bits(preset: str, dim: int) -> None:
    bits = TurboQuantCache(4, HEADS, dim, preset).bits_per_element
    assert bits == TABLE[preset].codes + 16 / dim


@HEAD_DIM
@PRESET
def test_error(preset: str, dim: int) -> None:
    cache, key, value = filled(preset, dim)
    got_key, got_value = cache.get(0)
    packed = slice(4, (LENGTH - 128) // 64 * 64)
    noise = randn(1, HEADS, LENGTH, dim)[:, :, packed]  # keys without their mean, which costs nothing
    key_error = float((got_key - key)[:, :, packed].square().sum() / noise.square().sum())
    value_error = float((got_value - value)[:, :, packed].square().sum() / value[:, :, packed].square().sum())
    # The bounds are tight: half the error would belong to another preset.
    assert TABLE[preset].key / 1.35 < key_error < TABLE[preset].key
    assert TABLE[preset].value / 1.35 < value_error < TABLE[preset].value
    for got, x in ((got_key, key), (got_value, value)):
        assert torch.equal(got[:, :, packed.stop :], x[:, :, packed.stop :])
        assert torch.equal(got[:, :, :4], x[:, :, :4])


@HEAD_DIM
@PRESET
def test_size_on_page(preset: str, dim: int) -> None:
    small, *_ = filled(preset, dim)
    before = small.nbytes
    tokens = randn(1, HEADS, 128, dim, seed=5)
    small.update(tokens, tokens, 0)
    assert (small.nbytes - before) * 8 == small.bits_per_element * 2 * HEADS * 128 * dim


@HEAD_DIM
@PRESET
def test_save_and_load(preset: str, dim: int, tmp_path: Path) -> None:
    cache, *_ = filled(preset, dim)
    cache.save(tmp_path / "c")
    loaded = TurboQuantCache.from_file(tmp_path / "c")
    assert loaded.config.name == preset
    for a, b in zip(loaded.get(0), cache.get(0), strict=True):
        assert torch.equal(a, b)


@HEAD_DIM
@PRESET
def test_attention_over_pages_is_attention_over_decoded_tokens(preset: str, dim: int) -> None:
    cache, *_ = filled(preset, dim)
    query = randn(1, 3 * HEADS, 5, dim, seed=9)
    out, lse = attend(query, cache._stores[0])
    key, value = (t.double().repeat_interleave(3, dim=1) for t in cache.get(0))
    scores = query.double() @ key.transpose(-1, -2) * dim**-0.5
    scores = scores.masked_fill(torch.arange(LENGTH) > torch.arange(LENGTH - 5, LENGTH)[:, None], float("-inf"))
    want = scores.softmax(-1) @ value
    assert float((out.double() - want).norm(dim=-1).div(want.norm(dim=-1)).max()) < 1e-4
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
