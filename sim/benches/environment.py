"""Environment of every cocotb bench: the simulated design's configuration and clock period."""

from __future__ import annotations

import json
import os
from typing import Any

from systole.isa import Config

CONFIG = Config.from_dict(json.loads(os.environ["SYSTOLE_CONFIG"]))
PERIOD_NS = 10

Handle = Any
"""A port or a design in the simulator; cocotb knows its kind only at run time."""
