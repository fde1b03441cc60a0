"""A model of the energy that a program takes: its counted accesses times a table of costs.

It knows the memories, the arithmetic and DRAM. It leaves out the clock tree, wires, control logic,
leakage and the host: for comparing programs and configurations, not for choosing a battery."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systole.isa import Config
from systole.isa.commands import COMMANDS, ROW_POSITIONS, TABLE_BYTES
from systole.isa.rows import EXP_BITS
from systole.isa.timing import FETCH_BUFFER_BYTES, TABLE_WIDTH
from systole.sw.runtime.program import Program
from systole.sw.simulate.accesses import Accesses, fetch_accesses, layer_accesses

FOLDER = Path(__file__).parent
NUMBER_BITS = 36
"""Width of the two memories of rows' numbers."""
DEFAULT = "45nm"
"""The table that is used unless another is chosen."""
PARTS = ("array", "window", "post", "accumulators", "scratchpad", "weights", "control", "DRAM")
"""Where energy goes. ``control``: the memories that commands wait in."""


class EnergyError(ValueError):
    """A table of costs that cannot be used; one sentence."""


@dataclass(frozen=True)
class EnergyTable:
    """What operations cost, in pJ."""

    name: str
    description: str
    """Process and voltage."""
    source: str
    """Where the figures are from."""
    multiply: float
    """A product of two int8."""
    add_8: float
    """A sum of two int8."""
    add_32: float
    """A sum of two int32."""
    requantise: float
    """An int32 to int8."""
    combine: float
    """Two int8 scaled and added, or multiplied."""
    sram: tuple[tuple[float, float], ...]
    """Capacities in bytes, rising, and the cost of 64 bits at each."""
    dram_bit: float
    """A bit read from or written to DRAM, its interface included."""

    def product(self, *bits: int) -> float:
        """The cost of a product of two integers of so many bits: it grows with both widths."""
        return self.multiply * math.prod(bits) / 64

    def access(self, capacity: float, bits: int) -> float:
        """The cost of ``bits`` read from or written to a memory of ``capacity`` bytes. Between the
        capacities of the table, and beyond them, the cost is a power of the capacity."""
        above = next((i for i, (size, _) in enumerate(self.sram) if size >= capacity), -1)
        above = max(above, 1) if above >= 0 else len(self.sram) - 1
        (small, low), (large, high) = self.sram[above - 1], self.sram[above]
        exponent = math.log(high / low) / math.log(large / small)
        return low * (capacity / small) ** exponent * bits / 64

    @classmethod
    def load(cls, name: str) -> EnergyTable:
        """A table by the name of one that comes with Systole (see :func:`known_tables`), or by the
        path of a TOML file like those. Raises :class:`EnergyError`."""
        path = FOLDER / f"{name}.toml" if name in known_tables() else Path(name)
        try:
            with open(path, "rb") as f:
                values = tomllib.load(f)
        except OSError as e:
            known = ", ".join(known_tables())
            raise EnergyError(f"energy table {name}: {e.strerror}; known are {known}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise EnergyError(f"energy table {name}: {e}") from None
        return _parsed(name, values)


def known_tables() -> list[str]:
    """The names of the tables that come with Systole."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _parsed(name: str, values: Mapping[str, Any]) -> EnergyTable:
    def need(key: str, kind: type | tuple[type, ...]) -> Any:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "text" if kind is str else "a list" if kind is list else "a number"
            raise EnergyError(f"energy table {name}: {key} must be {what}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise EnergyError(f"energy table {name}: {key} = {value}: must be 0 or more")
        return value

    number = (int, float)
    sizes, costs = need("sram.bytes", list), need("sram.pj_per_64_bits", list)
    rising = all(isinstance(x, number) and x > 0 for x in (*sizes, *costs)) and all(
        a < b for a, b in zip(sizes, sizes[1:])
    )
    if len(sizes) != len(costs) or len(sizes) < 2 or not rising:
        raise EnergyError(
            f"energy table {name}: sram.bytes and sram.pj_per_64_bits must be two lists of equal "
            "length, 2 or more positive numbers each, the bytes rising"
        )
    return EnergyTable(
        name=name,
        description=need("description", str),
        source=need("source", str),
        multiply=need("arithmetic_pj.multiply", number),
        add_8=need("arithmetic_pj.add_8", number),
        add_32=need("arithmetic_pj.add_32", number),
        requantise=need("arithmetic_pj.requantise", number),
        combine=need("arithmetic_pj.combine", number),
        sram=tuple(zip(sizes, costs, strict=True)),
        dram_bit=need("dram.pj_per_bit", number),
    )


def energy(counts: Accesses, config: Config, table: EnergyTable) -> dict[str, float]:
    """The energy of counted accesses by part, in pJ."""
    rows, cols = 8 * config.rows, 8 * config.cols
    lanes = config.reduced_lanes
    newer = (config.window_square - 1) * lanes
    older = config.window_lines * lanes - newer
    newer = max(newer, 2 * config.rows)  # IM2COL keeps two scratchpad words there.
    bank = table.access(config.scratchpad_bytes / config.banks, rows)
    # Each column and half has a memory of its own.
    sums = config.cols * table.access(4 * config.acc_half, 32)
    weights = table.access(config.weight_bytes, cols)
    lookup = table.access(TABLE_BYTES, 8 * min(config.rows, TABLE_WIDTH))
    line, older_line = (table.access(n * config.window_width, 8 * n) for n in (newer, older))
    words = max(command.words for command in COMMANDS.values())
    queue = table.access(8 * words * (config.queue_depth + 1), 64)
    fetch = table.access(FETCH_BUFFER_BYTES, config.axi_data_bits)
    return {
        "array": _array(counts, config, table),
        "window": counts.window_macs * (table.product(8, config.operand_bits) + table.add_32)
        + (counts.line_reads + counts.line_writes) * line
        + (counts.older_line_reads + counts.older_line_writes) * older_line
        + _rows(counts, config, table),
        "post": counts.requantised * table.requantise
        + counts.combined * table.combine
        # Each lane has a copy of the table.
        + (counts.table_reads + counts.table_writes * config.lanes) * lookup,
        "accumulators": (counts.accumulator_reads + counts.accumulator_writes) * sums,
        "scratchpad": counts.scratchpad_reads * bank
        + counts.scratchpad_writes * bank / config.word_parts,
        "weights": (counts.weight_reads + counts.weight_writes) * weights,
        "control": (counts.queue_reads + counts.queue_writes) * queue
        + (counts.fetch_reads + counts.fetch_writes) * fetch,
        "DRAM": 8 * (counts.dram_read_bytes + counts.dram_write_bytes) * table.dram_bit,
    }


def _rows(counts: Accesses, config: Config, table: EnergyTable) -> float:
    """The energy of the window engine's row operations, in pJ: their memories, and the products
    that they take besides the requantisation's."""
    entry = table.access(TABLE_BYTES * EXP_BITS // 8, EXP_BITS)
    number = table.access(ROW_POSITIONS * NUMBER_BITS // 8, NUMBER_BITS)
    return (
        counts.row_products * (table.product(9, 18) + table.add_32)
        # Each lane has a copy of the table.
        + (counts.row_table_reads + counts.row_table_writes * config.reduced_lanes) * entry
        + (counts.row_number_reads + counts.row_number_writes) * number
    )


def _array(counts: Accesses, config: Config, table: EnergyTable) -> float:
    """The energy of the array's arithmetic, in pJ."""
    bits = config.operand_bits
    product, add = table.product(bits, bits), table.add_32
    # Where zero points are taken off, at the edges.
    vectors = counts.macs // (config.rows * config.cols)
    operands = vectors * config.rows + counts.weight_reads * config.cols
    edges = operands * table.add_8 * bits / 8 if config.zero_points else 0
    if not config.fast:
        return counts.macs * (product + add) + edges
    # Two rows share a product of two sums. Those of neighbouring operands are added up at the
    # edges, once for each vector and each row of weights, and subtracted at the foot.
    pair = table.product(bits + 1, bits + 1) + 2 * table.add_8 * (bits + 1) / 8 + add
    feet = 2 * vectors * config.cols * add
    return counts.macs / 2 * pair + operands / 2 * (product + add) + feet + edges


@dataclass(frozen=True)
class EnergyReport:
    """The energy of a frame by the model."""

    table: str
    """Name of the table of costs."""
    picojoules: dict[str, float]
    """By part."""
    layers: list[dict[str, float]]
    """The same for each layer, without the fetching of commands, in program order."""
    macs: int
    """Useful multiply-accumulates."""

    @property
    def total(self) -> float:
        """All parts, in pJ."""
        return sum(self.picojoules.values())

    @property
    def tops_per_watt(self) -> float:
        """Useful operations, two for each multiply-accumulate, per pJ."""
        return 2 * self.macs / self.total


def program_energy(programs: Iterable[Program], table: EnergyTable) -> EnergyReport:
    """The energy of programs that make up a frame. With no layer at all it is zero."""
    total: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))  # type: ignore[arg-type]
    layers, macs = [], 0
    for program in programs:
        own = [energy(a, program.config, table) for a in layer_accesses(program)]
        for parts in (*own, energy(fetch_accesses(program), program.config, table)):
            total.update(parts)  # type: ignore[arg-type]
        layers += own
        macs += sum(layer.macs for layer in program.layers)
    return EnergyReport(table.name, dict(total), layers, macs)
