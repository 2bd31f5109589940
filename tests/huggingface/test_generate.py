"""``model.generate`` with a compressed cache, in all the ways people call it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from turboquant import CacheFileError, ShapeError, TurboQuantCache, TurboQuantConfig, TurboQuantError, prefill
from turboquant.cache import PackedLayer
from turboquant.errors import ConfigError

from .families import build, tokens

ALL_EXACT = TurboQuantConfig(n_bits=3, recent_tokens=4096)
PACKED = "turboquant_4bit"
PROMPT = 600


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def generate(model: PreTrainedModel, cache: Any, ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    ids = tokens(PROMPT) if ids is None else ids
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids), **kwargs}
    return model.generate(ids, past_key_values=cache, **settings)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beam": {"num_beams": 3},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 4},
    "chunked-prefill": {"prefill_chunk_size": 128},
    "num-return-sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition-penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_exact_cache_while_all_is_in_the_window(model: PreTrainedModel, mode: str) -> None:
    torch.manual_seed(0)
    want = generate(model, DynamicCache(config=model.config), **MODES[mode])
    torch.manual_seed(0)
    got = generate(model, TurboQuantCache.for_model(model, ALL_EXACT), **MODES[mode])
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:this model's attention cannot read packed pages")
@pytest.mark.parametrize("mode", MODES)
def test_modes_with_packed_pages_equal_the_dequantizing_path(model: PreTrainedModel, mode: str) -> None:
    """The same pages, read by our attention and by transformers' own: beams, crops and repeats must reach every tensor."""
    config = TurboQuantConfig(n_bits=4, key_balance=0.0)
    out = []
    for attention in ("turboquant", "eager"):
        model.set_attn_implementation(attention)
        torch.manual_seed(0)
        cache = TurboQuantCache.for_model(model, config)
        out.append(generate(model, cache, **MODES[mode]))
        assert all(s.packed_pages for s in cache._stores if isinstance(s, PackedLayer))
    model.set_attn_implementation("turboquant")
    assert torch.equal(out[0], out[1])


def test_generate_equals_a_loop_of_forward_calls(model: PreTrainedModel) -> None:
    got = generate(model, TurboQuantCache.for_model(model, PACKED))
    cache, ids = TurboQuantCache.for_model(model, PACKED), tokens(PROMPT)
    with torch.no_grad():
        step = ids
        for _ in range(20):
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, step), dim=1)
    assert torch.equal(got, ids)


def test_assisted_decoding_equals_greedy(model: PreTrainedModel) -> None:
    greedy = generate(model, TurboQuantCache.for_model(model, ALL_EXACT))
    assistant = build("llama", seed=1, num_hidden_layers=1)
    cache = TurboQuantCache.for_model(model, ALL_EXACT)
    assert torch.equal(generate(model, cache, assistant_model=assistant), greedy)


def test_speculative_tokens_are_taken_back(model: PreTrainedModel) -> None:
    cache = TurboQuantCache.for_model(model, PACKED)
    out = generate(model, cache, prompt_lookup_num_tokens=4)
    assert cache.get_seq_length() == out.shape[1] - 1


def test_left_padded_batch_equals_single_rows(model: PreTrainedModel) -> None:
    # Padding by whole pages keeps each row's page borders where they are alone.
    first = TurboQuantCache.for_model(model, PACKED)
    generate(model, first)
    stats = first.statistics
    lengths = (600, 600 - 64, 600 - 256)
    rows = [tokens(n, seed=n) for n in lengths]
    ids = torch.zeros(3, 600, dtype=torch.long)
    for i, r in enumerate(rows):
        ids[i, 600 - r.shape[1] :] = r
    mask = (ids > 0).long()
    batch = generate(model, TurboQuantCache.for_model(model, PACKED, statistics=stats), ids, attention_mask=mask)
    for i, (r, n) in enumerate(zip(rows, lengths, strict=True)):
        alone = generate(model, TurboQuantCache.for_model(model, PACKED, statistics=stats), r)
        assert torch.equal(batch[i, 600:], alone[0, n:]), f"row {i}"


