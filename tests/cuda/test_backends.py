"""Which back-end does a call, kernels behind the cache (on the emulator and on a GPU), and attention inside compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant import Rotary, TurboQuantConfig, attend
from turboquant.attention import CausalMask, TensorMask, use_backend
from turboquant.cache.layer import PackedLayer
from turboquant.cache.slab import PageSlabs
from turboquant.errors import ConfigError


def filled(
    device: torch.device, length: int, rows: int = 1, dim: int = 64, dtype: torch.dtype = torch.float32, **settings: Any
) -> PackedLayer:
    """A layer with ``length`` tokens, fed in blocks, all but the last few by way of pages."""
    g = torch.Generator().manual_seed(length)
    rotary = Rotary(1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    sliding = settings.pop("sliding_window", None)
    starts = settings.pop("starts", None)
    layer = PackedLayer(2, dim, TurboQuantConfig(**settings), (3, 3), rotary, sliding)
    if starts is not None:
        layer.starts = torch.tensor(starts, device=device)
    at = 0
    while at < length:
        n = min(200, length - at)
        key, value, query = torch.randn(3, rows, 2, n, dim, generator=g).to(device, dtype)
        layer.append(key, value)
        layer.observe_queries(query)
        if at + n < length:
            layer.commit()
        at += n
    return layer


@pytest.fixture
def on_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Kernels behind the cache, whether there is a GPU or not."""
    if kernel_device.type == "cpu":
        for module in ("turboquant.cache.layer", "turboquant.attention.cuda"):
            monkeypatch.setattr(f"{module}.kernels_run_on", lambda device: True)
        monkeypatch.setattr("turboquant.attention.cuda.is_gpu", lambda query: True)
        monkeypatch.setattr("turboquant.attention.cuda.stream_of", lambda device: 0)
    return kernel_device


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": 150},
        {"sink_tokens": 0},
        {"key_center": "mean"},
        {"key_center": "none"},
        {"starts": (0, 100), "rows": 2},
        {"recent_tokens": 0},
        {"quantizer": "lloyd_max_qjl"},
        {"rotation_type": "orthogonal"},
        {"dim": 80},
    ],
    ids=str,
)
def test_kernels_behind_the_cache(
    on_kernels: torch.device, settings: dict[str, Any], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboquant.attention.select._warned", set())
    if settings.get("dim") == 80 and queries > 1:
        pytest.skip("one call is enough to see the fall-back")
    layer = filled(on_kernels, 470, **settings)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(layer.batch_size, 6, queries, layer.head_dim, generator=g).to(on_kernels)
    with use_backend("reference"):
        expected, expected_lse = attend(query, layer, softcap=None)
    if settings.get("dim") == 80:
        with pytest.warns(UserWarning, match="head_dim 80"):
            found, lse = attend(query, layer)
    else:
        found, lse = attend(query, layer)
    assert layer.packed_pages >= 2
    seen = expected_lse > float("-inf")
    assert (found - expected).norm() / expected.norm() < 2e-3
    assert (lse - expected_lse)[seen].abs().max() < 5e-3
    assert torch.equal(lse == float("-inf"), ~seen)


def test_pages_are_those_of_the_reference(on_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = filled(on_kernels, 470).slabs
    monkeypatch.setattr("turboquant.cache.layer.kernels_run_on", lambda device: False)
    assert torch.equal(packed.read(0, len(packed)), filled(on_kernels, 470).slabs.read(0, len(packed)))


def test_decoding_grows_the_tail_in_place(on_kernels: torch.device) -> None:
    layer = filled(on_kernels, 300)
    layer.commit()
    g = torch.Generator().manual_seed(2)
    moved = 0
    for _ in range(130):
        key, value = torch.randn(2, 1, 2, 1, 64, generator=g).to(on_kernels)
        before = layer._tail.data_ptr() if layer._tail is not None else 0
        layer.append(key, value)
        query = torch.randn(1, 6, 1, 64, generator=g).to(on_kernels)
        found = attend(query, layer)[0]
        with use_backend("reference"):
            assert (found - attend(query, layer)[0]).norm() / found.norm() < 2e-3
        layer.commit()
        assert layer._tail is not None
        moved += layer._tail.data_ptr() != before
    assert moved <= 8
    assert layer.length == 430


def test_a_mask_of_its_own_falls_back_and_says_so(on_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant.attention.select._warned", set())  # said once per process
    layer = filled(on_kernels, 470)
    query = torch.randn(1, 6, 2, 64, device=on_kernels)
    allowed = torch.ones(1, 1, 2, 470, dtype=torch.bool, device=on_kernels).tril(468)
    with pytest.warns(UserWarning, match="plain torch"):
        found = attend(query, layer, TensorMask(allowed))[0]
    torch.testing.assert_close(found, attend(query, layer)[0], atol=2e-3, rtol=2e-2)


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="reference"), use_backend("tpu"):
        pass


def test_inside_a_compiled_graph() -> None:
    layer = filled(torch.device("cpu"), 300)
    query = torch.randn(1, 6, 3, 64)
    compiled = torch.compile(lambda q: attend(q * 2.0, layer)[0] + 1.0, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query), attend(query * 2.0, layer)[0] + 1.0)
    shape = torch.ops.turboquant.attend(query.to("meta"), layer.handle, 0.1, None, None)
    assert shape[0].shape == query.shape and shape[1].shape == (1, 6, 3) and shape[1].dtype == torch.float32
    assert CausalMask(3).plain() is not None


def test_what_kernels_do_not_take_falls_back(on_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales shared by heads change nothing about which head dims the kernel takes; queries of another dtype are read, too."""
    monkeypatch.setattr("turboquant.attention.select._warned", set())
    shared = filled(on_kernels, 470, dim=80, per_head_scale=False)
    with pytest.warns(UserWarning, match="head_dim 80"):
        assert attend(torch.randn(1, 6, 1, 80, device=on_kernels), shared)[0].isfinite().all()
    query = torch.randn(1, 6, 1, 64, device=on_kernels)
    with pytest.warns(UserWarning, match="bfloat16"):
        assert attend(query, filled(on_kernels, 470, dtype=torch.bfloat16))[0].dtype == torch.float32


def test_addresses_follow_rows_into_memory_that_was_used_before() -> None:
    slabs = PageSlabs()
    memory = torch.zeros(2 * 4 * 3 * 8, dtype=torch.uint8)
    slabs.slabs = [memory.view(2, 4, 3, 8).permute(1, 2, 0, 3)]
    assert (slabs.addresses() - memory.data_ptr()).tolist() == [[0, 4 * 3 * 8]]
    slabs.slabs = [memory[: 2 * 2 * 3 * 8].view(2, 2, 3, 8).permute(1, 2, 0, 3)]
    assert (slabs.addresses() - memory.data_ptr()).tolist() == [[0, 2 * 3 * 8]]
