"""``turboquant eval`` on a tiny model: its table, its JSON, and how it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaForCausalLM

from turboquant import TurboQuantCache

from .tiny import WORDS, Run, refused, runner, save_model

FIELDS = {"preset", "bits_per_element", "effective_bits", "ppl", "dppl", "kl", "top1", "tokens"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny[1]"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some [text].txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=900)), encoding="utf-8")
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner("eval", monkeypatch, capsys)


SIZES = ("--tokens", 448, "--chunks", 2)


def test_table_and_json(command: Run, model: str, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    code, out, err = command(model, "--text", text, "--presets", "exact,turboquant_3bit,fp8", *SIZES, "--json", report)
    assert (code, err) == (0, "")
    rows = json.loads(report.read_text(encoding="utf-8"))
    assert [r["preset"] for r in rows] == ["exact", "turboquant_3bit", "fp8"]
    for r in rows:
        assert set(r) >= FIELDS
        assert r["tokens"] == 2 * (448 - 256 - 1)
        assert (r["chunk_tokens"], r["chunks"], r["block"], r["skip"]) == (448, 2, 64, 256)
        assert (r["model"], r["text"], r["dtype"]) == ("tiny[1]", "some [text].txt", "float32")
        assert set(r["versions"]) == {"turboquant-cache", "torch", "transformers"}
        line = next(x for x in out.splitlines() if r["preset"] in x)
        assert f"{r['kl']:.5f}" in line
        assert f"{r['ppl']:.3f}" in line
        assert f"{100 * r['top1']:.2f} %" in line
    exact, packed, fp8 = rows
    assert (exact["kl"], exact["dppl"], exact["top1"], exact["bits_per_element"]) == (0, 0, 1, 32)
    assert packed["kl"] > 0
    assert packed["bits_per_element"] < 4 < packed["effective_bits"] < 32
    assert fp8["bits_per_element"] == fp8["effective_bits"] == 8
    assert "tiny[1] on some [text].txt: 2 chunks of 448 tokens, 382 predictions" in out


def test_exact_is_always_there(command: Run, model: str, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    options = ("--tokens", 100, "--chunks", 1, "--skip", 10, "--json", report)
    assert command(model, "--text", text, "--presets", " fp8, ,fp8", *options)[0] == 0
    assert [r["preset"] for r in json.loads(report.read_text(encoding="utf-8"))] == ["exact", "fp8"]


def test_statistics_of_another_run(command: Run, model: str, text: Path, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(model, attn_implementation="turboquant")
    cache = TurboQuantCache.for_model(loaded)
    with torch.no_grad():
        loaded(torch.randint(2, 200, (1, 300)), past_key_values=cache)
    cache.statistics.save(tmp_path / "statistics.safetensors")
    options = ("--text", text, "--presets", "turboquant_3bit", "--tokens", 448, "--chunks", 1)
    assert command(model, *options, "--statistics", tmp_path / "statistics.safetensors")[0] == 0
    refused(command(model, *options, "--statistics", tmp_path / "none"), "no statistics file")
    (tmp_path / "bad").write_bytes(b"not statistics")
    refused(command(model, *options, "--statistics", tmp_path / "bad"), "not a statistics file")


def test_settings_that_cannot_work(command: Run, model: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for presets in ("turboquant_9bit", "fp8,int3", "", ","):
        refused(command(model, "--text", text, "--presets", presets), "--presets", "turboquant_3bit", "int4_window")
    refused(command(model, "--text", tmp_path / "none.txt"), "--text", "No such file")
    refused(command(model, "--text", tmp_path), "--text", "directory")
    refused(command(model, "--text", tmp_path / "empty.txt"), "empty")
    refused(command(model, "--text", tmp_path / "binary.txt"), "UTF-8")
    refused(command(model, "--text", text, "--tokens", 448, "--chunks", 3), "900 tokens", "1344")
    refused(command(model, "--text", text, "--tokens", 200), "--skip 256", "200")
    refused(command(model, "--text", text, "--tokens", 200, "--skip", 199), "--skip 199")
    refused(command(model, "--text", text, "--json", tmp_path / "none" / "rows.json"), "--json")
    refused(command(model, "--text", text, "--device", "abacus"), "abacus")
    refused(command(tmp_path / "none", "--text", text), "none")


def test_options_of_the_wrong_kind_are_usage_errors(command: Run, model: str, text: Path) -> None:
    for args in (("--tokens", "1"), ("--chunks", "0"), ("--block", "0"), ("--skip", "-1"), ("--no-such-option",)):
        code, _, err = command(model, "--text", text, *args)
        assert code == 2
        assert "Traceback" not in err
        assert args[0] in err
    code, _, err = command(model)
    assert code == 2
    assert "--text" in err


def test_help(command: Run) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for option in ("--text", "--presets", "--tokens", "--chunks", "--block", "--skip", "--statistics", "--json"):
        assert option in out
