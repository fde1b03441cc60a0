"""The walk over a partitioned model's segments: the host's run in onnxruntime, the accelerator's on
whatever the caller has (the golden model, a device)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from systole.sw.compiler.partition import AcceleratorSegment, HostSegment, Partition
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Port, Tensor
from systole.sw.session import host
from systole.sw.session.host import HostOp

Accelerator = Callable[[AcceleratorSegment, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs one segment. It gets the segment's inputs and returns at least its outputs, both as int8
(N, C, H, W) by tensor name."""


@dataclass
class Trail:
    """What a run left behind."""

    values: dict[str, np.ndarray]
    """The model's inputs, its outputs and all that segments exchange, by value name, in the model's
    own form."""
    segments: list[tuple[AcceleratorSegment, dict[str, np.ndarray]]] = field(default_factory=list)
    """The accelerator's segments, in order, with the tensors that the accelerator returned."""
    host_ops: list[HostOp] = field(default_factory=list)
    """Operators that ran on the host, in order."""
    host_seconds: float = 0.0
    """The host's time, conversions included."""

    def handed_out(self) -> dict[str, tuple[Port, Tensor, np.ndarray]]:
        """The accelerator segments' outputs by value name, as int8 (N, C, H, W)."""
        return {
            port.name: (port, segment.graph.tensors[port.tensor], tensors[port.tensor])
            for segment, tensors in self.segments
            for port in segment.graph.outputs
        }


def golden_accelerator(
    segment: AcceleratorSegment, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The golden model in the accelerator's place: all tensors of the segment."""
    return golden.run(segment.graph, inputs)


def follow(
    plan: Partition,
    arrays: Mapping[str, np.ndarray],
    accelerator: Accelerator = golden_accelerator,
    on_host: host.Runner = host.run,
) -> Trail:
    """Run a model's segments in order. ``arrays``: the model's inputs by name, in its own types.
    ``on_host`` runs the host's.

    Raises :class:`ModelError` if onnxruntime fails on the host's operators, and whatever
    ``accelerator`` raises."""
    trail = Trail(dict(arrays))
    layers = 0
    for segment in plan.segments:
        if isinstance(segment, HostSegment):
            done = on_host(segment, trail.values, layers)
            trail.values.update(done.values)
            trail.host_ops.extend(done.ops)
            trail.host_seconds += done.seconds
        else:
            _follow_accelerator(segment, trail, accelerator)
            layers += len(segment.graph.ops)
    return trail


def _follow_accelerator(
    segment: AcceleratorSegment, trail: Trail, accelerator: Accelerator
) -> None:
    graph, values = segment.graph, trail.values
    inputs = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], values[p.name])
        for p in graph.inputs
    }
    tensors = accelerator(segment, inputs)
    trail.segments.append((segment, tensors))
    for p in graph.outputs:
        tensor = graph.tensors[p.tensor]
        values[p.name] = golden.dequantise_output(p, tensor, tensors[p.tensor])
