"""Compile kernel sources with NVRTC, NVIDIA's run-time compiler: no GPU, driver, CUDA toolkit or host compiler is needed.

NVRTC and the driver are reached through ``cuda.bindings``, the layer below ``cuda-core``. The CUDA wheels of
torch for Linux bring both since 2.10, so that there nothing else has to be installed.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import KernelError

CSRC = Path(__file__).parent / "csrc"
#: -v: registers and spills; the log of every compilation is kept.
OPTIONS = ("--std=c++17", "--ptxas-options=-v")
Defines = Mapping[str, int | str]
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_MACRO = re.compile(r"[A-Za-z_]\w*")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
#: Removed, so that the same source gives the same result.
_TIMES = re.compile(r"^ptxas info\s*: Compile time = .*\n?", re.MULTILINE)
_CONSTANT = re.compile(r"(\d+) bytes cmem\[0\]")


def install_hint() -> str:
    """The command that brings cuda-bindings and NVRTC, of the CUDA version that torch is built for."""
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"
    return f'pip install "turboquant-cache[{extra}]"'


def bindings(name: str) -> Any:
    """A module of cuda-bindings, ``"nvrtc"`` or ``"driver"``.

    Raises:
        KernelError: it is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as e:
        raise KernelError(f"cuda-bindings does not import ({e}): {install_hint()}") from e


@functools.lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the compiler.

    Raises:
        KernelError: cuda-bindings or the NVRTC library is missing.
    """
    try:
        error, major, minor = bindings("nvrtc").nvrtcVersion()
    except KernelError:
        raise
    except RuntimeError as e:  # the library is looked for on the first call
        raise KernelError(f"the NVRTC library does not load ({str(e).splitlines()[0]}): {install_hint()}") from e
    if int(error):
        raise KernelError(f"NVRTC does not tell its version: {error.name}")
    return int(major), int(minor)


@functools.lru_cache(maxsize=1)
def supported_archs() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC compiles for, ascending, 10 major + minor."""
    nvrtc_version()
    error, archs = bindings("nvrtc").nvrtcGetSupportedArchs()
    if int(error):
        raise KernelError(f"NVRTC does not tell what it supports: {error.name}")
    return tuple(sorted(int(a) for a in archs))


