"""``turboquant generate``: stream an answer with a compressed cache."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from ..arithmetic import parse_bytes
from ..config import PRESETS
from ..errors import ConfigError, TurboQuantError
from .models import check_output, check_tokens, load_model, one_line, read_text, write_json

if TYPE_CHECKING:
    from ..offload.store import TurboQuantStore

EXACT = "exact"


@dataclass(frozen=True)
class Report:
    """What one run did; ``--json`` writes it."""

    model: str
    preset: str
    prompt_tokens: int
    restored_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    cache_bytes: int
    exact_bytes: int
    bits_per_element: float
    effective_bits: float
    store: dict[str, int]
    token_ids: list[int]
    text: str


def generate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    prompt: Annotated[str, typer.Option(help="The prompt. With --prompt-file it is put after the file's text.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file to read.")] = None,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}, or {EXACT}.")] = "turboquant_3bit",
    offload: Annotated[
        str | None, typer.Option(help="Folder (or file: URL) where prefixes are stored and found again.")
    ] = None,
    offload_size: Annotated[str, typer.Option(help="Bound on the folder's size.")] = "10GiB",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or auto.")] = "auto",
    statistics: Annotated[Path | None, typer.Option(help="Key statistics saved earlier.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write a report of the run here.")] = None,
) -> None:
    """Generate text with a compressed cache, streaming it, and print what the cache took."""
    from rich.console import Console

    text = _prompt_text(prompt, prompt_file)
    if preset != EXACT and preset not in PRESETS:
        raise ConfigError(f"--preset {preset} is unknown; choose one of {', '.join(PRESETS)}, {EXACT}")
    check_output(json_out, "--json")
    if preset == EXACT and (offload is not None or statistics is not None):
        raise ConfigError("--offload and --statistics work with compressed caches; choose a preset other than exact")
    store = _open_store(offload, offload_size) if offload is not None else None
    console = Console()
    with console.status("loading the model"):
        hf_model, tokenizer = load_model(model, device, dtype, "sdpa" if preset == EXACT else "turboquant")
    report = run(hf_model, tokenizer, model, text, preset, store, max_new_tokens, temperature, seed, chat, statistics, console)
    _print_report(console, report)
    if json_out is not None:
        write_json(json_out, asdict(report), "--json")


def _prompt_text(prompt: str, prompt_file: Path | None) -> str:
    document = read_text(prompt_file, "--prompt-file") if prompt_file is not None else ""
    text = "\n\n".join(part for part in (document, prompt) if part)
    if not text.strip():
        raise ConfigError("nothing to answer: give --prompt, --prompt-file or both")
    return text


def _open_store(url: str, size: str) -> TurboQuantStore:
    from ..offload.store import TurboQuantStore

    if url.lower().startswith("file:"):
        try:
            parts = urlsplit(url)
        except ValueError as e:
            raise ConfigError(f"--offload {url}: not a URL ({e})") from None
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"--offload {url}: names another machine, {parts.netloc}; write file:///folder")
        folder = unquote(parts.path)
    elif "://" in url:
        raise ConfigError(f"--offload {url}: {url.split(':')[0]}: is not supported; give a folder or a file: URL")
    else:
        folder = url
    if not folder.strip():
        raise ConfigError(f"--offload {url!r}: give a folder or a file: URL")
    return TurboQuantStore(os.path.expanduser(folder), parse_bytes(size, "--offload-size"))


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # templates are programs of their own
            raise TurboQuantError(f"the model's chat template fails ({one_line(e)}); try --no-chat") from e
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return tokenizer(text, return_tensors="pt").input_ids


def run(
    model: Any,
    tokenizer: Any,
    name: str,
    text: str,
    preset: str,
    store: TurboQuantStore | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    statistics: Path | None,
    console: Any,
) -> Report:
    """Prefill in blocks (after what the store has), then stream; see the command's options."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import DynamicCache, TextStreamer

    from ..cache import TurboQuantCache
    from ..integrations.huggingface import prefill

    ids = _encode(tokenizer, text, chat).to(model.device)
    check_tokens(model, ids, "the prompt")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and ids.shape[1] + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens; with --max-new-tokens {max_new_tokens} that is over the model's {limit}"
        )
    if preset == EXACT:
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    else:
        cache = TurboQuantCache.for_model(model, preset, statistics=statistics, store=store)
    began = time.perf_counter()
    first: list[float] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Prints text as it comes and notes the time of the first new token."""

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and not first:
                first.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)

    with torch.no_grad():
        restored = store.restore(cache, ids) if store is not None else 0
        columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("prefill", total=ids.shape[1], completed=restored)
            # In blocks of the store's chunks: a restored prompt then continues exactly like a cold one.
            prefill(model, ids, cache, progress=lambda n: bar.update(task, advance=n))
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=None,
            top_k=None,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    ended = time.perf_counter()
    new = out[0, ids.shape[1] :]
    ttft = (first[0] if first else ended) - began
    exact_bytes, held, nominal, effective = _sizes(cache)
    return Report(
        model=name,
        preset=preset,
        prompt_tokens=int(ids.shape[1]),
        restored_tokens=restored,
        new_tokens=len(new),
        seconds_to_first_token=ttft,
        tokens_per_second=(len(new) - 1) / max(ended - began - ttft, 1e-9) if len(new) > 1 else 0.0,
        cache_bytes=held,
        exact_bytes=exact_bytes,
        bits_per_element=nominal,
        effective_bits=effective,
        store=dict(store.counters) if store is not None else {},
        token_ids=new.tolist(),
        text=tokenizer.decode(new, skip_special_tokens=True),
    )


def _sizes(cache: Any) -> tuple[int, int, float, float]:
    """Measure (bytes of the same tokens held exactly, bytes held, nominal bits, effective bits)."""
    if hasattr(cache, "exact_nbytes"):
        return cache.exact_nbytes, cache.nbytes, cache.bits_per_element, cache.effective_bits
    keyed = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed)
    bits = 8.0 * keyed[0].keys.dtype.itemsize
    return held, held, bits, bits


def _print_report(console: Any, r: Report) -> None:
    from rich.table import Table

    table = Table(show_header=False, title=f"{r.preset}")
    table.add_row("prompt", f"{r.prompt_tokens:,} tokens, {r.restored_tokens:,} restored from the store")
    table.add_row("generated", f"{r.new_tokens:,} tokens, {r.tokens_per_second:.2f} tokens/s")
    table.add_row("time to first token", f"{r.seconds_to_first_token:.2f} s")
    table.add_row("cache", f"{r.cache_bytes / 2**20:.2f} MiB ({r.effective_bits:.2f} bits per element, window included)")
    table.add_row("exact cache", f"{r.exact_bytes / 2**20:.2f} MiB ({r.exact_bytes / max(r.cache_bytes, 1):.2f}x)")
    if r.store:
        table.add_row("store", ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in sorted(r.store.items())))
    console.print(table)
