"""Runs the benches of the RTL and prints a summary; exits 1 if any fails.

python -m systole.sim.benches.regress [--sim verilator|icarus|all] [--seed N] [-k WORD]
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time

from systole.sim.benches.suite import CONFIGS, SIMULATORS, BenchResult, BenchTarget, run
from systole.sim.build import SimulatorMissingError
from systole.sw.runtime.device import DeviceError


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="systole.sim.benches.regress", description=inspect.cleandoc(__doc__ or "")
    )
    parser.add_argument("--sim", choices=(*SIMULATORS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=1, help="of everything random")
    parser.add_argument("-k", default="", metavar="WORD", help="only benches with WORD in the name")
    return parser.parse_args()


def _run(simulator: str, seed: int, word: str) -> list[BenchResult]:
    """Run the chosen benches on every configuration, and print each result as it comes."""
    results = []
    for label in CONFIGS:
        for result in run(BenchTarget(simulator, label), seed, word):
            results.append(result)
            verdict = "FAILED" if result.failure else "passed"
            print(f"{verdict}  {result.seconds:6.1f} s  {result.name}", flush=True)
    return results


def main() -> int:
    """Run the command line; returns the exit status."""
    options = _options()
    simulators = SIMULATORS if options.sim == "all" else (options.sim,)
    print(f"seed {options.seed}")
    start = time.monotonic()
    results: list[BenchResult] = []
    skipped = []
    for simulator in simulators:
        try:
            results += _run(simulator, options.seed, options.k)
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
