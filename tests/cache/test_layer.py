"""One packed layer: what stays exact, what is packed, what memory it takes, and edits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant.cache.exact import ExactLayer
from turboquant.cache.layer import BLOCK_PAGES, PackedLayer
from turboquant.cache.slab import MERGE_PAGES, PageSlabs
from turboquant.cache.state import export_state, import_state
from turboquant.codec.center import KeyStatistics
from turboquant.codec.rotary import Rotary
from turboquant.config import TurboQuantConfig
from turboquant.errors import ShapeError, TurboQuantError

HEADS, DIM = 2, 32
FEW = settings(max_examples=max(10, settings().max_examples // 2))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(dim: int = DIM) -> Rotary:
    return Rotary(10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2)))


def tokens(length: int, batch: int = 1, dim: int = DIM, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The first ``length`` tokens of one fixed sequence."""
    shape = (batch, HEADS, 1500, dim)
    return tuple(randn(*shape, seed=s)[:, :, :length].to(dtype) for s in (1, 2))  # type: ignore[return-value]


def statistics(dim: int = DIM) -> KeyStatistics:
    return KeyStatistics(randn(HEADS, dim, seed=3), (0.2 * randn(HEADS, dim, seed=4)).exp())


def packed(window: int | None = None, frozen: bool = True, dim: int = DIM, **config: Any) -> PackedLayer:
    c = TurboQuantConfig(**config)
    bits = c.bits_of_layer(0, 1)
    return PackedLayer(HEADS, dim, c, bits, rotary(dim), window, statistics(dim) if frozen else None)


def feed(layer: PackedLayer, key: Tensor, value: Tensor, cuts: list[int] | None = None) -> PackedLayer:
    for a, b in pairwise([layer.length, *(cuts or []), key.shape[2]]):
        layer.append(key[:, :, a:b], value[:, :, a:b])
        layer.commit()
    return layer


def contents(layer: PackedLayer) -> dict[str, Tensor]:
    """Everything that decides what is read: packed bytes, exact tokens, sinks."""
    found = {"tail": torch.stack(layer.exact(layer.packed_tokens, layer.length))}
    if layer.packed_pages > layer.first_page:
        found["pages"] = layer.slabs.read(0, len(layer.slabs))
    if (sinks := layer.sinks()) is not None:
        found["sinks"] = torch.stack(sinks[:2])
    return found


def assert_same(a: PackedLayer, b: PackedLayer) -> None:
    assert (a.length, a.packed_pages, a.first_page) == (b.length, b.packed_pages, b.first_page)
    found, want = contents(a), contents(b)
    assert found.keys() == want.keys()
    for name, t in want.items():
        assert torch.equal(found[name], t), name


# -- exact window ---------------------------------------------------------------------------------------------------------


@FEW
@given(
    length=st.integers(1, 700),
    cuts=st.lists(st.integers(1, 699), max_size=5),
    recent=st.integers(1, 200),
    sinks=st.integers(0, 64),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    frozen=st.booleans(),
)
def test_sinks_and_recent_tokens_are_exact(
    length: int, cuts: list[int], recent: int, sinks: int, dtype: torch.dtype, frozen: bool
) -> None:
    key, value = tokens(length, dtype=dtype)
    layer = packed(frozen=frozen, recent_tokens=recent, sink_tokens=sinks)
    feed(layer, key, value, sorted(c for c in cuts if c < length))
    assert layer.length == length
    if frozen or length >= 256 + 64:
        assert layer.packed_pages == max(0, length - recent) // 64
    for got, given_ in zip(layer.get(), (key, value), strict=True):
        assert got.dtype == dtype
        assert got.shape == given_.shape
        assert torch.equal(got[:, :, :sinks], given_[:, :, :sinks])
        assert torch.equal(got[:, :, max(0, length - recent) :], given_[:, :, max(0, length - recent) :])
        assert torch.equal(got[:, :, layer.packed_tokens :], given_[:, :, layer.packed_tokens :])


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0112), (3, 0.04), (2, 0.135)])
def test_error_of_packed_tokens(bits: int, bound: float) -> None:
    key, value = tokens(1500, dim=64)
    # The plain codec on the centred keys; balance spreads the error unevenly on purpose.
    layer = feed(packed(frozen=False, dim=64, n_bits=bits), key, value)
    part = slice(layer.sink_tokens, layer.packed_tokens)
    for got, x in zip(layer.get(), (key, value), strict=True):
        error = float((got - x)[:, :, part].square().sum() / x[:, :, part].square().sum())
        assert bound / 2 < error < bound


