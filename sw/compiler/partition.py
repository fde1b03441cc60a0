"""Partition: a model as segments that the accelerator and the host run in turn.

The loader itself decides what the accelerator runs. A node stays there until its handler refuses
it, or, given a configuration, the compiler does. It then goes to the host with the refusal as the
reason, and the rest is tried again. Every try moves at least one node, so the tries end.

:mod:`~sw.compiler.placement` orders the nodes by levels; a level is one segment. If, Loop and Scan
go to the host as a whole, bodies included. Malformed models are refused.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnx
import onnx_ir as ir

from systole.isa import Config
from systole.isa.tools.collector import without_collector
from systole.sw.compiler import READ_LATENCY, Compiler, Optimise
from systole.sw.compiler.placement import FLOAT, QUANTISED, NodePlacement, Placement
from systole.sw.compiler.plan import DoesNotFitError
from systole.sw.compiler.stripes import Schedule
from systole.sw.frontend.dataflow import Dataflow, static_shape
from systole.sw.frontend.load import apply_passes
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.lower import Walker, type_refusal
from systole.sw.ir.graph import Graph, ModelError, Port, Tensor
from systole.sw.progress import Progress, Share, part, silent, step, unseen
from systole.sw.runtime.program import Program

__all__ = [
    "FLOAT",
    "QUANTISED",
    "AcceleratorSegment",
    "HostSegment",
    "NodePlacement",
    "Partition",
    "partition",
    "place",
]


@dataclass(frozen=True)
class AcceleratorSegment:
    """Operators that the accelerator runs as one program."""

    graph: Graph
    program: Program | None
    """None without a configuration to compile for."""
    schedule: Schedule | None
    """The program's schedule."""
    after_passes: dict[str, Graph] = field(default_factory=dict)
    """The graph after each pass of the loader, by the pass's name."""
    views: dict[str, OnnxView] = field(default_factory=dict)
    """How the model's quantised values stand on the graph's tensors of the same name, those that
    passes have fused into an operator included."""


@dataclass(frozen=True)
class HostSegment:
    """Nodes that onnxruntime runs."""

    model: onnx.ModelProto
    placements: list[NodePlacement]
    """The nodes placed on the host, without the conversions that come with them."""


Segment = AcceleratorSegment | HostSegment


@dataclass(frozen=True)
class Partition:
    """A model as segments in the order in which they run. They exchange arrays by value name, in
    the model's own form."""

    path: Path
    dims: Mapping[str, int]
    """Values of the model's symbolic dimensions."""
    placements: list[NodePlacement]
    """The placement of every node, in topological order, with constants folded."""
    segments: list[Segment]
    inputs: Graph
    """A graph without operators that describes the model's inputs: names, types and shapes, and the
    scales of those that the accelerator reads."""
    compile_seconds: float


def partition(
    path: str | os.PathLike,
    config: Config | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    fallback: bool = True,
    optimise: Optimise = "fast",
    read_latency: int = READ_LATENCY,
    progress: Progress = silent,
) -> Partition:
    """Partition the model in ``path``. With a configuration, compile the accelerator's segments for
    it; operators that do not fit go to the host too. ``dims``: values of symbolic dimensions.
    ``optimise`` and ``read_latency`` as for :meth:`~sw.compiler.Compiler.search`. ``progress``
    shows each step.

    Raises :class:`ModelError` for a malformed model, for a model no node of which would run on the
    accelerator, and without ``fallback`` for a model that needs the host."""
    with progress("reading the model"):
        flow = Dataflow(path, dims)
    worker = _Partitioner(flow, config)
    segments = worker.solve(progress)
    placements = worker.placement.of_nodes()
    on_host = worker.placement.by_cause(p for p in placements if p.host)
    if not fallback and on_host:
        raise ModelError(
            f"{on_host[0]}; this node would run on the host, which --no-fallback forbids"
        )
    if not any(isinstance(s, AcceleratorSegment) for s in segments):
        _refuse_float(path, worker)
        cause = worker.placement.main_cause(on_host)
        why = f"; {cause}" if cause else ""
        raise ModelError(f"{path}: no operator of the model runs on the accelerator{why}")
    if optimise == "best":
        segments = worker.optimised(segments, read_latency, progress)
    inputs = _input_graph(worker.flow, segments)
    return Partition(
        path=Path(path),
        dims=dict(dims or {}),
        placements=placements,
        segments=segments,
        inputs=inputs,
        compile_seconds=worker.compile_seconds,
    )


