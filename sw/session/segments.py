"""A partitioned model without a machine: the golden model on the accelerator's segments, the host
on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from systole.sw.compiler.partition import HostSegment, Partition
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Graph, Port, Tensor
from systole.sw.session import host


@dataclass(frozen=True)
class Trail:
    """What a run left behind."""

    values: dict[str, np.ndarray]
    """The model's inputs, its outputs and all that segments exchange, by value name, in the model's
    own form."""
    segments: list[tuple[Graph, dict[str, np.ndarray]]] = field(default_factory=list)
    """The accelerator's, in order, with all tensors as int8 (N, C, H, W)."""

    def handed_out(self) -> dict[str, tuple[Port, Tensor, np.ndarray]]:
        """What the accelerator makes for others, by value name."""
        return {
            port.name: (port, graph.tensors[port.tensor], tensors[port.tensor])
            for graph, tensors in self.segments
            for port in graph.outputs
        }


def follow(plan: Partition, arrays: Mapping[str, np.ndarray]) -> Trail:
    """Run the model on its inputs by name. Raises :class:`ModelError` if onnxruntime fails
    on the host's operators."""
    trail = Trail(dict(arrays))
    values = trail.values
    for segment in plan.segments:
        if isinstance(segment, HostSegment):
            values.update(host.run(segment, values, 0)[0])
            continue
        graph = segment.graph
        inputs = {
            p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], values[p.name])
            for p in graph.inputs
        }
        tensors = golden.run(graph, inputs)
        trail.segments.append((graph, tensors))
        for p in graph.outputs:
            tensor = graph.tensors[p.tensor]
            values[p.name] = golden.dequantise_output(p, tensor, tensors[p.tensor])
    return trail
