"""The sub-commands of `saccade`."""

from __future__ import annotations

import typer

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
app.command()(serve)
app.command()(generate)
app.command("eval")(evaluate)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)
bench.command()(decode)
bench.command()(prefill)
bench.command()(engine)
bench.command("serve")(load)
app.add_typer(bench, name="bench")
