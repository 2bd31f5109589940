"""``python -m turboquant.cuda``: compile the kernels, without a GPU, and list what each occupies."""

from __future__ import annotations

import argparse
import sys
import time

from ..errors import KernelError
from .compiler import Compiled, compile_source, nvrtc_version
from .instances import instances, representative

_COLUMNS = ("kernel", "arch", "registers", "stack", "stores", "loads", "shared", "code", "seconds", "macros")
_FORMAT = "{:<20} {:<7} {:>9} {:>6} {:>6} {:>6} {:>7} {:>7} {:>7}  {}"


def main(arguments: list[str] | None = None) -> int:
    """Print one line per kernel, specialisation and target.

    Returns:
        0; 1 if a kernel spills registers or has a stack; 2 if one does not compile.
    """
    parser = argparse.ArgumentParser(prog="python -m turboquant.cuda", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="such as decode or decode:combine; all by default")
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="targets (default: %(default)s)")
    parser.add_argument(
        "--all", action="store_true", help="every specialisation, not only so many that every macro value occurs"
    )
    parser.add_argument(
        "--define",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only specialisations with this macro; may be repeated; implies --all",
    )
    options = parser.parse_args(arguments)
    wanted = {tuple(text.partition("=")[::2]) for text in options.define}
    known = instances()
    unknown = set(options.kernels).difference(known)
    if unknown:
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(known) or 'none'}")
    try:
        version = ".".join(map(str, nvrtc_version()))
    except KernelError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"NVRTC {version}; sizes in bytes, of one thread except shared and code")
    print(_FORMAT.format(*_COLUMNS))
    code = 0
    for source in options.kernels or known:
        every = known[source].all()
        chosen = every if options.all or wanted else representative(every)
        for macros in chosen:
            if not wanted <= {(n, str(v)) for n, v in macros}:
                continue
            for arch in options.arch:
                start = time.perf_counter()
                try:
                    made = compile_source(source, dict(macros), arch)
                    clean = _show(made, time.perf_counter() - start)
                except KernelError as e:
                    print(e, file=sys.stderr)
                    code = 2
                else:
                    code = max(code, 0 if clean else 1)
    return code


def _show(made: Compiled, seconds: float) -> bool:
    """Print a line; False if the kernel spills or has a stack."""
    u = made.usage
    macros = " ".join(f"{n}={v}" for n, v in made.defines)
    numbers = u.registers, u.stack, u.spill_stores, u.spill_loads, u.shared, len(made.cubin), f"{seconds:.1f}"
    print(_FORMAT.format(made.source, made.arch, *numbers, macros), flush=True)
    return not (u.stack or u.spill_stores or u.spill_loads)


if __name__ == "__main__":
    sys.exit(main())