def test_pending_tokens_are_exact_and_counted() -> None:
    key, value = tokens(700)
    layer = feed(packed(), key[:, :, :300], value[:, :, :300])
    pages = layer.packed_pages
    layer.append(key[:, :, 300:], value[:, :, 300:])
    assert (layer.length, layer.packed_pages) == (700, pages)
    assert torch.equal(layer.get()[0][:, :, pages * 64 :], key[:, :, pages * 64 :])
    layer.commit()
    layer.commit()
    assert layer.packed_pages == (700 - 128) // 64
    assert_same(layer, feed(packed(), key, value))


# -- chunking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [32, 48, 33])
@FEW
@given(
    length=st.integers(1, 900),
    cuts=st.lists(st.integers(1, 899), max_size=6),
    recent=st.sampled_from([1, 64, 128]),
    rotation=st.sampled_from(["hadamard", "orthogonal"]),
)
def test_chunks_do_not_change_what_is_stored(dim: int, length: int, cuts: list[int], recent: int, rotation: str) -> None:
    key, value = tokens(length, dim=dim)
    settings = {"recent_tokens": recent, "rotation_type": rotation}
    whole = feed(packed(dim=dim, **settings), key, value)
    assert_same(feed(packed(dim=dim, **settings), key, value, sorted(c for c in cuts if c < length)), whole)


@pytest.mark.parametrize("window", [None, 100], ids=["full", "sliding"])
def test_one_token_at_a_time(window: int | None) -> None:
    key, value = tokens(600, batch=2)
    layer = packed(window)
    for i in range(600):
        feed(layer, key[:, :, : i + 1], value[:, :, : i + 1])
    whole = feed(packed(window), key, value)
    assert_same(layer, whole)
    assert layer.nbytes == whole.nbytes


def test_prompts_longer_than_a_block_are_packed_in_blocks() -> None:
    key, value = tokens(1500)
    layer = feed(packed(), key, value)
    assert layer.packed_pages > BLOCK_PAGES
    assert_same(layer, feed(packed(), key, value, [64 * 5, 64 * 12, 1400]))


def test_rows_of_a_batch_are_independent() -> None:
    key, value = tokens(500, batch=3)
    whole = contents(feed(packed(), key, value))
    for row in range(3):
        alone = contents(feed(packed(), key[row : row + 1], value[row : row + 1]))
        assert torch.equal(alone["pages"][0], whole["pages"][row])
        assert torch.equal(alone["sinks"][:, 0], whole["sinks"][:, row])


# -- statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 100, 256, 700])
def test_packing_waits_for_statistics(count: int) -> None:
    key, value = tokens(900)
    layer = packed(frozen=False, statistics_tokens=count, recent_tokens=64)
    first = None
    for i in range(900):
        feed(layer, key[:, :, : i + 1], value[:, :, : i + 1])
        if first is None and layer.statistics is not None:
            first = i + 1
            assert layer.packed_pages == (first - 64) // 64
            measured = layer.statistics.mean.clone()
        elif first is None:
            assert layer.packed_pages == 0
            assert torch.equal(layer.get()[0], key[:, :, : i + 1])
    assert first == max(count, 128)  # frozen when the first page is packed
    assert layer.statistics is not None
    assert torch.equal(layer.statistics.mean, measured)


def test_padding_does_not_count_as_seen() -> None:
    key, value = tokens(600, batch=2)
    layer = packed(frozen=False)
    layer.starts = torch.tensor([500, 350])
    feed(layer, key, value)
    assert layer.statistics is None
    layer = packed(frozen=False)
    layer.starts = torch.tensor([500, 300])
    assert feed(layer, key, value).statistics is not None


