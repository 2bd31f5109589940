"""The typer application. Commands import torch and transformers when they run, so that help and ``plan`` start at once."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .doctor import doctor
from .eval import evaluate_command
from .generate import generate
from .plan import plan

app = typer.Typer(
    name="turboquant",
    help="Compress the KV cache of language models to 1.5-4 bits, and measure what that costs.",
    no_args_is_help=True,
    # Errors a user can cause are printed by main(); all others should show Python's own traceback.
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"turboquant-cache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command("generate")(generate)
app.command("eval")(evaluate_command)
app.command("plan")(plan)
app.command("doctor")(doctor)
