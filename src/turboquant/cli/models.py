"""Loading a model for a command: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TurboQuantError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(name: str, device: str = "auto", dtype: str = "auto", attention: str = "turboquant") -> tuple[Any, Any]:
    """Load a (model in eval mode, tokenizer).

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
    target = _device(device)
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
        return model.to(target).eval(), tokenizer
    except Exception as e:  # a damaged or unknown model makes transformers raise nearly anything
        raise TurboQuantError(f"cannot load the model {name!r}: {one_line(e)}") from e


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs here (see `turboquant doctor`)")
    if device.type == "meta":
        raise ConfigError("--device meta holds no data; use cpu, cuda or cuda:N")
    return device


def one_line(error: Exception) -> str:
    """Put an error in one line, for a message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _locate(name: str) -> tuple[str, dict[str, str]]:
    path = Path(os.path.expanduser(name))
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
    """Read a UTF-8 file.

    Raises:
        ConfigError: missing, unreadable or empty.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path}: not a UTF-8 text file") from None
    except OSError as e:
        raise ConfigError(f"{option} {path}: {e.strerror or e}") from None
    if not text.strip():
        raise ConfigError(f"{option} {path}: the file is empty")
    return text


def check_tokens(model: Any, ids: Any, what: str) -> None:
    """Look whether token ids can be fed.

    Raises:
        ConfigError: there are none, or the model does not know them.
    """
    if not ids.numel():
        raise ConfigError(f"the model's tokenizer makes no tokens of {what}")
    words = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= words:
        raise ConfigError(f"the tokenizer does not fit the model: token id {int(ids.max())}, but only {words} embeddings")


def check_output(path: Path | None, option: str) -> None:
    """Look before a long run whether its report can be written.

    Raises:
        ConfigError: the folder is missing or not writable, or the path is a folder.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} {path}: cannot be written")


def write_json(path: Path, data: object, option: str) -> None:
    """Write a report.

    Raises:
        TurboQuantError: the disk does not take it.
    """
    try:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise TurboQuantError(f"{option} {path}: {e.strerror or e}") from None
