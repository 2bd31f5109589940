"""``turboquant doctor``: what works, what is missing, what is broken."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from turboquant.attention import reference
from turboquant.cli import doctor as doctor_module
from turboquant.cli.app import app
from turboquant.cli.doctor import TOLERANCE, Check, SelfCheck, self_check
from turboquant.codec.center import KeyTransform
from turboquant.codec.page import PageCodec
from turboquant.config import PRESETS
from turboquant.cuda import device

runner = CliRunner(env={"COLUMNS": "120"})


def checks_of(*args: str, code: int = 0) -> dict[str, dict[str, Any]]:
    result = runner.invoke(app, ["doctor", "--json", *args])
    assert result.exit_code == code, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["usable"] is (code == 0)
    return {check["name"]: check for check in found["checks"]}


def test_report() -> None:
    found = checks_of()
    for name in ("turboquant-cache", "Python", "torch", "transformers", "numpy", "safetensors", "typer", "rich", "attention"):
        assert found[name]["status"] == "ok", found[name]
    assert found['attn_implementation="turboquant"'] == {
        "name": 'attn_implementation="turboquant"',
        "status": "ok",
        "detail": "registered",
        "essential": False,
    }
    assert torch.__version__ in found["torch"]["detail"]
    assert "GPU 0" in found if torch.cuda.is_available() else found["GPU"]["detail"].startswith("none: ")
    assert "B in the current directory" in found["free disk space"]["detail"]
    for preset in PRESETS:
        assert found[f"self-check {preset}"]["status"] == "ok"


def test_table() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "turboquant can run here." in result.output
    assert "reference path in plain torch: works everywhere" in result.output


@pytest.mark.parametrize("preset", PRESETS)
def test_self_check_measures_rounding_only(preset: str) -> None:
    found = self_check(preset)
    assert found.good
    assert 0 < found.difference < TOLERANCE / 10


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_self_check_on_a_gpu(preset: str) -> None:
    assert self_check(preset, "cuda").good


@pytest.fixture
def only_self_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_GROUPS", (doctor_module._self_checks,))


def break_values(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageCodec.decode_values
    monkeypatch.setattr(
        PageCodec, "decode_values", lambda self, pages: dataclasses.replace(d := real(self, pages), levels=d.levels.roll(1, -1))
    )


def break_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageCodec.decode_keys
    monkeypatch.setattr(
        PageCodec, "decode_keys", lambda self, pages: dataclasses.replace(d := real(self, pages), scale=d.scale * 1.5)
    )


def break_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_hide", lambda scores, *args: scores)


def break_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyTransform, "scale_query", lambda self, grouped: grouped)


def break_centring(monkeypatch: pytest.MonkeyPatch) -> None:
    real = KeyTransform.forward
    monkeypatch.setattr(KeyTransform, "forward", lambda self, keys, positions: real(self, keys, positions + 1))


@pytest.mark.parametrize("damage", [break_values, break_keys, break_sinks, break_balance, break_centring])
def test_wrong_results_are_found(
    monkeypatch: pytest.MonkeyPatch, only_self_checks: None, damage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    damage(monkeypatch)
    found = checks_of(code=1)
    assert all(found[f"self-check {preset}"]["status"] == "failed" for preset in PRESETS)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "cannot run here" in result.output


@pytest.mark.parametrize(
    ("difference", "noise"), [(float("nan"), 1.0), (1e-6, float("nan")), (1.0, 1.0), (1e-6, 2.0), (1e-6, 0.1)]
)
def test_nan_and_large_errors_fail(
    monkeypatch: pytest.MonkeyPatch, only_self_checks: None, difference: float, noise: float
) -> None:
    monkeypatch.setattr(doctor_module, "self_check", lambda *a: SelfCheck(difference, noise))
    assert checks_of(code=1)["self-check turboquant_3bit"]["status"] == "failed"


def test_an_exception_is_a_finding(monkeypatch: pytest.MonkeyPatch, only_self_checks: None) -> None:
    def broken(*args: Any) -> float:
        raise RuntimeError("first line [bold]\nsecond line")

    monkeypatch.setattr(doctor_module, "self_check", broken)
    assert checks_of(code=1)["self-check turboquant_3bit"]["detail"] == "RuntimeError: first line [bold]"
    assert "first line [bold]" in runner.invoke(app, ["doctor"]).output


def test_optional_packages_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_module._version_of
    monkeypatch.setattr(doctor_module, "_version_of", lambda name: None if name in ("transformers", "gguf") else real(name))
    monkeypatch.setattr(doctor_module, "_GROUPS", (doctor_module._transformers, doctor_module._packages))
    found = checks_of()
    assert found["transformers"]["status"] == found["gguf"]["status"] == "missing"
    assert "turboquant-cache[hf]" in found["transformers"]["detail"]
    assert ".gguf" in found["gguf"]["detail"]
    assert 'attn_implementation="turboquant"' not in found
    assert "turboquant-cache[hf]" in runner.invoke(app, ["doctor"]).output


def test_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_version_of", lambda name: "4.57.1")
    assert doctor_module._transformers() == [Check("transformers", "missing", "4.57.1 is too old; 5.17 or later is supported")]


def test_essential_packages_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_GROUPS", (doctor_module._packages,))
    monkeypatch.setattr(doctor_module, "_version_of", lambda name: None if name == "safetensors" else "1.0")
    assert checks_of(code=1)["safetensors"]["status"] == "failed"


def test_torch_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    found = doctor_module._torch()[0]
    assert (found.status, found.essential) == ("failed", True)
    assert "2.6 or later" in found.detail
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor_module._torch()[0].status == "failed"
    assert [c.status for c in doctor_module._self_checks()] == ["failed"]


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("Properties", "name total_memory major minor")("A GPU", 80 * 1024**3, 9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    assert doctor_module._torch()[1] == Check("GPU 0", "ok", "A GPU, 80.0 GiB, compute capability 9.0")


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, why in ((None, "built without CUDA"), ("12.8", "built for CUDA 12.8 but finds no device")):
        monkeypatch.setattr(torch.version, "cuda", built)
        assert why in doctor_module._torch()[1].detail


def test_why_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = doctor_module._kernels()
    assert (found.name, found.status, found.essential) == ("CUDA kernels", "info", False)
    assert found.detail.startswith("not usable: torch ")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [c.status for c in doctor_module._kernels()] == ["missing"]


def test_cuda_kernels_by_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "why_unavailable", lambda gpu: "too old" if gpu.index else None)
    monkeypatch.setattr(device, "capability", lambda gpu: (9, 0))
    found = doctor_module._kernels()
    assert [(c.name, c.status) for c in found] == [("CUDA kernels on GPU 0", "ok"), ("CUDA kernels on GPU 1", "missing")]
    assert found[0].detail.startswith("compiled for sm_90 by NVRTC ")
    assert found[1].detail == "not usable: too old"
