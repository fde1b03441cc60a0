"""The loader: an ONNX file to the quantised graph that everything else works on.

Taken are models quantised to int8 or uint8 activations and weights, in QDQ form or
with onnxruntime's fused operators; ``sw.frontend.passes.operators`` says what of each operator.
"""

from __future__ import annotations

import os

from systole.sw.frontend.passes.check import check_limits
from systole.sw.frontend.passes.fuse import (
    drop_unused,
    fuse_activations,
    fuse_clamps,
    fuse_residuals,
)
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.frontend.passes.read import read
from systole.sw.ir.graph import Graph

PASSES = (drop_unused, fuse_clamps, fuse_residuals, fuse_activations, check_limits)
"""What follows lowering, in order; each maps a graph to a graph."""


def load(path: str | os.PathLike) -> Graph:
    """The graph of the model in ``path``. Raises :class:`sw.ir.graph.ModelError`, whatever is wrong
    with the file, in one sentence."""
    return apply_passes(GraphBuilder(read(path)).run(OPERATORS))


def apply_passes(graph: Graph) -> Graph:
    """The graph after all :data:`PASSES`. Raises :class:`sw.ir.graph.ModelError` for what exceeds
    the limits of the commands."""
    for each in PASSES:
        graph = each(graph)
    return graph
