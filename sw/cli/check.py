"""What of a model the accelerator runs, without compiling it.

    systole check MODEL.onnx [--dim N=1]          # every node: accelerator or host, by which rule
    systole check MODEL.onnx --json placement.json
    systole check --document [--check]            # (re)write docs/supported-ops.md, or compare it

The rules are those of the loader's operator handlers: their docstrings for what is accepted, their
refusals for what is not. Exit status: 0 listed, 1 the document is out of date, 2 bad input (one
line on stderr).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from systole import api
from systole.sw.cli.common import (
    MISMATCH,
    DimOption,
    JsonOption,
    check_document,
    check_outputs,
    one_line_errors,
    output_console,
    parse_dims,
    print_table,
    write_json,
)
from systole.sw.compiler.partition import FLOAT, NodePlacement
from systole.sw.files import write_atomically
from systole.sw.frontend.inputs import InputError
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.frontend.passes.operators.registry import MICROSOFT
from systole.sw.report.reasons import host_reasons

PATH = Path(__file__).resolve().parents[2] / "docs" / "supported-ops.md"
DOMAINS = {"": "ONNX", MICROSOFT: MICROSOFT}
"""The domains of the accelerator's operators, and how the document calls them."""


def show(placements: list[NodePlacement], console: Console) -> None:
    """Every node in topological order, an operator's rule with the first on the accelerator; then
    how often each rule sent operators to the host."""
    table = Table()
    table.add_column("node", overflow="fold", max_width=40)
    table.add_column("operator", no_wrap=True)
    table.add_column("runs on", no_wrap=True)
    table.add_column("rule", overflow="fold")
    shown: set[tuple[str, str]] = set()
    for p in placements:
        rule = escape(p.rule.replace("``", "`"))
        if not p.host and (p.op_type, rule) in shown:
            rule = "as above"
        shown.add((p.op_type, rule))
        table.add_row(escape(p.name), p.op_type, "host" if p.host else "accelerator", rule)
    print_table(console, table)
    summary = _summary(placements)
    console.print(
        f"{len(placements)} nodes: {summary['on_accelerator']} on the accelerator, "
        f"{summary['on_host']} on the host"
    )
    if summary["model_macs"]:
        console.print(
            f"MACs {summary['model_macs']:,}: {summary['model_macs'] - summary['host_macs']:,} on "
            f"the accelerator, {summary['host_macs']:,} on the host",
            highlight=False,
        )
    reasons = host_reasons(placements)
    for reason in reasons:
        line = f"  {reason.what} on the host: {reason.reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    listed = sum(sum(reason.ops.values()) for reason in reasons)
    if converting := summary["on_host"] - listed:
        console.print(f"  conversions on the host beside these: {converting}")
    if waiting := sum(p.host and p.rule == FLOAT for p in placements):
        console.print(f"{waiting} of the nodes have an operator of the accelerator, once quantised")


def _summary(placements: list[NodePlacement]) -> dict[str, int]:
    """How many nodes and multiply-accumulates are where; MACs as far as they are known."""
    on_host = [p for p in placements if p.host]
    return {
        "on_accelerator": len(placements) - len(on_host),
        "on_host": len(on_host),
        "model_macs": sum(p.macs or 0 for p in placements),
        "host_macs": sum(p.macs or 0 for p in on_host),
    }


def report(model: Path, placements: list[NodePlacement]) -> dict[str, Any]:
    """What ``--json`` writes; keys are stable."""
    return {
        "model": model.name,
        **_summary(placements),
        "reasons": [asdict(reason) for reason in host_reasons(placements)],
        "nodes": [asdict(p) for p in placements],
    }


def document() -> str:
    """The text of ``docs/supported-ops.md``."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Supported operators"
    yield ""
    yield "Written by `python -m sw.check --document` from the operator handlers in"
    yield "`sw/frontend/passes/operators`, which enforce these rules."
    yield "`python -m sw.check MODEL.onnx` applies them to a model, node by node."
    yield ""
    yield "Activations are int8 or uint8, quantised per tensor; weights are constants, except in a"
    yield "MatMul of two activations. Whatever the accelerator refuses runs on the host, in"
    yield "onnxruntime, together with all nodes that exchange unquantised values with it: between"
    yield "host and accelerator there are only int8 and uint8 tensors. If, Loop and Scan run on"
    yield "the host as a whole. `systole run --no-fallback` refuses such models instead. Malformed"
    yield "models, and operators of domains that onnxruntime does not know, are always refused."
    yield ""
    yield "A QuantizeLinear may also stand behind operators that choose among the elements of a"
    yield "float result (MaxPool, Concat, Transpose, Resize of mode nearest, Relu and the like), if"
    yield "all that becomes of the result is quantised alike."
    yield ""
    yield "These are the rules of the default configuration's engines. What another one cannot do"
    yield "(without a window engine, without row operations, with a small scratchpad)"
    yield "shows when it is compiled for: `systole run` lists it under the host's operators."
    yield ""
    yield f"| {' | '.join(DOMAINS.values())} | on the accelerator |"
    yield f"|{'---|' * (len(DOMAINS) + 1)}"
    for rule, names in _rules().items():
        cells = [", ".join(op for domain, op in names if domain == d) or "-" for d in DOMAINS]
        yield f"| {' | '.join(cells)} | {rule.replace('|', chr(92) + '|')} |"


def _rules() -> dict[str, list[tuple[str, str]]]:
    """The operators, as (domain, type) in alphabetical order, by the rule that they share."""
    rules: dict[str, list[tuple[str, str]]] = {}
    for key, handler in sorted(OPERATORS.items()):
        rule = " ".join((handler.__doc__ or "").split()).replace("``", "`")
        rules.setdefault(rule, []).append(key)
    return rules


def main(
    model: Annotated[Path | None, typer.Argument(help="ONNX model")] = None,
    dim: DimOption = None,
    json_file: JsonOption = None,
    write: Annotated[
        bool, typer.Option("--document", help="write docs/supported-ops.md instead")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="with --document: compare only; exit 1 on a difference")
    ] = False,
) -> None:
    """List where each node of a model runs, and by which rule."""
    with one_line_errors():
        if write == (model is not None):
            raise InputError("give either a model or --document")
        if check and not write:
            raise InputError("--check goes with --document")
        if model is not None:
            check_outputs(json_file)
            placements = api.check(model, dims=parse_dims(dim))
            write_json(report(model, placements), json_file)
            show(placements, output_console())
            return
        if json_file is not None:
            raise InputError("--json goes with a model")
        check_document(PATH)
    if not check:
        write_atomically(PATH, document().encode())
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != document():
        typer.echo(f"{PATH} is out of date: run python -m sw.check --document", err=True)
        raise typer.Exit(MISMATCH)
