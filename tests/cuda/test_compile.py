"""All CUDA kernels compile for every target, without spilled registers; no GPU is needed.

By default so many specialisations that every value of every macro occurs: the first ones, which hold most values, for all
targets, the others for one target in turn. With --slow all of both.
"""

from __future__ import annotations

import ctypes
import re

import pytest

from turboquant.cuda import jit
from turboquant.cuda.compiler import CSRC, kernel_name, source_path

ARCHS = ("sm_80", "sm_90", "sm_100")
FOR_ALL_ARCHS = 2
#: Constant bank 0 of sm_80 begins with this many bytes before the parameters.
BEFORE_PARAMETERS = 352

Macros = tuple[tuple[str, int | str], ...]


def chosen(slow: bool) -> dict[str, tuple[str, Macros, str]]:
    """(source, macros, target) by a name for people; kernels of one file that are specialised alike are compiled once."""
    found: dict[str, tuple[str, Macros, str]] = {}
    seen = set()
    for source, registered in jit.instances().items():
        every = registered.all()
        for i, macros in enumerate(every if slow else jit.representative(every)):
            key = source_path(source), macros
            if key in seen:
                continue
            seen.add(key)
            # Tables and sizes are long and follow from the others.
            short = "-".join(f"{n.removeprefix('TQ_')}={v}" for n, v in macros if len(str(v)) < 4)
            for arch in ARCHS if slow or i < FOR_ALL_ARCHS else ARCHS[i % 3 :][:1]:
                found[f"{source_path(source).stem}-{i}-{arch}-{short}"] = source, macros, arch
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "macros" in metafunc.fixturenames:
        cases = chosen(metafunc.config.getoption("--slow"))
        metafunc.parametrize(("source", "macros", "arch"), list(cases.values()), ids=list(cases))


def test_every_kernel_is_registered() -> None:
    written = {
        (path.name, name)
        for path in CSRC.glob("*.cu")
        for name in re.findall(r"^\s*TQ_KERNEL\(\s*(\w+)", path.read_text(), re.MULTILINE)
    }
    assert written == {(source_path(s).name, kernel_name(s)) for s in jit.instances()}


def test_compiles_without_spills(source: str, macros: Macros, arch: str) -> None:
    made = jit.compile_source(source, dict(macros), arch)
    assert kernel_name(source) in made.kernels
    spilled = []
    for name, usage in made.kernels.items():
        print(f"{name} {arch}: {usage.registers} registers, {len(made.cubin)} bytes of code")
        if usage.stack or usage.spill_stores or usage.spill_loads:
            spilled.append(f"{name}: {usage}")
    assert not spilled, f"{arch} {dict(macros)}"
    if arch == "sm_80":
        for other in jit.instances().values():
            if other.params is not None and source_path(other.source) == source_path(source):
                size = made.kernels[kernel_name(other.source)].constant - BEFORE_PARAMETERS
                assert size == ctypes.sizeof(other.params), f"{other.params.__name__} mirrors the struct of {other.source}"
