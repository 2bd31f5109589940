"""``turboquant doctor``: what this machine can use, and why not."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import typer

from .. import __version__
from ..arithmetic import format_bytes
from ..config import PRESETS, TurboQuantConfig

Status = Literal["ok", "info", "missing", "failed"]
#: Of the packages that other checks need: lowest version that works.
MIN_PYTHON, MIN_TORCH, MIN_TRANSFORMERS = (3, 10), (2, 6), (5, 17)
#: Largest allowed difference of the self-check; float32 rounding measures about 1e-6.
TOLERANCE = 1e-4
#: Mean squared error of the best scalar code of N(0, 1) by bits (Max 1960).
LEAST_ERROR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
#: Allowed error of keys and values in units of that; measured 0.96 to 1.01 (a coordinate of 64 is not quite Gaussian).
MIN_NOISE, MAX_NOISE = 0.85, 1.15


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``info`` (nothing to do); ``missing`` (an optional part is not usable); ``failed``.
        detail: the finding, or why not.
        essential: the package cannot run if this failed.
    """

    name: str
    status: Status
    detail: str
    essential: bool = False


def _release(text: str) -> tuple[int, ...]:
    """(major, minor) of a version; (0,) if it has no numbers."""
    parts = text.split("+")[0].split(".")[:2]
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else (0,)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> list[Check]:
    good = sys.version_info[:2] >= MIN_PYTHON
    detail = f"{platform.python_version()} on {platform.platform()}"
    return [
        Check("turboquant-cache", "ok", __version__),
        Check("Python", "ok" if good else "failed", detail if good else f"{detail}; 3.10 or later is needed", essential=True),
    ]


def _torch() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: a shared library does not load
        return [Check("torch", "failed", f"does not import: {e}", essential=True)]
    good = _release(torch.__version__) >= MIN_TORCH
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads"
    found = [
        Check("torch", "ok" if good else "failed", detail if good else f"{detail}; 2.6 or later is needed", essential=True)
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found.append(
                Check(f"GPU {i}", "ok", f"{p.name}, {format_bytes(p.total_memory)}, compute capability {p.major}.{p.minor}")
            )
    else:
        built = getattr(torch.version, "cuda", None)
        why = f"torch is built for CUDA {built} but finds no device or driver" if built else "this torch is built without CUDA"
        found.append(Check("GPU", "info", f"none: {why}"))
    return found


def _kernels() -> list[Check]:
    name = "CUDA kernels"
    try:
        import torch

        from ..cuda import cache, compiler, device
    except (ImportError, OSError) as e:
        return [Check(name, "missing", f"not usable: {_line(e)}")]
    if not torch.cuda.is_available():
        return [Check(name, "info", f"not usable: {device.why_unavailable()}")]
    checks = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", i)
        why = device.why_unavailable(gpu)
        if why is None:
            nvrtc = ".".join(map(str, compiler.nvrtc_version()))
            detail = f"compiled for {compiler.arch_of(device.capability(gpu))} by NVRTC {nvrtc}, kept in {cache.folder()}"
        else:
            detail = f"not usable: {why}"
        checks.append(Check(f"{name} on GPU {i}", "missing" if why else "ok", detail))
    return checks


def _transformers() -> list[Check]:
    found = _version_of("transformers")
    if found is None:
        return [Check("transformers", "missing", 'not installed: pip install "turboquant-cache[hf]" for Hugging Face models')]
    if _release(found) < MIN_TRANSFORMERS:
        return [Check("transformers", "missing", f"{found} is too old; 5.17 or later is supported")]
    checks = [Check("transformers", "ok", f"{found} (5.17 or later is supported)")]
    name = 'attn_implementation="turboquant"'
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if "turboquant" in ALL_ATTENTION_FUNCTIONS:
            return [*checks, Check(name, "ok", "registered")]
        return [*checks, Check(name, "missing", "not registered; import turboquant before loading the model")]
    except Exception as e:  # any error in there is the finding
        return [*checks, Check(name, "missing", f"transformers does not load: {_line(e)}")]


def _packages() -> list[Check]:
    wanted = {
        "numpy": "",
        "safetensors": "",
        "accelerate": "device maps of Hugging Face models",
        "gguf": "models in .gguf files",
        "typer": "this command",
        "rich": "this command",
    }
    checks = []
    for package, use in wanted.items():
        found = _version_of(package)
        if found is not None:
            try:
                importlib.import_module(package)
                checks.append(Check(package, "ok", found, essential=not use))
                continue
            except Exception as e:  # any error in there is the finding
                detail = f"{found} does not import: {_line(e)}"
        else:
            detail = f"not installed; needed for {use}" if use else "not installed"
        checks.append(Check(package, "missing" if use else "failed", detail, essential=not use))
    return checks


def _line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0]}" if str(e).strip() else type(e).__name__


