"""What the generated pages of documentation share: Markdown from docstrings, and the file."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

CheckOption = Annotated[bool, typer.Option("--check", help="only compare; exit 1 on a difference")]


def markdown(text: str) -> str:
    """reStructuredText inline markup (literals, roles) as Markdown."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def cell(text: str) -> str:
    """Text for one table cell."""
    return markdown(" ".join(text.split())).replace("|", "\\|")


def later_paragraphs(documented: object, skip: int = 1) -> str:
    """A docstring's paragraphs after the first ``skip``."""
    paragraphs = inspect.cleandoc(inspect.getdoc(documented) or "").split("\n\n")
    return markdown("\n\n".join(paragraphs[skip:]))


def attribute_docs(owner: type) -> dict[str, str]:
    """The string literals that follow a class's assignments, by assigned name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    out = {}
    for node, following in itertools.pairwise(definition.body):
        target = None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        if (
            isinstance(target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            out[target.id] = following.value.value
    return out


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """The lines of a table."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(c) for c in row)} |"
    yield ""


def write_page(path: Path, text: str, module: str, *, check: bool) -> None:
    """Write a page that ``python -m module`` generates, or only compare it, with ``check``.

    Ends with status 1 if the file differs, 2 without a folder for it (an installed package has no
    ``docs/``)."""
    if not path.parent.is_dir():
        typer.echo(f"error: {path.parent} does not exist; it is in a checkout only", err=True)
        raise typer.Exit(2)
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        typer.echo(f"{path} is out of date: run python -m {module}", err=True)
        raise typer.Exit(1)
