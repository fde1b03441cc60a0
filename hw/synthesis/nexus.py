"""A block on a second family, Lattice Nexus (LIFCL): cells, without a clock.

nextpnr-nexus places and routes it, but its data base has no delays for the multipliers that Yosys
chains into sums there: of a 4 x 4 array, all multipliers, it says 680 MHz.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from systole.hw.synthesis import yosys
from systole.hw.synthesis.blocks import TOP

FAMILY = "LIFCL"
KINDS = {"LUT4": "lut", "CCU2": "carry", "FD1P3": "ff", "MULT": "dsp", "PDP": "ram", "DP16": "ram"}
"""Fields of the result by how the names of cells begin."""


def measure(directory: Path) -> dict[str, Any]:
    """LUTs, carry cells, flip-flops, multipliers and block RAM of the RTL in ``directory``.

    Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    passes = [f"synth_nexus -noiopad -top {TOP} -json nexus.json"]
    seconds = yosys.run([*yosys.read_all(directory), *passes], directory, "nexus.log")
    module = json.loads((directory / "nexus.json").read_text())["modules"][TOP]
    kinds = Counter(cell["type"] for cell in module["cells"].values())
    fields: Counter[str] = Counter()
    for kind, count in kinds.items():
        for start, field in KINDS.items():
            if kind.startswith(start):
                fields[field] += count
    return {f: fields[f] for f in KINDS.values()} | {"cells": dict(kinds), "seconds": seconds}
