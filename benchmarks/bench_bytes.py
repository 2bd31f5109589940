"""Bytes that a cache really holds, from its allocations: bits per element beyond the exact window, and the ratio to 16 bits.

    python benchmarks/bench_bytes.py [--json OUT]

Two lengths with equally long exact tails are compared, so the difference is packed pages alone.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from turboquant import PRESETS, TurboQuantCache, __version__

SHORT, LONG = 1024, 9216
HEADS = 4


def held(preset: str, head_dim: int, tokens: int) -> TurboQuantCache:
    """A one-layer bf16 cache that was fed ``tokens`` random tokens."""
    cache = TurboQuantCache(num_layers=1, num_kv_heads=HEADS, head_dim=head_dim, config=preset)
    key, value = torch.randn(2, 1, HEADS, tokens, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.update(key, value, 0)
    return cache


def measure(preset: str, head_dim: int) -> dict[str, Any]:
    """One row of the table."""
    long = held(preset, head_dim, LONG)
    elements = 2 * HEADS * (LONG - SHORT) * head_dim
    bits = (long.nbytes - held(preset, head_dim, SHORT).nbytes) * 8 / elements
    return {
        "preset": preset,
        "head_dim": head_dim,
        "bits_per_element": bits,
        "ratio_to_16_bits": 16 / bits,
        "tokens": LONG,
        "effective_bits": long.effective_bits,
    }


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    out = parser.parse_args().json
    about = {
        "device": f"cpu {platform.machine()}",
        "versions": {"turboquant-cache": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    rows = [measure(p, d) | about for d in (64, 128, 256) for p in PRESETS]
    print(f"{'preset':20}{'head_dim':>9}{'bits':>8}{'x of 16 bits':>14}{'with the window at ' + str(LONG):>26}")
    for r in rows:
        print(
            f"{r['preset']:20}{r['head_dim']:>9}{r['bits_per_element']:>8.3f}{r['ratio_to_16_bits']:>14.2f}{r['effective_bits']:>26.3f}"
        )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
