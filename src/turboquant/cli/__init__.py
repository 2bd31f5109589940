"""The command ``turboquant``."""

from __future__ import annotations

import os
import sys

from ..errors import TurboQuantError

_EXTRA = ("typer", "rich")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 cannot run (or the reader went away), 2 wrong input, 130 interrupted.

    Errors of this package become one line on stderr; with ``TURBOQUANT_DEBUG=1`` they keep their traceback.
    """
    # Libraries below draw bars of their own over the commands' output (the GGUF reader does); tqdm reads this when imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import rich  # noqa: F401  (typer starts without it, commands do not)

        from .app import app
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in _EXTRA:
            raise
        print('The turboquant command needs typer and rich: pip install "turboquant-cache[cli]"', file=sys.stderr)
        sys.exit(1)
    debug = os.environ.get("TURBOQUANT_DEBUG", "") not in ("", "0")
    try:
        app()
    except TurboQuantError as e:
        if debug:
            raise
        _print_error(str(e))
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)
    except BrokenPipeError:
        # The reader, say `head`, has what it wanted. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