def test_no_centring_needs_no_statistics() -> None:
    key, value = tokens(200)
    layer = feed(packed(frozen=False, key_center="none"), key, value)
    assert layer.packed_pages == 1
    assert layer.statistics is None


def test_centring_helps_biased_keys() -> None:
    key, value = tokens(600, dim=64)
    cos, sin = rotary(64).cos_sin(torch.arange(600)[None])
    key = rotary(64).apply(key + 10 * randn(HEADS, 1, 64, seed=8), cos, sin)
    errors = {}
    for center in ("rope_mean", "mean", "none"):
        layer = feed(packed(frozen=False, dim=64, key_center=center), key, value)
        errors[center] = float((layer.get()[0] - key)[:, :, : layer.packed_tokens].square().mean())
    assert errors["rope_mean"] < 0.05
    assert errors["rope_mean"] * 10 < errors["mean"] < errors["none"]


def test_reset_forgets_measured_statistics_but_not_given_ones() -> None:
    key, value = tokens(600)
    for frozen in (False, True):
        layer = feed(packed(frozen=frozen), key, value)
        assert layer.statistics is not None
        layer.reset()
        assert (layer.length, layer.nbytes == 0, layer.batch_size) == (0, not frozen, 0)
        assert (layer.statistics is not None) is frozen
        assert_same(feed(layer, key, value), feed(packed(frozen=frozen), key, value))


def test_statistics_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"statistics of shape \(3, 32\) do not fit a layer of \(2, 32\)"):
        packed().use_statistics(KeyStatistics(torch.zeros(3, DIM)))


@pytest.mark.parametrize("at", [1, 5])
def test_queries_are_counted_until_statistics_are_frozen(at: int) -> None:
    key, value = tokens(600)
    layer = packed(frozen=False)
    layer.append(key[:, :, :300], value[:, :, :300])
    layer.observe_queries(randn(1, 2 * HEADS, 300, DIM) * torch.linspace(0.1, 10, DIM))
    layer.commit()
    assert layer.statistics is not None
    assert layer.statistics.balance is not None
    balance = layer.statistics.balance.clone()
    assert (balance[:, -1] > balance[:, 0]).all()
    layer.append(key[:, :, 300 : 300 + at], value[:, :, 300 : 300 + at])
    layer.observe_queries(1e6 * randn(1, 2 * HEADS, at, DIM))
    layer.commit()
    assert torch.equal(layer.statistics.balance, balance)


def test_a_restored_layer_measures_the_same_balance() -> None:
    (key, value), query = tokens(400), randn(1, 2 * HEADS, 400, DIM) * torch.linspace(0.1, 10, DIM)
    layer, restored = packed(frozen=False), packed(frozen=False)
    for part in (slice(0, 200), slice(200, 400)):
        if part.start:  # saved before the statistics were frozen
            state = export_state(layer, 200)
            assert state is not None
            import_state(restored, state, [], None)
        for x in (layer, restored) if part.start else (layer,):
            x.append(key[:, :, part], value[:, :, part])
            x.observe_queries(query[:, :, part])
            x.commit()
    assert_same(layer, restored)


# -- memory ---------------------------------------------------------------------------------------------------------------


