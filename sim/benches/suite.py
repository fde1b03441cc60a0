"""The suite of benches: what there is, and how one of them runs in a simulator.

A bench of ``system`` is a function of a device and runs in this process. The cocotb benches run
inside the simulator, all chosen modules of one design in one simulator process.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from systole.isa import Config
from systole.sim.benches import system
from systole.sim.build import Simulator, build_block, generate, generate_blocks, run_group
from systole.sim.device import RtlDevice
from systole.sw.runtime.device import DeviceError

SIMULATORS = ("verilator", "icarus")
CONFIGS = {
    "4x4": Config.sized(
        4,
        4,
        scratchpad_bytes=16 * 1024,
        weight_bytes=4 * 1024,
        accumulator_bytes=8 * 1024,
        axi_data_bits=64,
        axi_burst_beats=16,
        window_width=16,
        row_ops=True,
        queue_depth=4,
    ),
    "6x4": Config.sized(
        6,
        4,
        scratchpad_bytes=6 * 2048,
        weight_bytes=24 * 64,
        accumulator_bytes=4 * 1024,
        axi_data_bits=32,
        axi_outstanding=2,
        banks=2,
        queue_depth=2,
        window=False,
        window_width=16,
    ),
}
"""Small machines, so that Icarus can run the same benches: 4x4 with everything, and one that is not
square, with rows that are no power of two, narrow memories, short queues and no window engine."""
SYSTEM_BENCHES = {bench.__name__: bench for bench in system.BENCHES}
COCOTB_BENCHES = {
    "systole": ("top",),
    "blocks": ("requantise", "scratchpad", "conv", "post", "window", "load_store"),
}
"""Modules of cocotb benches by the design they run on: the accelerator, or its blocks side by
side."""
TIME_LIMIT = 2 * 3600
"""Wall-clock seconds for one simulator run, which takes minutes on an idle machine."""

ASSERTION = re.compile(r"^ERROR: .*:\d+:", re.MULTILINE)
"""How Icarus, which goes on, prints a failed assertion."""


@dataclass(frozen=True)
class BenchTarget:
    """A simulator with a configuration."""

    simulator: str
    label: str
    """Key of ``CONFIGS``."""

    @property
    def config(self) -> Config:
        return CONFIGS[self.label]

    def __str__(self) -> str:
        return f"{self.simulator}-{self.label}"


@dataclass(frozen=True)
class BenchResult:
    """One bench on one target; ``failure`` is the reason and the simulator's log."""

    name: str
    seconds: float
    failure: str | None


def system_name(target: BenchTarget, bench: str) -> str:
    """The name under which a bench of ``SYSTEM_BENCHES`` is reported."""
    return f"sim/benches/system.py::{bench}[{target}]"


def module_name(target: BenchTarget, module: str) -> str:
    """The name under which a module of ``COCOTB_BENCHES`` is reported."""
    return f"sim/benches/{module}.py[{target}]"


def run_system(target: BenchTarget, bench: str, seed: int) -> BenchResult:
    """Run one of ``SYSTEM_BENCHES`` on a simulator of its own.

    Raises :class:`SimulatorMissingError` if the simulator is not installed.
    """
    start, failure = time.monotonic(), None
    device = RtlDevice(target.config, simulator=target.simulator, memory_bytes=1 << 20)
    try:
        with device:
            SYSTEM_BENCHES[bench](device, random.Random(seed))
    except (AssertionError, DeviceError, ValueError):
        failure = traceback.format_exc()
    return BenchResult(system_name(target, bench), time.monotonic() - start, failure)


def run_cocotb(target: BenchTarget, modules: Sequence[str], seed: int) -> list[BenchResult]:
    """Run modules of one design of ``COCOTB_BENCHES``; a result for each of their tests, and one
    more if the simulation as a whole failed.

    Raises :class:`SimulatorMissingError` if the simulator is not installed.
    """
    simulation = _simulator(target, modules)
    with tempfile.TemporaryDirectory(prefix="systole-bench-") as work:
        start = time.monotonic()
        failure, log = _simulate(simulation, target, modules, seed=seed, work=Path(work))
        results = list(_results(target, Path(work) / "results.xml", log))
        if failure is None and not results:
            failure = "no bench ran"
        if failure is not None:
            name = ", ".join(module_name(target, m) for m in modules)
            seconds = time.monotonic() - start
            results.append(BenchResult(name, seconds, f"{failure}\n{log}"))
    return results


def _simulator(target: BenchTarget, modules: Sequence[str]) -> Simulator:
    """The simulator of the design that all ``modules`` run on."""
    (design,) = (d for d, benches in COCOTB_BENCHES.items() if set(modules) <= set(benches))
    emit = generate_blocks if design == "blocks" else generate
    return build_block(target.simulator, emit(target.config), design)


def _simulate(
    simulation: Simulator, target: BenchTarget, modules: Sequence[str], *, seed: int, work: Path
) -> tuple[str | None, str]:
    """Run cocotb in the folder ``work``: why it failed, or None, and the log."""
    environment = {
        "COCOTB_TEST_MODULES": ",".join(f"systole.sim.benches.{m}" for m in modules),
        "COCOTB_RESULTS_FILE": str(work / "results.xml"),
        "COCOTB_RANDOM_SEED": str(seed),
        "COCOTB_LOG_LEVEL": "WARNING",
        "GPI_LOG_LEVEL": "WARNING",
        # cocotbext-axi uses what cocotb 2 calls old.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
        "SYSTOLE_CONFIG": json.dumps(target.config.to_dict()),
    }
    failure = None
    with open(work / "log", "wb") as log:
        try:
            code = run_group(
                simulation.command,
                env=simulation.environ(environment),
                cwd=work,
                stdout=log,
                stderr=log,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            failure = f"not finished after {TIME_LIMIT} seconds"
        else:
            failure = f"the simulator ended with status {code}" if code else None
    text = (work / "log").read_text(errors="replace")
    if ASSERTION.search(text):
        failure = "an RTL assertion failed"
    return failure, text


def _results(target: BenchTarget, file: Path, log: str) -> Iterator[BenchResult]:
    """What cocotb wrote about each test into ``file``, if it came so far."""
    for case in ElementTree.parse(file).iter("testcase") if file.exists() else ():
        bad = [element for kind in ("failure", "error") for element in case.iter(kind)]
        module = case.get("classname", "").replace(".", "/").removeprefix("systole/")
        yield BenchResult(
            f"{module}.py::{case.get('name')}[{target}]",
            float(case.get("time", 0)),
            f"{bad[0].text or ''}\n{log}" if bad else None,
        )


def run(target: BenchTarget, seed: int, word: str = "") -> Iterator[BenchResult]:
    """Every bench whose name contains ``word``, as it ends."""
    for bench in SYSTEM_BENCHES:
        if word in system_name(target, bench):
            yield run_system(target, bench, seed)
    for benches in COCOTB_BENCHES.values():
        modules = [m for m in benches if word in module_name(target, m)]
        if modules:
            yield from run_cocotb(target, modules, seed)
