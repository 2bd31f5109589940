"""The torch reference on a CUDA device: the same bytes and the same attention as on the CPU."""

from __future__ import annotations

import pytest
import torch

from turboquant import PRESETS, Rotary, TurboQuantCache, TurboQuantConfig, TurboQuantStore, attend, prefill
from turboquant.codec.layout import PageLayout
from turboquant.codec.page import PageCodec

from ..huggingface.families import build, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(1, 1), (2, 2), (3, 3), (4, 4), (3, 2)])
def test_same_bytes_as_on_the_cpu(dim: int, key_bits: int, value_bits: int) -> None:
    codec = PageCodec(PageLayout(dim, key_bits, value_bits))
    generator = torch.Generator().manual_seed(dim)
    key, value = torch.randn(2, 1, 4, 256, dim, generator=generator)
    on_cpu, on_gpu = codec.encode(key, value), codec.encode(key.cuda(), value.cuda()).cpu()
    if dim & (dim - 1) == 0:
        assert torch.equal(on_cpu, on_gpu)
    else:  # the odd factor of the rotation is a matrix product, whose order of summation is the library's
        assert float((on_cpu != on_gpu).float().mean()) < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("queries", [1, 33])
def test_attention_equals_the_cpu(preset: str, queries: int) -> None:
    rotary = Rotary(1.0 / 1e4 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    generator = torch.Generator().manual_seed(queries)
    key, value = torch.randn(2, 2, 2, 900, 64, generator=generator)
    query = torch.randn(2, 6, queries, 64, generator=generator)
    out = []
    for device in ("cpu", "cuda"):
        cache = TurboQuantCache(1, 2, 64, preset, device=device, rotary=rotary)
        layer = cache._stores[0]
        layer.append(key.to(device), value.to(device))
        layer.commit()
        out.append(attend(query.to(device), layer)[0].cpu())
    assert float((out[0] - out[1]).norm() / out[0].norm()) < 2e-3


def test_generate_save_and_restore(tmp_path: object) -> None:
    model = build("llama").cuda()
    ids = tokens(700).cuda()

    def run(cache: TurboQuantCache) -> torch.Tensor:
        prefill(model, ids, cache)
        return model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)

    plain = run(TurboQuantCache.for_model(model, TurboQuantConfig(n_bits=3)))
    store = TurboQuantStore(str(tmp_path), 1 << 28)
    assert torch.equal(run(TurboQuantCache.for_model(model, TurboQuantConfig(n_bits=3), store=store)), plain)
    again = TurboQuantCache.for_model(model, TurboQuantConfig(n_bits=3), store=store)
    assert store.restore(again, ids) == 512
    assert again.get(0)[0].is_cuda
    assert torch.equal(run(again), plain)