def arch_of(capability: tuple[int, int]) -> str:
    """The best ``sm_XY`` of NVRTC for a compute capability.

    Machine code also runs on later minor versions of its major one.

    Raises:
        KernelError: this NVRTC is older than the GPU.
    """
    major, minor = capability
    known = [a for a in supported_archs() if a // 10 == major and a % 10 <= minor]
    if not known:
        version = ".".join(map(str, nvrtc_version()))
        raise KernelError(
            f"NVRTC {version} does not compile for compute capability {major}.{minor}: install a newer nvidia-cuda-nvrtc"
        )
    return f"sm_{known[-1]}"


@dataclass(frozen=True)
class Usage:
    """What one kernel of a compiled source occupies, as ptxas reports it.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: bytes of a thread's local memory; arrays that are indexed at run time live there too.
        spill_stores, spill_loads: bytes that a thread moves because registers ran out.
        shared: static shared memory, bytes (dynamic shared memory is chosen at the launch).
        constant: bytes of constant bank 0: on sm_8x, which alone report it, 352 of the launch's own and the parameters; else 0.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    constant: int


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel source.

    Attributes:
        source: as given, ``"decode"``, ``"decode:combine"`` or a path.
        defines: macros and their values.
        arch: ``"sm_90"``.
        cubin: the ELF file that the driver loads.
        log: warnings, and what ptxas reports.
    """

    source: str
    defines: tuple[tuple[str, int | str], ...]
    arch: str
    cubin: bytes
    log: str

    @functools.cached_property
    def kernels(self) -> dict[str, Usage]:
        """What every kernel of the source occupies, by its name."""
        return parse_usage(self.log)

    @property
    def usage(self) -> Usage:
        """What the kernel that :attr:`source` names occupies.

        Raises:
            KernelError: the log does not mention it.
        """
        name = kernel_name(self.source)
        if name not in self.kernels:
            raise KernelError(f"the compiler's log does not mention {name}; it has {', '.join(self.kernels) or 'no kernels'}")
        return self.kernels[name]

    @property
    def registers(self) -> int:
        """Registers of a thread of that kernel."""
        return self.usage.registers

    @property
    def stack(self) -> int:
        """Bytes of local memory of a thread of that kernel."""
        return self.usage.stack

    @property
    def spill_stores(self) -> int:
        """Bytes of registers that a thread of that kernel stores to local memory."""
        return self.usage.spill_stores

    @property
    def spill_loads(self) -> int:
        """Bytes of registers that a thread of that kernel loads from local memory."""
        return self.usage.spill_loads

    @property
    def shared(self) -> int:
        """Static shared memory of that kernel, bytes."""
        return self.usage.shared


def parse_usage(log: str) -> dict[str, Usage]:
    """The lines of ``ptxas -v`` by kernel."""
    found: dict[str, Usage] = {}
    parts = _ENTRY.split(log)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        stack, registers = _STACK.search(text), _REGISTERS.search(text)
        if stack is None or registers is None:
            continue
        shared, constant = _SHARED.search(text), _CONSTANT.search(text)
        found[name] = Usage(
            registers=int(registers[1]),
            stack=int(stack[1]),
            spill_stores=int(stack[2]),
            spill_loads=int(stack[3]),
            shared=int(shared[1]) if shared else 0,
            constant=int(constant[1]) if constant else 0,
        )
    return found


def _split(source: str) -> tuple[Path, str]:
    """(file, kernel) of ``"decode"``, ``"decode:combine"``, ``"/x/y.cu"`` or ``"/x/y.cu:combine"``."""
    name, colon, kernel = source.rpartition(":")
    # A colon before a separator belongs to a path, as in C:\x.cu.
    file, kernel = (name, kernel) if colon and not re.search(r"[/\\.]", kernel) else (source, "")
    path = Path(file) if file.endswith(".cu") else CSRC / f"{file}.cu"
    return path, f"tq_{kernel or path.stem}"


def source_path(source: str) -> Path:
    """The file of a source: of this package by name (``"decode"``), or any by a path that ends in ``.cu``."""
    return _split(source)[0]


def kernel_name(source: str) -> str:
    """The function of a source: ``tq_decode`` of ``"decode"``, ``tq_combine`` of ``"decode:combine"``."""
    return _split(source)[1]


def read_sources(path: Path) -> dict[str, str]:
    """A source and all files that it includes, directly or not, by the name in the ``#include "name"``; the source first.

    A name is looked for beside the source, then among the package's own. Names of no file are left to the compiler: the
    ``#include`` may be switched off by a macro.

    Raises:
        KernelError: the source cannot be read.
    """
    try:
        found = {path.name: path.read_text(encoding="utf-8")}
    except OSError as e:
        raise KernelError(f"cannot read the kernel source {path}: {e.strerror or e}") from e
    waiting = [path.name]
    while waiting:
        for name in _INCLUDE.findall(found[waiting.pop()]):
            if name in found:
                continue
            for folder in (path.parent, CSRC):
                if (folder / name).is_file():
                    found[name] = (folder / name).read_text(encoding="utf-8")
                    waiting.append(name)
                    break
    return found


def freeze(defines: Defines) -> tuple[tuple[str, int | str], ...]:
    """Macros in one order, checked.

    Raises:
        KernelError: a name is no identifier, or a value is neither an int nor a str.
    """
    for name, value in defines.items():
        if not _MACRO.fullmatch(name) or isinstance(value, bool) or not isinstance(value, int | str):
            raise KernelError(f"cannot define {name!r} as {value!r}: names are identifiers, values int or str")
    return tuple(sorted(defines.items()))


def describe(source: str, defines: tuple[tuple[str, int | str], ...]) -> str:
    """A kernel in words, for messages: its file and its macros."""
    return f"{source_path(source).name} ({', '.join(f'{n}={v}' for n, v in defines) or 'no macros'})"


def digest(files: Mapping[str, str], defines: tuple[tuple[str, int | str], ...], arch: str) -> str:
    """Everything that the machine code depends on: sources, macros, target, compiler, options and this package's version."""
    parts = [__version__, repr(nvrtc_version()), repr(OPTIONS), arch, repr(defines)]
    for name, text in files.items():
        parts += [name, text]
    h = blake2b(digest_size=20)
    for part in parts:
        data = part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def compile_source(source: str, defines: Defines, arch: str, files: Mapping[str, str] | None = None) -> Compiled:
    """Compile one source for one target.

    Args:
        source: see :func:`source_path`.
        defines: macros.
        arch: ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ...
        files: what :func:`read_sources` gave, if it is at hand.

    Raises:
        KernelError: NVRTC is missing, or refuses the source; the message holds its log.
    """
    nvrtc_version()
    nvrtc = bindings("nvrtc")
    frozen = freeze(defines)
    files = files or read_sources(source_path(source))
    (name, text), *headers = files.items()
    error, program = nvrtc.nvrtcCreateProgram(
        text.encode(), name.encode(), len(headers), [t.encode() for _, t in headers], [n.encode() for n, _ in headers]
    )
    if int(error):
        raise KernelError(f"NVRTC does not take {describe(source, frozen)}: {error.name}")
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *(f"--define-macro={n}={v}" for n, v in frozen)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode(errors="replace")
        log = _TIMES.sub("", log).strip()
        if int(error):
            raise KernelError(f"{describe(source, frozen)} does not compile for {arch}: {error.name}\n{log}")
        cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(source, frozen, arch, cubin, log)


def _text(size: Any, get: Any, program: Any) -> bytes:
    """One of NVRTC's pairs of functions: the size of a result, and the result."""
    error, count = size(program)
    data = bytearray(count)
    if not int(error):
        (error,) = get(program, data)
    if int(error):
        raise KernelError(f"NVRTC does not hand out what it compiled: {error.name}")
    return bytes(data)
