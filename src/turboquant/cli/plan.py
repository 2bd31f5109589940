"""``turboquant plan``: what fits into memory, from a model's configuration alone."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any

import typer

from .. import arithmetic
from ..arithmetic import CacheShape, format_bytes, parse_bytes
from ..config import PRESETS, TurboQuantConfig
from ..errors import ConfigError
from .architecture import ModelFacts, read_model


def parse_count(text: str, name: str) -> int:
    """Read a number such as ``70.6B``, ``135M`` or ``7000000000``.

    Raises:
        ConfigError: not understood, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmbt]?)", text.strip().lower())
    count = round(float(match[1]) * 1000 ** " kmbt".index(match[2] or " ")) if match else 0
    if count < 1:
        raise ConfigError(f"{name}={text!r} is not understood; write for example 70.6B, 135M or a number")
    return count


def format_count(n: int) -> str:
    """Write a count: ``70.6 B``, ``135 M``."""
    unit, size = next(((u, s) for u, s in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)) if n >= s), ("", 1.0))
    value = n / size
    return f"{value:.{0 if value >= 100 or not unit else 1 if value >= 10 else 2}f} {unit}".strip()


# -- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(facts: ModelFacts, memory: int, weights_bits: float, context: int, parameters: int | None) -> dict[str, Any]:
    """All numbers of the table as plain JSON values.

    Args:
        facts: of the model.
        memory: bytes for weights and caches together.
        weights_bits: stored bits per weight.
        context: tokens per sequence.
        parameters: number of weights; None estimates it.
    """
    count = facts.parameters if parameters is None else parameters
    weights = math.ceil(count * weights_bits / 8)
    left = max(0, memory - weights)
    exact = TurboQuantConfig(n_bits=16)
    # An exact cache of one byte per number is the size of fp8 without scales.
    rows = [_row(facts.shape, "exact (16 bit)", exact, left, context, 2), _row(facts.shape, "fp8", exact, left, context, 1)]
    rows += [_row(facts.shape, name, TurboQuantConfig.preset(name), left, context, 2) for name in PRESETS]
    return {
        "model_type": facts.model_type,
        "layers": len(facts.shape.layers),
        "max_context": facts.max_context,
        "parameters": count,
        "parameters_estimated": parameters is None,
        "weights_bits": weights_bits,
        "weights_bytes": weights,
        "memory_bytes": memory,
        "left_bytes": left,
        "context": context,
        "rows": rows,
        "notes": [*facts.notes, *_shape_notes(facts.shape)],
    }


def _row(shape: CacheShape, name: str, config: TurboQuantConfig, left: int, context: int, exact_bytes: int) -> dict[str, Any]:
    longest = arithmetic.longest_context(shape, config, left, exact_bytes=exact_bytes)
    return {
        "cache": name,
        "bits_per_element": arithmetic.bits_per_element(shape, config, exact_bytes),
        "bytes_per_token": arithmetic.bytes_per_token(shape, config, exact_bytes),
        "cache_bytes": arithmetic.peak_bytes(shape, config, context, exact_bytes=exact_bytes),
        "longest_context": None if longest == arithmetic.NO_LIMIT else longest,
        "sequences": arithmetic.concurrent_sequences(shape, config, left, context, exact_bytes),
    }


def _shape_notes(shape: CacheShape) -> list[str]:
    notes = []
    config, n = TurboQuantConfig(), len(shape.layers)
    windows = sorted({s.sliding_window for s in shape.layers if s.sliding_window and s.kv_heads})
    if windows:
        sliding = sum(1 for s in shape.layers if s.sliding_window and s.kv_heads)
        spans = " or ".join(f"{w:,}" for w in windows)
        notes.append(f"{sliding} of {n} layers slide over {spans} tokens and stop growing there.")
    cacheless = sum(1 for s in shape.layers if not s.kv_heads)
    if cacheless:
        notes.append(f"{cacheless} of {n} layers hold no keys and values of their own; states of fixed size are not counted.")
    reasons = [s.why_exact(config) for s in shape.layers if s.kv_heads]
    found = dict.fromkeys(r for r in reasons if r)
    return notes + [f"{reasons.count(r)} of {n} layers stay exact in every row: {r}." for r in found]


def _show(plan: dict[str, Any], facts: ModelFacts, model: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    heads = [
        f"{kv} KV heads of {dim}"
        for kv, dim in dict.fromkeys((s.kv_heads, s.head_dim) for s in facts.shape.layers if s.kv_heads)
    ]
    console.print(Text.assemble((model, "bold"), f" ({plan['model_type']}): {plan['layers']} layers, {' and '.join(heads)}"))
    about = "about " if plan["parameters_estimated"] else ""
    weights, left = plan["weights_bytes"], plan["left_bytes"]
    console.print(
        f"{format_bytes(plan['memory_bytes'])} of memory - {about}{format_bytes(weights)} of weights ({about}"
        f"{format_count(plan['parameters'])} parameters of {plan['weights_bits']:g} bits) = {format_bytes(left)} for caches"
    )
    if not left:
        console.print("The weights alone do not fit; see --weights-bits and --parameters.", style="yellow")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", no_wrap=True)
    at = f"cache at\n{plan['context']:,}"
    for heading in ("bits per\nnumber", "bytes per\ntoken", at, "longest\ncontext", "sequences\nat once"):
        table.add_column(heading, justify="right")
    for row in plan["rows"]:
        longest = row["longest_context"]
        table.add_row(
            row["cache"],
            f"{row['bits_per_element']:.3f}".rstrip("0").rstrip("."),
            f"{row['bytes_per_token']:,.0f}",
            format_bytes(row["cache_bytes"]),
            "any" if longest is None else f"{longest:,}",
            f"{row['sequences']:,}",
        )
    console.print(table)
    limit = facts.max_context
    notes = [
        *plan["notes"],
        "Presets keep 4 first and 128 to 191 last tokens exact, at 16 bits; this and the key statistics are counted.",
        "Activations and what the runtime itself takes are not counted.",
    ]
    if limit and any(row["longest_context"] is None or row["longest_context"] > limit for row in plan["rows"]):
        notes.append(f"The model itself was made for {limit:,} tokens.")
    for note in notes:
        console.print(note, style="dim")


def plan(
    model: Annotated[str, typer.Argument(help="A model's folder, its config.json, a .gguf file, or a Hugging Face model id.")],
    memory: Annotated[str, typer.Option(help="Memory for weights and caches: 80GiB, 24GB, 512MiB or bytes.")],
    weights_bits: Annotated[float, typer.Option(min=1, max=64, help="Stored bits per weight.")] = 16,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence; by default the model's longest context.", show_default=False)
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Number of weights, for example 70.6B, instead of the estimate.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How long a context, and how many at once, fit into memory with each preset.

    Reads only the model's configuration: no weights, no GPU. Sizes are those of the storage, exact window and statistics
    included.
    """
    size = parse_bytes(memory, "--memory")
    count = None if parameters is None else parse_count(parameters, "--parameters")
    facts = read_model(model)
    tokens = context or facts.max_context
    if tokens is None:
        raise ConfigError("the model's configuration does not say how long its context is; give --context")
    result = make_plan(facts, size, weights_bits, tokens, count)
    if as_json:
        typer.echo(json.dumps({"model": model, **result}, indent=2))
    else:
        _show(result, facts, model)
