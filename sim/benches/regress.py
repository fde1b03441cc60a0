"""Runs the benches of the RTL and prints a summary; exits 1 if any fails.

python -m systole.sim.benches.regress [--sim verilator|icarus|all] [--seed N] [-k WORD]
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from systole.isa import Config
from systole.sim.benches import system as bench_system
from systole.sim.build import SimulatorMissingError, build_block, generate, generate_blocks
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
COCOTB_BENCHES = {
    "systole": ("systole.sim.benches.top",),
    "blocks": (
        "systole.sim.benches.requantise",
        "systole.sim.benches.scratchpad",
        "systole.sim.benches.conv",
        "systole.sim.benches.post",
        "systole.sim.benches.window",
        "systole.sim.benches.load_store",
    ),
}
"""cocotb modules by the design they run on: the accelerator, or its blocks side by side."""
TIME_LIMIT = 2 * 3600
"""Wall-clock seconds for one simulator run, which takes minutes on an idle machine."""

ASSERTION = re.compile(r"^ERROR: .*:\d+:", re.MULTILINE)
"""How Icarus, which goes on, prints a failed assertion."""


Chosen = Callable[[str], bool]


@dataclass(frozen=True)
class BenchResult:
    """One bench in one simulator on one configuration."""

    name: str
    seconds: float
    failure: str | None


def _system(
    simulator: str, label: str, config: Config, seed: int, chosen: Chosen
) -> Iterator[BenchResult]:
    """The benches on the simulator device, each in a process of its own."""
    for bench in bench_system.BENCHES:
        name = f"sim/benches/system.py::{bench.__name__}[{simulator}-{label}]"
        if not chosen(name):
            continue
        start, failure = time.monotonic(), None
        try:
            with RtlDevice(config, simulator=simulator, memory_bytes=1 << 20) as device:
                bench(device, random.Random(seed))
        except (AssertionError, DeviceError, ValueError):
            failure = traceback.format_exc()
        yield BenchResult(name, time.monotonic() - start, failure)


def _path(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _cocotb(
    design: str, simulator: str, label: str, config: Config, seed: int, chosen: Chosen
) -> Iterator[BenchResult]:
    """The tests of a design's chosen cocotb modules, all in one simulator process."""
    where = f"[{simulator}-{label}]"
    modules = [m for m in COCOTB_BENCHES[design] if chosen(_path(m) + where)]
    if not modules:
        return
    with tempfile.TemporaryDirectory(prefix="systole-bench-") as work:
        results, log = Path(work) / "results.xml", Path(work) / "log"
        source = generate_blocks(config) if design == "blocks" else generate(config)
        simulation = build_block(simulator, source, design)
        environment = {
            "COCOTB_TEST_MODULES": ",".join(modules),
            "COCOTB_RESULTS_FILE": str(results),
            "COCOTB_RANDOM_SEED": str(seed),
            "COCOTB_LOG_LEVEL": "WARNING",
            "GPI_LOG_LEVEL": "WARNING",
            # cocotbext-axi uses what cocotb 2 calls old.
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
            "SYSTOLE_CONFIG": json.dumps(config.to_dict()),
        }
        failure = None
        start = time.monotonic()
        with open(log, "wb") as f:
            try:
                code = subprocess.run(
                    simulation.command,
                    env=simulation.environ(environment),
                    cwd=work,
                    stdin=subprocess.DEVNULL,
                    stdout=f,
                    stderr=f,
                    timeout=TIME_LIMIT,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                failure = f"not finished after {TIME_LIMIT} seconds"
            else:
                failure = f"the simulator ended with status {code}" if code else None
        text = log.read_text(errors="replace")
        if ASSERTION.search(text):
            failure = "an RTL assertion failed"
        ran = 0
        for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
            bad = [element for kind in ("failure", "error") for element in case.iter(kind)]
            ran += 1
            yield BenchResult(
                f"{_path(case.get('classname'))}::{case.get('name')}{where}",
                float(case.get("time", 0)),
                (bad[0].text or text) if bad else None,
            )
        if failure is None and not ran:
            failure = "no bench ran"
        if failure is not None:
            seconds = time.monotonic() - start
            yield BenchResult(
                f"{', '.join(map(_path, modules))}{where}", seconds, f"{failure}\n{text}"
            )


def run(simulator: str, seed: int, chosen: Chosen) -> Iterator[BenchResult]:
    """Every chosen bench, as it ends."""
    for label, config in CONFIGS.items():
        yield from _system(simulator, label, config, seed, chosen)
        for design in COCOTB_BENCHES:
            yield from _cocotb(design, simulator, label, config, seed, chosen)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="systole.sim.benches.regress", description=inspect.cleandoc(__doc__)
    )
    parser.add_argument("--sim", choices=(*SIMULATORS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=1, help="of everything random")
    parser.add_argument("-k", default="", metavar="WORD", help="only benches with WORD in the name")
    options = parser.parse_args()
    simulators = SIMULATORS if options.sim == "all" else (options.sim,)
    print(f"seed {options.seed}")
    start, results = time.monotonic(), []
    skipped = []
    for simulator in simulators:
        try:
            for result in run(simulator, options.seed, lambda name: options.k in name):
                results.append(result)
                verdict = "FAILED" if result.failure else "passed"
                print(f"{verdict}  {result.seconds:6.1f} s  {result.name}", flush=True)
        except SimulatorMissingError as e:
            if simulator != "icarus" or options.sim == "icarus":
                print(f"error: {e}", file=sys.stderr)
                return 1
            print(f"skipped  {simulator}: {e}", flush=True)
            skipped.append(simulator)
        except DeviceError as e:
            # The RTL cannot be built.
            print(f"error: {e}", file=sys.stderr)
            return 1
    failed = [r for r in results if r.failure]
    for r in failed:
        print(f"\n{'_' * 30} {r.name} {'_' * 30}\n{r.failure}")
    print(
        f"{len(failed)} failed, {len(results) - len(failed)} passed "
        f"in {time.monotonic() - start:.1f} s"
        + "".join(f", {simulator} skipped" for simulator in skipped)
    )
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
