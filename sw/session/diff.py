"""Layer-by-layer comparison of the golden model with onnxruntime.

onnxruntime runs the same model with its quantised intermediate values as further outputs. That can
change what it fuses: a value that is an output must exist, so what would have been computed without
it no longer is. Only int8 and uint8 values are compared; operators on the host are onnxruntime's
anyway.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from systole.sw.compiler.partition import QUANTISED, AcceleratorSegment, Partition
from systole.sw.frontend.dataflow import Dataflow
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.golden import model as golden
from systole.sw.golden import oracle, ties
from systole.sw.ir.graph import Graph, ModelError, Op, first_line
from systole.sw.session.segments import follow

TIES = "the exact result lies so close to halfway between two steps that it is rounded either way"
"""What a tie is, for reports."""
IN_WHOLE = (
    "every layer by itself equals onnxruntime's: the differences come from what onnxruntime fuses "
    "or rounds otherwise within the whole model, operators on the host above all"
)
"""What explains differences that no layer explains."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from onnxruntime's, in quantised units."""

    elements: int
    equal: int
    largest: int
    mean: float
    """Mean absolute difference."""


@dataclass(frozen=True)
class Rounding:
    """A result that the accelerator rounds to int8, where the model has no QuantizeLinear."""

    layer: str
    op_type: str
    before: str
    """ONNX types of the functions fused behind it; empty: none."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of the golden model against onnxruntime's."""

    layer: str
    op_type: str
    tensor: str
    difference: Difference | None
    """Computed from the model's inputs, so it includes errors of earlier layers. None: the model
    has no such value, or none of this shape."""
    alone: Difference | None
    """Computed from onnxruntime's own operands of this layer. None if one of them is not known."""
    ties: int | None = None
    """Elements that differ in ``alone`` because a tie is rounded either way: the exact value is
    halfway between two steps, as closely as float32 and constants in whole units can tell. None
    without ``alone``."""
    rounded: int | None = None
    """Elements that differ in ``alone`` for no other reason than that, or that operands in front
    are rounded to int8 on the accelerator alone. None without ``alone``."""
    roundings: tuple[Rounding, ...] = ()
    """What is so rounded."""

    @property
    def differing(self) -> int:
        """Elements that the layer by itself gives another value."""
        return self.alone.elements - self.alone.equal if self.alone else 0

    @property
    def explained(self) -> bool:
        """Whether the layer by itself differs, and by ties and such roundings alone."""
        return self.differing > 0 and self.differing in (self.ties, self.rounded)


class Exposed:
    """onnxruntime on the model in ``path`` with more of its values as outputs: those of ``names``
    that exist as int8 or uint8. Raises :class:`ModelError` for a malformed model."""

    def __init__(
        self, path: str | os.PathLike, names: Iterable[str], dims: Mapping[str, int] | None = None
    ):
        flow = Dataflow(path, dims)
        self.known = flow.types.keys()
        """Names of all values of the model."""
        proto = ir.to_proto(flow.model)
        known = {info.name for info in (*proto.graph.output, *proto.graph.input)}
        proto.graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for name in dict.fromkeys(names)
            if flow.types.get(name) in QUANTISED and name not in known
        )
        self.path = path
        self.outputs = [info.name for info in proto.graph.output]
        self.session = oracle.session(proto)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. Raises :class:`ModelError` if onnxruntime fails."""
        try:
            results = self.session.run(self.outputs, dict(arrays))
        except Exception as e:  # onnxruntime's errors have no class of their own in common
            why = first_line(e)
            raise ModelError(f"{self.path}: onnxruntime cannot run the model: {why}") from None
        return {name: np.asarray(array) for name, array in zip(self.outputs, results, strict=True)}


def compare_layers(
    plan: Partition, arrays: Mapping[str, np.ndarray]
) -> tuple[list[TensorDiff], dict[str, np.ndarray]]:
    """A row per tensor in the order of execution, and onnxruntime's values, exposed ones included.

    ``arrays``: the model's inputs by name. Raises :class:`ModelError` if onnxruntime fails."""
    return compare_segments(plan, arrays, follow(plan, arrays).segments)


def compare_segments(
    plan: Partition,
    arrays: Mapping[str, np.ndarray],
    segments: list[tuple[AcceleratorSegment, dict[str, np.ndarray]]],
) -> tuple[list[TensorDiff], dict[str, np.ndarray]]:
    """As :func:`compare_layers`, given the segments with the golden model's tensors."""
    names = [name for _, tensors in segments for name in tensors]
    exposed = Exposed(plan.path, names, plan.dims)
    values, added = exposed.run(arrays), {*names} - exposed.known
    rows: list[TensorDiff] = []
    for segment, tensors in segments:
        graph = segment.graph
        theirs = dict(graph.constants)
        for name, view in segment.views.items():
            if name in tensors and name in values and values[name].size == math.prod(view.shape):
                theirs[name] = _stored(values[name], view).reshape(tensors[name].shape)
        # What the accelerator reads is the model's own input, or onnxruntime's where it made it.
        for port in graph.inputs:
            tensor = graph.tensors[port.tensor]
            source = arrays.get(port.name, values.get(port.name))
            if source is not None:
                theirs[port.tensor] = golden.quantise_input(port, tensor, source)
        judge = _Judge(graph, theirs, added)
        for op in graph.ops:
            rows += judge.rows(op, tensors)
    return rows, values


