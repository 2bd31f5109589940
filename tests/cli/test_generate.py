"""``turboquant generate`` on a tiny model: what it answers, stores, restores, and how it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from turboquant import TurboQuantStore
from turboquant.cli.generate import _open_store, generate
from turboquant.cli.models import _device, load_model, read_text
from turboquant.errors import ConfigError, TurboQuantError

from .tiny import WORDS, Run, refused, runner, save_model


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny[1]"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner("generate", monkeypatch, capsys)


def test_prompt(command: Run, model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, err = command(model, "--prompt", text(1, 20), "--max-new-tokens", 8, "--json", report)
    assert (code, err) == (0, "")
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["text"] in out
    assert (found["prompt_tokens"], found["restored_tokens"], found["new_tokens"]) == (20, 0, 8)
    assert (found["preset"], found["model"], found["store"]) == ("turboquant_3bit", model, {})
    assert found["text"].split() == [WORDS[i - 2] for i in found["token_ids"]]
    assert found["exact_bytes"] == 2 * 2 * 2 * 27 * 32 * 4  # the last token is not fed
    assert found["seconds_to_first_token"] > 0
    assert found["tokens_per_second"] > 0
    for row in ("prompt", "generated", "time to first token", "cache", "exact cache"):
        assert row in out


def test_prompt_file_comes_before_the_prompt(command: Run, model: str, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(text(2, 30), encoding="utf-8")
    ids = []
    for i, args in enumerate(
        (("--prompt-file", document, "--prompt", text(3, 5)), ("--prompt", text(2, 30) + " " + text(3, 5)))
    ):
        report = tmp_path / f"{i}.json"
        assert command(model, *args, "--max-new-tokens", 5, "--json", report)[0] == 0
        found = json.loads(report.read_text(encoding="utf-8"))
        assert found["prompt_tokens"] == 35
        ids.append(found["token_ids"])
    assert ids[0] == ids[1]
    assert command(model, "--prompt-file", document, "--max-new-tokens", 1)[0] == 0


def test_the_second_run_restores_and_answers_the_same(command: Run, model: str, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text(4, 600), encoding="utf-8")
    store = tmp_path / "a store"
    runs = []
    for i, offload in enumerate((None, store, store.as_uri(), store)):
        report = tmp_path / f"{i}.json"
        arguments = ["--prompt-file", prompt, "--max-new-tokens", 12, "--json", report]
        arguments += [] if offload is None else ["--offload", offload, "--offload-size", "1 MiB"]
        code, out, err = command(model, *arguments)
        assert (code, err) == (0, "")
        runs.append((json.loads(report.read_text(encoding="utf-8")), out))
    assert [r["restored_tokens"] for r, _ in runs] == [0, 0, 512, 512]
    assert len({tuple(r["token_ids"]) for r, _ in runs}) == 1
    assert runs[1][0]["store"]["stored"] > 0
    assert runs[2][0]["store"]["hits"] == 1
    assert "512 restored from the store" in runs[2][1]
    assert sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) <= 1 << 20


def test_exact_and_close(command: Run, model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, _ = command(model, "--prompt", text(6, 400), "--preset", "exact", "--max-new-tokens", 3, "--json", report)
    assert code == 0
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["cache_bytes"] == found["exact_bytes"] == 2 * 2 * 2 * 402 * 32 * 4
    assert (found["bits_per_element"], found["effective_bits"]) == (32.0, 32.0)
    assert "1.00x" in out
    assert (
        command(model, "--prompt", text(6, 400), "--preset", "turboquant_2bit", "--max-new-tokens", 3, "--json", report)[0] == 0
    )
    packed = json.loads(report.read_text(encoding="utf-8"))
    assert packed["exact_bytes"] == found["exact_bytes"]
    assert packed["cache_bytes"] < found["cache_bytes"]
    assert packed["effective_bits"] > packed["bits_per_element"]


def test_sampling_depends_on_the_seed_only(command: Run, model: str, tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        report = tmp_path / "report.json"
        arguments = ("--prompt", text(7, 10), "--temperature", 5, "--seed", seed, "--max-new-tokens", 12, "--json", report)
        assert command(model, *arguments)[0] == 0
        found.append(json.loads(report.read_text(encoding="utf-8"))["token_ids"])
    assert found[0] == found[1] != found[2]


def test_settings_that_cannot_work(command: Run, model: str, tmp_path: Path) -> None:
    prompt = ("--prompt", "w5 w6")
    refused(command(model), "--prompt")
    refused(command(model, "--prompt", "  "), "--prompt")
    refused(command(model, *prompt, "--preset", "turboquant_9bit"), "turboquant_9bit", "turboquant_3bit", "exact")
    refused(command(model, *prompt, "--preset", "exact", "--offload", tmp_path), "--offload")
    refused(command(model, *prompt, "--preset", "exact", "--statistics", tmp_path / "s"), "--statistics")
    refused(command(model, *prompt, "--statistics", tmp_path / "none"), "no statistics file")
    refused(command(model, *prompt, "--device", "abacus"), "--device abacus")
    refused(command(model, *prompt, "--device", "meta"), "--device meta")
    refused(command(model, *prompt, "--dtype", "int3"), "--dtype int3", "float32")
    if not torch.cuda.is_available():
        refused(command(model, *prompt, "--device", "cuda"), "--device cuda")


def test_offload_folders_that_cannot_work(command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for url, part in (
        ("s3://bucket/x", "s3: is not supported"),
        ("http://[", "http: is not supported"),
        ("file://elsewhere/x", "elsewhere"),
        ("file://[/x", "not a URL"),
        ("file://", "give a folder"),
        ("", "give a folder"),
        (tmp_path / "file", "cannot use"),
    ):
        refused(command(model, "--prompt", "w5", "--offload", url), part)
    for size in ("lots", "-1", "0", "10 parsecs", ""):
        refused(command(model, "--prompt", "w5", "--offload", tmp_path / "s", "--offload-size", size), "--offload-size")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_file_urls(tmp_path: Path) -> None:
    for url in (
        f"file://{tmp_path}/with%20space",
        f"file://localhost{tmp_path}/with%20space",
        f"FILE:{tmp_path}/with%20space",
        str(tmp_path / "with space"),
    ):
        store = _open_store(url, "2KiB")
        assert isinstance(store, TurboQuantStore)
        assert (store.tier.folder, store.tier.max_bytes) == (tmp_path / "with space", 2048)


def test_prompt_files_that_cannot_be_read(command: Run, model: str, tmp_path: Path) -> None:
    for name, content in (("latin.txt", b"caf\xe9"), ("empty.txt", b" \n ")):
        (tmp_path / name).write_bytes(content)
        refused(command(model, "--prompt-file", tmp_path / name), name)
    refused(command(model, "--prompt-file", tmp_path / "none.txt"), "none.txt", "No such file")
    refused(command(model, "--prompt-file", tmp_path), "directory")
    refused(command(model, "--prompt-file", "~nobody-of-this-name/x.txt"), "No such file")
    with pytest.raises(ConfigError, match="--text"):
        read_text(tmp_path / "none.txt", "--text")


def test_models_that_cannot_be_loaded(command: Run, model: str, tmp_path: Path) -> None:
    prompt = ("--prompt", "w5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf.txt").write_text("x", encoding="utf-8")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(50))
    refused(command(tmp_path / "none", *prompt), "none")
    refused(command("./none", *prompt), "none")
    refused(command(tmp_path / "empty", *prompt), "config.json")
    refused(command(tmp_path / "x.gguf.txt", *prompt), "x.gguf.txt")
    refused(command(tmp_path / "none.gguf", *prompt), "GGUF")
    refused(command(tmp_path / "bad.gguf", *prompt), "bad.gguf")
    for name, content in (
        ("model.safetensors", b"damaged"),
        ("config.json", b"[1, 2]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no_such_type"}'),
        ("tokenizer.json", b"{}"),
    ):
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir()
        for path in Path(model).iterdir():
            (folder / path.name).write_bytes(content if path.name == name else path.read_bytes())
        refused(command(folder, *prompt), "cannot load the model")
    with pytest.raises(TurboQuantError, match="cannot load") as found:
        load_model(str(folder))
    assert found.value.__cause__ is not None  # for TURBOQUANT_DEBUG=1


def test_prompts_that_do_not_fit(command: Run, model: str, tmp_path: Path) -> None:
    refused(command(model, "--prompt", text(8, 1000), "--max-new-tokens", 25), "1000 tokens", "--max-new-tokens 25", "1024")
    assert command(model, "--prompt", text(8, 1020), "--max-new-tokens", 4)[0] == 0
    small = save_model(tmp_path / "small", vocabulary=100)
    refused(command(small, "--prompt", "w5 w150"), "does not fit the model", "150")


def test_a_chat_template_is_used_unless_told_otherwise(command: Run, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for path in Path(model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}w2 w3 {{ m.content }}{% endfor %} w4", encoding="utf-8")
    report = tmp_path / "report.json"
    for option, tokens in (("--chat", 5), ("--no-chat", 2)):
        assert command(folder, "--prompt", "w5 w6", option, "--max-new-tokens", 1, "--json", report)[0] == 0
        assert json.loads(report.read_text(encoding="utf-8"))["prompt_tokens"] == tokens
    template.write_text("{{ raise_exception('only system messages') }}", encoding="utf-8")
    refused(command(folder, "--prompt", "w5 w6"), "only system messages", "--no-chat")


def test_reports_that_cannot_be_written_are_noticed_first(command: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "report.json", tmp_path):
        refused(command("no-model-is-loaded", "--prompt", "w5", "--json", path), "--json")


def test_options_of_the_wrong_kind_are_usage_errors(command: Run, model: str) -> None:
    for args in (("--max-new-tokens", "0"), ("--max-new-tokens", "x"), ("--temperature", "-1"), ("--no-such-option",)):
        code, _, err = command(model, "--prompt", "w5", *args)
        assert code == 2
        assert "Traceback" not in err
        assert args[0] in err


def test_devices() -> None:
    assert _device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="cuda:4096"):
        _device("cuda:4096")


def test_every_option_has_help(command: Run) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert (generate.__doc__ or "").split(",")[0] in out
    for option in ("--prompt", "--prompt-file", "--preset", "--offload", "--offload-size", "--json", "--chat", "--seed"):
        assert option in out


def test_the_report_is_complete(command: Run, model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command(model, "--prompt", "w5", "--max-new-tokens", 1, "--json", report)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    assert set(found) == {
        "model", "preset", "prompt_tokens", "restored_tokens", "new_tokens", "seconds_to_first_token", "tokens_per_second",
        "cache_bytes", "exact_bytes", "bits_per_element", "effective_bits", "store", "token_ids", "text",
    }  # fmt: skip
    assert found["tokens_per_second"] == 0  # one token is no rate
