"""Where the golden model and onnxruntime differ, layer by layer.

    python -m sw.diff MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--seed N]

onnxruntime runs the same model with its quantised intermediate values as further outputs. That can
change what it fuses: a value that is an output must exist, so what would have been computed without
it no longer is. The command therefore also runs the model as it is and says how many elements of
its outputs the exposure changed.

Only int8 and uint8 values are compared; operators on the host are onnxruntime's anyway. Exit
status: 0 compared, 2 bad input (one sentence on stderr).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from systole.sw.cli.quantize import parse_dims
from systole.sw.cli.run import make_console
from systole.sw.compiler.partition import QUANTISED, Partition, partition
from systole.sw.frontend.dataflow import Dataflow, first_line, run_reference
from systole.sw.frontend.inputs import InputError, random_inputs, read_inputs
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Graph, ModelError, Op, Tensor
from systole.sw.session import host
from systole.sw.session.segments import follow

NAME_WIDTH = 32
"""Longest name in the table."""


@dataclass(frozen=True)
class Difference:
    """In quantised units."""

    elements: int
    equal: int
    largest: int
    mean: float
    """Mean absolute difference."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that the golden model makes."""

    layer: str
    op_type: str
    tensor: str
    difference: Difference | None
    """From the model's inputs on, so errors of earlier layers are in it. None: the model has no
    such value, or none of its shape."""
    alone: Difference | None
    """Of this layer given onnxruntime's own operands; None where one is not to be had."""


class Exposed:
    """onnxruntime on the model in ``path`` with more of its values as outputs: those of ``names``
    that exist as int8 or uint8. Raises :class:`ModelError` for a malformed model."""

    def __init__(
        self, path: str | os.PathLike, names: Iterable[str], dims: Mapping[str, int] | None = None
    ):
        flow = Dataflow(path, dims)
        proto = ir.to_proto(flow.model)
        own = {info.name for info in proto.graph.output}
        inputs = {info.name for info in proto.graph.input}
        found = [n for n in dict.fromkeys(names) if flow.types.get(n) in QUANTISED]
        proto.graph.output.extend(
            onnx.ValueInfoProto(name=n) for n in found if n not in own | inputs
        )
        self.path = path
        self.outputs = [info.name for info in proto.graph.output]
        self.session = oracle.session(proto)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. Raises :class:`ModelError` if onnxruntime fails."""
        try:
            made = self.session.run(self.outputs, dict(arrays))
        except Exception as e:  # onnxruntime's errors have no class of their own in common
            why = first_line(e)
            raise ModelError(f"{self.path}: onnxruntime cannot run the model: {why}") from None
        return dict(zip(self.outputs, made, strict=True))


def compare_layers(
    plan: Partition, arrays: Mapping[str, np.ndarray], dims: Mapping[str, int] | None = None
) -> tuple[list[TensorDiff], dict[str, np.ndarray]]:
    """A row per tensor in the order of execution, and onnxruntime's values, exposed ones included.

    ``arrays``: the model's inputs by name."""
    trail = follow(plan, arrays)
    names = [name for _, tensors in trail.segments for name in tensors]
    values = Exposed(plan.path, names, dims).run(arrays)
    rows = []
    for graph, tensors in trail.segments:
        theirs = {
            name: found
            for name, ours in tensors.items()
            if name in values
            and (found := _align(ours, values[name], graph.tensors.get(name))) is not None
        }
        # What the accelerator reads is the model's own input, or onnxruntime's where it made it.
        for port in graph.inputs:
            tensor = graph.tensors[port.tensor]
            source = arrays.get(port.name, values.get(port.name))
            if source is not None:
                theirs[port.tensor] = golden.quantise_input(port, tensor, source)
        for op in graph.ops:
            rows += _rows(op, graph, tensors, theirs)
    return rows, values


