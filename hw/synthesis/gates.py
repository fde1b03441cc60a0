"""Gates and delay of a block in a standard-cell library, memories left out.

With Debian's ``qflow-tech-osu018`` (180 nm): area in gate equivalents (GE), of which one is a NAND2
(24 um^2), and the longest path without wires, in ns and in FO4 (an inverter that drives four:
0.095 ns). Without the library only Yosys' generic gates are counted, each with its GE as CMOS.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from systole.hw.synthesis import yosys
from systole.hw.synthesis.blocks import TOP
from systole.hw.verilog import RAM

LIBERTY = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
NAND2 = 24.0
"""The area of one, um^2."""
FO4 = 0.095
"""The delay of an inverter that drives four like it, ns."""
TRANSISTORS = 4
"""Of a NAND2."""
MAPPING = "+strash;ifraig;dch;map -B 0.9;topo;buffer -c;upsize;dnsize;stime -p"
"""Of abc, with a library: map for delay, buffer, size, report the longest path."""


@dataclass(frozen=True)
class Gates:
    """What a block takes as standard cells."""

    ge: int
    """Gate equivalents."""
    registers: int
    """Bits of flip-flops, included in ``ge``; small memories are some of them."""
    delay: float | None
    """The longest path, ns, without wires; None without the library."""
    seconds: float
    """Processor time."""

    @property
    def fo4(self) -> float | None:
        return None if self.delay is None else self.delay / FO4


def _flat(directory: Path) -> list[str]:
    """Commands up to a flat netlist of simple gates and flip-flops; large memories are ports."""
    return [
        *yosys.read_all(directory),
        f"hierarchy -check -top {TOP}",
        f"setattr -mod -set blackbox 1 A:hdlname={RAM} $paramod*{RAM}*",
        f"synth -flatten -noabc -top {TOP}",
    ]


def library(directory: Path) -> Gates:
    """Map onto the library. Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    if not LIBERTY.exists():
        raise yosys.ToolError(f"{LIBERTY} is missing; Debian's qflow-tech-osu018 brings it")
    script = directory / "map.abc"
    script.write_text(MAPPING.removeprefix("+").replace(";", "\n") + "\n")
    passes = [
        *_flat(directory),
        f"dfflibmap -liberty {LIBERTY}",
        "opt -fast -purge",
        f"abc -liberty {LIBERTY} -script {script.name}",
        "clean",
        f"tee -q -o stat.json stat -json -liberty {LIBERTY}",
    ]
    seconds = yosys.run(passes, directory, "gates.log")
    found = json.loads((directory / "stat.json").read_text())["design"]
    delays = re.findall(r"Delay = *([\d.]+) ps", (directory / "gates.log").read_text())
    cells = found["num_cells_by_type"]
    return Gates(
        round(float(found["area"]) / NAND2),
        sum(n for kind, n in cells.items() if kind.startswith("DFF")),
        round(float(delays[-1]) / 1000, 3) if delays else None,
        seconds,
    )


def generic(directory: Path) -> Gates:
    """Count generic gates: the same everywhere, with no library, and quick.

    Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    passes = [
        *_flat(directory),
        "setattr -unset init w:*",
        "dfflegalize -cell $_DFF_P_ x",
        "abc -g AND,NAND,OR,NOR,XOR,XNOR,MUX -script +strash;ifraig;map",
        "clean",
        "tee -q -o stat.json stat -json -tech cmos",
    ]
    seconds = yosys.run(passes, directory, "gates.log")
    found = json.loads((directory / "stat.json").read_text())["design"]
    registers = found["num_cells_by_type"].get("$_DFF_P_", 0)
    transistors = int(str(found["estimated_num_transistors"]).rstrip("+"))
    return Gates(round(transistors / TRANSISTORS), registers, None, seconds)
