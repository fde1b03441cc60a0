"""What was measured, kept in a file: by block, machine and target, with a key that says of what.

The key is a hash of the generated RTL, the versions of the tools and the target. A measurement
whose key is still the same is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from systole.hw.synthesis import ecp5, gates, kept, nexus, yosys
from systole.hw.synthesis.blocks import small, write_rtl
from systole.isa import Config


@dataclass(frozen=True)
class Target:
    """A technology, and what is measured in it."""

    device: str
    tools: tuple[str, ...]
    """Packages whose versions count."""
    measure: Callable[[Path], dict[str, Any]]
    """Measures the RTL in a folder."""
    options: tuple[str, ...] = ()
    """What the tools are told besides."""


def _cells(directory: Path) -> dict[str, Any]:
    return dataclasses.asdict(ecp5.synthesise(directory))


def _routed(directory: Path) -> dict[str, Any]:
    cells = ecp5.synthesise(directory)
    placed = ecp5.place(directory)
    return {
        "mhz": placed.mhz,
        "path": ecp5.path_text(placed.path),
        "estimate": cells.estimate.longest,
        "seconds": placed.seconds,
    }


TARGETS: dict[str, Target] = {
    "cells": Target(ecp5.DEVICE, ("pyosys",), _cells),
    "routed": Target(ecp5.DEVICE, ("pyosys", ecp5.NEXTPNR), _routed, ecp5.OPTIONS),
    "gates": Target("OSU018", ("pyosys",), lambda d: dataclasses.asdict(gates.library(d))),
    "generic": Target("generic", ("pyosys",), lambda d: dataclasses.asdict(gates.generic(d))),
    "nexus": Target(nexus.FAMILY, ("pyosys",), nexus.measure),
    "cycles": Target("cycle model", (), lambda directory: {}),
}


@dataclass(frozen=True)
class Job:
    """One measurement: a block of the machine of a shape, on a target."""

    block: str
    rows: int
    cols: int
    target: str
    options: tuple[tuple[str, int | str], ...] = ()
    """Fields of the configuration that are not as by default, with their values."""

    @property
    def chosen(self) -> str:
        """The options as in a configuration's file."""
        return ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.options)

    @property
    def label(self) -> str:
        middle = f" ({self.chosen})" if self.options else ""
        return f"{self.block} {self.rows}x{self.cols}{middle} {self.target}"

    def on(self, target: str) -> Job:
        """The same on another target."""
        return dataclasses.replace(self, target=target)

    @property
    def config(self) -> Config:
        return small(self.rows, self.cols, **dict(self.options))


