"""Attention over packed pages against dense float64 attention over the same, dequantized, keys and values."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant.attention import CausalMask, TensorMask, attend, attend_exact
from turboquant.cache.layer import BLOCK_PAGES, PackedLayer
from turboquant.codec.page import PageCodec
from turboquant.codec.rotary import Rotary
from turboquant.config import TurboQuantConfig
from turboquant.errors import ShapeError

TOLERANCE = 1e-4
INF = float("inf")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(dim: int) -> Rotary:
    return Rotary(10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2)))


def filled(
    length: int,
    last: int = 1,
    *,
    dim: int = 64,
    heads: int = 2,
    batch: int = 1,
    bits: tuple[int, int] = (3, 3),
    starts: list[int] | None = None,
    window: int | None = None,
    chunk: int | None = None,
    queries: bool = False,
    seed: int = 0,
    **config: Any,
) -> PackedLayer:
    """A layer of ``length`` tokens, the ``last`` of them still pending. Keys have a mean before the rotary embedding."""
    layer = PackedLayer(heads, dim, TurboQuantConfig(key_bits=bits[0], value_bits=bits[1], **config), bits, rotary(dim), window)
    if starts is not None:
        layer.starts = torch.tensor(starts)
    r = rotary(dim)
    cos, sin = r.cos_sin(torch.arange(length)[None])
    key = r.apply(randn(batch, heads, length, dim, seed=seed) + 2 * randn(heads, 1, dim, seed=seed + 1), cos, sin)
    value = randn(batch, heads, length, dim, seed=seed + 2)
    cuts = [0, *range(chunk or length, length - last, chunk or length), length - last, length]
    for a, b in pairwise(cuts):
        if b > a:
            layer.append(key[:, :, a:b], value[:, :, a:b])
            if queries:
                layer.observe_queries(randn(batch, heads, b - a, dim, seed=b) * torch.linspace(0.2, 5, dim))
    return layer


def visible(layer: PackedLayer, queries: int) -> Tensor:
    """(batch, 1, queries, keys held): causal, within the window, after the padding."""
    index = torch.arange(layer.first_token, layer.length)
    query = torch.arange(layer.length - queries, layer.length)[:, None]
    ok = index <= query
    if layer.sliding_window is not None:
        ok = ok & (index > query - layer.sliding_window)
    ok = ok[None, None].expand(layer.batch_size, 1, -1, -1)
    return ok if layer.starts is None else ok & (index >= layer.starts[:, None, None, None])


def dense(
    query: Tensor,
    layer: PackedLayer,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) in float64 over ``layer.get()``; rows that see nothing are zero."""
    key, value = (t.double().repeat_interleave(query.shape[1] // layer.num_kv_heads, dim=1) for t in layer.get())
    mask = visible(layer, query.shape[2]) if mask is None else mask
    scores = query.double() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.double()
    if sink_logits is not None:
        sink = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, value = torch.cat((scores, sink), -1), torch.cat((value, torch.zeros_like(value[:, :, :1])), 2)
    p = scores.softmax(-1).nan_to_num(0.0)
    return p @ value, scores.logsumexp(-1)


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    (out, lse), (want, want_lse) = found, expected
    assert out.shape == want.shape
    assert lse.shape == want_lse.shape
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    error = (out.double() - want).norm(dim=-1)
    assert float((error - tolerance * want.norm(dim=-1)).max()) <= 1e-7
    assert torch.equal(lse == -INF, want_lse == -INF)
    seen = want_lse != -INF
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=tolerance, rtol=tolerance)


# -- over everything that varies ------------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)]),
    dim=st.sampled_from([64, 80, 128]),
    group=st.sampled_from([1, 3, 8]),
    queries=st.sampled_from([1, 5, 64, 300]),
    length=st.sampled_from([1, 63, 64, 65, 700, 1500]),
    rotation=st.sampled_from(["hadamard", "orthogonal"]),
    quantizer=st.sampled_from(["lloyd_max", "lloyd_max", "lloyd_max_qjl"]),
    center=st.sampled_from(["rope_mean", "mean", "none"]),
    recent=st.sampled_from([1, 37, 128]),
    sinks=st.sampled_from([0, 4, 64]),
)
def test_packed_attention_is_dense_attention(
    bits: tuple[int, int],
    dim: int,
    group: int,
    queries: int,
    length: int,
    rotation: str,
    quantizer: str,
    center: str,
    recent: int,
    sinks: int,
) -> None:
    bits = (max(bits[0], 2), bits[1]) if quantizer == "lloyd_max_qjl" else bits
    queries = min(queries, length)
    config = {"rotation_type": rotation, "quantizer": quantizer, "key_center": center}
    layer = filled(
        length, queries, dim=dim, heads=1, bits=bits, recent_tokens=recent, sink_tokens=sinks, statistics_tokens=64, **config
    )
    query = randn(1, group, queries, dim, seed=7)
    assert_close(attend(query, layer), dense(query, layer))
    layer.commit()
    if length == 1500:
        assert layer.packed_pages == (1500 - recent) // 64
    assert_close(attend(query, layer), dense(query, layer))


