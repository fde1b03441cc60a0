"""Who may import whom: no circle of modules, and every room only imports rooms listed for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.helpers.sources import MODULES, tree, within

BASE = ("isa", "sw.files", "sw.progress", "sw.ir")
ALLOWED: dict[str, tuple[str, ...]] = {
    "isa": (),
    "isa.tools": ("isa",),
    # The generator knows nothing of the software.
    "hw.bus": ("isa",),
    "hw.arithmetic": ("isa", "hw.bus"),
    "hw.memory": ("isa", "hw.bus"),
    "hw.control": ("isa", "hw.bus"),
    "hw.conv": ("isa", "hw.bus"),
    "hw.post": ("isa", "hw.bus", "hw.arithmetic"),
    "hw.window": ("isa", "hw.bus", "hw.arithmetic"),
    "hw.transfer": ("isa", "hw.bus"),
    "hw": ("isa", "hw"),
    # Measures what the generator writes.
    "hw.synthesis": ("isa", "hw"),
    # From the model file to the program.
    "sw.files": (),
    "sw.progress": (),
    "sw.ir": ("isa",),
    "sw.golden": ("isa", "sw.ir"),
    "sw.frontend": ("isa", "sw.ir", "sw.golden"),
    "sw.runtime": BASE,
    "sw.simulate": (*BASE, "sw.runtime"),
    "sw.compiler": (*BASE, "sw.golden", "sw.frontend", "sw.runtime", "sw.simulate"),
    "sw.quantisation": (*BASE, "sw.golden", "sw.frontend", "sw.compiler"),
    "sw.zoo": (*BASE, "sw.golden", "sw.frontend"),
    "sw.report": (
        *(*BASE, "sw.frontend", "sw.runtime", "sw.simulate", "sw.compiler"),
        "hw.synthesis",
    ),
    # The simulated RTL is a device; whole models run on devices.
    "sim": ("isa", "hw", "sw.runtime", "sim"),
    "sim.benches": ("isa", "hw", "sw.ir", "sw.runtime", "sw.simulate", "sim"),
    "sw.session": (
        *(*BASE, "sw.golden", "sw.frontend", "sw.runtime", "sw.simulate", "sw.compiler"),
        *("sw.report", "sim"),
    ),
    # The public interface, and the command line, which uses it.
    "api": (
        *(*BASE, "sw.frontend", "sw.compiler", "sw.quantisation", "sw.runtime", "sw.session"),
        *("hw", "sw.report"),
    ),
    "sw.cli": ("isa", "hw", "sim", "sw", "api"),
    # What users type: `python -m sw.run` and its like.
    "sw": ("sw.cli",),
    "sw.zoo.__main__": ("sw.cli",),
    "sw.zoo.digits.train_transformer": (*BASE, "sw.zoo", "sw.quantisation"),
}
"""Rooms, from the ground up, and what each may import besides itself; of a name all below it."""


def imports(module: str) -> Iterator[str]:
    """Modules of the project that a module imports, in functions too."""
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "systole":
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif (node.module or "").startswith("systole."):
            package = node.module.removeprefix("systole.")
            for alias in node.names:
                full = f"{package}.{alias.name}"
                yield full if full in MODULES else package


def room_of(module: str) -> str:
    """The longest name of a room that a module lies in."""
    return max((r for r in ALLOWED if within(module, r)), key=len)


def test_no_circles():
    graph = {m: {i for i in imports(m) if i != m} for m in MODULES}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_lies_below(room):
    own = [m for m in MODULES if room_of(m) == room]
    assert own, "an empty room"
    wrong = [
        f"{module} imports {other}"
        for module in own
        for other in imports(module)
        if room_of(other) != room and not any(within(other, a) for a in ALLOWED[room])
    ]
    assert not wrong