PARTS = (
    *("array", "accumulators", "weight-sequencer", "activation-sequencer"),
    *("requantise", "combine", "table", "post-walk", "parameters"),
    *("reduce", "issue", "output-walk", "collector"),
    *("scratchpad", "weight-arbiter", "load", "store", "read-manager", "write-manager"),
    *("fetch", "shell", "csr", "trace"),
)
"""Blocks of which none has another in it: together the chip, but for what ties them together."""
GROWING = (
    *("array", "accumulators", "weight-sequencer", "activation-sequencer", "requantise", "combine"),
    *("table", "parameters", "reduce", "issue", "collector", "scratchpad"),
    *("weight-arbiter", "load", "store"),
)
"""Those of them whose size depends on the array's."""
PLACED = (
    *("array", "accumulators", "conv", "requantise", "combine", "post-walk", "reduce", "issue"),
    *("collector", "scratchpad", "load", "store", "read-manager", "write-manager"),
    *("fetch", "shell", "csr", "trace"),
)
"""Blocks that are also placed and routed alone."""
NARROW = (("post_lanes", 4), ("window_lanes", 4))
"""Options of a machine in which only the array grows: with lanes as at 4x4."""
SPARING = (("post_lanes", 4), ("window_lanes", 2))
"""Options of an 8x8 machine that leave room among the device's multipliers."""
LANED = (
    *("requantise", "combine", "table", "parameters"),
    *("reduce", "issue", "collector", "scratchpad"),
)
"""Blocks in which these options can be seen."""
CHIPS = (
    Job("chip", 4, 4, "cells"),
    Job("chip", 8, 8, "cells"),
    Job("chip", 8, 8, "cells", NARROW),
    Job("chip", 8, 8, "cells", SPARING),
    Job("chip", 16, 16, "cells"),
    Job("chip", 16, 16, "cells", NARROW),
)
"""Whole chips."""
LANE_MACHINES = tuple(
    Job("chip", 16, 16, "cycles", options)
    for options in (
        (),
        *((("post_lanes", n), ("window_lanes", n)) for n in (8, 4, 2)),
    )
)
"""Machines that differ in lanes alone, of which cycles are predicted."""
SMALLEST = (
    *(("post_lanes", 1), ("window_lanes", 1), ("window_kernel", 3), ("axi_data_bits", 64)),
    *(("trace", False), ("counters", False)),
)
"""Options of the smallest machine that still runs every network."""
CHOICES = tuple(
    dataclasses.replace(CHIPS[0], options=options)
    for options in (
        (("cell", 1),),
        (("inner_product", "fast"),),
        (("post_lanes", 2),),
        (("window_lanes", 2),),
        (("window_kernel", 3),),
        (("trace", False),),
        (("counters", False),),
        (("window", False),),
        (("zero_points", True),),
        (("post_lanes", 2), ("window_lanes", 2), ("trace", False), ("counters", False)),
        SMALLEST,
    )
)
"""The first of these chips with other options than the defaults: what they cost and bring."""
ROUTED = tuple(job.on("routed") for job in (CHIPS[0], CHOICES[-1], CHIPS[3]))
"""Chips that fit the device: the default, the smallest and the largest."""


def plan() -> Iterator[Job]:
    """What ``make synth`` measures, the quick ones first."""
    yield from (Job(block, 4, 4, "cells") for block in PARTS)
    yield CHIPS[0]
    yield from (Job(block, 4, 4, "gates") for block in PARTS)
    yield from (Job(block, 8, 8, "gates") for block in GROWING)
    yield from (Job(block, 8, 8, "gates", NARROW) for block in LANED)
    yield from (Job(block, 4, 4, "routed") for block in PLACED)
    yield from (Job(block, 4, 4, "nexus") for block in ("array", "requantise", "combine", "reduce"))
    yield Job("chip", 4, 4, "nexus")
    yield from CHOICES
    yield from CHIPS[1:]
    yield from ROUTED


class Store:
    """The file of results."""

    def __init__(self, path: Path):
        self.path = path
        self.entries = kept.entries(path)

    def get(self, job: Job) -> dict[str, Any] | None:
        """The figures of a job, or None."""
        entry = self.entries.get(job.label)
        return entry and entry["figures"]

    def extend(self, job: Job, figures: dict[str, Any]) -> None:
        """Add figures to those of a job that has been measured."""
        self.entries[job.label]["figures"] |= figures
        self._write()

    def add(self, job: Job, key: str, rtl: str, figures: dict[str, Any]) -> None:
        """Keep a result, at once and whole."""
        target = TARGETS[job.target]
        self.entries[job.label] = {
            "key": key,
            "rtl": rtl,
            "device": target.device,
            "tools": {tool: yosys.version(tool) for tool in target.tools},
            "config": kept.name_of(job.config),
            "figures": figures,
        }
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        text = json.dumps(self.entries, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def key_of(job: Job, rtl: str) -> str:
    """What identifies a measurement."""
    target = TARGETS[job.target]
    versions = [f"{tool} {yosys.version(tool)}" for tool in target.tools]
    text = "\n".join((job.target, target.device, rtl, *versions, *target.options))
    return sha256(text.encode()).hexdigest()[:16]


def measure(job: Job, store: Store, *, only_check: bool = False) -> bool:
    """Measure a job unless the store has it; returns whether it had not.

    Raises :class:`~systole.hw.synthesis.yosys.ToolError`."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        rtl = write_rtl(job.block, job.config, {}, directory)
        key = key_of(job, rtl)
        if store.entries.get(job.label, {}).get("key") == key:
            return False
        if not only_check:
            store.add(job, key, rtl, TARGETS[job.target].measure(directory))
        return True
