"""Quality of all presets and reference rows on a real model: ``turboquant eval`` with the settings of the README's table.

    python benchmarks/bench_quality.py [--model MODEL] [--json OUT] [more options of `turboquant eval`]

Without --model it fetches SmolLM2-135M-Instruct; the text is the essays of examples/fetch.py. On 2 CPU cores the default
takes about 20 minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from fetch import ASSETS, fetch  # noqa: E402

ROWS = (
    "turboquant_4bit,turboquant_3.5bit,turboquant_3bit,turboquant_2.5bit,turboquant_2bit,turboquant_1.5bit,"
    "fp8,fp8_window,int4,int4_window"
)


def main() -> None:
    """Run the evaluation in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="downloads")
    a, more = parser.parse_known_args()
    model = a.model or str(fetch(ASSETS[0], a.dir))
    text = fetch(ASSETS[1], a.dir)
    out = a.json or ROOT / "benchmarks" / "results" / f"quality_{Path(model).stem}_local.json"
    code = "from turboquant.cli import main; main()"
    command = ["eval", model, "--text", str(text), "--presets", ROWS, "--dtype", "float32", "--json", str(out), *more]
    sys.exit(subprocess.run([sys.executable, "-W", "ignore", "-c", code, *command], check=False).returncode)


if __name__ == "__main__":
    main()
