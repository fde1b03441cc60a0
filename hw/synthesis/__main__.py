"""Measures a block of the accelerator, or the whole chip, on ECP5.

python -m hw.synthesis requantise --set lanes=4
python -m hw.synthesis chip --config FILE --place
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from systole.hw.synthesis import ecp5
from systole.hw.synthesis.blocks import BLOCKS, BlockError, split, write_rtl
from systole.hw.synthesis.yosys import ToolError
from systole.hw.verilog import GenerateError
from systole.isa import Config, ConfigError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def _value(text: str) -> tuple[str, int | bool]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, int(value, 0)
    except ValueError:
        raise BlockError(f"--set {text}: must be NAME=NUMBER, or NAME=true or =false") from None


def _show(title: str, area: ecp5.Area) -> None:
    typer.echo(
        f"{title:24} {area.lut:7} {area.carry:7} {area.small_ram:7} {area.ff:7} {area.dsp:7} "
        f"{area.ram:7} {area.places:7}"
    )


def _measure(block: str, config: Config, given: dict[str, Any], place: bool, folder: Path) -> None:
    key = write_rtl(block, config, given, folder)
    typer.echo(f"{block} of a {config.rows} x {config.cols} machine, RTL {key}")
    result = ecp5.synthesise(folder)
    typer.echo(f"{'':24}    LUT4   CCU2C DPR16X4      FF  MULT18  DP16KD  places")
    _show("whole", result.area)
    for part, area in sorted(result.by_module.items(), key=lambda p: -p[1].places)[:12]:
        _show("  " + part[:22], area)
    paths = result.estimate
    for kind in ("registers", "inputs", "outputs", "through"):
        path = getattr(paths, kind)
        typer.echo(f"estimate, {kind}: {path.text() if path else 'no path'}")
    typer.echo(f"yosys: {result.seconds:.0f} s")
    if place:
        placed = ecp5.place(folder)
        typer.echo(f"placed and routed on {ecp5.DEVICE}: {placed.mhz} MHz, {placed.seconds:.0f} s")
        for line in ecp5.path_text(placed.path):
            typer.echo("  " + line)


@app.command()
def measure(
    block: Annotated[str, typer.Argument(help=f"{', '.join(BLOCKS)}, or module:Class of hw/")],
    config: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates it
        typer.Option("--config", help="TOML file of the configuration"),
    ] = None,
    setting: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="NAME=VALUE: a field of the configuration or a parameter"),
    ] = None,
    place: Annotated[bool, typer.Option("--place", help="place and route: minutes")] = False,
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--keep", help="folder for RTL, netlist and the tools' output"),
    ] = None,
) -> None:
    """Print area and clock of a block on ECP5, with its longest paths."""
    try:
        base = None if config is None else Config.from_toml(config)
        chosen, given = split(dict(map(_value, setting or [])), base)
        with tempfile.TemporaryDirectory() as temporary:
            folder = keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            _measure(block, chosen, given, place, folder.absolute())
    except (BlockError, ConfigError, GenerateError, ToolError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