def test_padding_longer_than_the_first_blocks_of_a_chunked_prefill(model: PreTrainedModel) -> None:
    stats = TurboQuantCache.for_model(model, PACKED)
    generate(model, stats)
    row = tokens(256)
    ids = torch.cat((torch.zeros(1, 384, dtype=torch.long), row), dim=1)
    both = torch.cat((ids, tokens(640)), dim=0)
    cache = TurboQuantCache.for_model(model, PACKED, statistics=stats.statistics)
    out = generate(model, cache, both, attention_mask=(both > 0).long(), prefill_chunk_size=128)
    assert cache._stores[0].starts.tolist() == [384, 0]
    alone = TurboQuantCache.for_model(model, PACKED, statistics=stats.statistics)
    assert torch.equal(out[0, 640:], generate(model, alone, row, prefill_chunk_size=128)[0, 256:])


def test_padding_does_not_enter_the_statistics(model: PreTrainedModel) -> None:
    row = tokens(500)
    one = TurboQuantCache.for_model(model, PACKED)
    padded = TurboQuantCache.for_model(model, PACKED)
    with torch.no_grad():
        model(row, past_key_values=one)
        ids = torch.cat((torch.zeros(1, 100, dtype=torch.long), row), dim=1)
        mask = (ids > 0).long()
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=padded)
    for i, s in one.statistics.layers.items():
        torch.testing.assert_close(padded.statistics.layers[i].mean, s.mean, rtol=1e-3, atol=1e-3)
        assert s.balance is not None
        torch.testing.assert_close(padded.statistics.layers[i].balance, s.balance, rtol=1e-3, atol=1e-3)


def test_multi_turn_reuses_the_cache(model: PreTrainedModel) -> None:
    cache, dense = TurboQuantCache.for_model(model, ALL_EXACT), DynamicCache(config=model.config)
    history = {id(cache): tokens(PROMPT), id(dense): tokens(PROMPT)}
    for turn in range(3):
        for c in (cache, dense):
            ids = torch.cat((history[id(c)], tokens(30, seed=turn)), dim=1)
            history[id(c)] = generate(model, c, ids)
    assert torch.equal(history[id(cache)], history[id(dense)])


def test_reset_makes_the_cache_new(model: PreTrainedModel) -> None:
    cache = TurboQuantCache.for_model(model, PACKED)
    first = generate(model, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache), first)


