"""The page of area and clock, from results made up for the purpose."""

from __future__ import annotations

from systole.hw.synthesis import ecp5
from systole.hw.synthesis.kept import BEFORE, PATH
from systole.hw.synthesis.results import LANED, NARROW, PARTS, Job, Store
from systole.sw.cli.silicon import OUTPUT
from systole.sw.report import silicon


def made_up(path, entries) -> Store:
    store = Store(path)
    for job, figures in entries.items():
        store.entries[job.label] = {"tools": {"pyosys": "1"}, "figures": {"seconds": 60} | figures}
    return store


def cells(lut: int, dsp: int = 1) -> dict:
    area = dict.fromkeys(("lut", "carry", "small_ram", "ff", "dsp", "ram"), 1)
    return {
        "area": area | {"lut": lut, "dsp": dsp},
        "by_module": {"conv": area},
        "estimate": {"registers": {"delay": 10.0}, "inputs": None},
    }


def test_the_page_is_of_the_results_kept():
    assert silicon.document(Store(BEFORE), Store(PATH)) == OUTPUT.read_text(encoding="utf-8")


def test_before_stands_before_now(tmp_path):
    chip, routed = Job("chip", 4, 4, "cells"), Job("chip", 4, 4, "routed")
    before = made_up(tmp_path / "before.json", {chip: cells(30000)})
    now = made_up(
        tmp_path / "now.json",
        {chip: cells(20000, dsp=50), routed: {"mhz": 100.0, "path": ["1.0 ns  conv.x"]}},
    )
    page = silicon.document(before, now)
    assert "| 4 x 4 | 30,000 → 20,000 | 1 | 1 | 1 | 1 → 50 | 1 | yes | 100 | 100.0 |" in page
    # 16 MACs at 100 MHz, on 20,000 LUT4 and 50 multipliers.
    assert "| 4 x 4 | 1.60 | 0.080 | 0.0320 |" in page
    assert "1.0 ns  conv.x" in page


def test_a_chip_that_does_not_fit(tmp_path):
    chip = Job("chip", 8, 8, "cells")
    page = silicon.document(
        Store(tmp_path / "none.json"),
        made_up(tmp_path / "now.json", {chip: cells(1, dsp=ecp5.AVAILABLE["dsp"] + 1)}),
    )
    assert "no: dsp" in page


def test_large_machines_are_computed_from_small_ones(tmp_path):
    """100 GE an element and 10 a lane: every other block takes 10 a row at each size, or those of
    four rows at every size."""
    entries = {}
    for n in (4, 8):
        for block in PARTS:
            ge = 100 * n * n if block == "array" else 10 * n
            entries[Job(block, n, n, "gates")] = {"ge": ge, "delay": 0.95}
    for block in LANED:
        entries[Job(block, 8, 8, "gates", NARROW)] = {"ge": 40, "delay": 0.95}
    store = made_up(tmp_path / "now.json", entries)
    page = silicon.document(Store(tmp_path / "none.json"), store)
    assert "| array | 1 | 1,600 | 10 | 1.6 | 6.4 | 25.6 | 102.4 | 25.6 | 102.4 |" in page
    assert "| combine | 1 | 40 | 10 | 0.0 | 0.1 | 0.2 | 0.3 | 0.0 | 0.0 |" in page
    assert "; 95 % at 32 x 32; 93 % at 16 x 16, narrow; 97 % at 32 x 32, narrow." in page
    assert silicon.draw(Store(tmp_path / "none.json"), store).startswith(b"<?xml")
