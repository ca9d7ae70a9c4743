"""The sub-commands of `saccade`."""

from __future__ import annotations

from typing import Annotated

import typer

from service.api.state import saccade_version
from service.commands.bench import decode, engine, prefill
from service.commands.evaluate import evaluate
from service.commands.generate import generate
from service.commands.load import load
from service.commands.serve import serve

app = typer.Typer(
    help="Serve long-context language models that attend only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"saccade {saccade_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None: ...


app.command()(serve)
app.command()(generate)
app.command("eval")(evaluate)
bench = typer.Typer(
    help="Measure this machine, or a server under load.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
bench.command()(decode)
bench.command()(prefill)
bench.command()(engine)
bench.command("serve")(load)
app.add_typer(bench, name="bench")
