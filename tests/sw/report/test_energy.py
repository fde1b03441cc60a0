"""The energy model: its tables, and what follows from counted accesses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from systole.isa import Config
from systole.sw.compiler import compile_graph
from systole.sw.frontend.load import load
from systole.sw.report.energy import (
    DEFAULT,
    FOLDER,
    PARTS,
    EnergyError,
    EnergyTable,
    energy,
    known_tables,
    program_energy,
)
from systole.sw.simulate.accesses import Accesses
from systole.sw.zoo import digits

TABLE = EnergyTable.load(DEFAULT)


def test_known_tables_load():
    assert known_tables() == ["45nm", "7nm"]
    for name in known_tables():
        assert EnergyTable.load(name).source


def test_memories_between_and_beyond_the_capacities_of_the_table():
    assert TABLE.access(8192, 64) == pytest.approx(10)
    assert TABLE.access(32768, 128) == pytest.approx(40)
    assert TABLE.access(16384, 64) == pytest.approx(10 * 2**0.5)
    # The power of the nearest two goes on.
    assert TABLE.access(2048, 64) == pytest.approx(5)
    assert TABLE.access(32 << 20, 64) == pytest.approx(500)


def test_a_frame_of_counts():
    config = Config(scratchpad_bytes=4 * 32768)
    counts = Accesses(macs=10, scratchpad_reads=3, dram_read_bytes=5, dram_write_bytes=1)
    parts = energy(counts, config, TABLE)
    assert {name: pj for name, pj in parts.items() if pj} == pytest.approx(
        {"array": 10 * 0.3, "scratchpad": 3 * 2 * 20, "DRAM": 48 * 8}
    )
    assert tuple(parts) == PARTS


def test_the_array_by_its_options():
    """One vector through one tile, on 4 rows and 4 columns."""
    counts = Accesses(macs=16, weight_reads=4)

    def array(**options) -> float:
        return energy(counts, Config.sized(4, 4, **options), TABLE)["array"]

    assert array() == pytest.approx(16 * (0.2 + 0.1))
    # A product of 9 by 9 bits, and a subtraction of 9 bits for each of 4 + 16 operands.
    wide, narrow = 81 / 64, 9 / 8
    assert array(zero_points=True) == pytest.approx(16 * (0.2 * wide + 0.1) + 20 * 0.03 * narrow)
    # For each of 8 pairs two sums of 9 bits, their product, and a sum of 32 bits; at the edges a
    # product and a sum for each of 2 + 8 pairs; two sums at the foot of each column.
    pairs = 8 * (2 * 0.03 * narrow + 0.2 * wide + 0.1)
    assert array(inner_product="fast") == pytest.approx(pairs + 10 * (0.2 + 0.1) + 8 * 0.1)


def test_window_products_with_zero_points_are_of_9_bits():
    config = Config.sized(4, 4, zero_points=True)
    assert energy(Accesses(window_macs=1), config, TABLE)["window"] == pytest.approx(0.225 + 0.1)


def test_a_part_written_costs_its_share_of_a_word():
    config = Config.sized(12, 8)
    assert config.word_groups == 3
    whole = energy(Accesses(scratchpad_reads=1), config, TABLE)["scratchpad"]
    parts = energy(Accesses(scratchpad_writes=3), config, TABLE)["scratchpad"]
    assert parts == pytest.approx(whole)


def test_layers_and_commands_make_up_the_frame():
    program = compile_graph(load(digits.MODEL), Config())
    report = program_energy([program], TABLE)
    assert len(report.layers) == len(program.layers)
    layers = sum(sum(layer.values()) for layer in report.layers)
    commands = 8 * TABLE.dram_bit * program.fetched_bytes
    assert layers + commands < report.total < layers + 1.1 * commands
    twice = program_energy([program, program], TABLE)
    assert twice.total == pytest.approx(2 * report.total)
    assert twice.tops_per_watt == pytest.approx(report.tops_per_watt)
    # Twice the cost of everything is half the operations for it.
    double = replace(
        TABLE,
        multiply=2 * TABLE.multiply,
        add_8=2 * TABLE.add_8,
        add_32=2 * TABLE.add_32,
        requantise=2 * TABLE.requantise,
        combine=2 * TABLE.combine,
        sram=tuple((size, 2 * cost) for size, cost in TABLE.sram),
        dram_bit=2 * TABLE.dram_bit,
    )
    assert program_energy([program], double).tops_per_watt == pytest.approx(
        report.tops_per_watt / 2
    )


GOOD = (FOLDER / "45nm.toml").read_text()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("multiply = 0.2", "multiply = -1", "arithmetic_pj.multiply = -1: must be 0 or more"),
        ("multiply = 0.2", "multiply = nan", "arithmetic_pj.multiply = nan: must be 0 or more"),
        ("multiply = 0.2", 'multiply = "much"', "arithmetic_pj.multiply must be a number"),
        ("pj_per_bit = 8", "", "dram.pj_per_bit must be a number"),
        ("[10, 20, 100]", "[10, 20]", "two lists of equal length"),
        ("[8192, 32768, 1048576]", "[8192, 8192, 1]", "the bytes rising"),
        ("[dram]", "[dram", "Expected ']'"),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(old, new, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert EnergyTable.load(str(path)).multiply == TABLE.multiply
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(EnergyError) as e:
        EnergyTable.load(str(path))
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_table_that_is_not_there():
    with pytest.raises(EnergyError, match=r"8nm: No such file .* known are 45nm, 7nm"):
        EnergyTable.load("8nm")
