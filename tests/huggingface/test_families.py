"""Every family: packed layers as expected, rotary understood, attention over packed pages right, quality near exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from turboquant import TurboQuantCache, TurboQuantConfig, TurboQuantError, UnsupportedModelError
from turboquant.cache import PackedLayer

from .families import FAMILIES, build, tokens

# Without the balance both attention paths store the same pages; with a huge window nothing is packed.
PLAIN = TurboQuantConfig(n_bits=4, key_balance=0.0)
ALL_EXACT = TurboQuantConfig(n_bits=4, recent_tokens=4096)
BLOCKS = (400, 64, 64, 64, 1, 1, 106)
SUPPORTED = [n for n, f in FAMILIES.items() if f.packed]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def logits(model: PreTrainedModel, cache: Any, attention: str) -> torch.Tensor:
    model.set_attn_implementation(attention)
    ids, out, at = tokens(sum(BLOCKS)), [], 0
    for n in BLOCKS:
        out.append(model(ids[:, at : at + n], past_key_values=cache).logits)
        at += n
    return torch.cat(out, dim=1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# A sliding window that is smaller than the exact one leaves nothing to compress.
@pytest.mark.parametrize("name", [n for n in SUPPORTED if n != "mistral-sliding"])
def test_all_in_the_window_equals_the_exact_cache(name: str) -> None:
    model = build(name)
    exact = logits(model, DynamicCache(config=model.config), "eager")
    cache = TurboQuantCache.for_model(model, ALL_EXACT)
    assert distance(logits(model, cache, "turboquant"), exact) < 1e-4
    assert cache.get_seq_length() == sum(BLOCKS)


@pytest.mark.filterwarnings("ignore:this model's attention cannot read packed pages")
@pytest.mark.parametrize("name", SUPPORTED)
def test_attention_over_pages_equals_attention_over_the_dequantized_cache(name: str) -> None:
    model = build(name)
    packed = TurboQuantCache.for_model(model, PLAIN)
    direct = logits(model, packed, "turboquant")
    through_get = logits(model, TurboQuantCache.for_model(model, PLAIN), "eager")
    # A float difference of 1e-7 may move a later layer's key over a threshold: one code, 1e-4 in the logits.
    assert distance(direct, through_get) < 2e-3
    assert [i for i, s in enumerate(packed._stores) if isinstance(s, PackedLayer)] == list(FAMILIES[name].packed)
    assert all(s.packed_pages >= 8 for s in packed._stores if isinstance(s, PackedLayer))


@pytest.mark.parametrize("name", SUPPORTED)
def test_four_bits_stay_near_the_exact_cache_and_beat_two(name: str) -> None:
    model = build(name)
    exact = logits(model, DynamicCache(config=model.config), "eager")
    error = {
        b: distance(logits(model, TurboQuantCache.for_model(model, f"turboquant_{b}bit"), "turboquant"), exact) for b in (4, 2)
    }
    # Random models have no redundancy: rounding moves them far more than trained ones (see the evaluation on SmolLM2).
    assert error[4] < 0.25
    assert error[4] < 0.6 * error[2]


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_models_own_rotary_embedding_is_found(name: str) -> None:
    family, cache = FAMILIES[name], TurboQuantCache.for_model(build(name))
    for store in cache._stores:
        if isinstance(store, PackedLayer):
            assert (store.rotary.rotary_dim if store.rotary else None) == family.rotary_dim
            assert store.rotary is None or store.rotary.pairing == family.pairing
    if family.rotary_dim is None:
        assert "constant mean" in cache.summary()


def test_gemma3_layers_use_their_own_theta() -> None:
    model = build("gemma3", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=1024)
    model_rope = model.config.rope_parameters
    assert model_rope["sliding_attention"]["rope_theta"] != model_rope["full_attention"]["rope_theta"]
    cache = TurboQuantCache.for_model(model)
    full, sliding = cache._stores[0].rotary.inv_freq, cache._stores[1].rotary.inv_freq
    dim = model.config.head_dim
    for freq, kind in ((full, "full_attention"), (sliding, "sliding_attention")):
        theta = model_rope[kind]["rope_theta"]
        torch.testing.assert_close(freq[1].item(), theta ** (-2 / dim), rtol=1e-5, atol=0)


def test_left_alone_layers_are_listed_with_their_reason() -> None:
    text = TurboQuantCache.for_model(build("gemma3")).summary()
    assert "layer 0: exact (sliding window of 96 tokens fits in the exact window)" in text
    assert "layer 1: packed K3V3" in text


def test_sliding_layers_drop_old_pages() -> None:
    model = build("mistral-sliding")
    cache = TurboQuantCache.for_model(model, PLAIN)
    logits(model, cache, "turboquant")
    for store in cache._stores:
        assert store.first_page > 0
        held = store.length - store.first_token
        assert 384 <= held < 384 + 3 * 64
        assert len(store.slabs) == store.packed_pages - store.first_page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    exact = logits(model, DynamicCache(config=model.config), "eager").float()
    cache = TurboQuantCache.for_model(model, PLAIN)
    assert distance(logits(model, cache, "turboquant").float(), exact) < 0.25
    assert cache.get(0)[0].dtype == dtype


def test_deepcopy_is_independent() -> None:
    model = build("llama")
    cache = TurboQuantCache.for_model(model, PLAIN)
    model(tokens(500), past_key_values=cache)
    before = cache.get(1)[0].clone()
    twin = copy.deepcopy(cache)
    model(tokens(100, seed=1), past_key_values=twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (500, 600)
    torch.testing.assert_close(cache.get(1)[0], before, rtol=0, atol=0)


def test_unsupported_models_say_why() -> None:
    from transformers import AutoModelForCausalLM, DeepseekV3Config, MambaConfig, T5Config, T5ForConditionalGeneration

    small = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        TurboQuantCache.for_model(t5)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**small))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        TurboQuantCache.for_model(mamba)
    mla = AutoModelForCausalLM.from_config(
        DeepseekV3Config(**small, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
                         qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, first_k_dense_replace=2, intermediate_size=64)
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="latent attention"):
        TurboQuantCache.for_model(mla)
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        TurboQuantCache.for_model(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="sliding window of 100 tokens"):
        TurboQuantCache.for_model(build("mistral-short-sliding"))
    with pytest.raises(UnsupportedModelError, match="head_dim 16"):
        TurboQuantCache.for_model(build("llama", head_dim=16))


def test_a_crop_that_an_exact_sliding_layer_cannot_do_changes_nothing() -> None:
    model = build("gemma3")
    cache = TurboQuantCache.for_model(model)
    model(tokens(401), past_key_values=cache)
    with pytest.raises(TurboQuantError, match="slides over 96 tokens"):
        cache.crop(-5)
    assert [s.length for s in cache._stores] == [401] * 4