def test_bytes_shrink(model: PreTrainedModel) -> None:
    model16 = build("llama").to(torch.bfloat16)
    cache = TurboQuantCache.for_model(model16, "turboquant_3bit")
    with torch.no_grad():
        model16(tokens(3000), past_key_values=cache)
    packed = 3000 // 64 - 2
    exact_tokens = 3000 - 64 * (packed - 0)
    assert cache.exact_nbytes == 4 * 2 * 2 * 3000 * 32 * 2
    room = -(-exact_tokens // 64) * 64
    statistics = 4 * 2 * (2 + 64) * 32 * 4  # mean, balance, and the table of R_j mu
    assert cache.nbytes == 4 * 2 * (packed * 1792 + (room + 4) * 2 * 32 * 2) + statistics  # page: 2*64*32*3/8 + 256 bytes
    assert cache.effective_bits == pytest.approx(cache.nbytes * 8 / (cache.exact_nbytes / 2))


def test_other_attention_works_and_says_once_that_it_is_slow() -> None:
    model = build("llama", attention="sdpa")
    cache = TurboQuantCache.for_model(model, PACKED)
    with pytest.warns(UserWarning, match='attn_implementation="turboquant"'):
        generate(model, cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, cache, torch.cat((tokens(PROMPT + 19), tokens(5)), dim=1))


def test_a_given_4d_mask_counts(model: PreTrainedModel) -> None:
    ids = tokens(40)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    allowed[30:, 5:20] = False
    with torch.no_grad():
        got = model(ids, attention_mask=allowed[None, None], past_key_values=TurboQuantCache.for_model(model)).logits
        model.set_attn_implementation("sdpa")
        want = model(ids, attention_mask=allowed[None, None], use_cache=False).logits
        model.set_attn_implementation("turboquant")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_without_a_compressed_cache_the_attention_function_is_exact(model: PreTrainedModel) -> None:
    ids = tokens(300, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    out = []
    with torch.no_grad():
        for attention in ("turboquant", "sdpa"):
            model.set_attn_implementation(attention)
            out.append(model(ids, attention_mask=mask, use_cache=False).logits[:, 70:])
    model.set_attn_implementation("turboquant")
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-3)


def test_dropout_is_refused() -> None:
    model = build("llama", attention_dropout=0.1).train()
    with pytest.raises(ConfigError, match="dropout"):
        model(tokens(10), past_key_values=TurboQuantCache.for_model(model))


def test_statistics_of_another_model_are_refused(model: PreTrainedModel, tmp_path: Any) -> None:
    cache = TurboQuantCache.for_model(model, PACKED)
    generate(model, cache)
    path = tmp_path / "statistics.safetensors"
    cache.statistics.save(path)
    again = TurboQuantCache.for_model(model, PACKED, statistics=path)
    assert torch.equal(generate(model, again), generate(model, TurboQuantCache.for_model(model, PACKED)))
    with pytest.raises(CacheFileError, match="another model"):
        TurboQuantCache.for_model(build("llama", seed=7), PACKED, statistics=path)


def test_saved_cache_continues_like_the_original(model: PreTrainedModel, tmp_path: Any) -> None:
    cache = TurboQuantCache.for_model(model, PACKED)
    ids = generate(model, cache)
    cache.save(tmp_path / "cache.tq")
    loaded = TurboQuantCache.for_model(model, PACKED).load(tmp_path / "cache.tq")
    assert torch.equal(generate(model, loaded, ids), generate(model, cache, ids))
    with pytest.raises(CacheFileError, match="another model"):
        TurboQuantCache.for_model(build("llama", seed=7), PACKED).load(tmp_path / "cache.tq")


@pytest.mark.parametrize(
    "order", ["turboquant, transformers", "transformers, turboquant", "transformers.modeling_utils, turboquant"]
)
def test_attention_is_registered_whatever_is_imported_first(order: str) -> None:
    code = f"import {order}\nfrom transformers import AttentionInterface\nassert 'turboquant' in AttentionInterface()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, turboquant; assert not {'torch', 'transformers'} & set(sys.modules); turboquant.TurboQuantConfig()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_prefill_in_blocks_equals_chunked_prefill(model: PreTrainedModel) -> None:
    seen: list[int] = []
    cache = TurboQuantCache.for_model(model, PACKED)
    assert prefill(model, tokens(PROMPT), cache, 256, seen.append) == 512
    assert seen == [256, 256]
    whole = generate(model, TurboQuantCache.for_model(model, PACKED), prefill_chunk_size=256)
    assert torch.equal(generate(model, cache), whole)
    short = TurboQuantCache.for_model(model, PACKED)
    assert prefill(model, tokens(100), short) == 0
    with pytest.raises(ShapeError, match="at least one must be left"):
        prefill(model, tokens(300), cache)


def test_a_prompt_fed_twice_is_noticed(model: PreTrainedModel) -> None:
    cache = TurboQuantCache.for_model(model, PACKED)
    with torch.no_grad():
        model(tokens(300), past_key_values=cache)
        with pytest.raises(TurboQuantError, match="fed again"):
            model(tokens(256), attention_mask=torch.ones(1, 256), past_key_values=cache)
    assert cache.get_seq_length() == 300


def test_masks_prepared_by_the_caller_are_passed_on() -> None:
    gemma, ids = build("gemma3"), tokens(80)
    allowed = torch.ones(80, 80, dtype=torch.bool).tril()
    near = allowed & torch.ones(80, 80, dtype=torch.bool).triu(-95)
    masks = {"full_attention": allowed[None, None], "sliding_attention": near[None, None]}
    with torch.no_grad():
        want = gemma(ids, past_key_values=TurboQuantCache.for_model(gemma)).logits
        position_ids = torch.arange(80)[None]
        got = gemma(
            ids, attention_mask=masks, position_ids=position_ids, past_key_values=TurboQuantCache.for_model(gemma)
        ).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_inference_mode_leaves_nothing_behind_for_calls_with_gradients() -> None:
    # A head_dim of its own, so that this test makes the shared tables.
    model = build("llama", head_dim=48)
    with torch.inference_mode():
        model(tokens(400), past_key_values=TurboQuantCache.for_model(model, PACKED))
    cache = TurboQuantCache.for_model(model, PACKED)
    for _ in range(2):
        out = model(tokens(400), past_key_values=cache).logits
    assert out.isfinite().all()
