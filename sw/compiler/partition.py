"""Partition: which nodes of a model the accelerator runs, which the host, in what segments.

The loader itself decides. A node stays on the accelerator until its handler refuses it (or, given a
configuration, the compiler does); then it goes to the host with the refusal as the reason, and the
rest is tried again. Every try moves at least one node, so the tries end.

Between accelerator and host there are only int8 and uint8 tensors, and the model's own inputs and
outputs. So nodes that exchange anything else form a *group* that is placed as a whole. Conversions
at the border (a DequantizeLinear, the QuantizeLinear of a model input) belong to whoever needs
their result, if need be to several.

Groups on the accelerator and single nodes on the host are ordered by *levels*: even ones run on the
accelerator, odd ones on the host, and each unit has the lowest level that its operands allow.
A level is one segment. As levels only rise along the graph, no segment waits for its own result.

If, Loop and Scan go to the host as a whole, bodies included. Malformed models are refused.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from systole.isa import Config
from systole.sw.compiler import READ_LATENCY, Compiler, Optimise
from systole.sw.compiler.stripes import Schedule
from systole.sw.frontend.dataflow import CONVERSIONS, Dataflow
from systole.sw.frontend.load import apply_passes
from systole.sw.frontend.passes.lower import lower
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.ir.graph import Graph, ModelError, Port, Tensor
from systole.sw.runtime.program import Program

FLOAT = "float: quantise first with python -m sw.quantize"
QUANTISED = ("tensor(int8)", "tensor(uint8)")


@dataclass(frozen=True)
class NodePlacement:
    """Where a node runs, and the rule that decided it."""

    name: str
    op_type: str
    value: str
    """Name of its first output."""
    host: bool
    rule: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.name!r}: {self.rule}"


@dataclass(frozen=True)
class AcceleratorSegment:
    """Operators that the accelerator runs as one program."""

    graph: Graph
    program: Program | None
    """None if there is no configuration to compile for."""
    schedule: Schedule | None
    """The program's."""


@dataclass(frozen=True)
class HostSegment:
    """Nodes that onnxruntime runs."""

    model: onnx.ModelProto
    placements: list[NodePlacement]


@dataclass(frozen=True)
class Partition:
    """A model as segments, in the order in which they run. They exchange arrays in the model's own
    form, by value name."""

    path: Path
    placements: list[NodePlacement]
    """Of every node, in topological order, constants folded."""
    segments: list[AcceleratorSegment | HostSegment]
    inputs: Graph
    """The model's inputs alone, a graph without operators: their names, types and shapes; the scale
    where the accelerator quantises or reads one."""
    compile_seconds: float


def partition(
    path: str | os.PathLike,
    config: Config | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    fallback: bool = True,
    optimise: Optimise = "fast",
    read_latency: int = READ_LATENCY,
) -> Partition:
    """Partition the model in ``path``. With a configuration the accelerator's segments are compiled
    for it, and what it cannot hold goes to the host too. ``dims``: values of symbolic dimensions.
    ``optimise`` and ``read_latency`` as for :meth:`~sw.compiler.Compiler.search`.

    Raises :class:`ModelError` for a malformed model, for one of which nothing would run on the
    accelerator, and without ``fallback`` for one that needs the host."""
    worker = _Partitioner(path, config, dims)
    segments = worker.solve()
    placements = worker.placements()
    on_host = [p for p in placements if p.host]
    if not fallback and on_host:
        first = next((p for p in on_host if p.op_type not in CONVERSIONS), on_host[0])
        raise ModelError(f"{first}; this node would run on the host, which --no-fallback forbids")
    if not any(isinstance(s, AcceleratorSegment) for s in segments):
        if worker.is_float:
            raise ModelError(
                f"{path} is a float model: calibrate it with --calibrate X.npz (a file or folder "
                "of sample inputs), or quantise it first with python -m sw.quantize"
            )
        why = f"; {on_host[0]}" if on_host else ""
        raise ModelError(f"{path}: no operator of the model runs on the accelerator{why}")
    if optimise == "best":
        segments = [worker.optimised(s, read_latency) for s in segments]
    return Partition(
        Path(path), placements, segments, worker.input_graph(segments), worker.compile_seconds
    )


