"""A quick estimate of the longest paths of an ECP5 netlist, before anything is placed.

Delays of cells are those of nextpnr's data base for speed grade 6. A wire is given the delay that
wires had on average in blocks that were placed and routed (``WIRE``), more for a large fan-out. It
is an estimate: for what a device does, place and route.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Bit = int | str
"""A net of one bit in Yosys' JSON: a number, or a constant."""

LUT, WIDE, FIRST_SUM, SUM, CARRY_IN, CARRY, INTO_CARRY = 0.24, 0.24, 0.85, 0.47, 0.40, 0.07, 0.45
MULTIPLY, DISTRIBUTED = 3.93, 0.24
CLOCK_TO_Q, SETUP, RAM_OUT, DISTRIBUTED_OUT = 0.52, 0.0, 5.74, 0.67
WIRE, FAR_WIRE, FAN_OUT = 0.85, 1.8, 0.02
INTO_FLIP_FLOP = 0.13
"""Nanoseconds."""
FAR = 40
"""Sinks beyond which a net becomes no slower: it is buffered, or global."""
CLOCKED = {
    "TRELLIS_FF": (CLOCK_TO_Q, ("Q",)),
    "DP16KD": (RAM_OUT, ("DOA", "DOB")),
    "TRELLIS_DPR16X4": (DISTRIBUTED_OUT, ("DO",)),
}
"""Of a cell that starts paths: the delay from its clock, and the outputs (or how they begin)."""
HARD = {"MULT18X18D", "DP16KD"}
"""Cells in columns of their own: their wires are the long ones (``FAR_WIRE``)."""
BESIDE = ("LUT4", "PFUMX", "CCU2C", "L6MUX21")
"""Cells that share a slice with the flip-flop they drive."""
CLOCKS = ("CLK", "CLKA", "CLKB", "WCK")


DERIVED = re.compile(r"_(LUT4|PFUMX|L6MUX21|CCU2C|TRELLIS_|MULT18X18D|DP16KD)|\$|\[")
"""Where what Yosys or nextpnr appended to a signal's name begins."""


def signal_of(name: str) -> str:
    """The signal that a net or cell of a netlist is named after."""
    return DERIVED.split(name)[0]


@dataclass(frozen=True)
class Path:
    """A longest path, in ns, with the names of the nets it goes through."""

    delay: float
    nets: tuple[str, ...]
    levels: int
    """Cells between start and end."""

    def text(self) -> str:
        """Delay and the named nets, those of the same signal once."""
        names: list[str] = []
        for name in map(signal_of, self.nets):
            if not names or names[-1] != name:
                names.append(name)
        return f"{self.delay:.1f} ns, {self.levels} levels: {' -> '.join(names)}"


@dataclass(frozen=True)
class Estimate:
    """The longest paths by kind; None where there is none."""

    registers: Path | None
    """From register to register: what the block's clock allows."""
    inputs: Path | None
    """From a port to a register."""
    outputs: Path | None
    """From a register to a port."""
    through: Path | None
    """From port to port."""

    @property
    def longest(self) -> float:
        """The longest of all, ns: the period with ports behind registers."""
        paths = (self.registers, self.inputs, self.outputs, self.through)
        return max((path.delay for path in paths if path), default=0.0)


@dataclass(frozen=True)
class _Arrival:
    """When a net settles, after which net, and how many cells are before it."""

    at: float
    before: Bit | None
    levels: int


def _arcs(kind: str, inputs: list[tuple[str, Bit]], out: str) -> Iterator[tuple[Bit, float]]:
    """The inputs on which an output of a combinational cell depends, with delays."""
    for name, bit in inputs:
        if kind == "LUT4":
            yield bit, LUT
        elif kind in ("PFUMX", "L6MUX21"):
            yield bit, WIDE
        elif kind == "CCU2C":
            first, carry = name.endswith("0"), name == "CIN"
            if out == "COUT":
                yield bit, CARRY if carry else INTO_CARRY
            elif out == "S0" and (first or carry):
                yield bit, CARRY_IN if carry else LUT
            elif out == "S1":
                yield bit, SUM if carry or not first else FIRST_SUM
        elif kind == "TRELLIS_DPR16X4":
            if name == "RAD":
                yield bit, DISTRIBUTED
        elif kind == "MULT18X18D":
            yield bit, MULTIPLY