def _refuse_float(path: str | os.PathLike, worker: _Partitioner) -> None:
    """Raises :class:`ModelError` for a model without quantised numbers, with what to do."""
    if not worker.placement.is_float:
        return
    for node in worker.flow.nodes:
        if node.op_type == "DynamicQuantizeLinear":
            raise ModelError(
                f"{path} is quantised at run time: the scales of {node.op_type} {node.name!r} "
                "depend on the input; quantise the float model that it was made of with python -m "
                "sw.quantize"
            )
    raise ModelError(
        f"{path} is a float model: calibrate it with --calibrate X.npz (a file or folder of sample "
        "inputs), or quantise it first with python -m sw.quantize"
    )


def place(path: str | os.PathLike, dims: Mapping[str, int] | None = None) -> list[NodePlacement]:
    """The placement of every node, whether or not the accelerator gets any. Raises
    :class:`ModelError` for a malformed model."""
    flow = Dataflow(path, dims)
    flow.check_runs(path)
    worker = _Partitioner(flow, None)
    worker.solve()
    return worker.placement.of_nodes()


_SegmentKey = tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]
"""Nodes, inputs and outputs of a segment."""
_Refusal = tuple[list[int], str]
"""Nodes that are refused, and why."""


class _Partitioner:
    """Builds a model's segments; moves nodes to the host until all segments compile."""

    def __init__(self, flow: Dataflow, config: Config | None):
        self.flow, self.config = flow, config
        self._row_ops = (config or Config()).row_ops
        self.placement = Placement(flow, row_ops=self._row_ops)
        self.compile_seconds = 0.0
        # Most segments stay the same from one attempt to the next.
        self._lowered: dict[_SegmentKey, AcceleratorSegment | _Refusal] = {}
        self._compiled: dict[_SegmentKey, AcceleratorSegment | _Refusal] = {}
        self._host_models: dict[_SegmentKey, onnx.ModelProto] = {}

    def solve(self, progress: Progress = silent) -> list[Segment]:
        """The segments in order of execution; ``progress`` shows the steps. Only those of which
        lowering refuses nothing are compiled: most that it does refuse something of would be
        compiled in vain."""
        while True:
            with step(progress, "placing operators") as share:
                while self._try(share, compiling=False) is None:
                    pass
            with step(progress, "compiling") as share:
                segments = self._try(share, compiling=True)
            if segments is not None:
                return segments

    def _try(self, share: Share, *, compiling: bool) -> list[Segment] | None:
        """The segments as nodes are placed now, compiled or not; None: some were refused. ``share``
        takes how much of this attempt is done."""
        level = self.placement.levels()
        parts = {}
        for at in sorted(set(level.values())):
            own = [i for i in level if level[i] == at]
            parts[at] = (own, self.placement.with_conversions(own))
        needed = {at: self.flow.boundary(nodes) for at, (_, nodes) in parts.items()}
        segments: list[Segment | None] = []
        # The host's need no work.
        done, total = 0, sum(len(own) for at, (own, _) in parts.items() if at % 2 == 0)
        for at, (own, nodes) in parts.items():
            wanted = self.flow.results.union(*(needed[other] for other in parts if other != at))
            names: list[str] = [v.name for i in own for v in self.flow.nodes[i].outputs if v.name]
            outputs = [name for name in names if name in wanted]
            key = (tuple(nodes), tuple(needed[at]), tuple(outputs))
            if at % 2:
                segments.append(self._host_segment(key))
            else:
                of_segment = part(share, done / total, (done + len(own)) / total)
                of_segment(0)
                done += len(own)
                segment = self._accelerator_segment(own, key, of_segment if compiling else None)
                if segment is None and compiling:
                    return None  # The segments behind it will be others.
                segments.append(segment)
        complete = [segment for segment in segments if segment is not None]
        return complete if len(complete) == len(segments) else None

    def _host_segment(self, key: _SegmentKey) -> HostSegment:
        if key not in self._host_models:
            self._host_models[key] = self._host_model(key)
        on_host = [i for i in key[0] if i in self.placement.host]
        placements = [self.placement.of_host_node(i) for i in on_host]
        return HostSegment(self._host_models[key], placements)

    def _host_model(self, key: _SegmentKey) -> onnx.ModelProto:
        nodes, inputs, outputs = key
        proto = ir.to_proto(self.flow.extract(list(nodes), list(inputs), list(outputs)))
        for info in [*proto.graph.input, *proto.graph.output]:
            kind = self.flow.types[info.name]
            if not kind.startswith("tensor("):
                raise ModelError(
                    f"value {info.name!r} has type {kind}, and segments exchange only tensors"
                )
        for i, node in zip(nodes, proto.graph.node, strict=True):
            # A node may well have no name; onnxruntime's profile tells nodes apart by it.
            node.name = self.flow.labels[i].output
        return proto

    def _accelerator_segment(
        self, own: list[int], key: _SegmentKey, compiling: Share | None
    ) -> AcceleratorSegment | None:
        """The segment of ``own`` and the conversions that it brings along, compiled if there is
        something that takes how much of that is done. None if nodes were refused."""
        nodes, inputs, _ = key
        for name in inputs:
            why = type_refusal(self.flow.values[name])
            if static_shape(self.flow.values[name]) is None:
                why = f"the shape of {name!r} is known only when the model runs"
            if why is not None:
                readers = [i for i in nodes if name in self.flow.uses[i]]
                self.placement.refuse(readers, why, own)
                return None
        if key not in self._lowered:
            self._lowered[key] = self._lower(key)
        known = self._lowered[key]
        if compiling is not None and isinstance(known, AcceleratorSegment):
            if key not in self._compiled:
                self._compiled[key] = self._with_program(nodes, known, compiling)
            known = self._compiled[key]
        if isinstance(known, AcceleratorSegment):
            return known
        self.placement.refuse(*known, own)
        return None

    def _lower(self, key: _SegmentKey) -> AcceleratorSegment | _Refusal:
        """A segment without a program, or what is refused of it."""
        nodes, inputs, outputs = key
        graph: Graph | None = None
        after: dict[str, Graph] = {}

        def observe(name: str, result: Graph, _: bool) -> None:
            after[name] = result

        try:
            model = self.flow.extract(list(nodes), list(inputs), list(outputs))
            walker = Walker(model, row_ops=self._row_ops, masks=self.flow.masks)
            graph = walker.walk()
            after["lower"] = graph
            graph = apply_passes(graph, observe)
            return AcceleratorSegment(graph, None, None, after, walker.views)
        except ModelError as e:
            return self._refusal(nodes, graph, e)

    def _with_program(
        self, nodes: tuple[int, ...], segment: AcceleratorSegment, share: Share
    ) -> AcceleratorSegment | _Refusal:
        """A segment of these nodes, compiled, or what is refused of it."""
        try:
            program, schedule = self._compile(segment.graph, share=share)
            return replace(segment, program=program, schedule=schedule)
        except ModelError as e:
            return self._refusal(nodes, segment.graph, e)

    def _refusal(self, nodes: tuple[int, ...], graph: Graph | None, error: ModelError) -> _Refusal:
        """What an error of a segment of these nodes refuses."""
        if error.node in self.flow.producer:
            culprits = [self.flow.producer[error.node]]
        else:
            culprits, error = self._find_culprits(list(nodes), graph, error)
        return culprits, self._reason(culprits, error)

    def _reason(self, nodes: list[int], error: ModelError) -> str:
        """The error's sentence without the node's name."""
        text = str(error)
        for label in (self.flow.labels[i] for i in nodes):
            text = text.removeprefix(f"{label.op_type} {label.name!r}: ")
        return text

    def _find_culprits(
        self, nodes: list[int], graph: Graph | None, error: ModelError
    ) -> tuple[list[int], ModelError]:
        """The nodes of the first operator that fails by itself, and its error; all nodes, and the
        segment's error, if there is none."""
        if graph is None:
            return nodes, error
        # What planning refuses is found without making programs.
        attempt = self._check if isinstance(error, DoesNotFitError) else self._compile
        for op in graph.ops:
            tensors = {name: graph.tensors[name] for name in (*op.inputs, op.output)}
            given = [name for name in op.inputs if name not in graph.constants]
            ports = [Port(name, name, "int8") for name in given]
            result = [Port(op.output, op.output, "int8")]
            single = replace(graph, tensors=tensors, ops=[op], inputs=ports, outputs=result)
            try:
                attempt(apply_passes(single))
            except ModelError as e:
                culprits = [i for i in nodes if self.flow.labels[i].name == op.name]
                if culprits:
                    return culprits, e
        return nodes, error

    def _check(self, graph: Graph) -> None:
        assert self.config is not None, "something did not fit in its scratchpad"
        Compiler(graph, self.config).check()

    def _compile(
        self,
        graph: Graph,
        optimise: Optimise = "fast",
        read_latency: int = READ_LATENCY,
        share: Share = unseen,
    ) -> tuple[Program, Schedule] | tuple[None, None]:
        if self.config is None:
            return None, None
        start = time.perf_counter()
        with without_collector():  # it takes a tenth of the time
            compiler = Compiler(graph, self.config)
            schedule = compiler.search(optimise, read_latency, share)
            program = compiler.program(schedule)
        self.compile_seconds += time.perf_counter() - start
        return program, schedule

    def optimised(
        self, segments: list[Segment], read_latency: int, progress: Progress
    ) -> list[Segment]:
        """The segments with the best schedules instead of the fast ones."""
        out: list[Segment] = []
        with step(progress, "searching for better schedules") as share:
            for number, segment in enumerate(segments):
                if isinstance(segment, AcceleratorSegment):
                    own = part(share, number / len(segments), (number + 1) / len(segments))
                    program, schedule = self._compile(segment.graph, "best", read_latency, own)
                    segment = replace(segment, program=program, schedule=schedule)
                out.append(segment)
        return out


