"""Writes the accelerator as SystemVerilog, with what a system on chip needs to take it in.

python -m hw.generate [--rows R --cols C ... | --config FILE] -o DIRECTORY

Into the folder go:

* ``rtl/``: a file for each module. ``systole_axi`` is the top, with the port names of AXI and a
  reset that is active low; ``systole`` is what it wraps. All large memories are ``systole_ram``:
  put an SRAM macro or a block RAM in its place.
* ``systole.json``: the configuration, the plain top's ports, and the list of these files.
* ``systole.f`` and ``systole.core``: the sources for tools and for FuseSoC. ``systole.vlt``: what
  ``verilator -Wall`` would say, and why it is no fault.
* ``systole.sdc``, ``systole.lpf``: the clock.
* ``systole.rdl``, ``systole.h``: the registers for PeakRDL, registers and commands for C.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from amaranth.lib import wiring

from systole.hw.arithmetic.hints import ACTIVE
from systole.hw.integration import files
from systole.hw.integration.modules import split
from systole.hw.integration.wrapper import WRAPPER, wrapper
from systole.hw.top import Systole
from systole.hw.verilog import (
    ACTIVE_SOURCE,
    CLOCK,
    RAM,
    RAM_SOURCE,
    RESET,
    TOP,
    GenerateError,
    verilog,
)
from systole.isa import VERSION, Config, ConfigError
from systole.isa.tools.header import header
from systole.isa.tools.interrupt import interruptible
from systole.isa.tools.systemrdl import registers

MANIFEST = f"{TOP}.json"


def _ports(design: Systole) -> list[dict[str, str | int]]:
    ports: list[dict[str, str | int]] = [
        {"name": name, "direction": "input", "width": 1} for name in (CLOCK, RESET)
    ]
    for path, member, value in design.signature.flatten(design):
        direction = "input" if member.flow is wiring.In else "output"
        name = "__".join(map(str, path))
        ports.append({"name": name, "direction": direction, "width": len(value)})
    return ports


def _package(config: Config, scratch: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest, and the content of all files by name. ``scratch``: a folder for work files."""
    design = Systole(config)
    ports, config_hash = _ports(design), f"{config.hash:#010x}"
    modules = split(verilog(design, TOP, scratch, purge=True))
    modules[RAM] = RAM_SOURCE.lstrip("\n")
    modules[ACTIVE] = ACTIVE_SOURCE.lstrip("\n")
    modules[WRAPPER] = wrapper(TOP, ports, config_hash)
    sources = {f"{files.SOURCES}/{name}.sv": text for name, text in sorted(modules.items())}
    out = {
        **sources,
        f"{TOP}.f": files.file_list(sources),
        f"{TOP}.core": files.core_file(sources),
        f"{TOP}.vlt": files.WAIVERS,
        f"{TOP}.sdc": files.design_constraints(),
        f"{TOP}.lpf": files.lattice_constraints(),
        f"{TOP}.rdl": registers(),
        f"{TOP}.h": header(config),
    }
    manifest = {
        "top": TOP,
        "wrapper": WRAPPER,
        "isa_version": VERSION,
        "config_hash": config_hash,
        "config": config.to_dict(),
        "ports": ports,
        "files": [*out],
    }
    return manifest, out | {MANIFEST: json.dumps(manifest, indent=2) + "\n"}


def generate(config: Config, directory: str | Path) -> dict[str, Any]:
    """Write the accelerator of ``config`` into ``directory``; returns the manifest.

    Files appear whole or not at all, replacing older ones; those that the manifest of an older run
    lists and that are no longer made are removed. Raises :class:`GenerateError` or ``OSError``.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        manifest, contents = _package(config, temporary)
        (temporary / files.SOURCES).mkdir()
        for name, text in contents.items():
            (temporary / name).write_text(text)
        (directory / files.SOURCES).mkdir(parents=True, exist_ok=True)
        old = _listed(directory / MANIFEST)
        for name in contents:
            os.replace(temporary / name, directory / name)
        for name in old - set(contents):
            (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _listed(manifest: Path) -> set[str]:
    """The files that a manifest lists, those alone that lie in its folder; none if it is no
    manifest."""
    try:
        names = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    made = (Path(name) for name in names if isinstance(name, str))
    return {str(p) for p in made if p.parent in (Path(), Path(files.SOURCES))}


def _main(output: Path, config: Path | None, **fields: int | bool | None) -> None:
    """Write the accelerator of a configuration as SystemVerilog, with a manifest.

    Memories not given are sized near their defaults, as the shape of the array allows.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        if config is not None:
            if given:
                option = next(iter(given)).replace("_", "-")
                raise ConfigError(f"--config and --{option} exclude each other")
            chosen = Config.from_toml(config)
        else:
            shape = {name: given.pop(name, getattr(Config, name)) for name in ("rows", "cols")}
            chosen = Config.sized(**shape, **given)
        generate(chosen, output)
    except OSError as e:
        _fail(f"{e.filename or output}: {e.strerror}")
    except (ConfigError, GenerateError) as e:
        _fail(str(e))


def _fail(sentence: str) -> None:
    typer.echo(f"error: {sentence}", err=True)
    raise typer.Exit(2)


def _app() -> typer.Typer:
    """The command, its options made from the fields of ``Config``."""
    annotations: dict[str, Any] = {
        "output": Annotated[Path, typer.Option("--output", "-o", help="folder to write to")],
        "config": Annotated[
            Optional[Path],  # noqa: UP045 - typer evaluates it
            typer.Option("--config", help="TOML file of fields, instead of options"),
        ],
    }
    parameters = [inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY)]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None))
    for field in dataclasses.fields(Config):
        kind = type(field.default)
        note = typer.Option(help=f"default {field.default}")
        annotations[field.name] = Annotated[Optional[kind], note]  # noqa: UP045
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        )

    def command(**values: Any) -> None:
        _main(**values)

    command.__doc__ = _main.__doc__
    command.__annotations__ = annotations
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=annotations[p.name]) for p in parameters]
    )
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    return app


app = _app()

if __name__ == "__main__":
    with interruptible():
        app()
