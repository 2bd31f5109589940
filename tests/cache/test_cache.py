"""The cache of all layers through its public methods: content, overrides, edits, files, reports and errors."""

from __future__ import annotations

import doctest
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import turboquant
from turboquant import (
    CacheFileError,
    ConfigError,
    Rotary,
    ShapeError,
    Statistics,
    TurboQuantCache,
    TurboQuantConfig,
    TurboQuantError,
)
from turboquant.cache import cache as cache_module
from turboquant.codec.center import KeyStatistics
from turboquant.config import EXACT_BITS
from turboquant.offload.container import HEADER_BYTES, Kind, write
from turboquant.offload.snapshot import _namespace

LAYERS, HEADS, DIM = 3, 2, 32
FEW = settings(max_examples=max(10, settings().max_examples // 2))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(dim: int = DIM, base: float = 10000.0) -> Rotary:
    return Rotary(base ** (-torch.arange(dim // 2).double() / (dim // 2)))


def text(
    length: int = 600, batch: int = 1, layers: int = LAYERS, dim: int = DIM, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """The first ``length`` tokens of one sequence: (key, value) of every layer."""
    return [
        tuple((randn(batch, HEADS, 900, dim, seed=10 * i + s) + s)[:, :, :length].to(dtype) for s in (0, 1))
        for i in range(layers)
    ]


def make(config: TurboQuantConfig | str | None = None, layers: int = LAYERS, dim: int = DIM, **more: Any) -> TurboQuantCache:
    return TurboQuantCache(layers, HEADS, dim, config, **{"rotary": rotary(dim), **more})


def feed(cache: TurboQuantCache, tokens: list[tuple[Tensor, Tensor]], stop: int | None = None) -> TurboQuantCache:
    for i, (key, value) in enumerate(tokens):
        start = cache.get_seq_length(i)
        if start < key.shape[2]:
            cache.update(key[:, :, start:stop], value[:, :, start:stop], i)
    return cache


def contents(cache: TurboQuantCache) -> list[Tensor]:
    return [t for i in range(cache.num_layers) for t in cache.get(i)]


def assert_equal(a: TurboQuantCache, b: TurboQuantCache) -> None:
    for x, y in zip(contents(a), contents(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# -- the published example ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
def test_published_example(rotation: str) -> None:
    config = TurboQuantConfig(n_bits=3, rotation_type=rotation)
    cache = TurboQuantCache(num_layers=2, num_kv_heads=4, head_dim=64, config=config)
    key, value = torch.randn(1, 4, 300, 64), torch.randn(1, 4, 300, 64)
    assert cache.update(layer_idx=0, key=key, value=value) is None
    got_key, got_value = cache.get(layer_idx=0)
    assert got_key.shape == got_value.shape == torch.Size([1, 4, 300, 64])
    assert 0 < float((got_key - key).norm() / key.norm()) < 0.2
    assert torch.equal(got_value[:, :, -128:], value[:, :, -128:])


def test_example_of_the_documentation_runs() -> None:
    test = doctest.DocTestFinder(recurse=False).find(TurboQuantCache, "TurboQuantCache", cache_module)[0]
    assert len(test.examples) == 5
    test.globs = {"torch": torch, **vars(turboquant), "TurboQuantCache": TurboQuantCache, "TurboQuantConfig": TurboQuantConfig}
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
def test_large_caches_cost_nothing_until_they_are_used(rotation: str) -> None:
    config = TurboQuantConfig(n_bits=3, rotation_type=rotation)
    cache = TurboQuantCache(num_layers=80, num_kv_heads=8, head_dim=128, config=config, device="cuda", dtype=torch.float16)
    assert cache.nbytes == cache.exact_nbytes == 0
    assert cache.effective_bits == 0.0
    assert cache.num_layers == 80
    assert cache.get_seq_length() == cache.get_seq_length(79) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("config", ["turboquant_3bit", TurboQuantConfig(n_bits=EXACT_BITS)], ids=["packed", "exact"])
def test_content_comes_back_in_the_dtype_of_the_model(config: Any, dtype: torch.dtype) -> None:
    tokens = text(400, batch=2, dtype=dtype)
    cache = feed(make(config), tokens)
    for i, (key, value) in enumerate(tokens):
        for got, x in zip(cache.get(i), (key, value), strict=True):
            assert got.dtype == dtype
            assert got.shape == x.shape
            assert torch.equal(got[:, :, -128:], x[:, :, -128:])
            assert torch.equal(got[:, :, :4], x[:, :, :4])
            assert torch.equal(got, x) is (config != "turboquant_3bit")


@FEW
@given(
    length=st.integers(257, 600),
    cuts=st.lists(st.integers(1, 599), max_size=4),
    recent=st.integers(1, 130),
    sinks=st.integers(0, 8),
)
def test_exact_window_whatever_the_chunks(length: int, cuts: list[int], recent: int, sinks: int) -> None:
    tokens = text(length, layers=1)
    cache = make(TurboQuantConfig(recent_tokens=recent, sink_tokens=sinks), 1)
    for stop in sorted({c for c in cuts if c < length} | {length}):
        feed(cache, tokens, stop)
    for got, x in zip(cache.get(0), tokens[0], strict=True):
        assert torch.equal(got[:, :, -recent:], x[:, :, -recent:])
        assert torch.equal(got[:, :, :sinks], x[:, :, :sinks])


@settings(max_examples=max(6, settings().max_examples // 5))
@given(cuts=st.lists(st.integers(1, 599), max_size=5))
def test_given_statistics_make_chunks_irrelevant(cuts: list[int]) -> None:
    tokens = text()
    first = feed(make(), tokens)
    other = make(statistics=first.statistics)
    for stop in sorted({*cuts, 600}):
        feed(other, tokens, stop)
    assert_equal(first, other)
    assert other.nbytes == first.nbytes


def test_layers_advance_one_by_one() -> None:
    tokens, cache = text(300), make()
    for i, (key, value) in enumerate(tokens):
        cache.update(key, value, i)
        assert [cache.get_seq_length(j) for j in range(LAYERS)] == [300] * (i + 1) + [0] * (LAYERS - i - 1)
    cache.update(tokens[0][0][:, :, :1], tokens[0][1][:, :, :1], -LAYERS)
    assert cache.get_seq_length(0) == 301


# -- per-layer settings ---------------------------------------------------------------------------------------------------


def test_layer_overrides() -> None:
    config = TurboQuantConfig(n_bits=3, layers={0: "exact", 1: (4, 2), -1: 1})
    tokens, cache = text(500, layers=4, dim=64), make(config, 4, 64)
    feed(cache, tokens)
    error = [
        [float((g - x).square().sum() / x.square().sum()) for g, x in zip(cache.get(i), tokens[i], strict=True)]
        for i in range(4)
    ]
    assert error[0] == [0, 0]
    assert error[1][0] < 0.01 < 0.05 < error[1][1]
    assert 0.01 < error[2][0] < 0.05
    assert error[3][0] > 0.15
    bits = [16 if torch.get_default_dtype() == torch.float16 else 32, 3 + 32 / 128, 3 + 32 / 128, 1 + 32 / 128]
    assert cache.bits_per_element == pytest.approx(sum(bits) / 4)


def test_last_layers_by_negative_index() -> None:
    by_end, by_start = (make(TurboQuantConfig(layers={i: "exact"})) for i in (-1, LAYERS - 1))
    tokens = text(400)
    assert_equal(feed(by_end, tokens), feed(by_start, tokens))
    assert torch.equal(by_end.get(-1)[0], tokens[-1][0])


@pytest.mark.parametrize("index", [3, -4, 100])
def test_overrides_of_layers_that_do_not_exist(index: int) -> None:
    with pytest.raises(ConfigError, match=f"there is no layer {index}; the model has 3"):
        make(TurboQuantConfig(layers={index: 4}))


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "one-token-decode"])
@pytest.mark.parametrize(("preset", "bits", "ratio"), [("turboquant_3bit", 3.125, 5.1), ("turboquant_2.5bit", 2.625, 6.1)])
def test_packed_part_is_as_small_as_published(preset: str, bits: float, ratio: float, decode: bool) -> None:
    tokens = text(656, layers=2, dim=128, dtype=torch.float16)
    held, exact = [], []
    cache = make(preset, 2, 128)
    for length in (400, 656):  # four pages apart, with equal tails
        if decode:
            for stop in range(max(cache.get_seq_length(), 300) if length == 400 else cache.get_seq_length() + 1, length + 1):
                feed(cache, tokens, stop)
        else:
            cache = feed(make(preset, 2, 128), tokens, length)
        assert cache.get_seq_length() == length
        held.append(cache.nbytes)
        exact.append(cache.exact_nbytes)
    assert (held[1] - held[0]) * 8 == bits * 2 * 2 * HEADS * 256 * 128
    assert cache.bits_per_element == bits
    assert exact[1] == 2 * 2 * HEADS * 656 * 128 * 2
    assert (exact[1] - exact[0]) / (held[1] - held[0]) == pytest.approx(ratio, abs=0.05)
    assert cache.effective_bits == held[1] * 8 / (2 * 2 * HEADS * 656 * 128)


def test_exact_cache_reports_its_own_size() -> None:
    cache = feed(make(TurboQuantConfig(n_bits=16)), text(300, dtype=torch.bfloat16))
    assert cache.nbytes == cache.exact_nbytes == LAYERS * 2 * HEADS * 300 * DIM * 2
    assert cache.effective_bits == cache.bits_per_element == 16


# -- crop, rows, reset ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "length"),
    [
        pytest.param(590, 590, id="tail"),
        pytest.param(-10, 590, id="last-ten"),
        pytest.param(0, 600, id="zero-changes-nothing"),
        pytest.param(600, 600, id="all"),
        pytest.param(10_000, 600, id="beyond"),
        pytest.param(300, 300, id="inside-a-page"),
        pytest.param(448, 448, id="end-of-pages"),
        pytest.param(128, 128, id="page-border"),
        pytest.param(-536, 64, id="page-border-from-the-end"),
        pytest.param(1, 1, id="one-token"),
    ],
)
def test_crop(argument: int, length: int) -> None:
    cache = feed(make(TurboQuantConfig(layers={1: "exact"})), text())
    before = contents(cache)
    cache.crop(argument)
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [length] * LAYERS
    for a, b in zip(contents(cache), before, strict=True):
        assert torch.equal(a, b[:, :, :length])


@pytest.mark.parametrize("length", [590, 448, 300, 128, 64, 3, 0])
def test_crop_then_append_again(length: int) -> None:
    tokens = text()
    never = feed(make(), tokens)
    cache = make(statistics=never.statistics)
    feed(cache, tokens).crop(length or -600)
    assert cache.get_seq_length() == length
    feed(feed(cache, tokens, 597), tokens)
    cut = slice(length // 64 * 64, (length // 64 + 1) * 64) if length == 300 else slice(0, 0)
    for a, b in zip(contents(cache), contents(never), strict=True):
        same = (a == b).all(-1).all(1)[0]
        same[cut] = True  # this page was decoded and coded again
        assert same.all()
    assert cache.nbytes == never.nbytes


@pytest.mark.parametrize("argument", [-600, -10_000])
def test_taking_back_everything(argument: int) -> None:
    cache = feed(make(), text())
    cache.crop(argument)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert_equal(feed(cache, text(batch=2)), feed(make(), text(batch=2)))


def edits() -> dict[str, tuple[Callable[[TurboQuantCache], None], list[int]]]:
    return {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }


@pytest.mark.parametrize("name", edits())
def test_rows(name: str) -> None:
    edit, rows = edits()[name]
    cache = feed(make(TurboQuantConfig(layers={1: "exact"})), text(500, batch=3))
    before = contents(cache)
    edit(cache)
    for a, b in zip(contents(cache), before, strict=True):
        assert torch.equal(a, b[rows])
    tokens = [tuple(t[rows] for t in layer) for layer in text(batch=3)]
    whole = feed(
        make(TurboQuantConfig(layers={1: "exact"}), statistics=cache.statistics),
        [tuple(t[rows] for t in layer) for layer in text(500, batch=3)],
    )
    assert_equal(feed(cache, tokens), feed(whole, tokens))


@pytest.mark.parametrize("name", edits())
def test_rows_of_an_empty_cache(name: str) -> None:
    cache = make(TurboQuantConfig(layers={1: "exact"}))
    edits()[name][0](cache)
    assert cache.get_seq_length() == 0
    feed(cache, text(10))


def test_reset() -> None:
    cache = feed(make(TurboQuantConfig(layers={1: "exact"})), text())
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    assert cache.statistics.layers == {}
    with pytest.raises(TurboQuantError, match="nothing was stored yet"):
        cache.get(0)
    assert_equal(feed(cache, text(batch=2)), feed(make(TurboQuantConfig(layers={1: "exact"})), text(batch=2)))


# -- statistics -----------------------------------------------------------------------------------------------------------


def test_statistics_can_be_reused(tmp_path: Path) -> None:
    tokens = text()
    first = feed(make(), tokens)
    statistics = first.statistics
    assert sorted(statistics.layers) == [0, 1, 2]
    assert statistics.key_center == "rope_mean"
    statistics.save(tmp_path / "s")
    other = make(statistics=Statistics.load(tmp_path / "s"))
    assert other.statistics.digest() == statistics.digest()
    assert_equal(feed(other, tokens), first)
    # They really are used: other statistics give other bytes, and packing need not wait.
    plain = make(statistics=Statistics({i: KeyStatistics(torch.zeros(HEADS, DIM)) for i in range(LAYERS)}))
    feed(plain, tokens, 200)
    assert not torch.equal(plain.get(0)[0], tokens[0][0][:, :, :200])
    assert not torch.equal(feed(plain, tokens).get(0)[0], first.get(0)[0])


def test_statistics_of_another_model_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="do not fit a layer"):
        make(statistics=Statistics({0: KeyStatistics(torch.zeros(HEADS, 64))}))


def test_statistics_are_there_once_measured() -> None:
    cache, tokens = make(TurboQuantConfig(layers={1: "exact"})), text()
    assert feed(cache, tokens, 255).statistics.layers == {}
    assert sorted(feed(cache, tokens, 256).statistics.layers) == [0, 2]
    assert feed(make(TurboQuantConfig(key_center="none")), tokens).statistics.layers == {}


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TurboQuantConfig(), id="3bit"),
        pytest.param(TurboQuantConfig(2, layers={0: "exact", -1: (4, 1)}, rotation_type="orthogonal", seed=7), id="mixed"),
        pytest.param(TurboQuantConfig(quantizer="lloyd_max_qjl", key_center="mean", sink_tokens=0), id="qjl"),
        pytest.param(TurboQuantConfig(16), id="exact"),
    ],
)
@pytest.mark.parametrize("length", [0, 5, 255, 600])
def test_save_and_load(tmp_path: Path, length: int, config: TurboQuantConfig, dtype: torch.dtype) -> None:
    tokens = text(650, batch=2, dtype=dtype)
    cache = make(config)
    if length:
        feed(cache, tokens, length)
    cache.save(tmp_path / "c.tq")
    loaded = make(config)
    assert loaded.load(str(tmp_path / "c.tq")) is loaded
    alone = TurboQuantCache.from_file(tmp_path / "c.tq")
    assert alone.config.canonical() == config.canonical()
    for other in (loaded, alone):
        assert other.get_seq_length() == length
        assert other.statistics.digest() == cache.statistics.digest()
        if length:
            assert_equal(other, cache)
            assert other.effective_bits <= cache.effective_bits  # no room for tokens to come
            other.crop(-3)
            feed(other, tokens, length)
            assert_equal(other, cache)
    for stop in (length + 17, 650):  # statistics may be measured only now
        feed(cache, tokens, stop)
        for other in (loaded, alone):
            assert_equal(feed(other, tokens, stop), cache)


def test_loading_replaces_the_content(tmp_path: Path) -> None:
    saved = feed(make(), text())
    saved.save(tmp_path / "c")
    busy = feed(make(), text(300, batch=3, dtype=torch.float16))
    assert_equal(busy.load(tmp_path / "c"), saved)


def test_saving_replaces_a_file_and_leaves_no_other(tmp_path: Path) -> None:
    cache, path = feed(make(), text(300)), tmp_path / "c"
    path.write_text("old")
    cache.save(path)
    feed(cache, text(400)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert TurboQuantCache.from_file(path).get_seq_length() == 400
    with pytest.raises(TurboQuantError, match="cannot write the cache"):
        cache.save(tmp_path / "no" / "such" / "folder")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "c.tq"
    cache = feed(make(layers=1), text(330, layers=1))
    cache.model_fingerprint = "model-a"
    cache.save(path)
    return path


def refuse(path: Path, message: str, cache: TurboQuantCache | None = None) -> None:
    """Loading must fail, name the file, and leave the cache as it was."""
    cache = feed(make(layers=1), text(300, layers=1)) if cache is None else cache
    before, bytes_before, statistics = contents(cache), cache.nbytes, cache.statistics.digest()
    with pytest.raises(CacheFileError, match=message) as e:
        cache.load(path)
    assert str(path) in str(e.value)
    assert cache.nbytes == bytes_before
    assert cache.statistics.digest() == statistics
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_every_changed_byte_is_noticed(stored: Path, tmp_path_factory: pytest.TempPathFactory, where: float, flip: int) -> None:
    raw, path = bytearray(stored.read_bytes()), tmp_path_factory.mktemp("c") / "c"
    raw[int(where * len(raw))] ^= flip
    path.write_bytes(raw)
    with pytest.raises(CacheFileError):
        TurboQuantCache.from_file(path)


@pytest.mark.parametrize("at", range(0, HEADER_BYTES, 5))
def test_every_changed_byte_of_the_header_is_noticed(stored: Path, tmp_path: Path, at: int) -> None:
    raw = bytearray(stored.read_bytes())
    raw[at] ^= 0x10
    (tmp_path / "c").write_bytes(raw)
    refuse(tmp_path / "c", "header is damaged" if at >= 8 else "not a saved cache of this package")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda raw: raw[:-1], "cut off", id="cut"),
        pytest.param(lambda raw: raw[:100], "cut off", id="cut-header"),
        pytest.param(lambda raw: b"", "cut off", id="empty"),
        pytest.param(lambda raw: raw + b"x", "bytes appended", id="longer"),
        pytest.param(lambda raw: raw[:-9] + b"\xff" + raw[-8:], "checksum", id="payload"),
        pytest.param(lambda raw: b"x" * 5000, "not a saved cache", id="foreign"),
    ],
)
def test_damaged_files(stored: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "c").write_bytes(damage(stored.read_bytes()))
    refuse(tmp_path / "c", message)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "there is no such file")
    refuse(tmp_path, "cannot be read")
    feed(make(layers=1), text(300, layers=1)).statistics.save(tmp_path / "statistics")
    refuse(tmp_path / "statistics", "not a saved cache")
    write(tmp_path / "chunk", Kind.CHUNK, 256, bytes(32), bytes(32), [b"pages"])
    refuse(tmp_path / "chunk", "object of a store")
    write(tmp_path / "junk", Kind.SNAPSHOT, 256, bytes(32), bytes(32), [b"no tensors at all"])
    refuse(tmp_path / "junk", "not understood")


def test_other_configurations_and_shapes(stored: Path) -> None:
    for config, names in (
        ("turboquant_2bit", "key_bits, value_bits"),
        (TurboQuantConfig(seed=1), "seed"),
        (TurboQuantConfig(layers={0: 4}), "layers"),
    ):
        refuse(stored, f"another configuration; {names} differ", feed(make(config, 1), text(300, layers=1)))
    refuse(stored, r"saved from \[1, 2, 32\] \(layers, heads, head_dim\), this cache has \[3, 2, 32\]", feed(make(), text(300)))
    refuse(stored, r"this cache has \[1, 2, 64\]", feed(make(layers=1, dim=64), text(300, layers=1, dim=64)))


def test_other_models(stored: Path) -> None:
    cache = feed(make(layers=1), text(300, layers=1))
    cache.model_fingerprint = "model-b"
    refuse(stored, "another model", cache)
    for fingerprint in ("model-a", ""):
        cache.model_fingerprint = fingerprint
        assert cache.load(stored).get_seq_length() == 330
    assert TurboQuantCache.from_file(stored).model_fingerprint == "model-a"


@pytest.mark.parametrize("other", [None, rotary(base=500000.0)], ids=["without", "another-base"])
def test_a_file_is_not_decoded_with_another_rotary_embedding(stored: Path, other: Rotary | None) -> None:
    right, cache = make(layers=1).load(stored), make(layers=1, rotary=other)
    try:
        cache.load(stored)
    except CacheFileError:
        return
    assert_equal(cache, right)


def test_a_file_of_another_dtype_is_refused(stored: Path) -> None:
    with pytest.raises(CacheFileError, match="float32"):
        make(layers=1, dtype=torch.float16).load(stored)


@pytest.mark.parametrize("how", ["load", "reset"])
def test_statistics_of_a_loaded_file_do_not_outlive_it(stored: Path, tmp_path: Path, how: str) -> None:
    cache = make(layers=1).load(stored)
    if how == "load":  # a file from before its statistics were measured
        feed(make(layers=1), text(100, layers=1)).save(tmp_path / "short")
        cache.load(tmp_path / "short")
    else:  # "Forget all tokens, and statistics measured on them."
        cache.reset()
    assert cache.statistics.layers == {}


def rewrite(stored: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Another file with valid checksums, as a later version or another program might write it."""
    tensors = safetensors.torch.load(stored.read_bytes()[HEADER_BYTES:])
    meta = json.loads(tensors.pop("settings").numpy().tobytes())
    change(meta, tensors)
    raw = json.dumps(meta, sort_keys=True).encode()
    tensors["settings"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    write(path, Kind.SNAPSHOT, 330, _namespace(raw), bytes(32), [safetensors.torch.save(tensors)])


def test_rewritten_file_is_accepted(stored: Path, tmp_path: Path) -> None:
    rewrite(stored, tmp_path / "c", lambda meta, tensors: None)
    assert_equal(make(layers=1).load(tmp_path / "c"), make(layers=1).load(stored))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda meta, tensors: tensors.pop("0/tail"), id="no-tail"),
        pytest.param(
            lambda meta, tensors: tensors.update({"0/pages": tensors["0/pages"][:, :, 1:].contiguous()}), id="missing-page"
        ),
        pytest.param(
            lambda meta, tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("statistics")], id="no-statistics"
        ),
    ],
)
def test_inconsistent_files_are_refused(stored: Path, tmp_path: Path, change: Callable[..., None]) -> None:
    rewrite(stored, tmp_path / "c", change)
    with pytest.raises(CacheFileError, match="do not fit"):
        make(layers=1).load(tmp_path / "c")


def test_inconsistent_files_leave_the_cache_as_it_was(stored: Path, tmp_path: Path) -> None:
    rewrite(stored, tmp_path / "c", lambda meta, tensors: tensors.pop("0/tail"))
    cache = feed(make(layers=1), text(300, layers=1))
    with pytest.raises(CacheFileError):
        cache.load(tmp_path / "c")
    assert cache.get_seq_length() == 300


# -- report ---------------------------------------------------------------------------------------------------------------


def test_summary() -> None:
    cache = make(TurboQuantConfig(layers={0: "exact", -1: (4, 2)}), 5)
    empty = cache.summary()
    assert "not measured yet" in empty
    assert " 0 bytes held" in empty
    report = feed(cache, text(600, layers=5)).summary().splitlines()
    assert report[0] == "TurboQuantCache K3V3: 5 layers, 600 tokens"
    assert report[1].startswith("  layer 0: exact")
    assert report[2].startswith("  layers 1-3: packed K3V3, 2 KV heads x 32, 3.5 bits")
    assert "keys centred (rope-mean; frozen)" in report[2]
    assert report[3].startswith("  layer 4: packed K4V2")
    assert "first 4 and at least 128 last tokens" in report[4]
    assert f"{cache.nbytes:,} bytes held" in report[5]
    assert f"{cache.bits_per_element:.3f} bits per element nominal, {cache.effective_bits:.3f} effective" in report[5]
    assert f"{cache.exact_nbytes / cache.nbytes:.2f}x less than exact" in report[5]


@pytest.mark.parametrize("preset", list(turboquant.PRESETS))
def test_summary_names_the_preset(preset: str) -> None:
    assert make(preset).summary().startswith(f"TurboQuantCache {preset}: 3 layers, 0 tokens")


def test_summary_tells_how_keys_are_centred() -> None:
    assert "keys centred (mean; not measured yet)" in make(rotary=None).summary()
    assert "centred" not in make(TurboQuantConfig(key_center="none")).summary()


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1], ids=["packed", "exact"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((1, 3, 5, DIM), torch.float32, id="heads"),
        pytest.param((1, HEADS, 5, 64), torch.float32, id="head_dim"),
        pytest.param((2, HEADS, 5, DIM), torch.float32, id="batch"),
        pytest.param((1, HEADS, 5, DIM), torch.float16, id="dtype"),
        pytest.param((HEADS, 5, DIM), torch.float32, id="3d"),
    ],
)
def test_tensors_that_do_not_fit(layer: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cache = feed(make(TurboQuantConfig(layers={1: "exact"})), text(300))
    before = contents(cache)
    with pytest.raises(ShapeError):
        cache.update(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), layer)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_device_and_dtype_are_checked() -> None:
    key = torch.zeros(1, HEADS, 5, DIM)
    with pytest.raises(ShapeError, match="the cache is on cuda:1 but the key on cpu"):
        make(device="cuda:1").update(key, key, 0)
    with pytest.raises(ShapeError, match=r"the cache holds torch\.float16 but the key is torch\.float32"):
        make(dtype=torch.float16).update(key, key, 0)
    make(device="cpu", dtype=torch.float32).update(key, key, 0)
    with pytest.raises(RuntimeError, match="no-such-device"):
        make(device="no-such-device")


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1, 99])
def test_layers_that_do_not_exist(layer: int) -> None:
    cache, key = make(), torch.zeros(1, HEADS, 5, DIM)
    for call in (lambda: cache.get(layer), lambda: cache.update(key, key, layer), lambda: cache.get_seq_length(layer)):
        with pytest.raises(TurboQuantError, match=f"there is no layer {layer}; the cache has 3"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((0, 2, 64), "num_layers=0 must be a positive integer", id="layers"),
        pytest.param((2, 0, 64), "num_kv_heads=0", id="heads"),
        pytest.param((2.0, 2, 64), "num_layers=2.0", id="float"),
        pytest.param((2, 2, 16), "head_dim=16 is not supported; pages take 32 to 512", id="head_dim"),
        pytest.param(
            (2, 2, 64, "turboquant_5bit"), "preset 'turboquant_5bit' is unknown; choose one of turboquant_4bit", id="preset"
        ),
        pytest.param((2, 2, 64, 3), "config=3 must be a TurboQuantConfig or the name of a preset", id="config"),
    ],
)
def test_settings_that_cannot_work(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TurboQuantCache(*arguments)


# -- configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bits": 5}, "n_bits=5 is not supported; choose one of 1, 2, 3, 4, 16"),
        ({"n_bits": True}, "n_bits=True"),
        ({"key_bits": 16}, "either both exact"),
        ({"key_bits": 0}, "key_bits=0"),
        ({"rotation_type": "fourier"}, "'hadamard', 'orthogonal'"),
        ({"quantizer": "kmeans"}, "'lloyd_max', 'lloyd_max_qjl'"),
        ({"quantizer": "lloyd_max_qjl", "key_bits": 1}, "keys need 2 to 4"),
        ({"key_center": "median"}, "'rope_mean', 'mean', 'none'"),
        ({"per_head_scale": 1}, "per_head_scale=1"),
        ({"sink_tokens": 65}, "from 0 to 64"),
        ({"recent_tokens": -1}, "from 0 to 65536"),
        ({"statistics_tokens": 0}, "from 1 to 2048"),
        ({"key_balance": 1.5}, "from 0 .off. to 1"),
        ({"key_balance": float("nan")}, "key_balance=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"layers": [3, 3]}, "must map layer indices"),
        ({"layers": {"0": 3}}, "the index '0' must be an integer"),
        ({"layers": {0: (3, 3, 3)}}, "pair of bits, or 'exact'"),
        ({"layers": {0: (16, 3)}}, "either both exact"),
        ({"layers": {0: 7}}, r"layers\[0\]=7"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_configurations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TurboQuantConfig(**changes)


def test_configurations_survive_json() -> None:
    for config in (TurboQuantConfig(), TurboQuantConfig(2, layers={-1: "exact", 0: (4, 1), 5: 2}, seed=3, key_balance=0)):
        again = TurboQuantConfig.from_canonical(json.loads(json.dumps(config.canonical())))
        assert again.canonical() == config.canonical()
        assert again.digest() == config.digest()
    with pytest.raises(ConfigError, match="stored configuration not understood"):
        TurboQuantConfig.from_canonical({**TurboQuantConfig().canonical(), "colour": "red"})
    with pytest.raises(ConfigError, match="unknown setting colour"):
        TurboQuantConfig.preset("turboquant_3bit", colour="red")
    assert TurboQuantConfig(3, seed=1).digest() != TurboQuantConfig(3).digest()


def test_equal_configurations_have_equal_digests() -> None:
    try:
        config = TurboQuantConfig(n_bits=3.0)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert config == TurboQuantConfig(n_bits=3)
    assert config.digest() == TurboQuantConfig(n_bits=3).digest()


def test_layers_may_be_any_mapping() -> None:
    config = TurboQuantConfig(layers=types.MappingProxyType({0: 4}))
    assert config.canonical() == TurboQuantConfig(layers={0: 4}).canonical()


def test_configurations_are_immutable() -> None:
    layers = {0: 4}
    config = TurboQuantConfig(layers=layers)
    layers[0] = 2
    assert config.bits_of_layer(0, 1) == (4, 4)