def _input_graph(flow: Dataflow, segments: list[Segment]) -> Graph:
    """See :attr:`Partition.inputs`."""
    known: dict[str, tuple[Port, Tensor]] = {}
    for segment in segments:
        if isinstance(segment, AcceleratorSegment):
            for port in segment.graph.inputs:
                known.setdefault(port.name, (port, segment.graph.tensors[port.tensor]))
    ports, tensors = [], {}
    for value in flow.graph.inputs:
        name = value.name
        assert name is not None
        port, tensor = known.get(name) or _plain_input(name, value, flow)
        ports.append(port)
        tensors[port.tensor] = tensor
    return Graph(flow.graph.name or "", tensors, [], ports, [])


def _plain_input(name: str, value: ir.Value, flow: Dataflow) -> tuple[Port, Tensor]:
    """An input that the host reads: real numbers are within -1..1, integers start at 0."""
    shape = static_shape(value)
    assert shape is not None and value.dtype is not None
    # Any type that the model has: nothing quantises this input.
    dtype = cast(Literal["float32", "int8", "uint8"], str(value.dtype.numpy()))
    perm = tuple(range(len(shape)))
    stored = (1, math.prod(shape), 1, 1)
    if len(shape) == 4:
        if shape[3] in (1, 3) and shape[1] not in (1, 3):
            perm = (0, 3, 1, 2)
        n, c, h, w = (shape[p] for p in perm)
        stored = n, c, h, w
    unsigned = dtype not in ("int8", "float32", "float16", "float64")
    tensor = Tensor(
        name,
        stored,
        scale=np.float32(1 / 128),
        zero=0,
        unsigned=unsigned,
        onnx_shape=shape,
        perm=perm,
    )
    return Port(name, name, dtype, flow.index_limit(name)), tensor