@dataclass(frozen=True)
class SelfCheck:
    """What :func:`self_check` measured.

    Attributes:
        difference: largest difference between attention over packed pages and over the dequantized cache, relative to the
            largest output.
        noise: squared error of the decoded keys or values, whichever is worse, in units of
            :data:`LEAST_ERROR`.
    """

    difference: float
    noise: float

    @property
    def good(self) -> bool:
        """Whether both are what rounding and quantization explain; NaN is not."""
        return self.difference <= TOLERANCE and MIN_NOISE <= self.noise <= MAX_NOISE


def self_check(preset: str, device: str = "cpu") -> SelfCheck:
    """Encode random keys and values, read them in two ways, and compare with each other and with what went in.

    Args:
        preset: a preset's name.
        device: of torch.
    """
    import torch

    from ..attention import CausalMask, attend, attend_exact
    from ..cache.layer import PackedLayer
    from ..codec.rotary import Rotary

    heads, dim, tokens, new = 2, 64, 512, 2
    config = TurboQuantConfig.preset(preset)
    generator = torch.Generator().manual_seed(0)
    noise, value = torch.randn(2, 1, heads, tokens, dim, generator=generator).to(device)
    query = torch.randn(1, 2 * heads, tokens, dim, generator=generator).to(device)
    # Keys share a large mean under their rotary embedding: only if centring works do they lose no more than the noise does.
    rotary = Rotary(10_000.0 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64))
    mean = 5 * torch.randn(heads, 1, dim, generator=generator).to(device).expand(heads, tokens, dim)
    key = noise + rotary.apply(mean, *rotary.cos_sin(torch.arange(tokens, device=device)))
    layer = PackedLayer(heads, dim, config, config.bits_of_layer(0, 1), rotary)
    layer.append(key, value)
    layer.observe_queries(query)
    layer.commit()
    if not layer.packed_pages:
        raise RuntimeError("no page was packed")
    last = query[:, :, -new:]
    packed, _ = attend(last, layer)
    read = layer.get()
    plain, _ = attend_exact(last, *read, 0, CausalMask(tokens - new), dim**-0.5)
    coded = slice(config.sink_tokens, layer.packed_tokens)
    ratios = [
        float((got - want)[:, :, coded].square().mean()) / LEAST_ERROR[bits]
        for got, want, bits in zip(read, (key, value), layer.bits, strict=True)
    ]
    return SelfCheck(float((packed - plain).abs().max() / plain.abs().max()), max(ratios))


def _self_checks() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError):
        return [Check("attention", "failed", "needs torch", essential=True)]
    checks = [Check("attention", "ok", "reference path in plain torch: works everywhere")]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    for device in devices:
        for preset in PRESETS:
            name = f"self-check {preset}" if device == "cpu" else f"self-check {preset} on {device}"
            try:
                found = self_check(preset, device)
            except Exception as e:  # any error in there is the finding
                checks.append(Check(name, "failed", _line(e), essential=True))
                continue
            detail = f"packed and dequantized attention differ by {found.difference:.0e}; error {found.noise:.2f} of the ideal"
            checks.append(Check(name, "ok" if found.good else "failed", detail, essential=True))
    return checks


def _disk() -> list[Check]:
    try:
        free = shutil.disk_usage(".").free
    except OSError as e:
        return [Check("free disk space", "info", f"unknown: {_line(e)}")]
    return [Check("free disk space", "info", f"{format_bytes(free)} in the current directory")]


_GROUPS: tuple[Callable[[], list[Check]], ...] = (_python, _torch, _kernels, _transformers, _packages, _self_checks, _disk)


def run_checks() -> list[Check]:
    """All lines of the report."""
    return [check for group in _GROUPS for check in group()]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what this machine can use and why not, and check that encoding and attention compute the right thing.

    Exit code 0 if the package can run, 1 if something essential is broken.
    """
    checks = run_checks()
    usable = not any(c.essential and c.status == "failed" for c in checks)
    if as_json:
        typer.echo(json.dumps({"usable": usable, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _show(checks, usable)
    raise typer.Exit(0 if usable else 1)


def _show(checks: list[Check], usable: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "info": "dim", "missing": "yellow", "failed": "bold red"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for c in checks:
        # Text, not strings: findings may hold square brackets, which rich would read as markup.
        table.add_row(Text(c.name), Text(c.status, colours[c.status]), Text(c.detail))
    console = Console(highlight=False)
    console.print(table)
    if usable:
        console.print("turboquant can run here.", style="green")
    else:
        console.print("turboquant cannot run here: see the lines that failed.", style="bold red")
