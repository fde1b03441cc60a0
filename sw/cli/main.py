"""The command ``systole``: all commands under one name."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from systole import __version__

COMMANDS = {
    "run": "systole.sw.cli.run",
    "check": "systole.sw.cli.check",
    "diff": "systole.sw.cli.diff",
    "quantize": "systole.sw.cli.quantize",
    "generate": "systole.sw.cli.generate",
    "bench": "systole.sw.cli.bench",
    "zoo": "systole.sw.cli.zoo",
    "demo": "systole.sw.cli.demo",
}
"""Modules by command. Each is imported when its command is asked for: none needs all libraries."""


class LazyCommands(TyperGroup):
    """The commands of :data:`COMMANDS`, imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order in which ``--help`` shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(module.main)
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyCommands, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"systole {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show it")
    ] = False,
) -> None:
    """Generate int8 inference accelerators, compile ONNX models for them, and simulate both."""
