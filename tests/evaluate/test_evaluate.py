"""Evaluation against the exact cache, on a tiny model and random text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, LlamaConfig

from turboquant import TurboQuantCache
from turboquant.config import PRESETS
from turboquant.errors import ConfigError
from turboquant.evaluate import BASELINES, Row, evaluate, known_rows
from turboquant.evaluate.baselines import BaselineCache, fp8, int4
from turboquant.evaluate.perplexity import EXACT

TOKENS, BLOCK, SKIP = 448, 64, 256


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 200, (2 * TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rows(model: Any, ids: Tensor) -> dict[str, Row]:
    names = ["turboquant_4bit", "turboquant_3bit", "turboquant_2bit", *BASELINES]
    return {r.preset: r for r in evaluate(model, ids, names, TOKENS, 2, BLOCK, SKIP)}


def test_the_exact_row(rows: dict[str, Row]) -> None:
    exact = rows[EXACT]
    assert next(iter(rows)) == EXACT
    assert (exact.kl, exact.dppl, exact.top1) == (0.0, 0.0, 1.0)
    assert (exact.bits_per_element, exact.effective_bits) == (32.0, 32.0)


def test_perplexity_is_that_of_one_forward_pass(model: Any, ids: Tensor, rows: dict[str, Row]) -> None:
    total = 0.0
    for piece in ids.view(2, TOKENS):
        with torch.no_grad():
            logits = model(piece[None]).logits[0, SKIP:-1]
        total += float(torch.nn.functional.cross_entropy(logits, piece[SKIP + 1 :], reduction="sum"))
    count = 2 * (TOKENS - SKIP - 1)
    assert all(r.tokens == count for r in rows.values())
    assert rows[EXACT].ppl == pytest.approx(math.exp(total / count), rel=1e-5)


def test_more_bits_are_closer(rows: dict[str, Row]) -> None:
    four, three, two = (rows[f"turboquant_{b}bit"] for b in (4, 3, 2))
    assert 0 < four.kl < three.kl < two.kl
    assert two.top1 < four.top1 <= 1
    assert four.bits_per_element > three.bits_per_element > two.bits_per_element


def test_rows_add_up(rows: dict[str, Row]) -> None:
    for r in rows.values():
        assert r.dppl == pytest.approx(r.ppl - rows[EXACT].ppl)
        assert 0 <= r.top1 <= 1
        assert math.isfinite(r.ppl)
        assert r.kl >= 0


def test_reference_rows_are_sane(rows: dict[str, Row]) -> None:
    assert 0 < rows["fp8_window"].kl <= rows["fp8"].kl
    assert 0 < rows["int4_window"].kl <= rows["int4"].kl
    assert rows["fp8"].kl < rows["int4"].kl
    assert rows["fp8"].bits_per_element == rows["fp8"].effective_bits == 8
    assert rows["int4"].bits_per_element == rows["int4"].effective_bits == 4 + 32 / 32


def test_windows_take_space(rows: dict[str, Row]) -> None:
    for name in ("fp8_window", "int4_window", "turboquant_4bit", "turboquant_3bit", "turboquant_2bit"):
        assert rows[name].effective_bits > rows[name].bits_per_element
    # 447 tokens are fed; (447 - 128) // 64 = 4 pages, of which 4 tokens are sinks.
    packed = 4 * 64 - 4
    assert rows["fp8_window"].effective_bits == pytest.approx((packed * 8 + (447 - packed) * 32) / 447)


@pytest.mark.parametrize("block", [1, 50, 1000])
def test_the_exact_row_does_not_depend_on_blocks(model: Any, ids: Tensor, rows: dict[str, Row], block: int) -> None:
    short = ids[:120]
    one, other = evaluate(model, short, [], 120, 1, 64, 10)[0], evaluate(model, short, [], 120, 1, block, 10)[0]
    assert one.tokens == other.tokens == 109
    assert one.ppl == pytest.approx(other.ppl, rel=1e-5)


def test_exact_is_added_once_and_names_are_not_repeated(model: Any, ids: Tensor) -> None:
    found = evaluate(model, ids[:40], ["fp8", EXACT, "fp8"], 40, 1, 16, 0)
    assert [r.preset for r in found] == [EXACT, "fp8"]
    assert [r.preset for r in evaluate(model, ids[:40], [], 40, 1, 16, 0)] == [EXACT]


def test_nothing_is_packed_before_the_window_is_full(model: Any, ids: Tensor) -> None:
    found = evaluate(model, ids[:100], ["turboquant_2bit", "fp8_window"], 100, 1, 50, 0)
    for r in found[1:]:
        assert r.kl == pytest.approx(0, abs=1e-6)
        assert r.top1 == 1


def test_given_statistics_are_used(model: Any, ids: Tensor, rows: dict[str, Row]) -> None:
    with torch.no_grad():
        model.set_attn_implementation("turboquant")
        cache = TurboQuantCache.for_model(model)
        model(ids[None, :300], past_key_values=cache)
        model.set_attn_implementation("sdpa")
    found = evaluate(model, ids, ["turboquant_3bit"], TOKENS, 2, BLOCK, SKIP, statistics=cache.statistics)[1]
    assert found.kl != rows["turboquant_3bit"].kl
    assert found.kl == pytest.approx(rows["turboquant_3bit"].kl, rel=0.5)


def test_progress_counts_every_token(model: Any, ids: Tensor) -> None:
    seen: dict[str, int] = {}
    evaluate(model, ids[:200], ["fp8"], 100, 2, 30, 20, progress=lambda name, n: seen.update({name: seen.get(name, 0) + n}))
    assert seen == {EXACT: 198, "fp8": 198}  # the last token of a chunk is only predicted


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "turboquant"])
def test_the_attention_implementation_is_put_back(model: Any, ids: Tensor, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    try:
        evaluate(model, ids[:60], ["turboquant_3bit"], 60, 1, 30, 0)
        assert model.config._attn_implementation == implementation

        def fail(name: str, n: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, ids[:60], ["turboquant_3bit"], 60, 1, 30, 0, progress=fail)
        assert model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presets": ["turboquant_5bit", "int3"]}, "unknown presets turboquant_5bit, int3; choose from exact"),
        ({"chunk_tokens": 1000}, "the text has 896 tokens but 1 chunks of 1000 need 1000"),
        ({"chunks": 3, "chunk_tokens": 448}, "need 1344"),
        ({"skip": -1}, "skip=-1"),
        ({"skip": 99}, "skip=99 leaves nothing"),
        ({"chunk_tokens": 1, "skip": 0}, "leaves nothing"),
        ({"chunks": 0}, "chunks=0"),
        ({"block": 0}, "block=0"),
    ],
)
def test_wrong_arguments(model: Any, ids: Tensor, options: dict[str, Any], message: str) -> None:
    arguments = {"presets": ["fp8"], "chunk_tokens": 100, "chunks": 1, "skip": 10, **options}
    with pytest.raises(ConfigError, match=message):
        evaluate(model, ids, **arguments)


def test_known_rows() -> None:
    assert known_rows() == [EXACT, *PRESETS, *BASELINES]


def test_number_formats() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 448.0, 500.0, -1e6, 17.0, 2**-9])
    assert fp8(x).tolist() == [0.0, 1.0, -1.0, 448.0, 448.0, -448.0, 16.0, 2**-9]
    y = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
    step = (y.amax(-1) - y.amin(-1)) / 15
    assert bool(((int4(y) - y).abs() <= 0.51 * step[..., None] + 1e-3).all())
    assert max(len(set(row.tolist())) for row in int4(y).reshape(-1, 32)) <= 16
    same = torch.full((3, 32), 0.5)
    torch.testing.assert_close(int4(same), same)
    for trip in (fp8, int4):
        assert trip(y.bfloat16()).dtype == torch.bfloat16


def test_what_a_baseline_cache_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("fp8", "fp8_window"):
        cache = BaselineCache(name, 1)
        x = torch.randn(1, 2, 448, 32, generator=generator)
        for start in range(0, 448, 64):
            block = x[:, :, start : start + 64]
            read, _ = cache.update(block, block, 0)
            if name == "fp8_window":
                assert torch.equal(read[:, :, -64:], block)  # a call reads its own tokens exactly
        rounded = torch.ones(448, dtype=torch.bool)
        if name == "fp8_window":
            rounded[:4] = False
            rounded[320:] = False
        got = cache.layers[0].keys
        assert torch.equal(got[:, :, rounded], fp8(x)[:, :, rounded])
        assert torch.equal(got[:, :, ~rounded], x[:, :, ~rounded])