def place(path: str | os.PathLike, dims: Mapping[str, int] | None = None) -> list[NodePlacement]:
    """The placement of every node, whether or not the accelerator gets any. Raises
    :class:`ModelError` for a malformed model."""
    worker = _Partitioner(path, None, dims)
    worker.check_runs(path)
    worker.solve()
    return worker.placements()


class _Partitioner(Dataflow):
    def __init__(
        self, path: str | os.PathLike, config: Config | None, dims: Mapping[str, int] | None
    ):
        super().__init__(path, dims)
        self.config = config
        self.compile_seconds = 0.0
        self.reasons: dict[int, str] = {}
        """Why a node runs on the host, for those refused themselves."""
        self.host: dict[int, str] = {}
        """The same for all nodes on the host."""
        self.is_float = not any(
            n.op_type in CONVERSIONS or n.op_type.startswith(("QLinear", "QGemm"))
            for n in self.nodes
        )
        for i, n in enumerate(self.nodes):
            if (n.domain, n.op_type) not in OPERATORS:
                self.reasons[i] = "operator not supported"
            elif self.is_float:
                self.reasons[i] = FLOAT

    # Placement -----------------------------------------------------------------------------------

    def _conversion(self, i: int) -> bool:
        """A node that belongs to whoever reads its result."""
        node = self.nodes[i]
        if i in self.reasons or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "DequantizeLinear":
            return True
        source = node.inputs[0]
        return node.op_type == "QuantizeLinear" and (
            source is None or source.name not in self.producer
        )

    def _spread(self) -> list[int]:
        """Fills ``host``; the group of every node (a representative)."""
        group = list(range(len(self.nodes)))

        def find(i: int) -> int:
            while group[i] != i:
                group[i] = group[group[i]]
                i = group[i]
            return i

        self.free = [self._conversion(i) for i in range(len(self.nodes))]
        for i, used in enumerate(self.uses):
            for name in used:
                source = self.producer.get(name)
                linked = source is not None and self.types[name] not in QUANTISED
                if linked and not self.free[i] and not self.free[source]:
                    group[find(i)] = find(source)
        group = [find(i) for i in range(len(group))]
        first: dict[int, int] = {}
        for i in sorted(self.reasons):
            first.setdefault(group[i], i)
        self.host = {}
        for i, g in enumerate(group):
            if i in self.reasons:
                self.host[i] = self.reasons[i]
            elif g in first:
                other = self.labels[first[g]]
                self.host[i] = (
                    f"exchanges unquantised values with {other.op_type} {other.name!r}, "
                    "which runs on the host"
                )
        return group

    def _sources(self, i: int) -> Iterator[int]:
        """Nodes that a node depends on, through conversions."""
        for name in self.uses[i]:
            source = self.producer.get(name)
            if source is None:
                continue
            if self.free[source]:
                yield from self._sources(source)
            else:
                yield source

    def _levels(self) -> dict[int, int]:
        """The level of every node but pure conversions. A group that would wait for itself goes to
        the host, and all is placed anew."""
        while True:
            group = self._spread()
            units: dict[tuple[bool, int], list[int]] = {}
            unit: dict[int, tuple[bool, int]] = {}
            for i in range(len(self.nodes)):
                if not self.free[i]:
                    unit[i] = (True, i) if i in self.host else (False, group[i])
                elif not self.results.isdisjoint(v.name for v in self.nodes[i].outputs):
                    # A conversion that makes an output of the model runs where its operand is.
                    sources = list(self._sources(i))
                    on_host = not sources or sources[0] in self.host
                    if on_host:
                        self.host[i] = "converts what does not come from the accelerator"
                    unit[i] = (on_host, i)
                else:
                    continue
                units.setdefault(unit[i], []).append(i)
            needs = {
                u: {unit[s] for i in members for s in self._sources(i)} - {u}
                for u, members in units.items()
            }
            level: dict[tuple[bool, int], int] = {}
            waiting = list(units)
            while waiting:
                ready = [u for u in waiting if needs[u] <= level.keys()]
                for u in ready:
                    own = int(u[0])
                    least = [level[s] + (level[s] % 2 != own) for s in needs[u]]
                    level[u] = max([*least, -own])
                if not ready:
                    break
                waiting = [u for u in waiting if u not in level]
            if not waiting:
                return {i: level[u] for i, u in unit.items()}
            stuck = next(u for u in waiting if not u[0])
            for i in units[stuck]:
                self.reasons[i] = "needs, through the host, a result of its own segment"

    def solve(self) -> list[AcceleratorSegment | HostSegment]:
        """The segments in order of execution."""
        while True:
            level = self._levels()
            parts = {}
            for at in sorted(set(level.values())):
                own = [i for i in level if level[i] == at]
                parts[at] = (own, self._with_conversions(own))
            needed = {at: self.boundary(nodes) for at, (_, nodes) in parts.items()}
            segments: list[AcceleratorSegment | HostSegment] = []
            refused = False
            for at, (own, nodes) in parts.items():
                wanted = self.results.union(*(needed[o] for o in parts if o != at))
                names = [v.name for i in own for v in self.nodes[i].outputs]
                outputs = [name for name in names if name in wanted]
                if at % 2:
                    segments.append(self._host_segment(nodes, needed[at], outputs))
                    continue
                segment = self._accelerator_segment(own, nodes, needed[at], outputs)
                refused |= segment is None
                if segment is not None:
                    segments.append(segment)
            if not refused:
                return segments

    def placements(self) -> list[NodePlacement]:
        """Of every node; after ``solve``."""
        users: dict[int, list[int]] = {}
        for i, used in enumerate(self.uses):
            for name in used:
                if name in self.producer:
                    users.setdefault(self.producer[name], []).append(i)
        rules: dict[int, tuple[bool, str]] = {}
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            if i in self.host:
                rules[i] = (True, self.host[i])
                continue
            on_host = self.free[i] and all(rules[u][0] for u in users.get(i, [i]) if u != i)
            if on_host and users.get(i):
                rules[i] = (True, "converts for the host alone")
            else:
                doc = OPERATORS[node.domain, node.op_type].__doc__ or ""
                rules[i] = (False, " ".join(doc.split()))
        return [self._placement(i, *rules[i]) for i in range(len(self.nodes))]

    def _placement(self, i: int, host: bool, rule: str) -> NodePlacement:
        label = self.labels[i]
        return NodePlacement(label.name, label.op_type, label.output, host, rule)

    # Segments ------------------------------------------------------------------------------------

    def _with_conversions(self, own: Iterable[int]) -> list[int]:
        nodes, todo = set(own), list(own)
        while todo:
            for name in self.uses[todo.pop()]:
                source = self.producer.get(name)
                if source is not None and self.free[source] and source not in nodes:
                    nodes.add(source)
                    todo.append(source)
        return sorted(nodes)

    def _host_segment(self, nodes: list[int], inputs: list[str], outputs: list[str]) -> HostSegment:
        proto = ir.to_proto(self.extract(nodes, inputs, outputs))
        for info in [*proto.graph.input, *proto.graph.output]:
            kind = self.types[info.name]
            if not kind.startswith("tensor("):
                raise ModelError(f"value {info.name!r} of type {kind} would leave its segment")
        # A node may well have no name; onnxruntime's profile tells nodes apart by it.
        placements = []
        for i, node in zip(nodes, proto.graph.node, strict=True):
            label = self.labels[i]
            node.name = label.output
            if i in self.host:
                placements.append(self._placement(i, True, self.host[i]))
        return HostSegment(proto, placements)

    def _accelerator_segment(
        self, own: list[int], nodes: list[int], inputs: list[str], outputs: list[str]
    ) -> AcceleratorSegment | None:
        """None if something was refused; it is in ``reasons`` then."""
        for name in inputs:
            if any(not isinstance(d, int) for d in self.values[name].shape.dims):
                why = f"the shape of {name!r} is known only when the model runs"
                self._refuse([i for i in nodes if name in self.uses[i]], why, own)
                return None
        graph = None
        try:
            graph = lower(self.extract(nodes, inputs, outputs))
            graph = apply_passes(graph)
            return AcceleratorSegment(graph, *self._compile(graph))
        except ModelError as e:
            if e.node in self.producer:
                culprits = [self.producer[e.node]]
            else:
                culprits, e = self._find_culprits(nodes, graph, e)
            self._refuse(culprits, self._reason(culprits, e), own)
            return None

    def _refuse(self, nodes: list[int], why: str, segment: list[int]) -> None:
        if all(i in self.reasons for i in nodes):
            nodes = segment
        for i in nodes:
            self.reasons.setdefault(i, why)

    def _reason(self, nodes: list[int], error: ModelError) -> str:
        """The error's sentence without the node's name."""
        text = str(error)
        for label in (self.labels[i] for i in nodes):
            text = text.removeprefix(f"{label.op_type} {label.name!r}: ")
        return text

    def _compile(
        self, graph: Graph, optimise: Optimise = "fast", read_latency: int = READ_LATENCY
    ) -> tuple[Program, Schedule] | tuple[None, None]:
        if self.config is None:
            return None, None
        start = time.perf_counter()
        compiler = Compiler(graph, self.config)
        schedule = compiler.search(optimise, read_latency)
        program = compiler.program(schedule)
        self.compile_seconds += time.perf_counter() - start
        return program, schedule

    def optimised(
        self, segment: AcceleratorSegment | HostSegment, read_latency: int
    ) -> AcceleratorSegment | HostSegment:
        """The segment with the best schedule instead of the fast one."""
        if isinstance(segment, HostSegment):
            return segment
        return AcceleratorSegment(
            segment.graph, *self._compile(segment.graph, "best", read_latency)
        )

    def _find_culprits(
        self, nodes: list[int], graph: Graph | None, error: ModelError
    ) -> tuple[list[int], ModelError]:
        """The nodes of the first operator that fails by itself; all if there is none."""
        for op in graph.ops if graph else ():
            tensors = {name: graph.tensors[name] for name in (*op.inputs, op.output)}
            given = [name for name in op.inputs if name not in graph.constants]
            ports = [Port(name, name, "int8") for name in given]
            result = [Port(op.output, op.output, "int8")]
            single = replace(graph, tensors=tensors, ops=[op], inputs=ports, outputs=result)
            try:
                self._compile(apply_passes(single))
            except ModelError as e:
                found = [i for i in nodes if self.labels[i].name == op.name]
                if found:
                    return found, e
        return nodes, error

    # Inputs --------------------------------------------------------------------------------------

    def input_graph(self, segments: list[AcceleratorSegment | HostSegment]) -> Graph:
        """See :attr:`Partition.inputs`."""
        known: dict[str, tuple[Port, Tensor]] = {}
        for segment in segments:
            if isinstance(segment, AcceleratorSegment):
                for port in segment.graph.inputs:
                    known.setdefault(port.name, (port, segment.graph.tensors[port.tensor]))
        ports, tensors = [], {}
        for value in self.graph.inputs:
            port, tensor = known.get(value.name) or self._plain_input(value)
            ports.append(port)
            tensors[port.tensor] = tensor
        return Graph(self.graph.name or "", tensors, [], ports, [])

    def _plain_input(self, value: ir.Value) -> tuple[Port, Tensor]:
        """Of an input that the host reads: real numbers within -1..1, integers from 0."""
        shape = tuple(value.shape.dims)
        dtype = str(value.dtype.numpy())
        perm = tuple(range(len(shape)))
        if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
            perm = (0, 3, 1, 2)
        stored = tuple(shape[p] for p in perm) if len(shape) == 4 else (1, math.prod(shape), 1, 1)
        unsigned = dtype not in ("int8", "float32", "float16", "float64")
        tensor = Tensor(value.name, stored, np.float32(1 / 128), 0, unsigned, shape, perm)
        return Port(value.name, value.name, dtype), tensor
