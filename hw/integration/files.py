"""Everything that goes beside the RTL into a folder: what tools need to take it in."""

from __future__ import annotations

from collections.abc import Iterable

from systole.hw.integration.wrapper import CLOCK, RESET, WRAPPER
from systole.isa import VERSION

SOURCES = "rtl"
"""The folder of the SystemVerilog files."""
CLOCK_MHZ = 100
"""What the constraints ask for, to be edited."""
WAIVERS = """`verilator_config
// What `verilator -Wall` would say of generated code, and why it is no fault.

// Registers have the initial values of their reset: FPGAs load them, and simulators start clean.
lint_off -rule PROCASSINIT
// Yosys leaves out the zeros that extend a narrower operand, as the language allows.
lint_off -rule WIDTHEXPAND
// Yosys writes `!` and `&&` for comparisons with zero of several bits.
lint_off -rule WIDTHTRUNC
// Ports and fields of records that a block has no use for in this configuration.
lint_off -rule UNUSEDSIGNAL
lint_off -rule UNUSEDPARAM
lint_off -rule UNDRIVEN
// Comparisons that this configuration decides.
lint_off -rule CMPCONST
// Fields of one record that depend on each other, bit by bit without a loop.
lint_off -rule UNOPTFLAT
// An instance that has the name of one of its ports.
lint_off -rule VARHIDDEN
// Module names are longer than the words they are made of.
lint_off -rule DECLFILENAME
"""


def file_list(sources: Iterable[str]) -> str:
    """The list of sources that most tools read with ``-f``; the wrapper is the top."""
    return "\n".join(sources) + "\n"


def design_constraints() -> str:
    """The clock and the reset as SDC."""
    return (
        f"# {CLOCK_MHZ} MHz: edit the period to your clock.\n"
        f"create_clock -name {CLOCK} -period {1000 / CLOCK_MHZ:.3f} [get_ports {CLOCK}]\n"
        f"# The wrapper synchronises the release of the reset.\n"
        f"set_false_path -from [get_ports {RESET}]\n"
    )


def lattice_constraints() -> str:
    """The clock as LPF, for Diamond and nextpnr-ecp5."""
    return (
        f"# {CLOCK_MHZ} MHz: edit it to your clock.\n"
        f'FREQUENCY PORT "{CLOCK}" {CLOCK_MHZ} MHZ;\n'
        "BLOCK ASYNCPATHS;\n"
    )


def core_file(sources: Iterable[str]) -> str:
    """A FuseSoC core file (CAPI2) with the targets ``default`` and ``lint``."""
    files = "\n".join(f"      - {source}" for source in sources)
    return f"""CAPI=2:
name: ::systole:{VERSION}.0.0
description: An int8 neural-network inference accelerator, generated; see systole.json

filesets:
  rtl:
    files:
{files}
    file_type: systemVerilogSource
  waivers:
    files:
      - systole.vlt
    file_type: vlt
  constraints:
    files:
      - systole.sdc
    file_type: SDC

targets:
  default:
    filesets: [rtl, constraints]
    toplevel: {WRAPPER}
  lint:
    filesets: [rtl, waivers]
    toplevel: {WRAPPER}
    flow: lint
    flow_options:
      tool: verilator
      verilator_options: [-Wall]
"""
