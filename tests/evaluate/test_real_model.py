"""SmolLM2-135M on real text: the bounds that the project promises. Slow; fetches the model (98 MB) and the essays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant import TurboQuantCache, TurboQuantStore
from turboquant.cli.models import load_model
from turboquant.evaluate import evaluate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def assets() -> tuple[Path, Path]:
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fetch.py"), "--dir", str(ROOT / ".demo")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not out.returncode, out.stderr
    model, text = out.stdout.strip().splitlines()[-2:]
    return Path(model), Path(text)


@pytest.fixture(scope="module")
def loaded(assets: tuple[Path, Path]) -> Any:
    return load_model(str(assets[0]), "cpu", "float32")


def test_kl_and_perplexity_are_within_the_promised_bounds(assets: tuple[Path, Path], loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer(assets[1].read_text(encoding="utf-8")[:16_000], return_tensors="pt").input_ids[0]
    names = ["turboquant_4bit", "turboquant_3bit", "turboquant_2.5bit", "turboquant_2bit", "fp8"]
    rows = {r.preset: r for r in evaluate(model, ids, names, chunk_tokens=2048, chunks=1)}
    bounds = {"turboquant_4bit": 0.004, "turboquant_3bit": 0.010, "turboquant_2.5bit": 0.025, "turboquant_2bit": 0.05}
    for name, bound in bounds.items():
        assert rows[name].kl <= bound, name
    assert rows["turboquant_3bit"].dppl <= 0.20
    assert rows["turboquant_3bit"].kl < rows["fp8"].kl


def test_a_restored_prompt_answers_token_for_token(assets: tuple[Path, Path], loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    ids = tokenizer(assets[1].read_text(encoding="utf-8")[:4_000], return_tensors="pt").input_ids
    options = {"max_new_tokens": 24, "do_sample": False, "prefill_chunk_size": 256, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, past_key_values=TurboQuantCache.for_model(model), **options)
    store = TurboQuantStore(tmp_path, 1 << 30)
    model.generate(ids, past_key_values=TurboQuantCache.for_model(model, store=store), **options)
    again = TurboQuantCache.for_model(model, store=store)
    assert store.restore(again, ids) == (ids.shape[1] - 1) // 256 * 256
    assert torch.equal(model.generate(ids, past_key_values=again, **options), plain)
