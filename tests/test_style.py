"""The house rules that a machine can hold, room by room: lengths of functions, calls that can be
read, class names that are unique, docstrings that begin with what a thing is."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.helpers.sources import MODULES, place, tree, within

Function = ast.FunctionDef | ast.AsyncFunctionDef

LONGEST_ELABORATE = 120
LONGEST_FUNCTION = 80
"""Lines from ``def`` to the end, what it defines inside included."""
MOST_POSITIONAL = 5
"""Arguments of a call without their names."""
ROWS_OF_VALUES = ("reshape", "transpose", "add_row")
"""Methods whose arguments are one sequence: axes of an array, cells of a table."""

ROOMS = sorted(
    m for m, path in MODULES.items() if m == "api" or (path.stem == "__init__" and m.count(".") < 2)
)
"""The source folders and the folders in them, each with all that no other of these holds; and the
public interface."""


def modules_of(room: str) -> list[str]:
    """The modules below a room that are in no room below it."""
    smaller = [r for r in ROOMS if r != room and within(r, room)]
    return [m for m in MODULES if within(m, room) and not any(within(m, s) for s in smaller)]


def long_functions(module: str) -> Iterator[str]:
    """Each function over its limit, with its length."""
    for node in ast.walk(tree(module)):
        if isinstance(node, Function):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            limit = LONGEST_ELABORATE if node.name == "elaborate" else LONGEST_FUNCTION
            if lines > limit:
                yield f"{place(module, node)}: {node.name} has {lines} lines, at most {limit}"


def unreadable_calls(module: str) -> Iterator[str]:
    """Each call whose arguments only a reader of the signature can tell apart."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            count = sum(not isinstance(a, ast.Starred) for a in node.args)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else None
            if count > MOST_POSITIONAL and method not in ROWS_OF_VALUES:
                call = ast.unparse(node.func)
                yield f"{place(module, node)}: {call} is given {count} positional arguments"


def documented(module: str) -> Iterator[tuple[str, str]]:
    """(place, docstring) of the module and of its public classes and functions."""

    def walk(node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str]]:
        for child in node.body:
            if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
                yield f"{place(module, child)}: {child.name}", ast.get_docstring(child) or ""
                if isinstance(child, ast.ClassDef):
                    yield from walk(child)

    yield f"{module}", ast.get_docstring(tree(module)) or ""
    yield from walk(tree(module))


def classes() -> dict[str, list[str]]:
    """The modules that define each class name."""
    homes = defaultdict(list)
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    return homes


@pytest.mark.parametrize("room", ROOMS)
def test_functions_are_short(room: str) -> None:
    assert not [line for module in modules_of(room) for line in long_functions(module)]


@pytest.mark.parametrize("room", ROOMS)
def test_calls_name_their_arguments(room: str) -> None:
    assert not [line for module in modules_of(room) for line in unreadable_calls(module)]


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_what_it_is(room: str) -> None:
    wrong = [
        f"{where}: {text.splitlines()[0]}"
        for module in modules_of(room)
        for where, text in documented(module)
        if text.startswith("Of ")
    ]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_class_names_are_unique(room: str) -> None:
    own = set(modules_of(room))
    assert not {
        name: homes for name, homes in classes().items() if len(homes) > 1 and own & {*homes}
    }


def test_every_module_is_in_one_room() -> None:
    assert sorted(m for room in ROOMS for m in modules_of(room)) == sorted(MODULES)
