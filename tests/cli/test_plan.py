"""``turboquant plan``: configurations in, numbers out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from turboquant import TurboQuantCache, TurboQuantConfig
from turboquant.arithmetic import CacheShape, LayerShape, cache_bytes, concurrent_sequences, longest_context, peak_bytes
from turboquant.cli import architecture as plan_module
from turboquant.cli.app import app
from turboquant.cli.architecture import read_model
from turboquant.cli.plan import format_count, parse_count
from turboquant.config import PRESETS
from turboquant.errors import ConfigError, UnsupportedModelError

runner = CliRunner(env={"COLUMNS": "120"})
GIB = 1024**3

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def write(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def plan_json(*args: str) -> dict[str, Any]:
    result = runner.invoke(app, ["plan", *args, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError("transformers was asked")

    monkeypatch.setattr(plan_module, "_through_transformers", refuse)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_llama_70b(tmp_path: Path, without_transformers: None) -> None:
    found = plan_json(str(write(tmp_path, LLAMA_70B)), "--memory", "80GiB", "--weights-bits", "4")
    assert found["parameters"] == 70_553_706_496  # the published model, to the last weight
    assert found["parameters_estimated"]
    assert found["weights_bytes"] == 70_553_706_496 // 2
    assert found["left_bytes"] == 80 * GIB - 70_553_706_496 // 2
    assert found["context"] == 131_072
    rows = {row["cache"]: row for row in found["rows"]}
    assert list(rows) == ["exact (16 bit)", "fp8", *PRESETS]
    exact, fp8, three = rows["exact (16 bit)"], rows["fp8"], rows["turboquant_3bit"]
    assert (exact["bits_per_element"], exact["bytes_per_token"], exact["cache_bytes"]) == (16, 327_680, 40 * GIB)
    assert (fp8["bits_per_element"], fp8["bytes_per_token"], fp8["cache_bytes"]) == (8, 163_840, 20 * GIB)
    assert (three["bits_per_element"], three["bytes_per_token"]) == (3.125, 64_000)
    shape, config = CacheShape.uniform(80, 8, 128), TurboQuantConfig.preset("turboquant_3bit")
    assert three["cache_bytes"] == peak_bytes(shape, config, 131_072)
    assert 7.8 < three["cache_bytes"] / GIB < 7.9
    assert three["longest_context"] == longest_context(shape, config, found["left_bytes"])
    assert three["sequences"] == concurrent_sequences(shape, config, found["left_bytes"], 131_072)
    assert exact["longest_context"] == found["left_bytes"] // 327_680
    assert exact["sequences"] == 1


def test_table(tmp_path: Path, without_transformers: None) -> None:
    result = runner.invoke(app, ["plan", str(write(tmp_path, LLAMA_70B)), "--memory", "80GiB", "--weights-bits", "4"])
    assert result.exit_code == 0
    for text in (
        "80 layers, 8 KV heads of 128",
        "about 32.9 GiB of weights",
        "about 70.6 B parameters",
        "40.0 GiB",
        "3.125",
        "64,000",
        *PRESETS,
    ):
        assert text in result.output


def test_weights_that_do_not_fit(tmp_path: Path, without_transformers: None) -> None:
    folder = str(write(tmp_path, LLAMA_70B))
    result = runner.invoke(app, ["plan", folder, "--memory", "80GiB"])
    assert result.exit_code == 0
    assert "do not fit" in result.output
    rows = plan_json(folder, "--memory", "80GiB")["rows"]
    assert all(row["longest_context"] == row["sequences"] == 0 for row in rows)


def test_options(tmp_path: Path, without_transformers: None) -> None:
    found = plan_json(
        str(write(tmp_path, SMALL)), "--memory", "1GB", "--context", "500", "--parameters", "2M", "--weights-bits", "4.5"
    )
    assert found["context"] == 500
    assert not found["parameters_estimated"]
    assert found["weights_bytes"] == 1_125_000
    assert found["memory_bytes"] == 10**9
    assert found["rows"][0]["cache_bytes"] == cache_bytes(CacheShape.uniform(4, 2, 64), TurboQuantConfig(n_bits=16), 500)


def test_a_model_that_slides_everywhere_takes_any_context(tmp_path: Path, without_transformers: None) -> None:
    folder = str(write(tmp_path, {**SMALL, "model_type": "mistral", "sliding_window": 1024}))
    assert all(row["longest_context"] is None for row in plan_json(folder, "--memory", "1GiB")["rows"])
    result = runner.invoke(app, ["plan", folder, "--memory", "1GiB"])
    assert "any" in result.output
    assert "4 of 4 layers slide over 1,024 tokens" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "lots"], "--memory='lots' is not understood; write for example 80GiB"),
        (["--memory", "0"], "--memory='0' must be more than 0 bytes"),
        (["--memory", "1GiB", "--parameters", "many"], "--parameters='many'"),
    ],
)
def test_wrong_values(tmp_path: Path, args: list[str], message: str) -> None:
    result = runner.invoke(app, ["plan", str(write(tmp_path, SMALL)), *args])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--memory", "1GiB", "--context", "0"],
        ["--memory", "1GiB", "--weights-bits", "0"],
        ["--memory", "1GiB", "--context", "x"],
    ],
)
def test_wrong_usage(tmp_path: Path, args: list[str]) -> None:
    assert runner.invoke(app, ["plan", str(write(tmp_path, SMALL)), *args]).exit_code == 2


# -- configurations ---------------------------------------------------------------------------------------------------


def test_folder_and_file_are_the_same(tmp_path: Path, without_transformers: None) -> None:
    folder = write(tmp_path, SMALL)
    assert read_model(str(folder)) == read_model(str(folder / "config.json"))
    assert read_model(str(folder)).shape == CacheShape.uniform(4, 2, 64)


def test_nested_text_config(tmp_path: Path, without_transformers: None) -> None:
    nested = {
        "model_type": "gemma3",
        "text_config": {**SMALL, "model_type": "gemma3_text", "head_dim": 128, "sliding_window": 512},
    }
    nested["text_config"]["num_hidden_layers"] = 7
    facts = read_model(str(write(tmp_path, nested)))
    assert facts.model_type == "gemma3_text"
    windows = [512, 512, 512, 512, 512, None, 512]  # every sixth layer sees all
    assert facts.shape == CacheShape.uniform(7, 2, 128, windows)
    assert any("vision" in note for note in facts.notes)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"num_key_value_heads": None}, CacheShape.uniform(4, 4, 64)),
        ({"head_dim": 96}, CacheShape.uniform(4, 2, 96)),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 512},
            CacheShape.uniform(4, 2, 64, [None, 512, None, 512]),
        ),
        ({"model_type": "gemma2", "sliding_window": 512}, CacheShape.uniform(4, 2, 64, [512, None, 512, None])),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, CacheShape.uniform(4, 2, 64)),
        ({"model_type": "gpt_bigcode", "multi_query": True}, CacheShape.uniform(4, 1, 64)),
    ],
)
def test_fields(tmp_path: Path, without_transformers: None, changes: dict[str, Any], shape: CacheShape) -> None:
    assert read_model(str(write(tmp_path, {**SMALL, **changes}))).shape == shape


def test_old_names(tmp_path: Path, without_transformers: None) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    facts = read_model(str(write(tmp_path, gpt2)))
    assert facts.shape == CacheShape.uniform(12, 12, 64)
    assert facts.max_context == 1024
    assert facts.parameters == pytest.approx(124_439_808, rel=0.002)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({**SMALL, "kv_lora_rank": 512}, UnsupportedModelError, "MLA"),
        ({"model_type": "x", "text_config": {**SMALL, "kv_lora_rank": 512}}, UnsupportedModelError, "MLA"),
        ({**SMALL, "is_encoder_decoder": True}, UnsupportedModelError, "encoder-decoder"),
        ([1, 2], ConfigError, "not a model's configuration"),
        ({**SMALL, "num_attention_heads": None}, ConfigError, "num_attention_heads is missing"),
        ({**SMALL, "hidden_size": "big"}, ConfigError, "hidden_size is 'big'"),
        ({**SMALL, "vocab_size": -1}, ConfigError, "vocab_size is -1"),
        ({**SMALL, "layer_types": ["full_attention"]}, ConfigError, "layer_types does not describe 4 layers"),
        ({}, ConfigError, "num_hidden_layers is missing"),
    ],
)
def test_configurations_that_cannot_be_planned(
    tmp_path: Path, without_transformers: None, config: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_model(str(write(tmp_path, config)))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a config\.json nor a \.gguf"):
        read_model(str(tmp_path))
    for name in ("nowhere/config.json", "model.gguf"):
        with pytest.raises(ConfigError, match="there is no file"):
            read_model(str(tmp_path / name))
    with pytest.raises(ConfigError, match="there is no file or folder"):
        read_model("not a name")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_model(str(tmp_path))


def test_no_context_in_the_configuration(tmp_path: Path, without_transformers: None) -> None:
    folder = str(write(tmp_path, {**SMALL, "max_position_embeddings": None}))
    assert isinstance(runner.invoke(app, ["plan", folder, "--memory", "1GiB"]).exception, ConfigError)
    assert plan_json(folder, "--memory", "1GiB", "--context", "100")["context"] == 100


def test_unknown_architecture_without_transformers_says_so(tmp_path: Path, without_transformers: None) -> None:
    facts = read_model(str(write(tmp_path, {**SMALL, "model_type": "brand_new"})))
    assert facts.shape == CacheShape.uniform(4, 2, 64)
    assert any("does not know brand_new" in note for note in facts.notes)
    assert any("rough estimate" in note for note in facts.notes)


# -- through transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "mixtral",
        "gemma2",
        "gemma3_text",
        "phi3",
        "starcoder2",
        "gpt2",
        "gpt_neox",
        "opt",
        "cohere2",
    ],
)
def test_json_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    """Layers read from JSON are those of transformers' cache, and the parameters those of its model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind]()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    by_transformers = plan_module._through_transformers(str(tmp_path))
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    if kind != "qwen2":  # whose layers slide by other fields
        raw.pop("layer_types", None)
    by_json = plan_module._facts(raw, plan_module._layers(raw), [])
    assert by_json == by_transformers
    assert by_json.parameters == pytest.approx(weights, rel=0.002)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_equals_the_cache_of_a_model_that_ran(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    windows = (
        {"sliding_window": 300, "layer_types": ["sliding_attention", "full_attention"] * 2} if kind == "gemma3_text" else {}
    )
    fields = {k: v for k, v in SMALL.items() if k != "model_type"}
    config = transformers.CONFIG_MAPPING[kind](**fields, head_dim=64, **windows)
    config.save_pretrained(tmp_path)
    shape = read_model(str(tmp_path)).shape
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="turboquant").eval()
    tokens = torch.arange(700)[None] % 1000
    for recipe in (TurboQuantConfig(n_bits=3), TurboQuantConfig(n_bits=3, recent_tokens=250)):
        cache = TurboQuantCache.for_model(model, recipe)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        # transformers counts the token to come into the window; so does cache_bytes, which tells what is needed then.
        exact = [s for s in shape.layers if s.why_exact(recipe)]
        assert cache_bytes(shape, recipe, 700) - cache.nbytes == sum(s.elements * 2 for s in exact)
        assert len(exact) == (2 if windows and recipe.recent_tokens == 250 else 0)