def test_without_an_exact_window() -> None:
    layer, query = filled(128, 1, recent_tokens=0, statistics_tokens=64), randn(1, 2, 1, 64, seed=3)
    before = attend(query, layer)
    assert_close(before, dense(query, layer))
    layer.commit()
    assert layer.packed_tokens == layer.length
    assert_close(attend(query, layer), dense(query, layer))


@pytest.mark.parametrize("balanced", [False, True], ids=["centred", "balanced"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [(1, 2), (2, 2), (3, 3), (4, 4)], ids=lambda b: f"K{b[0]}V{b[1]}")
def test_every_bit_width_and_head_dim(bits: tuple[int, int], dim: int, balanced: bool) -> None:
    layer = filled(700, 5, dim=dim, bits=bits, batch=2, chunk=260, queries=balanced)
    assert layer.statistics is not None
    assert (layer.statistics.balance is not None) is balanced
    query = randn(2, 6, 5, dim, seed=3)
    assert_close(attend(query, layer), dense(query, layer))


def test_compression_is_close_to_exact_attention() -> None:
    # The other tests compare two readings of the same pages; this one says that the pages hold the right thing.
    layer, exact = (filled(1000, 1, dim=128, bits=(4, 4), recent_tokens=r) for r in (0, 1000))
    assert layer.packed_pages == 15
    assert exact.packed_pages == 0
    query = randn(1, 2, 1, 128, seed=3)
    (out, _), (want, _) = attend(query, layer), attend(query, exact)
    assert float((out - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("scaling", [None, 1.0, 0.02])
@pytest.mark.parametrize("sink_logits", [False, True], ids=["", "sink-logits"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
def test_scaling_softcap_and_sink_logits(softcap: float | None, sink_logits: bool, scaling: float | None) -> None:
    layer = filled(500, 3)
    query, logits = randn(1, 6, 3, 64, seed=3), torch.tensor([-INF, -2.0, 0.0, 5.0, 30.0, 80.0]) if sink_logits else None
    assert_close(attend(query, layer, None, scaling, softcap, logits), dense(query, layer, None, scaling, softcap, logits))


def test_large_scores_do_not_overflow() -> None:
    layer, query = filled(500, 3), 300 * randn(1, 2, 3, 64, seed=3)
    assert_close(attend(query, layer), dense(query, layer), tolerance=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision_queries(dtype: torch.dtype) -> None:
    layer, query = filled(500, 3), randn(1, 2, 3, 64, seed=3).to(dtype)
    out, lse = attend(query, layer)
    assert out.dtype == dtype
    want, want_lse = dense(query, layer)
    torch.testing.assert_close(out.double(), want, atol=0, rtol=2.0**-7)
    torch.testing.assert_close(lse.double(), want_lse, atol=TOLERANCE, rtol=TOLERANCE)


# -- padding and windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", ["rope_mean", "mean", "none"])
@pytest.mark.parametrize("queries", [1, 70])
def test_left_padding(center: str, queries: int) -> None:
    layer = filled(700, queries, batch=5, starts=[0, 37, 62, 200, 560], key_center=center)
    query = randn(5, 4, queries, 64, seed=3)
    assert_close(attend(query, layer), dense(query, layer))


def test_padding_content_does_not_matter() -> None:
    starts = [0, 70, 300]
    clean, dirty = (filled(600, 0, batch=3, starts=starts) for _ in range(2))
    dirty.reset()
    dirty.starts = torch.tensor(starts)
    reference = filled(600, 0, batch=3, starts=starts, recent_tokens=1000)  # exact, for its keys and values
    key, value = (t.clone() for t in reference.get())
    for row, start in enumerate(starts):
        key[row, :, :start], value[row, :, :start] = 1e4, -1e4
    dirty.append(key, value)
    query = randn(3, 4, 20, 64, seed=3)
    for a, b in zip(attend(query, clean), attend(query, dirty), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    # Masked tokens are never read into the result, exact or packed.
    for t, other in zip(clean.get(), dirty.get(), strict=True):
        for row, start in enumerate(starts):
            torch.testing.assert_close(t[row, :, start:], other[row, :, start:], atol=1e-6, rtol=1e-6)


def test_queries_at_padding_see_nothing() -> None:
    layer = filled(100, 100, batch=2, starts=[0, 90], recent_tokens=0, statistics_tokens=1)
    layer.commit()
    assert layer.packed_pages == 1
    query = randn(2, 2, 100, 64, seed=3)
    out, lse = attend(query, layer)
    assert torch.equal(out[1, :, :90], torch.zeros(2, 90, 64))
    assert (lse[1, :, :90] == -INF).all()
    assert (out[1, :, 90:].norm(dim=-1) > 0).all()
    assert_close((out, lse), dense(query, layer))
    # A logit that only enters the denominator does not bring them back, nor does it make NaN.
    out, lse = attend(query, layer, sink_logits=torch.tensor([1.0, 2.0]))
    assert torch.equal(out[1, :, :90], torch.zeros(2, 90, 64))
    torch.testing.assert_close(lse[1, :, 0], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("starts", [None, [0, 300, 690]], ids=["", "padded"])
@pytest.mark.parametrize("queries", [1, 40, 300])
@pytest.mark.parametrize("window", [1, 64, 200])
def test_sliding_window(window: int, queries: int, starts: list[int] | None) -> None:
    layer = filled(1100, queries, batch=3, window=window, chunk=90, starts=starts, recent_tokens=32, statistics_tokens=64)
    assert layer.first_page > 0
    assert layer.first_token <= 1100 - queries - window + 1
    query = randn(3, 4, queries, 64, seed=3)
    assert_close(attend(query, layer), dense(query, layer))
    layer.commit()
    if queries == 1:
        assert_close(attend(query, layer), dense(query, layer))


# -- masks given as tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_tensor_mask(additive: bool, shape: tuple[int, int]) -> None:
    layer = filled(600, 7, batch=2)
    bits = randn(*shape, 7, 600, seed=4) > 0
    bits[0, 0, 2] = False  # a row that sees nothing
    mask = torch.where(bits, 3 * randn(*shape, 7, 600, seed=5), -INF) if additive else bits
    query = randn(2, 4, 7, 64, seed=3)
    found = attend(query, layer, TensorMask(mask))
    assert_close(found, dense(query, layer, mask))
    assert torch.equal(found[0][0, 0, 2], torch.zeros(64))
    assert (found[1][0, 0, 2] == -INF).all()


def test_additive_mask_of_lowest_numbers() -> None:
    # transformers writes finfo.min, not -inf: rows that see anything are the same.
    layer, ok = filled(600, 7), randn(1, 1, 7, 600, seed=4) > 0
    mask = torch.where(ok, 0.0, torch.finfo(torch.float32).min)
    query = randn(1, 4, 7, 64, seed=3)
    assert_close(attend(query, layer, TensorMask(mask)), dense(query, layer, ok))


def test_tensor_mask_of_a_sliding_layer_starts_at_its_first_token() -> None:
    layer = filled(1000, 5, window=150, chunk=90, recent_tokens=32, statistics_tokens=64)
    ok = visible(layer, 5)
    assert layer.first_token > 0
    assert ok.shape[-1] == 1000 - layer.first_token
    query = randn(1, 4, 5, 64, seed=3)
    for a, b in zip(attend(query, layer, TensorMask(ok, layer.first_token)), attend(query, layer), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@given(
    q0=st.integers(0, 40),
    n=st.integers(1, 20),
    window=st.sampled_from([None, 1, 30, 80]),
    first=st.integers(-2, 2),
    last=st.integers(-2, 2),
)
def test_causal_mask_leaves_out_only_what_hides_nothing(q0: int, n: int, window: int | None, first: int, last: int) -> None:
    # A block of keys whose ends are close to where the first query's past and the last query's window end.
    query, device = torch.arange(100 + q0, 100 + q0 + n)[:, None], torch.device("cpu")
    stop = 101 + q0 + last
    start = min(stop - 1, max(0, 100 + q0 + n - (window or 100) + first))
    key, mask = torch.arange(start, stop), CausalMask(100, window)
    want = (key <= query) & (key > query - (window or 10**6))
    full, block = mask.at(q0, q0 + n, key[None]), mask.block(q0, q0 + n, start, stop, device)
    assert full is not None
    assert torch.equal(full.expand(1, 1, *want.shape)[0, 0], want)
    assert (block is None) == bool(want.all())
    assert block is None or torch.equal(block, full)


# -- independence and merging ---------------------------------------------------------------------------------------------


def test_rows_are_independent() -> None:
    layer = filled(700, 3, batch=3, starts=[0, 37, 200])
    query = randn(3, 4, 3, 64, seed=3)
    out, lse = attend(query, layer)
    layer.commit()
    for row in (2, 0):
        one = filled(700, 3, batch=3, starts=[0, 37, 200])
        one.select_rows(torch.tensor([row]))
        alone, alone_lse = attend(query[row : row + 1], one)
        torch.testing.assert_close(alone, out[row : row + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone_lse, lse[row : row + 1], atol=1e-5, rtol=1e-5)


@settings(max_examples=max(6, settings().max_examples // 6))
@given(cut=st.integers(0, 700), sinks=st.booleans())
def test_parts_merge_by_their_log_sum_exp(cut: int, sinks: bool) -> None:
    layer, query = filled(700, 6), randn(1, 4, 6, 64, seed=3)
    logits = randn(4) if sinks else None
    whole, whole_lse = attend(query, layer, sink_logits=logits)
    ok, left = visible(layer, 6), torch.arange(700) < cut
    parts = [attend(query, layer, TensorMask(ok & left)), attend(query, layer, TensorMask(ok & ~left), sink_logits=logits)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-4)


def test_exact_attention_takes_a_later_first_key() -> None:
    layer = filled(300, 4, recent_tokens=1000)
    (key, value), query = layer.get(), randn(1, 4, 4, 64, seed=3)
    mask = CausalMask(296, 100)
    whole = attend_exact(query, key, value, 0, mask, 0.125)
    part = attend_exact(query, key[:, :, 150:], value[:, :, 150:], 150, mask, 0.125)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_queries_in_chunks_are_queries_at_once() -> None:
    layer, query = filled(700, 300), randn(1, 4, 300, 64, seed=3)
    out, lse = attend(query, layer)
    ok = visible(layer, 300)
    for a, b in ((0, 7), (250, 260), (299, 300)):
        part, part_lse = attend(query[:, :, a:b], layer, TensorMask(ok[:, :, a:b]))
        torch.testing.assert_close(part, out[:, :, a:b], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(part_lse, lse[:, :, a:b], atol=1e-6, rtol=1e-5)


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_pages_are_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"decode_keys": [], "decode_values": []}
    for name, seen in sizes.items():
        original = getattr(PageCodec, name)

        def spy(self: PageCodec, pages: Tensor, original: Any = original, seen: list[int] = seen) -> Any:
            seen.append(pages.shape[2])
            return original(self, pages)

        monkeypatch.setattr(PageCodec, name, spy)
    layer = filled(3000, 1, chunk=700)
    layer.commit()
    attend(randn(1, 2, 1, 64), layer)
    assert sum(sizes["decode_keys"]) == layer.packed_pages == (3000 - 128) // 64
    assert max(sizes["decode_keys"]) == BLOCK_PAGES
    assert sizes["decode_values"] == sizes["decode_keys"]
    # Pages that no query may see are not decoded at all.
    sizes["decode_keys"].clear()
    attend(randn(1, 2, 1, 64), layer, CausalMask(2999, 700))
    assert sum(sizes["decode_keys"]) < 30


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.nbytes = max(self.nbytes, t.nbytes)
        return out


@pytest.mark.parametrize("queries", [1, 20])
def test_memory_does_not_grow_with_the_context(queries: int) -> None:
    largest = []
    for length in (64 * 34, 64 * 66):
        layer = filled(length, queries)
        layer.commit()
        with Largest() as mode:
            attend(randn(1, 4, queries, 64), layer)
        largest.append(mode.nbytes)
        assert layer.slabs.nbytes > 0
    assert largest[0] == largest[1]
    # Decoded levels of 1,024 tokens, or scores.
    assert largest[0] <= 4 * max(2 * 1024 * 64, 4 * queries * 1024)


class Peak(TorchDispatchMode):
    """Most bytes that are alive at once in tensors made while the mode is on."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                storage = t.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.peak = max(self.peak, sum(self.live.values()))
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        return out


@pytest.mark.parametrize(
    ("queries", "center"),
    [
        pytest.param(256, "none", id="prefill"),
        pytest.param(256, "rope_mean", id="prefill-rope_mean"),
        pytest.param(1, "rope_mean", id="decode"),
    ],
)
def test_memory_stays_within_the_documented_bound(queries: int, center: str) -> None:
    layer = filled(1024 + queries, queries, dim=128, heads=2, recent_tokens=1, sink_tokens=0, key_center=center)
    layer.commit()
    query = randn(1, 8, queries, 128)
    attend(query, layer)  # tables are made once
    assert layer._tail is not None
    with Peak(query, layer._tail, *layer.slabs.slabs) as mode:
        attend(query, layer)
    offsets = 2 * 1024 * 128 * 16 if center == "rope_mean" else 0
    bound = 2 * 1024 * 128 * 24 + 3 * 8 * queries * 1024 * 4 + offsets + 2 * 8 * queries * 128 * 4
    assert mode.peak <= bound


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 4, 1, 64), id="batch"),
        pytest.param((1, 3, 1, 64), id="heads"),
        pytest.param((1, 4, 1, 128), id="head_dim"),
        pytest.param((1, 4, 301, 64), id="tokens"),
    ],
)
def test_queries_that_do_not_fit(shape: tuple[int, ...]) -> None:
    layer = filled(300)
    with pytest.raises(ShapeError, match="does not fit a layer with batch 1, 2 KV heads, head_dim 64 and 300 tokens"):
        attend(torch.zeros(shape), layer)


def test_queries_without_a_batch_axis() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 1, 64\) must be"):
        attend(torch.zeros(4, 1, 64), filled(300))


def test_empty_layer() -> None:
    layer = PackedLayer(2, 64, TurboQuantConfig(), (3, 3))
    with pytest.raises(ShapeError, match="batch 0"):
        attend(torch.zeros(1, 2, 1, 64), layer)
