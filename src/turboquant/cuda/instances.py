"""Which specialisations of the kernels exist: what tests compile without a GPU, and ``python -m turboquant.cuda`` lists."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from .compiler import Compiled, Defines, compile_source, freeze, source_path

MANY_VALUES = 16
_Frozen = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Instances:
    """The specialisations of one kernel.

    Attributes:
        source: as for ``jit.get_kernel``.
        lister: gives every set of macros that the wrapper may ask for.
        params: the struct that mirrors the kernel's; tests compare its size.
    """

    source: str
    lister: Callable[[], Iterable[Defines]]
    params: type[ctypes.Structure] | None = None

    def all(self) -> list[_Frozen]:
        """Every set of macros once, in the order of the lister."""
        return list(dict.fromkeys(freeze(d) for d in self.lister()))


_registered: dict[str, Instances] = {}


def register_instances(
    source: str, lister: Callable[[], Iterable[Defines]], params: type[ctypes.Structure] | None = None
) -> None:
    """Declare what a wrapper may ask ``get_kernel`` for; called where the wrapper is defined, once per kernel."""
    _registered[source] = Instances(source, lister, params)


def instances() -> dict[str, Instances]:
    """The specialisations of all kernels of this package, and of others that were registered, by source."""
    package = __package__ or ""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
    return dict(_registered)


def representative(every: Iterable[_Frozen]) -> list[_Frozen]:
    """A few sets of macros in which every value of every macro occurs: greedily the one with most values not seen yet.

    A macro of more than :data:`MANY_VALUES` values, such as a size, is taken to follow from the others and left out of account.
    """
    left = list(every)
    values = Counter(name for name, _ in {pair for macros in left for pair in macros})
    missing = {pair for macros in left for pair in macros if values[pair[0]] <= MANY_VALUES}
    chosen: list[_Frozen] = []
    while missing:
        best = max(left, key=lambda macros: len(missing.intersection(macros)))
        missing.difference_update(best)
        chosen.append(best)
    return chosen or left[:1]


def compile_all(archs: Iterable[str], limit: int | None = None, sources: Collection[str] | None = None) -> Iterator[Compiled]:
    """Compile the specialisations of the kernels, one after the other; the disk cache is not used.

    Kernels of one file that are specialised alike are compiled once, see ``Compiled.kernels``.

    Args:
        archs: ``"sm_80"``, ...
        limit: most of each kernel and target, those of :func:`representative` first; all by default.
        sources: kernels; all by default.

    Raises:
        KernelError: one does not compile, or NVRTC is missing.
    """
    archs, done = list(archs), set()
    for source, registered in instances().items():
        if sources is not None and source not in sources:
            continue
        every = registered.all()
        for macros in list(dict.fromkeys([*representative(every), *every]))[:limit]:
            module = source_path(source), macros
            if module not in done:
                done.add(module)
                for arch in archs:
                    yield compile_source(source, dict(macros), arch)
