"""A budget of gates for each block, so that a change that costs area is seen.

Generic gates, counted by Yosys in gate equivalents (NAND2): the same on every machine for the same
version. Where a change is worth its gates, the budget is set to the new count, in the same commit.
"""

from __future__ import annotations

import pytest

from systole.hw.synthesis import gates
from systole.hw.synthesis.blocks import small, write_rtl

pytest.importorskip("pyosys", reason="pyosys is not installed: the extra synth")

TOLERANCE = 0.02
BUDGET = {
    "array": 20406,
    "accumulators": 3738,
    "activation-sequencer": 17728,
    "requantise": 16354,
    "combine": 14520,
    "reduce": 63920,
    "scratchpad": 3688,
    "load": 12850,
    "read-manager": 8381,
    "fetch": 6976,
    "shell": 14741,
    "csr": 12161,
    "trace": 6878,
}
"""Gate equivalents of blocks of a 4 x 4 machine with windows of 3 x 3; of one lane where a block
has lanes."""
CONFIG = small(4, 4, window_kernel=3)


@pytest.mark.parametrize("block", BUDGET)
def test_a_block_stays_within_its_budget(block, tmp_path):
    one_lane = {"lanes": 1} if block in ("requantise", "combine") else {}
    write_rtl(block, CONFIG, one_lane, tmp_path)
    found, budget = gates.generic(tmp_path).ge, BUDGET[block]
    assert found <= budget * (1 + TOLERANCE), f"{block}: {found} GE, budget {budget}"
    assert found >= budget * (1 - TOLERANCE), f"{block}: {found} GE; lower its budget of {budget}"
