"""The main job on a real model: a long document, a 3-bit cache, disk offload, and the same prompt again in a new process.

    python examples/demo.py [--model MODEL] [--document FILE]

Runs the ``turboquant`` command three times (exact cache; compressed cache with an empty store; the same again, restored),
checks that the restored answer is token for token the first, measures KL divergence and top-1 agreement on the document,
and prints one table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fetch import ASSETS, fetch
from rich.console import Console
from rich.table import Table

QUESTION = "In two sentences: what does the author say about why people become addicted to more and more things?"
console = Console()


def turboquant(*args: str) -> None:
    """Run the command in a process of its own, its output on this terminal."""
    console.rule(f"[bold]turboquant {args[0]}", align="left")
    code = "from turboquant.cli import main; main()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *args], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def generate(model: str, document: Path, preset: str, report: Path, tokens: int, *more: str) -> dict[str, Any]:
    """One run of ``turboquant generate``; returns its report."""
    prompt = ("--prompt-file", str(document), "--prompt", QUESTION)
    turboquant("generate", model, *prompt, "--preset", preset, "--max-new-tokens", str(tokens), "--json", str(report), *more)
    result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return result


def table(exact: dict[str, Any], cold: dict[str, Any], warm: dict[str, Any], rows: dict[str, Any], stored: int) -> Table:
    """Exact cache against compressed cache, cold and restored."""
    preset = cold["preset"]
    t = Table(title=f"{cold['prompt_tokens']:,} prompt tokens", title_justify="left")
    t.add_column("")
    t.add_column("exact cache", justify="right")
    t.add_column(preset, justify="right")
    bits = f"{rows[preset]['bits_per_element']:.3f}"
    t.add_row("bits per element, beyond the window", f"{exact['bits_per_element']:.0f}", bits)
    t.add_row("bits per element, window included", f"{exact['effective_bits']:.0f}", f"{warm['effective_bits']:.2f}")
    smaller = exact["cache_bytes"] / warm["cache_bytes"]
    t.add_row(
        "cache held", f"{exact['cache_bytes'] / 2**20:.1f} MiB", f"{warm['cache_bytes'] / 2**20:.1f} MiB ({smaller:.1f}x less)"
    )
    t.add_row("stored on disk", "-", f"{stored / 2**20:.1f} MiB")
    t.add_row("KL divergence from the exact cache", "0", f"{rows[preset]['kl']:.4f} nats")
    t.add_row("top-1 agreement", "100 %", f"{100 * rows[preset]['top1']:.1f} %")
    t.add_row(
        "time to first token, cold", f"{exact['seconds_to_first_token']:.2f} s", f"{cold['seconds_to_first_token']:.2f} s"
    )
    t.add_row("time to first token, restored", "-", f"{warm['seconds_to_first_token']:.2f} s")
    return t


def main() -> None:
    """Parse arguments and run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--document", type=Path, help="text to read (default: the first essays, about 3,000 tokens)")
    parser.add_argument("--preset", default="turboquant_3bit")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="downloads, store and reports (default: %(default)s)")
    a = parser.parse_args()
    a.dir.mkdir(parents=True, exist_ok=True)
    model = a.model or str(fetch(ASSETS[0], a.dir))
    document = a.document or a.dir / "document.txt"
    if a.document is None:
        text = fetch(ASSETS[1], a.dir).read_text(encoding="utf-8")
        document.write_text(text[:13_500].rsplit("\n", 1)[0], encoding="utf-8")
    store = a.dir / "store"
    shutil.rmtree(store, ignore_errors=True)
    offload = ("--offload", str(store))

    exact = generate(model, document, "exact", a.dir / "exact.json", a.max_new_tokens)
    cold = generate(model, document, a.preset, a.dir / "cold.json", a.max_new_tokens, *offload)
    stored = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    warm = generate(model, document, a.preset, a.dir / "warm.json", a.max_new_tokens, *offload)
    out = a.dir / "eval.json"
    turboquant("eval", model, "--text", str(document), "--presets", a.preset, "--chunks", "1", "--json", str(out))
    rows = {r["preset"]: r for r in json.loads(out.read_text(encoding="utf-8"))}

    console.rule("[bold]result", align="left")
    console.print(table(exact, cold, warm, rows, stored))
    same = cold["token_ids"] == warm["token_ids"]
    console.print(f"restored {warm['restored_tokens']:,} of {warm['prompt_tokens']:,} prompt tokens from disk in a new "
                  f"process; the answer is {'token for token the same' if same else 'NOT the same'}.")  # fmt: skip
    if not same or not warm["restored_tokens"]:
        raise SystemExit("the restored run differs: this is a bug")


if __name__ == "__main__":
    main()
