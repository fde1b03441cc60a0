"""The clock that a run's times are given for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from systole.hw.synthesis import kept
from systole.isa import Config
from systole.sw.report.clock import ASSUMED_MHZ, Clock, clock_of

ROUTED, OTHER = Config.sized(8, 8), Config.sized(4, 8)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Results in which one chip has been placed and routed."""
    entries = {
        "chip 8x8 cells": {"config": f"{ROUTED.hash:#010x}", "figures": {}, "device": "another"},
        "chip 8x8 routed": {
            "config": f"{ROUTED.hash:#010x}",
            "figures": {"mhz": 91.234},
            "device": "LFE5U-85F-6",
        },
        "reduce 4x8 routed": {
            "config": f"{OTHER.hash:#010x}",
            "figures": {"mhz": 120.0},
            "device": "LFE5U-85F-6",
        },
    }
    path = tmp_path / "now.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    monkeypatch.setattr(kept, "PATH", path)


def test_a_chip_that_was_routed_has_its_clock(measured):
    clock = clock_of(ROUTED)
    assert clock == Clock(91.2, "placed and routed on LFE5U-85F-6")
    assert str(clock) == "91.2 MHz (placed and routed on LFE5U-85F-6)"


def test_any_other_clock_is_called_assumed(measured):
    """A block alone says nothing of the chip, and a clock that is given goes first."""
    assert str(clock_of(OTHER)) == f"an assumed clock of {ASSUMED_MHZ:g} MHz"
    assert str(clock_of(ROUTED, 50)) == "an assumed clock of 50 MHz"


def test_a_run_does_not_import_the_generator():
    """Amaranth and the whole generator would cost every run 0.4 s before it begins."""
    code = "import sys, systole.sw.session.run; sys.exit('amaranth' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
