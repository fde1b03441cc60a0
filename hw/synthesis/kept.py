"""The files of results that are kept, to be read without the generator or any tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from systole.isa import Config

PATH = Path(__file__).parent / "results" / "now.json"
BEFORE = PATH.with_name("before.json")
"""What was measured before the work on clock and area, for comparison."""


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a file, by label; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def name_of(config: Config) -> str:
    """What stands for a configuration in the files."""
    return f"{config.hash:#010x}"


def routed_chip(config: Config) -> tuple[float, str] | None:
    """The clock in MHz that the whole chip of a configuration reached, placed and routed, and the
    device; None if it was not measured."""
    for label, entry in entries(PATH).items():
        whole = label.startswith("chip ") and label.endswith(" routed")
        if whole and entry["config"] == name_of(config):
            return entry["figures"]["mhz"], entry["device"]
    return None
