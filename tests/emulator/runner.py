"""Compiles a kernel source for the CPU, and launches it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "src" / "turboquant" / "cuda" / "csrc"
# No fused multiply-add and no aliasing rules: kernels reinterpret bytes of shared memory as they like, as nvcc allows.
FLAGS: tuple[str, ...] = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")
# A frame must fit into a fiber's stack of 128 KiB.
FLAGS += ("-g1", "-fno-exceptions", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror=frame-larger-than=98304", "-DTQ_EMULATE")
UNUSED_DAYS = 3  # compiled kernels that nobody used for so long are removed
_LAUNCHES = threading.Lock()  # a loaded kernel keeps its block in global variables


class EmulationError(RuntimeError):
    """The source does not compile, or the kernel broke a rule; the message says which block, thread and operation."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("reverse", ctypes.c_uint32),
    )


class EmulatedKernel:
    """One kernel of a compiled source."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        try:
            self._entry = getattr(library, f"{name}_emulate")
        except AttributeError:
            raise EmulationError(f"the source has no TQ_KERNEL({name}, ...)") from None
        self._error = library.tq_error
        self._error.restype = ctypes.c_char_p

    def launch(self, grid: tuple[int, int, int], block: int, shared: int, params: ctypes.Structure) -> None:
        """Run all blocks, one after another.

        Args:
            grid: numbers of blocks.
            block: threads per block, a multiple of 32.
            shared: bytes of shared memory per block.
            params: the kernel's struct; its pointers are addresses of CPU memory.

        Raises:
            EmulationError: the kernel broke a rule, or the launch does not suit it.
        """
        if min(*grid, block, shared) < 0:
            raise EmulationError(f"{self.name}: negative sizes in grid {grid}, block {block}, shared {shared}")
        reverse = os.environ.get("TQ_EMULATE_REVERSE", "0") == "1"
        how = _Launch((ctypes.c_uint32 * 3)(*grid), block, shared, reverse)
        with _LAUNCHES:
            failed = self._entry(ctypes.byref(how), ctypes.byref(params), ctypes.c_size_t(ctypes.sizeof(params)))
            message = self._error().decode(errors="replace") if failed else ""
        if failed:
            raise EmulationError(message)


def get_kernel(source: str, defines: Mapping[str, int | str], device: torch.device) -> EmulatedKernel:
    """The kernel of a source, compiled at most once per set of macros.

    Args:
        source: ``"decode"`` (file ``csrc/decode.cu``, kernel ``tq_decode``), ``"decode:combine"`` (the same file, kernel
            ``tq_combine``), or with a path to a ``.cu`` file in place of the name.
        defines: macros of the specialisation.
        device: where the tensors are; must be the CPU.

    Raises:
        EmulationError: no such file or kernel, or the source does not compile.
    """
    if device.type != "cpu":
        raise EmulationError(f"the emulator runs on CPU tensors, not on {device}")
    file, _, kernel = source.partition(":")
    path = Path(file) if file.endswith(".cu") else CSRC / f"{file}.cu"
    if not path.is_file():
        raise EmulationError(f"there is no kernel source {path}")
    macros = tuple(sorted((name, str(value)) for name, value in defines.items()))
    library = _load(path, macros, os.environ.get("TQ_EMULATE_SANITIZE", "0") == "1", path.stat().st_mtime_ns)
    return EmulatedKernel(library, f"tq_{kernel or path.stem}")


@functools.cache
def why_unavailable() -> str | None:
    """None if kernels can be emulated here, else the reason."""
    if os.name != "posix":
        return "the kernel emulator needs a POSIX system"
    return None if _compiler()[0] else "the kernel emulator needs a C++ compiler (g++, c++ or clang++); none is on the PATH"


@functools.cache
def _compiler() -> tuple[str, str]:
    """Path and version of the C++ compiler; empty strings if there is none."""
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return "", ""


@functools.cache
def _folder() -> Path:
    """The folder of compiled kernels: private to the user, as what lies in it is loaded as code."""
    if named := os.environ.get("TQ_EMULATE_CACHE"):
        folder = Path(named)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"turboquant-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or folder.is_symlink() or state.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="turboquant-emulator-"))
    for old in folder.glob("*.so"):  # every edit of a source leaves files behind
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > UNUSED_DAYS * 86400:
                old.unlink()
    return folder


@functools.cache
def _load(path: Path, macros: tuple[tuple[str, str], ...], sanitize: bool, _changed: int) -> ctypes.CDLL:
    """The compiled library from memory, from the folder or from the compiler; ``_changed`` tells apart rewritten files."""
    if reason := why_unavailable():
        raise EmulationError(reason)
    compiler, version = _compiler()
    folders = (path.parent, CSRC, HERE)
    flags = [*FLAGS, "-fsanitize=undefined" if sanitize else "-fsanitize=alignment"]
    flags += [f"-D{name}={value}" for name, value in macros]
    key = hashlib.blake2b(repr((version, platform.machine(), flags)).encode(), digest_size=16)
    headers = {header for folder in folders for pattern in ("*.h", "*.cuh") for header in folder.glob(pattern)}
    for file in (path, *sorted(headers)):
        key.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    library = _folder() / f"{path.stem}-{key.hexdigest()}.so"
    if library.is_file():
        os.utime(library)
    else:
        _build(compiler, [*flags, *(f"-I{folder}" for folder in folders)], path, library)
    return ctypes.CDLL(str(library))


def _build(compiler: str, flags: list[str], path: Path, library: Path) -> None:
    """Compile and link to a temporary name, then rename: processes that build the same kernel do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        # Two steps: linked with -fsanitize, the library would need libubsan in place of emulate_undefined.h.
        steps = (
            [compiler, *flags, "-c", "-x", "c++", str(path), "-o", str(built[0])],
            [compiler, "-shared", str(built[0]), "-o", str(built[1]), "-lm"],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(f"{path} does not compile for the emulator:\n{' '.join(step)}\n{done.stderr}")
        os.replace(built[1], library)
