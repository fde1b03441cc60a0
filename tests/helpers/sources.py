"""The source files of the project, parsed: what the tests of the house rules look at."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("isa", "hw", "sw", "sim")
"""The source folders."""


def _modules() -> dict[str, Path]:
    paths = {}
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths | {"api": ROOT / "systole" / "api.py"}


MODULES = _modules()
"""All modules of the sources by name (``hw.bus.axi``), packages by their own; and the public
interface, ``api``."""


@functools.cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def place(module: str, node: ast.expr | ast.stmt) -> str:
    """``path:line`` of a node, as editors understand it."""
    return f"{MODULES[module].relative_to(ROOT)}:{node.lineno}"


def within(module: str, room: str) -> bool:
    """Whether a module is ``room`` or lies below it."""
    return module == room or module.startswith(f"{room}.")