def test_layers_that_are_not_plain_attention(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    llama4 = {**SMALL, "model_type": "llama4_text", "num_local_experts": 2, "attention_chunk_size": 512, "head_dim": 64}
    facts = read_model(str(write(tmp_path, llama4)))
    assert facts.shape.layers[0] == LayerShape(2, 64, 512, "chunked attention")
    assert facts.shape.layers[3] == LayerShape(2, 64)
    mixed = {**SMALL, "model_type": "qwen3_next", "layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 64}
    shape = read_model(str(write(tmp_path, mixed))).shape
    assert [s.kv_heads for s in shape.layers] == [0, 0, 0, 2]


def test_defaults_left_out_of_the_file_come_from_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    facts = read_model(
        str(write(tmp_path, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}))
    )
    assert len(facts.shape.layers) == 26
    assert facts.shape.layers[0] == LayerShape(4, 256, 4096)


def test_hub_ids_and_gguf_files_go_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def record(where: str, gguf_file: str | None = None, notes: list[str] | None = None) -> str:
        asked.append((where, gguf_file))
        return "facts"

    monkeypatch.setattr(plan_module, "_through_transformers", record)
    read_model("some-org/some-model")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    read_model(str(tmp_path / "a.gguf"))
    read_model(str(tmp_path))
    assert asked == [("some-org/some-model", None), (str(tmp_path), "a.gguf"), (str(tmp_path), "a.gguf")]
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"2 \.gguf files"):
        read_model(str(tmp_path))


def test_a_damaged_gguf_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"cannot read the configuration of a\.gguf"):
        read_model(str(tmp_path / "a.gguf"))


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    assert parse_count("70.6B", "n") == 70_600_000_000
    assert parse_count("135M", "n") == 135_000_000
    assert parse_count("12", "n") == 12
    assert [format_count(n) for n in (70_553_706_496, 134_515_008, 7_241_732_096, 12)] == ["70.6 B", "135 M", "7.24 B", "12"]
    for text in ("", "B", "-1B", "0", "1G"):
        with pytest.raises(ConfigError, match="n="):
            parse_count(text, "n")
