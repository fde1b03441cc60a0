"""How commands start, and how Ctrl-C ends them: with one line on stderr and status 130."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand

INTERRUPTED = 130
"""Exit status, as shells have it for what SIGINT ended."""


class Interruptible(TyperCommand):
    """A command that Ctrl-C ends with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(_say()) from None


def run_command(module: str) -> None:
    """Run the command in ``module`` by itself, as ``python -m sw.NAME`` does."""
    try:
        command = importlib.import_module(module).main
    except KeyboardInterrupt:
        sys.exit(_say())
    app = typer.Typer(add_completion=False)
    app.command(cls=Interruptible)(command)
    app()


def _say() -> int:
    typer.echo("interrupted", err=True)
    return INTERRUPTED
