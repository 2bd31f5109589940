"""Arithmetic of bytes: equal to the layout and to what a cache really holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant import TurboQuantCache, TurboQuantConfig, arithmetic
from turboquant.arithmetic import (
    NO_LIMIT,
    CacheShape,
    LayerShape,
    bits_per_element,
    bytes_per_token,
    cache_bytes,
    concurrent_sequences,
    format_bytes,
    longest_context,
    page_bytes,
    parse_bytes,
    peak_bytes,
)
from turboquant.cache import layer as cache_layer
from turboquant.cache.layer import PackedLayer
from turboquant.codec import layout
from turboquant.codec.center import KeyStatistics, Statistics
from turboquant.config import PRESETS
from turboquant.errors import ConfigError

EXACT = TurboQuantConfig(n_bits=16)
LLAMA_70B = CacheShape.uniform(num_layers=80, num_kv_heads=8, head_dim=128)
GIB = 1024**3


def frozen(layers: int, heads: int, dim: int, config: TurboQuantConfig) -> Statistics | None:
    if config.key_center == "none":
        return None
    balance = torch.ones(heads, dim) if config.key_balance else None
    return Statistics({i: KeyStatistics(torch.zeros(heads, dim), balance) for i in range(layers)}, config.key_center)


def measured_cache(
    config: TurboQuantConfig, tokens: int, step: int, layers: int = 2, heads: int = 2, dim: int = 64, batch: int = 1
) -> TurboQuantCache:
    cache = TurboQuantCache(layers, heads, dim, config, statistics=frozen(layers, heads, dim, config))
    x = torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    for start in range(0, tokens, step):
        for i in range(layers):
            cache.update(x[:, :, start : start + step], x[:, :, start : start + step], layer_idx=i)
    return cache


# -- pages ------------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_layout() -> None:
    assert arithmetic.PAGE_TOKENS == layout.PAGE_TOKENS
    assert (arithmetic.MIN_HEAD_DIM, arithmetic.MAX_HEAD_DIM) == (layout.MIN_HEAD_DIM, layout.MAX_HEAD_DIM)
    assert arithmetic.SLIDING_SLACK == cache_layer._SLIDING_SLACK


def test_page_bytes_equals_the_layout_for_every_head_dim() -> None:
    for dim in range(layout.MIN_HEAD_DIM, layout.MAX_HEAD_DIM + 1):
        for key, value, qjl in itertools.product(layout.PLANES, layout.PLANES, (False, True)):
            assert page_bytes(dim, key, value, qjl) == layout.PageLayout(dim, key, value, qjl).page_bytes


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 64, 128, 191, 192, 193, 300, 319, 320, 1000, 4096, 5000])
@pytest.mark.parametrize("preset", ["turboquant_4bit", "turboquant_2.5bit"])
def test_equals_the_measured_cache_fed_at_once(preset: str, tokens: int) -> None:
    config = TurboQuantConfig.preset(preset)
    cache = measured_cache(config, tokens, step=tokens)
    assert cache.nbytes == cache_bytes(CacheShape.uniform(2, 2, 64), config, tokens)


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_measured_cache_of_every_preset(preset: str) -> None:
    config = TurboQuantConfig.preset(preset)
    cache = measured_cache(config, 1000, step=1000, batch=3, dim=80)
    shape = CacheShape.uniform(2, 2, 80)
    assert cache.nbytes == cache_bytes(shape, config, 1000, batch=3)
    assert cache.bits_per_element == pytest.approx(bits_per_element(shape, config))


def test_equals_the_measured_cache_fed_one_by_one() -> None:
    config = TurboQuantConfig(n_bits=3)
    shape = CacheShape.uniform(1, 1, 32)
    cache = TurboQuantCache(1, 1, 32, config, statistics=frozen(1, 1, 32, config))
    x = torch.randn(1, 1, 1100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for t in range(1100):
        cache.update(x[:, :, t : t + 1], x[:, :, t : t + 1], layer_idx=0)
        assert cache.nbytes == cache_bytes(shape, config, t + 1), t + 1


@pytest.mark.parametrize("tokens", [300, 1000, 4096, 5000])
def test_equals_the_measured_cache_of_two_layers_fed_one_by_one(tokens: int) -> None:
    config = TurboQuantConfig(n_bits=3)
    assert measured_cache(config, tokens, step=1).nbytes == cache_bytes(CacheShape.uniform(2, 2, 64), config, tokens)


@given(
    tokens=st.integers(1, 700),
    step=st.integers(1, 700),
    sinks=st.integers(0, 64),
    recent=st.integers(0, 200),
    dim=st.sampled_from([32, 72, 80, 100]),
    balance=st.sampled_from([0.0, 0.25]),
    center=st.sampled_from(["rope_mean", "mean", "none"]),
    quantizer=st.sampled_from(["lloyd_max", "lloyd_max_qjl"]),
)
def test_equals_the_measured_cache_however_it_is_fed(
    tokens: int, step: int, sinks: int, recent: int, dim: int, balance: float, center: str, quantizer: str
) -> None:
    # Decoding is one token at a time; that is the test above. Here: blocks, few enough to stay quick.
    step = max(step, tokens // 8 + 1)
    config = TurboQuantConfig(
        key_bits=2,
        value_bits=3,
        sink_tokens=sinks,
        recent_tokens=recent,
        key_balance=balance,
        key_center=center,  # type: ignore[arg-type]
        quantizer=quantizer,  # type: ignore[arg-type]
        layers={0: "exact", -1: (3, 1)},
    )
    cache = measured_cache(config, tokens, step, layers=3, heads=2, dim=dim)
    assert cache.nbytes == cache_bytes(CacheShape.uniform(3, 2, dim), config, tokens)


@pytest.mark.parametrize("window", [256, 300, 512])
@pytest.mark.parametrize("step", [1, 100])
def test_equals_the_measured_sliding_layer(window: int, step: int) -> None:
    config = TurboQuantConfig(n_bits=2)
    statistics = KeyStatistics(torch.zeros(1, 32), torch.ones(1, 32))
    layer = PackedLayer(1, 32, config, (2, 2), None, window, statistics)
    shape = CacheShape.uniform(1, 1, 32, [window])
    x = torch.zeros(1, 1, step, 32).bfloat16()
    for t in range(step, 1001, step):
        layer.append(x, x)
        layer.commit()
        assert layer.nbytes == cache_bytes(shape, config, t), t


def test_float32_windows_count_four_bytes() -> None:
    config = TurboQuantConfig(n_bits=3)
    cache = TurboQuantCache(1, 2, 64, config, statistics=frozen(1, 2, 64, config))
    cache.update(torch.zeros(1, 2, 400, 64), torch.zeros(1, 2, 400, 64), layer_idx=0)
    assert cache.nbytes == cache_bytes(CacheShape.uniform(1, 2, 64), config, 400, exact_bytes=4)


def test_unfrozen_statistics_agree_once_they_are_measured() -> None:
    config = TurboQuantConfig(n_bits=3, key_balance=0.0)
    cache = TurboQuantCache(1, 2, 64, config)
    x = torch.randn(1, 2, config.statistics_tokens, 64).bfloat16()
    cache.update(x, x, layer_idx=0)
    assert cache.nbytes == cache_bytes(CacheShape.uniform(1, 2, 64), config, config.statistics_tokens)


def test_short_sliding_windows_stay_exact() -> None:
    config = TurboQuantConfig(n_bits=3)
    last_exact = config.sink_tokens + config.recent_tokens + 64
    shape = CacheShape.uniform(1, 2, 64, [last_exact])
    assert "exact window" in shape.layers[0].why_exact(config)
    assert cache_bytes(shape, config, 10_000) == last_exact * 2 * 2 * 64 * 2
    assert cache_bytes(shape, config, 10) == 10 * 2 * 2 * 64 * 2
    assert CacheShape.uniform(1, 2, 64, [last_exact + 1]).layers[0].why_exact(config) == ""


def test_layers_that_cannot_be_compressed_are_exact() -> None:
    config = TurboQuantConfig(n_bits=3)
    for layer in (LayerShape(2, 16), LayerShape(2, 64, exact_reason="chunked attention")):
        shape = CacheShape((layer, LayerShape(2, 64)))
        alone = cache_bytes(CacheShape((LayerShape(2, 64),)), config, 1000)
        assert cache_bytes(shape, config, 1000) == alone + 1000 * layer.elements * 2
        # Nominal bits are those of what can be compressed, like TurboQuantCache.bits_per_element.
        assert bits_per_element(shape, config) == bits_per_element(CacheShape((LayerShape(2, 64),)), config)
    assert cache_bytes(CacheShape((LayerShape(0, 64, None, "no keys and values"),)), config, 1000) == 0


# -- known figures ----------------------------------------------------------------------------------------------------


def test_llama_70b() -> None:
    assert bytes_per_token(LLAMA_70B, EXACT) == 327_680
    assert cache_bytes(LLAMA_70B, EXACT, 131_072) == 40 * GIB
    three = TurboQuantConfig.preset("turboquant_3bit")
    assert bits_per_element(LLAMA_70B, three) == 3.125
    assert bytes_per_token(LLAMA_70B, three) == 64_000
    pages = 64_000 * (131_072 - 128)
    window = (128 + 4) * 327_680
    statistics = 80 * 8 * (2 + 64) * 128 * 4  # mean, balance, and the mean at the 64 positions of a page
    assert cache_bytes(LLAMA_70B, three, 131_072) == pages + window + statistics
    assert pages / GIB == pytest.approx(7.8, abs=0.01)
    # Just before a page is packed there are 191 exact tokens, in room for 192.
    assert peak_bytes(LLAMA_70B, three, 131_072) == pages - 64 * 64_000 + window + 64 * 327_680 + statistics


@pytest.mark.parametrize(
    ("preset", "bits"), [("turboquant_4bit", 4.125), ("turboquant_2.5bit", 2.625), ("turboquant_1.5bit", 1.625)]
)
def test_bits_per_element_at_head_dim_128(preset: str, bits: float) -> None:
    assert bits_per_element(LLAMA_70B, TurboQuantConfig.preset(preset)) == bits


# -- what fits --------------------------------------------------------------------------------------------------------

SHAPES = [
    CacheShape.uniform(2, 2, 64),
    CacheShape.uniform(3, 1, 80, [None, 512, 128]),
    CacheShape((LayerShape(1, 16), LayerShape(2, 128), LayerShape(0, 64, None, "no keys and values"))),
]


@given(
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from([1, 2, 3, 4, 16]),
    recent=st.sampled_from([0, 100, 128]),
    memory=st.integers(0, 2_000_000),
    batch=st.integers(1, 3),
)
def test_longest_context_is_the_longest(shape: CacheShape, bits: int, recent: int, memory: int, batch: int) -> None:
    config = TurboQuantConfig(n_bits=bits, recent_tokens=recent)
    found = longest_context(shape, config, memory, batch)
    # Searched token by token, as a sequence grows.
    slow = 0
    while slow < 5000 and cache_bytes(shape, config, slow + 1, batch) <= memory:
        slow += 1
    assert min(found, 5000) == slow


@given(
    shape=st.sampled_from(SHAPES),
    tokens=st.one_of(st.integers(60, 260), st.integers(1, 1500)),
    recent=st.sampled_from([0, 100, 128]),
)
def test_peak_is_the_largest_size_on_the_way(shape: CacheShape, tokens: int, recent: int) -> None:
    config = TurboQuantConfig(n_bits=2, recent_tokens=recent)
    assert peak_bytes(shape, config, tokens) == max(cache_bytes(shape, config, t) for t in range(tokens + 1))


def test_a_cache_whose_layers_all_slide_stops_growing() -> None:
    shape = CacheShape.uniform(4, 2, 64, [1024] * 4)
    config = TurboQuantConfig(n_bits=3)
    assert longest_context(shape, config, peak_bytes(shape, config, 10_000)) == NO_LIMIT
    assert longest_context(shape, config, peak_bytes(shape, config, 10_000) - 1) < 2048


def test_concurrent_sequences_share_the_statistics() -> None:
    config = TurboQuantConfig(n_bits=3)
    shape = SHAPES[0]
    for n in (1, 2, 7):
        enough = peak_bytes(shape, config, 2000, batch=n)
        assert concurrent_sequences(shape, config, enough, 2000) == n
        assert concurrent_sequences(shape, config, enough - 1, 2000) == n - 1
    assert concurrent_sequences(shape, config, 0, 2000) == 0


# -- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 gib ", 3 * GIB // 2),
        ("1TiB", 2**40),
        ("7kB", 7000),
        ("1073741824", GIB),
        ("64B", 64),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 G", "80Gi", "-1GiB", "1e9", "0", "0.1", "80GiB x", "nan", "80,0GiB"])
def test_parse_bytes_rejects(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory="):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (64_000, "64,000 B"),
        (512 * 1024, "512.0 KiB"),
        (8_430_000_000, "7.85 GiB"),
        (40 * GIB, "40.0 GiB"),
        (3 * 2**50, "3,072 TiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_wrong_numbers_are_refused() -> None:
    config = TurboQuantConfig()
    with pytest.raises(ConfigError, match="tokens=-1"):
        cache_bytes(SHAPES[0], config, -1)
    with pytest.raises(ConfigError, match="batch=-1"):
        longest_context(SHAPES[0], config, 1000, batch=-1)
    with pytest.raises(ConfigError, match="tokens=0"):
        concurrent_sequences(SHAPES[0], config, 1000, 0)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        CacheShape.uniform(2, 0, 64)
    with pytest.raises(ConfigError, match="windows"):
        CacheShape.uniform(2, 1, 64, [None])
    with pytest.raises(ConfigError, match="no layer 7"):
        cache_bytes(SHAPES[0], TurboQuantConfig(layers={7: 2}), 100)
