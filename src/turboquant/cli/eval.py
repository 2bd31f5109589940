"""``turboquant eval``: quality of presets on a model and a text, against the exact cache."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .models import check_output, check_tokens, load_model, read_text, write_json

#: Text is tokenized only as far as needed: this many characters per token are always enough.
_CHARACTERS_PER_TOKEN = 12


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    presets: Annotated[
        str, typer.Option(help="Comma-separated: presets, and the reference rows fp8, fp8_window, int4, int4_window.")
    ] = "turboquant_4bit,turboquant_3bit,turboquant_2.5bit,turboquant_2bit,fp8,fp8_window,int4",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a chunk; each starts with an empty cache.")] = 2048,
    chunks: Annotated[int, typer.Option(min=1, help="Number of chunks.")] = 4,
    block: Annotated[int, typer.Option(min=1, help="Tokens fed per call.")] = 64,
    skip: Annotated[int, typer.Option(min=0, help="Predictions after this many tokens of a chunk are scored.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or auto.")] = "auto",
    statistics: Annotated[Path | None, typer.Option(help="Key statistics to use instead of each chunk's own.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows here, one object each.")] = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of compressed caches against the exact cache.

    Chunks are fed in small blocks through the cache, so that what is read is what is stored.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    names = [p.strip() for p in presets.split(",") if p.strip()]
    content = read_text(text, "--text")
    _check_names(names)
    check_output(json_out, "--json")
    if not skip < tokens - 1:
        raise ConfigError(f"--skip {skip} leaves nothing of --tokens {tokens} to score")
    console = Console()
    with console.status("loading the model"):
        hf_model, tokenizer = load_model(model, device, dtype, "sdpa")
    from ..codec.center import Statistics
    from ..evaluate import evaluate

    ids = tokenizer(content[: chunks * tokens * _CHARACTERS_PER_TOKEN], return_tensors="pt").input_ids[0]
    check_tokens(hf_model, ids, f"--text {text}")
    frozen = Statistics.load(statistics) if statistics is not None else None
    total = tokens * chunks * (1 + len([n for n in dict.fromkeys(names) if n != "exact"]))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("exact", total=total)
        rows = evaluate(
            hf_model, ids, names, tokens, chunks, block, skip, frozen,
            lambda name, n: bar.update(task, advance=n, description=name),
        )  # fmt: skip
    _print_rows(console, rows, model, text, tokens, chunks)
    if json_out is not None:
        about = _about(hf_model, model, text, tokens, chunks, block, skip)
        write_json(json_out, [{**asdict(r), **about} for r in rows], "--json")


def _check_names(names: list[str]) -> None:
    from ..evaluate import known_rows

    unknown = [n for n in names if n not in known_rows()]
    if unknown or not names:
        raise ConfigError(f"--presets: unknown {', '.join(unknown) or '(empty)'}; choose from {', '.join(known_rows())}")


def _about(model: Any, name: str, text: Path, tokens: int, chunks: int, block: int, skip: int) -> dict[str, Any]:
    import torch
    import transformers

    from .. import __version__

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"cpu {platform.machine()}"
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "text": text.name,
        "chunk_tokens": tokens,
        "chunks": chunks,
        "block": block,
        "skip": skip,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "versions": {"turboquant-cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _print_rows(console: Any, rows: list[Any], model: str, text: Path, tokens: int, chunks: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, because a name may hold square brackets, which rich would read as markup.
    names = f"{Path(model).name} on {text.name}"
    title = Text(f"{names}: {chunks} chunks of {tokens} tokens, {rows[0].tokens:,} predictions")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)  # fits 80 columns
    for name in ("preset", "bits", "bits held", "ppl", "delta", "KL", "top-1"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for r in rows:
        table.add_row(
            r.preset, f"{r.bits_per_element:.3f}", f"{r.effective_bits:.2f}", f"{r.ppl:.3f}", f"{r.dppl:+.3f}", f"{r.kl:.5f}",
            f"{100 * r.top1:.2f} %",
        )  # fmt: skip
    console.print(table)
