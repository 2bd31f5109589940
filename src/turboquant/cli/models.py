"""Loading a model for a command: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TurboQuantError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(name: str, device: str = "auto", dtype: str = "auto", attention: str = "turboquant") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer).

    Args:
        name: hub id, folder with a model of transformers, or a ``.gguf`` file (dequantized on loading).
        device: "auto" takes CUDA if there is one.
        dtype: "auto" is float32 on the CPU and bfloat16 on a GPU.
        attention: attention implementation.

    Raises:
        ConfigError: the path is wrong or a package is missing.
        TurboQuantError: transformers cannot load the model; the message carries its reason.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError('this command needs transformers: pip install "turboquant-cache[cli]"')
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device} is unknown; use cpu, cuda or cuda:N") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU here (see `turboquant doctor`)")
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, extra = _locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        if extra:
            from transformers import GgufConfig

            extra = {**extra, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention, **extra
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
        reason = str(e).strip().split("\n")[0]
        raise TurboQuantError(f"cannot load the model {name!r}: {reason}") from None
    return model.to(target).eval(), tokenizer


def _locate(name: str) -> tuple[str, dict[str, str]]:
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ConfigError(f"{name}: there is no such GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError('GGUF files need the gguf package: pip install "turboquant-cache[hf]"')
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name}: this folder holds no config.json; give a folder saved with save_pretrained()")
        return str(path), {}
    if path.exists() or name.startswith((".", "~", os.sep)):
        raise ConfigError(f"{name}: not a model folder, a .gguf file or a hub id")
    return name, {}


def read_text(path: Path, option: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: missing, unreadable or empty.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path}: not a UTF-8 text file") from None
    except OSError as e:
        raise ConfigError(f"{option} {path}: {e.strerror or e}") from None
    if not text.strip():
        raise ConfigError(f"{option} {path}: the file is empty")
    return text


def parse_bytes(text: str, option: str) -> int:
    """Bytes of ``80GiB``, ``24GB``, ``512MiB`` or a plain number.

    Raises:
        ConfigError: not understood.
    """
    units = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    units |= {f"{p}ib": 1 << 10 * (i + 1) for i, p in enumerate("kmgt")}
    units |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
    clean = text.strip().lower().replace(" ", "").replace("_", "")
    digits = clean.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        value = float(digits) * units[clean[len(digits) :]]
        if not 0 < value < 1 << 60:
            raise ValueError
    except (KeyError, ValueError):
        raise ConfigError(f"{option} {text!r} is not a size; write for example 80GiB, 24GB or 512MiB") from None
    return int(value)