class _Netlist:
    """The netlist of one flat module, as arcs between bits."""

    def __init__(self, module: dict[str, Any]):
        self.names = _names(module)
        self.arcs: dict[Bit, list[tuple[Bit, float, str]]] = {}
        self.starts: dict[Bit, float] = {}
        self.ends: list[tuple[Bit, str]] = []
        self.end_names: dict[Bit, str] = {}
        self.kind_of: dict[Bit, str] = {}
        self.fan_out: dict[Bit, int] = defaultdict(int)
        for name, cell in module["cells"].items():
            self._add(name, cell)
        ports = module["ports"].values()
        self.inputs = {b for p in ports if p["direction"] == "input" for b in p["bits"]}
        self.outputs = {b for p in ports if p["direction"] == "output" for b in p["bits"]}

    def _add(self, name: str, cell: dict[str, Any]) -> None:
        kind, directions = cell["type"], cell["port_directions"]
        inputs: list[tuple[str, Bit]] = []
        outputs: list[tuple[str, Bit]] = []
        for port, bits in cell["connections"].items():
            side = inputs if directions.get(port) == "input" else outputs
            side.extend((port, bit) for bit in bits if not isinstance(bit, str))
        for _, bit in inputs:
            self.fan_out[bit] += 1
        delay, starting = CLOCKED.get(kind, (0.0, ()))
        for port, bit in outputs:
            self.kind_of[bit] = kind
            if port.startswith(starting) and starting:
                self.starts[bit] = delay
            arcs = [(b, d, kind) for b, d in _arcs(kind, inputs, port)]
            if arcs:
                self.arcs[bit] = arcs
        if starting:
            self.end_names |= {bit: name for _, bit in inputs}
            read_address = "RAD" if kind == "TRELLIS_DPR16X4" else None
            self.ends += [
                (bit, f"{kind}.{port}")
                for port, bit in inputs
                if port not in CLOCKS and port != read_address
            ]

    def wire(self, bit: Bit, kind: str, port: str = "") -> float:
        """The delay of the wire from a bit's driver to an input of a cell of ``kind``."""
        driver = self.kind_of.get(bit, "")
        if kind in ("PFUMX", "L6MUX21") and driver in ("LUT4", "PFUMX"):
            return 0.0
        if kind == driver == "CCU2C" and self.fan_out[bit] == 1:
            return 0.0  # the carry chain
        if port == "TRELLIS_FF.DI" and driver in BESIDE and self.fan_out[bit] == 1:
            return INTO_FLIP_FLOP
        base = FAR_WIRE if HARD & {kind, driver, port.partition(".")[0]} else WIRE
        return base + FAN_OUT * min(self.fan_out[bit], FAR)

    def arrivals(self, starts: dict[Bit, float]) -> dict[Bit, _Arrival]:
        """When each net settles that depends on one of ``starts``, at the latest."""
        found = {bit: _Arrival(at, None, 0) for bit, at in starts.items()}
        for bit in self._order():
            for before, delay, kind in self.arcs[bit]:
                if before in found:
                    at = found[before].at + self.wire(before, kind) + delay
                    if bit not in found or at > found[bit].at:
                        found[bit] = _Arrival(at, before, found[before].levels + 1)
        return found

    def _order(self) -> list[Bit]:
        """Bits that depend on others, each after all it depends on."""
        if not hasattr(self, "_ordered"):
            waiting = {b: sum(a in self.arcs for a, _, _ in arcs) for b, arcs in self.arcs.items()}
            users: dict[Bit, list[Bit]] = defaultdict(list)
            for bit, arcs in self.arcs.items():
                for before, _, _ in arcs:
                    users[before].append(bit)
            ready = [b for b, n in waiting.items() if not n]
            for bit in ready:
                for user in users[bit]:
                    waiting[user] -= 1
                    if not waiting[user]:
                        ready.append(user)
            self._ordered = ready
        return self._ordered

    def longest(self, found: dict[Bit, _Arrival], ends: list[tuple[Bit, str]]) -> Path | None:
        """The longest path to one of ``ends``: bits, with the input of a cell or ''."""
        best = max(
            (
                (found[b].at + (self.wire(b, "", p) + SETUP if p else 0), b)
                for b, p in ends
                if b in found
            ),
            key=lambda pair: pair[0],
            default=None,
        )
        if best is None:
            return None
        at: Bit | None = best[1]
        levels, nets = found[best[1]].levels, []
        if ends is self.ends:
            nets.append(self.end_names[best[1]])
        while at is not None:
            if at in self.names:
                nets.append(self.names[at])
            at = found[at].before
        return Path(round(best[0], 2), tuple(reversed(nets)), levels)


def _names(module: dict[str, Any]) -> dict[Bit, str]:
    """The name of each bit: of those that a person gave, the innermost and shortest."""
    names: dict[Bit, str] = {}
    for name, net in module["netnames"].items():
        if net.get("hide_name") or "$" in name:
            continue
        for i, bit in enumerate(net["bits"]):
            full = f"{name}[{i}]" if len(net["bits"]) > 1 else name
            if not isinstance(bit, str):
                old = names.get(bit)
                if old is None or _derived(full) < _derived(old):
                    names[bit] = full
    return names


def _derived(name: str) -> tuple[bool, int, int, str]:
    """Orders names: those that Yosys derived from cells come last, those of inner modules first."""
    return len(signal_of(name)) < len(name.partition("[")[0]), -name.count("."), len(name), name


def estimate(module: dict[str, Any]) -> Estimate:
    """The longest paths of a flat module in Yosys' JSON."""
    netlist = _Netlist(module)
    registers = netlist.arrivals(netlist.starts)
    ports = netlist.arrivals({bit: CLOCK_TO_Q for bit in netlist.inputs})
    leaving = [(bit, "") for bit in netlist.outputs]
    return Estimate(
        netlist.longest(registers, netlist.ends),
        netlist.longest(ports, netlist.ends),
        netlist.longest(registers, leaving),
        netlist.longest(ports, leaving),
    )