def _rows(
    op: Op, graph: Graph, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> Iterator[TensorDiff]:
    """Of the tensors that an operator makes."""
    alone = golden.evaluate(op, graph, theirs) if theirs.keys() >= set(op.inputs) else {}
    made = alone.keys() or golden.evaluate(op, graph, ours).keys()
    for name in made:
        reference = theirs.get(name)
        differences = [
            _difference(a[name], reference) if name in a and reference is not None else None
            for a in (ours, alone)
        ]
        yield TensorDiff(op.name, op.op_type, name, *differences)


def _difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    distance = np.abs(ours.astype(np.int16) - reference)
    equal = int((distance == 0).sum())
    return Difference(distance.size, equal, int(distance.max()), float(distance.mean()))


def _align(ours: np.ndarray, array: np.ndarray, tensor: Tensor | None) -> np.ndarray | None:
    """onnxruntime's array as int8 (N, C, H, W) like ``ours``; None if it does not fit. A tensor
    inside the graph does not say how it stands in the model: of the layouts that a model may have
    (channels second or last, a matrix) the one in which most elements agree."""
    if array.size != ours.size:
        return None
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - 128).astype(np.int8)
    forms = [array]
    if tensor is not None and tensor.onnx_shape == array.shape:
        forms.append(array.transpose(tensor.perm))
    if array.ndim > 1:
        forms += [np.moveaxis(array, -1, 1), np.moveaxis(array, -1, 0)]
    candidates = [form.reshape(ours.shape) for form in forms]
    return max(candidates, key=lambda form: int((form == ours).sum()))


def first_offender(rows: list[TensorDiff]) -> int | None:
    """Index of the first row with a difference."""
    for i, row in enumerate(rows):
        if row.difference is not None and row.difference.equal < row.difference.elements:
            return i
    return None


def show(rows: list[TensorDiff], console: Console) -> None:
    """Print the rows for people."""
    offender = first_offender(rows)
    table = Table(title="golden model against onnxruntime, in quantised units")
    table.add_column("")
    for name in ("layer", "operator", "tensor"):
        table.add_column(name, no_wrap=True)
    for name in ("elements", "equal %", "max", "mean", "alone: equal %", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        texts = [row.layer, row.op_type, row.tensor]
        table.add_row(
            "first ->" if i == offender else "",
            *(_short(text).replace("[", "\\[") for text in texts),
            *_columns(row.difference, full=True),
            *_columns(row.alone, full=False),
        )
    console.print(table)
    hidden = sum(row.difference is None for row in rows)
    if hidden:
        console.print(f"{hidden} tensors are no value of the model, and are not compared")
    if offender is None:
        console.print(f"all {len(rows) - hidden} compared tensors are equal")
    else:
        row = rows[offender]
        console.print(f"first difference: layer {row.layer!r}, tensor {row.tensor!r}", markup=False)


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= NAME_WIDTH else f"\u2026{name[1 - NAME_WIDTH :]}"


def _columns(d: Difference | None, *, full: bool) -> list[str]:
    if d is None:
        return ["-"] * (4 if full else 2)
    share = f"{100 * d.equal / d.elements:.3f}"
    return (
        [f"{d.elements:,}", share, str(d.largest), f"{d.mean:.5f}"]
        if full
        else [share, str(d.largest)]
    )


def main(
    model: Annotated[Path, typer.Argument(help="quantised ONNX model")],
    input: Annotated[
        Path | None, typer.Option(help=".npz, .npy, .png or .jpg; else seeded random")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the random input")] = 0,
    dim: Annotated[
        list[str] | None, typer.Option(help="bind an open dimension: NAME=N or INPUT:AXIS=N")
    ] = None,
) -> None:
    """Compare every quantised tensor of the golden model with onnxruntime's."""
    console, errors = make_console(), Console(stderr=True)
    try:
        dims = parse_dims(dim or [])
        plan = partition(model, dims=dims)
        if input is None:
            console.print(f"no --input: seeded random input (seed {seed})")
            arrays = random_inputs(plan.inputs, seed)
        else:
            arrays = read_inputs(input, plan.inputs)
        rows, values = compare_layers(plan, arrays, dims)
        plain = run_reference(model, arrays)
    except (ModelError, InputError) as e:
        errors.print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(rows, console)
    changes = [host.compare(values[name], wanted) for name, wanted in plain.items()]
    changed = sum(c.elements - c.equal for c in changes)
    console.print(
        f"exposing the intermediate values changed {changed:,} of "
        f"{sum(c.elements for c in changes):,} elements of onnxruntime's own outputs"
    )