def storage_bytes(root: Any) -> int:
    """Bytes of the distinct storages of all tensors reachable from ``root``; shared tables (codec, rotary) apart."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(x: Any) -> None:
        if id(x) in seen or isinstance(x, (str, bytes, int, float, type)):
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for v in x.values():
                walk(v)
        elif isinstance(x, (list, tuple, set)):
            for v in x:
                walk(v)
        elif hasattr(x, "__dict__"):
            for name, v in vars(x).items():
                if name not in ("codec", "rotary"):
                    walk(v)

    walk(root)
    storages.pop(0, None)
    return sum(storages.values())


@FEW
@given(
    length=st.integers(1, 900),
    cuts=st.lists(st.integers(1, 899), max_size=6),
    crop=st.one_of(st.none(), st.integers(1, 900)),
    rows=st.sampled_from([None, [0], [1, 1, 0]]),
    window=st.sampled_from([None, 100]),
)
def test_nbytes_is_what_is_allocated(
    length: int, cuts: list[int], crop: int | None, rows: list[int] | None, window: int | None
) -> None:
    key, value = tokens(length, batch=2)
    layer = feed(packed(window), key, value, sorted(c for c in cuts if c < length))
    assert layer.nbytes == storage_bytes(layer)
    if rows is not None:
        layer.select_rows(torch.tensor(rows))
        assert layer.nbytes == storage_bytes(layer)
    if crop is not None and window is None:
        layer.crop(crop)
        assert layer.nbytes == storage_bytes(layer)


def test_nbytes_counts_the_call_in_progress() -> None:
    key, value = tokens(500)
    layer = feed(packed(), key[:, :, :300], value[:, :, :300])
    before = layer.nbytes
    layer.append(key[:, :, 300:], value[:, :, 300:])
    assert layer.nbytes == before + 2 * HEADS * 200 * DIM * 4


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "one-token-decode"])
@pytest.mark.parametrize(("key_bits", "value_bits", "bits"), [(3, 3, 3.125), (3, 2, 2.625), (4, 4, 4.125)])
def test_a_page_costs_its_nominal_bits(key_bits: int, value_bits: int, bits: float, decode: bool) -> None:
    key, value = tokens(700, dim=128, dtype=torch.float16)
    layer = packed(dim=128, key_bits=key_bits, value_bits=value_bits)
    held = {}
    lengths = (400, 464, 592) if decode else (464, 592)
    for length in lengths:  # equal tails, 1 and 2 pages apart
        if decode:
            for i in range(layer.length, length):
                feed(layer, key[:, :, : i + 1], value[:, :, : i + 1])
            held[length] = layer.nbytes
        else:
            held[length] = feed(
                packed(dim=128, key_bits=key_bits, value_bits=value_bits), *(t[:, :, :length] for t in (key, value))
            ).nbytes
    per_page = bits / 8 * 2 * HEADS * 64 * 128
    assert held[592] - held[464] == 2 * per_page
    if decode:
        assert held[464] - held[400] == per_page
    assert 16 / bits == pytest.approx({3.125: 5.12, 2.625: 6.1, 4.125: 3.88}[bits], rel=2e-3)


@FEW
@given(length=st.integers(256, 900), step=st.sampled_from([1, 3, 64, 100]), batch=st.integers(1, 2))
def test_nbytes_depends_on_the_length_only(length: int, step: int, batch: int) -> None:
    key, value = tokens(length, batch)
    prefill = feed(packed(), key, value)
    steps = feed(packed(), key, value, list(range(256, length, step)))
    assert steps.nbytes == prefill.nbytes


def test_slabs_stay_few_and_copies_rare() -> None:
    slabs = PageSlabs()
    slabs.append(torch.zeros(1, 1, 37, 8, dtype=torch.uint8))
    for i in range(400):
        slabs.append(torch.full((1, 1, 1, 8), i % 251, dtype=torch.uint8))
        assert slabs.nbytes == 8 * len(slabs) == 8 * (38 + i)
    assert len(slabs.slabs) <= 2 + 400 // (MERGE_PAGES // 2) + 6
    assert slabs.read(37, 437)[0, 0, :, 0].tolist() == [i % 251 for i in range(400)]


@FEW
@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=12), data=st.data())
def test_slabs_read_like_one_tensor(sizes: list[int], data: st.DataObject) -> None:
    whole = torch.arange(sum(sizes), dtype=torch.int32)[None, None, :, None].expand(2, 3, -1, 4).contiguous()
    slabs, at = PageSlabs(), 0
    for n in sizes:
        slabs.append(whole[:, :, at : at + n].clone())
        at += n
    assert len(slabs) == at
    assert slabs.nbytes == whole.nbytes
    start = data.draw(st.integers(0, at - 1))
    stop = data.draw(st.integers(start + 1, at))
    assert torch.equal(slabs.read(start, stop), whole[:, :, start:stop])
    block = data.draw(st.integers(1, 40))
    seen = start
    for first, view in slabs.blocks(block, start, stop):
        assert first == seen
        assert 1 <= view.shape[2] <= block
        seen += view.shape[2]
    assert seen == stop
    slabs.keep(start, stop)
    assert slabs.nbytes == (stop - start) * 2 * 3 * 4 * 4
    assert sum(s.untyped_storage().nbytes() for s in slabs.slabs) == slabs.nbytes
    slabs.select_rows(torch.tensor([1]))
    assert torch.equal(slabs.read(0, len(slabs)), whole[1:, :, start:stop])


# -- sliding windows ------------------------------------------------------------------------------------------------------


@FEW
@given(length=st.integers(1, 1000), cuts=st.lists(st.integers(1, 999), max_size=6), window=st.sampled_from([1, 50, 64, 300]))
def test_sliding_layers_hold_their_window_and_little_more(length: int, cuts: list[int], window: int) -> None:
    key, value = tokens(length)
    layer = feed(packed(window, recent_tokens=32), key, value, sorted(c for c in cuts if c < length))
    assert layer.first_token <= max(0, length - window + 1)
    assert length - layer.first_token < max(window, 32) + 3 * 64
    got = layer.get()[0]
    assert got.shape[2] == length - layer.first_token
    assert torch.equal(got[:, :, -32:], key[:, :, -32:][:, :, -got.shape[2] :])
    # Sinks leave the window like any other token.
    assert layer.sinks() is None
    assert layer.slabs.nbytes == len(layer.slabs) * HEADS * layer.layout.page_bytes


def test_sliding_layers_hold_what_full_layers_hold() -> None:
    key, value = tokens(900)
    sliding, full = feed(packed(200), key, value), feed(packed(sink_tokens=0), key, value)
    assert sliding.first_page > 0
    for a, b in zip(sliding.get(), full.get(), strict=True):
        assert torch.equal(a, b[:, :, sliding.first_token :])


def test_crop_of_a_sliding_layer() -> None:
    key, value = tokens(900)
    layer = feed(packed(200, recent_tokens=32), key, value, list(range(100, 900, 50)))
    before = layer.get()[0]
    layer.crop(870)  # speculative tokens: within the slack
    assert torch.equal(layer.get()[0], before[:, :, : 870 - layer.first_token])
    with pytest.raises(TurboQuantError, match="cannot crop to 300 tokens: this layer slides over 200 tokens"):
        layer.crop(300)
    assert layer.length == 870
    feed(layer, key, value)
    assert layer.length == 900


# -- padding --------------------------------------------------------------------------------------------------------------


@FEW
@given(
    length=st.integers(1, 500),
    starts=st.lists(st.integers(0, 499), min_size=2, max_size=2),
    cuts=st.lists(st.integers(1, 499), max_size=4),
)
def test_padded_rows_keep_their_own_sinks(length: int, starts: list[int], cuts: list[int]) -> None:
    key, value = tokens(length, batch=2)
    layer = packed(sink_tokens=5, recent_tokens=20)
    layer.starts = torch.tensor(starts)
    feed(layer, key, value, sorted(c for c in cuts if c < length))
    for got, given_ in zip(layer.get(), (key, value), strict=True):
        for row, start in enumerate(starts):
            assert torch.equal(got[row, :, start : start + 5], given_[row, :, start : start + 5])


def test_padding_shifts_positions() -> None:
    layer = packed()
    assert layer.positions(3, 6, torch.device("cpu")).tolist() == [[3, 4, 5]]
    layer.starts = torch.tensor([0, 4])
    assert layer.positions(3, 6, torch.device("cpu")).tolist() == [[3, 4, 5], [-1, 0, 1]]
    # The same text, padded by whole pages, gives the same pages.
    key, value = tokens(400)
    plain = feed(packed(), key, value)
    padded = packed()
    padded.starts = torch.tensor([128])
    shift = [torch.cat((torch.zeros(1, HEADS, 128, DIM), t), dim=2) for t in (key, value)]
    feed(padded, *shift)
    assert torch.equal(padded.slabs.read(2, len(padded.slabs)), plain.slabs.read(0, len(plain.slabs)))


# -- crop -----------------------------------------------------------------------------------------------------------------

LENGTH = 700  # 8 packed pages, 188 exact tokens
CROPS = [
    pytest.param(699, id="last-token"),
    pytest.param(520, id="tail"),
    pytest.param(500, id="inside-the-last-page"),
    pytest.param(450, id="inside-a-page"),
    pytest.param(66, id="second-page"),
    pytest.param(40, id="first-page"),
    pytest.param(3, id="within-the-sinks"),
]
BORDERS = [pytest.param(512, id="end-of-pages"), pytest.param(448, id="page-border"), pytest.param(64, id="first-border")]


@pytest.mark.parametrize("length", [*CROPS, *BORDERS])
def test_crop_keeps_stored_values(length: int) -> None:
    key, value = tokens(LENGTH, batch=2)
    layer = feed(packed(), key, value)
    assert layer.packed_tokens == 512
    before = layer.get()
    layer.crop(length)
    assert layer.length == length
    assert layer.packed_tokens == min(512, length // 64 * 64)
    for a, b in zip(layer.get(), before, strict=True):
        assert torch.equal(a, b[:, :, :length])


@pytest.mark.parametrize("length", [*CROPS, *BORDERS])
def test_crop_and_append_again(length: int) -> None:
    key, value = tokens(LENGTH, batch=2)
    never = feed(packed(), key, value)
    layer = feed(packed(), key, value)
    layer.crop(length)
    feed(layer, key, value, [length + 1] if length < LENGTH - 1 else None)
    assert (layer.length, layer.packed_pages) == (LENGTH, 8)
    assert torch.equal(contents(layer)["tail"], contents(never)["tail"])
    assert torch.equal(contents(layer)["sinks"], contents(never)["sinks"])
    same = (contents(layer)["pages"] == contents(never)["pages"]).all(-1).all(1).all(0)
    # Only the page that was cut is coded twice (mostly to the same codes); not even that one if all its tokens were exact.
    cut = {length // 64} if length < 512 and length % 64 and length > layer.sink_tokens else set()
    assert {i for i, ok in enumerate(same.tolist()) if not ok} <= cut
    error = (layer.get()[0] - key).square().sum() / key.square().sum()
    assert error < 0.06


def test_crop_to_nothing_and_beyond() -> None:
    key, value = tokens(LENGTH)
    layer = feed(packed(), key, value)
    layer.crop(LENGTH)
    layer.crop(LENGTH + 100)
    assert layer.length == LENGTH
    layer.crop(0)
    assert (layer.length, layer.packed_pages, layer.batch_size) == (0, 0, 0)
    assert_same(feed(layer, *tokens(LENGTH, batch=3)), feed(packed(), *tokens(LENGTH, batch=3)))


@FEW
@given(steps=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=8))
def test_speculative_decoding_keeps_the_exact_window(steps: list[tuple[int, int]]) -> None:
    # Crop within the exact tail and append again, many times: as if the taken back tokens had never been there.
    key, value = tokens(1500)
    layer, length = feed(packed(), key[:, :, :300], value[:, :, :300]), 300
    for back, forward in steps:
        layer.crop(max(length - back, layer.packed_tokens + 1))
        length = min(layer.length + forward, 1500)
        feed(layer, key[:, :, :length], value[:, :, :length])
    got = layer.get()
    assert torch.equal(got[0][:, :, layer.packed_tokens :], key[:, :, layer.packed_tokens : length])
    whole = feed(packed(), key, value)
    assert torch.equal(layer.slabs.read(0, layer.packed_pages), whole.slabs.read(0, layer.packed_pages))


# -- rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 0, 1, 2, 2]], ids=str)
def test_select_rows(rows: list[int]) -> None:
    key, value = tokens(500, batch=3)
    layer = packed()
    layer.starts = torch.tensor([0, 70, 3])
    before = feed(layer, key, value).get()
    layer.select_rows(torch.tensor(rows))
    assert layer.batch_size == len(rows)
    assert layer.starts.tolist() == [[0, 70, 3][r] for r in rows]
    for a, b in zip(layer.get(), before, strict=True):
        assert torch.equal(a, b[rows])
    more = randn(len(rows), HEADS, 90, DIM, seed=5)
    layer.append(more, more)
    layer.commit()
    assert torch.equal(layer.get()[0][:, :, 500:], more)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param(
            (1, 3, 5, DIM), (1, 3, 5, DIM), r"key of shape \(1, 3, 5, 32\) .* 2 heads, tokens, head_dim 32", id="heads"
        ),
        pytest.param((1, HEADS, 5, 64), (1, HEADS, 5, 64), "does not fit", id="head_dim"),
        pytest.param((HEADS, 5, DIM), (HEADS, 5, DIM), "does not fit", id="3d"),
        pytest.param((1, HEADS, 5, DIM), (1, HEADS, 6, DIM), "must agree", id="key-and-value"),
        pytest.param((2, HEADS, 5, DIM), (2, HEADS, 5, DIM), r"batch 2.*cached batch 1.*reset\(\)", id="batch"),
    ],
)
def test_wrong_shapes(key: tuple[int, ...], value: tuple[int, ...], message: str) -> None:
    layer = feed(packed(), *tokens(300))
    before = contents(layer)
    with pytest.raises(ShapeError, match=message):
        layer.append(torch.zeros(key), torch.zeros(value))
    assert layer.length == 300
    assert all(torch.equal(t, contents(layer)[n]) for n, t in before.items())


def test_wrong_dtypes() -> None:
    key, value = tokens(10)
    layer = packed()
    with pytest.raises(ShapeError, match=r"float32, float16 or bfloat16, not torch\.float64"):
        layer.append(key.double(), value.double())
    with pytest.raises(ShapeError, match="must agree"):
        layer.append(key, value.half())
    feed(layer, key, value)
    with pytest.raises(ShapeError, match=r"cached batch 1, torch\.float32"):
        layer.append(key.half(), value.half())


def test_empty_layers_say_so() -> None:
    for layer in (packed(), ExactLayer(HEADS, DIM)):
        assert (layer.length, layer.nbytes - (layer.nbytes if isinstance(layer, PackedLayer) else 0), layer.batch_size) == (
            0,
            0,
            0,
        )
        layer.crop(5)
        layer.select_rows(torch.tensor([0]))
        layer.commit()
        with pytest.raises(TurboQuantError, match="nothing was stored yet"):
            layer.get()


# -- exact layers ---------------------------------------------------------------------------------------------------------


def test_exact_layer() -> None:
    key, value = tokens(100, batch=2)
    layer = ExactLayer(HEADS, DIM)
    layer.append(key[:, :, :60], value[:, :, :60])
    layer.append(key[:, :, 60:], value[:, :, 60:])
    assert torch.equal(layer.get()[0], key)
    assert torch.equal(layer.get()[1], value)
    assert layer.nbytes == storage_bytes(layer) == key.nbytes + value.nbytes
    layer.crop(70)
    layer.select_rows(torch.tensor([1, 1]))
    assert torch.equal(layer.get()[1], value[[1, 1], :, :70])
    assert layer.nbytes == storage_bytes(layer)
    for wrong in ((2, 3, 5, DIM), (2, HEADS, 5, 64), (1, HEADS, 5, DIM)):
        with pytest.raises(ShapeError):
            layer.append(torch.zeros(wrong), torch.zeros(wrong))
    layer.reset()
    assert (layer.length, layer.nbytes) == (0, 0)


def test_exact_layer_does_not_alias_its_input() -> None:
    key, value = tokens(10)
    layer, given_ = ExactLayer(HEADS, DIM), key.clone()
    layer.append(given_, value)
    given_.zero_()
    assert torch.equal(layer.get()[0], key)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float64, torch.float64)], ids=["mixed", "float64"])
def test_exact_layer_refuses_the_dtypes_that_packed_layers_refuse(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    key, value = tokens(10)
    with pytest.raises(ShapeError):
        ExactLayer(HEADS, DIM).append(key.to(dtypes[0]), value.to(dtypes[1]))


def test_exact_layer_cropped_to_nothing_is_empty() -> None:
    layer = ExactLayer(HEADS, DIM)
    layer.append(*tokens(10))
    layer.crop(0)
    assert layer.batch_size == 0
    layer.append(*tokens(10, batch=2))