class _Judge:
    """Compares the operators of a graph one by one, each on onnxruntime's own operands."""

    def __init__(self, graph: Graph, theirs: dict[str, np.ndarray], added: Collection[str]):
        self._graph = graph
        self._theirs = theirs
        """onnxruntime's tensors. What the model has no value for, such as an operand in another
        order, becomes part of them as the golden model makes it of onnxruntime's."""
        self._added = added
        """Tensors that the model has no value for."""
        self._unrounded: dict[str, ties.Ends] = {}
        """Those of them that the model does not round to int8, as they might be."""
        self._roundings: dict[str, tuple[Rounding, ...]] = {}
        """What is rounded on the way to a tensor."""

    def rows(self, op: Op, ours: Mapping[str, np.ndarray]) -> Iterator[TensorDiff]:
        """The rows of an operator's results, of which the golden model has ``ours``."""
        graph, theirs = self._graph, self._theirs
        alone = golden.evaluate(op, graph, theirs) if theirs.keys() >= set(op.inputs) else {}
        near, unrounded = {}, {}
        if any(name in theirs and (theirs[name] != alone[name]).any() for name in alone):
            near = ties.near(op, graph, theirs)
        if alone:
            unrounded = self._without_rounding(op)
        for name in alone or golden.evaluate(op, graph, ours):
            reference = theirs.get(name)
            if reference is None:
                yield TensorDiff(op.name, op.op_type, name, None, None)
                continue
            difference, by_itself = (
                _difference(arrays[name], reference) if name in arrays else None
                for arrays in (ours, alone)
            )
            tied, rounded = (
                None if by_itself is None else _within(each.get(name), reference, alone[name])
                for each in (near, unrounded)
            )
            yield TensorDiff(
                layer=op.name,
                op_type=op.op_type,
                tensor=name,
                difference=difference,
                alone=by_itself,
                ties=tied,
                rounded=rounded,
                roundings=self._roundings.get(op.output, ()),
            )
        for name, array in alone.items():
            theirs.setdefault(name, array)

    def _without_rounding(self, op: Op) -> dict[str, ties.Ends]:
        """The results of an operator if tensors that are not the model's were not rounded; those of
        them are kept for the operators behind. Empty where nothing is rounded that the model does
        not round."""
        names = [op.output]
        activation, residual = getattr(op, "activation", None), getattr(op, "residual", None)
        names += [each.mid_name for each in (activation, residual) if each is not None]
        own = [name for name in names if name in self._added]
        if not own and self._unrounded.keys().isdisjoint(op.inputs):
            return {}
        operands = {
            name: self._unrounded.get(name) or ties.Ends(self._theirs[name], self._theirs[name])
            for name in op.inputs
        }
        results = ties.between(op, self._graph, operands, self._added)
        wide = any((results[n].low != results[n].high).any() for n in own if n in results)
        roundings = [each for name in op.inputs for each in self._roundings.get(name, ())]
        if wide:
            first, _, behind = op.op_type.partition("+")
            fused = activation is not None and activation.mid_name in own
            kind, before = (first, behind) if fused else (op.op_type, "")
            roundings.append(Rounding(op.name, kind, before))
        self._roundings[op.output] = tuple(dict.fromkeys(roundings))
        if op.output in self._added and op.output in results:
            self._unrounded[op.output] = results[op.output]
        return results


def _within(ends: ties.Ends | None, reference: np.ndarray, alone: np.ndarray) -> int:
    """Elements of ``reference`` that differ from ``alone`` and lie between ``ends``."""
    if ends is None:
        return 0
    return int(((reference != alone) & ends.contain(reference)).sum())


def _difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    distance = np.abs(ours.astype(np.int16) - reference)
    equal = int((distance == 0).sum())
    return Difference(distance.size, equal, int(distance.max()), float(distance.mean()))


def _stored(array: np.ndarray, view: OnnxView) -> np.ndarray:
    """onnxruntime's int8 or uint8 array as it is stored, of which the model's value is ``view``."""
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - 128).astype(np.int8)
    stored = np.empty(array.size, np.int8)
    stored[view.indices().reshape(-1)] = array.reshape(-1)
    return stored


def first_offender(rows: list[TensorDiff]) -> int | None:
    """Index of the first row at fault: one that differs by itself, or, if that is not known, with
    what was computed before it."""
    for i, row in enumerate(rows):
        judged = row.alone or row.difference
        if judged is not None and judged.equal < judged.elements:
            return i
    return None


def explanations(rows: list[TensorDiff]) -> Iterator[str]:
    """A sentence for each layer that differs by itself: whether ties explain it, or int8 where the
    model does not round; or one for all, where none does."""
    if first_offender(rows) is None:
        yield IN_WHOLE
    last = {row.layer: row for row in rows if row.differing}
    for row in last.values():
        assert row.alone is not None
        what = (
            f"{row.op_type} {row.layer!r}: {row.differing:,} of {row.alone.elements:,} elements "
            f"differ by at most {row.alone.largest}"
        )
        if row.explained and row.differing == row.ties:
            yield f"{what}, all of them ties: {TIES}"
        elif row.explained:
            yield f"{what}, all of them because {_rounded_before(row)}"
        elif (row.rounded or 0) > (row.ties or 0):
            why = f"because {_rounded_before(row)}"
            yield f"{what}, {row.rounded:,} of them {why}; that does not explain the others"
        elif row.ties:
            yield f"{what}, {row.ties:,} of them ties; ties do not explain the others"
        else:
            yield f"{what}; no tie explains it"


def _rounded_before(row: TensorDiff) -> str:
    """Where int8 lies in front of a row's result, and not in the model."""
    parts = []
    for each in row.roundings:
        inside = each.layer == row.layer and not each.before
        what = "to int8 within it" if inside else f"{each.op_type} {each.layer!r} to int8"
        parts.append(f"{what} before {each.before}" if each.before else what)
    return f"the accelerator rounds {' and '.join(parts)}, where the model does not round"
