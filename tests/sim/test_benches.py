"""The benches under ``sim/benches``, on both of their configurations.

Each runs in the simulator in which it costs less: cocotb in Icarus, which builds in a second, whole
programs in Verilator. The other simulator is for ``make test-long`` and ``make sim``. The cocotb
benches of one design run in one simulator process, once for all tests of this module. A failing
test shows the simulator's log.
"""

from __future__ import annotations

import functools

import pytest

from systole.sim.benches.suite import (
    COCOTB_BENCHES,
    CONFIGS,
    SIMULATORS,
    SYSTEM_BENCHES,
    BenchResult,
    BenchTarget,
    module_name,
    run_cocotb,
    run_system,
)
from tests.helpers.marks import needs_icarus

SEED = 1
FIRST = next(iter(CONFIGS))
"""The machine that ``make test`` runs whole programs on."""
DESIGN = {module: design for design, modules in COCOTB_BENCHES.items() for module in modules}


def targets(*, long: str, machines: tuple[str, ...] = tuple(CONFIGS)) -> list:
    """All targets as parameters, each in a group of its own; those of the simulator ``long``, and
    of other ``machines``, only run in ``make test-long``."""
    parameters = []
    for simulator in SIMULATORS:
        for label in CONFIGS:
            target = BenchTarget(simulator, label)
            # One worker builds a target's simulators.
            marks = [pytest.mark.xdist_group(f"benches-{target}")]
            if simulator == long or label not in machines:
                marks.append(pytest.mark.long)
            if simulator == "icarus":
                marks.append(needs_icarus)
            parameters.append(pytest.param(target, marks=marks, id=str(target)))
    return parameters


@functools.cache
def cocotb_results(target: BenchTarget, design: str) -> list[BenchResult]:
    """The results of all cocotb benches of a design."""
    return run_cocotb(target, COCOTB_BENCHES[design], SEED)


def check(results: list[BenchResult]) -> None:
    """Fail with the logs of what failed."""
    assert results, "no result"
    failures = [f"{r.name}\n{r.failure}" for r in results if r.failure]
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)


def benches_on_targets() -> list:
    """All cocotb benches on all targets as parameters. The requantisation does not know what array
    it is behind, and takes half a minute in Icarus: one machine is enough for ``make test``."""
    parameters = []
    for on_target in targets(long="verilator"):
        (target,) = on_target.values
        for module in DESIGN:
            marks = list(on_target.marks)
            if module == "requantise" and target.label != FIRST:
                marks.append(pytest.mark.long)
            parameters.append(pytest.param(target, module, marks=marks, id=f"{target}-{module}"))
    return parameters


@pytest.mark.parametrize("target, module", benches_on_targets())
def test_cocotb_bench(target: BenchTarget, module: str) -> None:
    path = module_name(target, module).partition("[")[0]
    check([r for r in cocotb_results(target, DESIGN[module]) if path in r.name])


@pytest.mark.parametrize("bench", SYSTEM_BENCHES)
@pytest.mark.parametrize("target", targets(long="icarus", machines=(FIRST,)))
def test_system_bench(target: BenchTarget, bench: str) -> None:
    check([run_system(target, bench, SEED)])
