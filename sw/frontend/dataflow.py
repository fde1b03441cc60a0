"""A model's nodes and values: which node computes and which reads what, of which type; malformed
models are refused here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes.masks import choices_as_masks, computed_masks, logical_inputs
from systole.sw.frontend.passes.operators.registry import MICROSOFT
from systole.sw.frontend.passes.read import infer_shapes, read
from systole.sw.frontend.passes.values import Node
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError, first_line

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", MICROSOFT)
"""Domains whose operators onnxruntime has."""
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


class Dataflow:
    """The model in ``path``, read; ``dims`` are values of its symbolic dimensions.

    Raises :class:`ModelError` for a malformed model: one that cannot be read, that onnxruntime does
    not accept, with unknown domains or empty tensors."""

    def __init__(self, path: str | os.PathLike, dims: Mapping[str, int] | None = None):
        self.model = read(path, dims)
        self.graph = self.model.graph
        choices_as_masks(self.graph)
        self.nodes = list(self.graph)
        """In topological order; nodes are known by their index."""
        self.labels = [Node(n) for n in self.nodes]
        self.values = {v.name: v for v in self.graph.inputs}
        """Inputs and results, by name."""
        self.values |= {v.name: v for n in self.nodes for v in n.outputs if v.name}
        self.constants = dict(self.graph.initializers)
        self.producer = {v.name: i for i, n in enumerate(self.nodes) for v in n.outputs if v.name}
        self.uses = [self._used(n) for n in self.nodes]
        """Names of the values that each node reads, constants excluded, in its bodies too."""
        self.results = {v.name for v in self.graph.outputs}
        self.masks = computed_masks(self.graph)
        """Values that are masks of attention scores, and the highest number of each that masks."""
        self.logical = logical_inputs(self.graph)
        """Inputs that masks are computed from."""
        for name in self.results:
            if name not in self.values:
                raise ModelError(f"output {name!r} is a constant")
        self._check_domains()
        self.types = infer_shapes(self.model, Path(path))
        """onnxruntime's type of each value, such as ``tensor(int8)``."""

    def _used(self, node: ir.Node) -> list[str]:
        used: dict[str, None] = {}

        def visit(node: ir.Node) -> None:
            values = list(node.inputs)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    bodies = [attribute.as_graph()]
                elif attribute.type == ir.AttributeType.GRAPHS:
                    bodies = list(attribute.as_graphs())
                else:
                    continue
                for body in bodies:
                    for inner in body:
                        visit(inner)
                    values += list(body.outputs)
            for value in values:
                if value is None or value.name is None:
                    continue
                if self.values.get(value.name) is value:
                    used[value.name] = None

        visit(node)
        return list(used)

    def _check_domains(self) -> None:
        for node, label in zip(self.nodes, self.labels, strict=True):
            if node.domain not in DOMAINS:
                raise label.fail(
                    f"domain {node.domain!r} is unknown; neither the accelerator nor onnxruntime "
                    "has its operators"
                )

    def invalid_scale(self, i: int) -> str | None:
        """What is wrong with a scale of node ``i``: it is not positive and finite."""
        node = self.nodes[i]
        if node.op_type in CONVERSIONS:
            scales = node.inputs[1:2]
        elif node.op_type.startswith(("QLinear", "QGemm")):
            scales = node.inputs
        else:
            return None
        for value in scales:
            if value is None or value.const_value is None:
                continue
            array = value.const_value.numpy()
            if array.dtype.kind == "f" and not (np.isfinite(array) & (array > 0)).all():
                bad = array[~(np.isfinite(array) & (array > 0))].flat[0]
                return f"scale {value.name!r} = {bad}: must be positive and finite"
        return None

    def index_limit(self, name: str, limit: int = 256) -> int:
        """The number of rows of the smallest constant table that value ``name`` picks from, at most
        ``limit``; 2 of an input that masks are computed from."""
        if name in self.logical:
            limit = min(limit, 2)
        for node, used in zip(self.nodes, self.uses, strict=True):
            if name not in used:
                continue
            if node.op_type in ("Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze"):
                limit = self.index_limit(str(node.outputs[0].name), limit)
            table = node.inputs[0]
            if node.op_type == "Gather" and table is not None and table.const_value is not None:
                axis = Node(node).integer("axis", 0)
                limit = min(limit, int(table.const_value.shape.numpy()[axis]))
        return limit

    def check_runs(self, path: str | os.PathLike) -> None:
        """onnxruntime finds some conflicts of shapes only when it runs a model: run it on zeros.
        Raises :class:`ModelError`."""
        arrays = {}
        for value in self.graph.inputs:
            assert value.name and value.shape and value.dtype, "pass 1 and onnxruntime checked it"
            arrays[value.name] = np.zeros(value.shape.numpy(), value.dtype.numpy())
        run_reference(path, arrays)

    def boundary(self, nodes: list[int]) -> list[str]:
        """Names of the values that nodes read and others compute."""
        own = {v.name for i in nodes for v in self.nodes[i].outputs}
        used = dict.fromkeys(name for i in nodes for name in self.uses[i])
        return [name for name in used if name not in own]

    def extract(self, nodes: list[int], inputs: list[str], outputs: list[str]) -> ir.Model:
        """Nodes as a model of their own; tensors are shared."""
        used = {v for i in nodes for v in self.nodes[i].inputs if v is not None}
        bodies = any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for i in nodes
            for a in self.nodes[i].attributes.values()
        )
        view = ir.GraphView(
            [self.values[name] for name in inputs],
            [self.values[name] for name in outputs],
            nodes=[self.nodes[i] for i in nodes],
            initializers=[c for c in self.constants.values() if bodies or c in used],
            opset_imports=self.graph.opset_imports,
            name=self.graph.name,
        )
        return ir.Model(view.clone(), ir_version=self.model.ir_version)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """A value's shape; None if it is known only when the model runs."""
    if value.shape is None:
        return None
    dims = tuple(d for d in value.shape.dims if isinstance(d, int))
    return dims if len(dims) == len(value.shape.dims) else None


def run_reference(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], *, optimise: bool = True
) -> dict[str, np.ndarray]:
    """onnxruntime's outputs of the whole model, as :func:`systole.sw.golden.oracle.run`. Raises
    :class:`ModelError` if it fails."""
    try:
        return oracle.run(path, arrays, optimise=optimise)
    except Exception as e:  # onnxruntime's errors have no class of their own in common
        raise ModelError(f"{path}: onnxruntime cannot run the model: {first_line(e)}") from None
