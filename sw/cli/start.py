"""How the commands start, alone and under one name: all that they import is imported here, where
Ctrl-C is expected from the first moment on."""

from __future__ import annotations

import importlib

from systole.isa.tools.interrupt import interruptible


def start_command(name: str) -> None:
    """Run one command by itself, as ``python -m sw.NAME`` does: ``main`` of ``sw.cli.NAME``."""
    with interruptible():
        import typer

        app = typer.Typer(add_completion=False)
        app.command()(importlib.import_module(f"systole.sw.cli.{name}").main)
        app()


def start_all() -> None:
    """Run the command ``systole``."""
    with interruptible():
        from systole.sw.cli.main import app

        app(prog_name="systole")
