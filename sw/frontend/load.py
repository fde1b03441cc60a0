"""The loader: an ONNX file to the quantised graph that everything else works on.

Taken are models quantised to int8 or uint8 activations and weights, in QDQ form or
with onnxruntime's fused operators; ``sw.frontend.passes.operators`` says what of each operator.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from systole.sw.frontend.passes.check_limits import check_limits
from systole.sw.frontend.passes.drop_unused import drop_unused
from systole.sw.frontend.passes.fuse_activations import fuse_activations
from systole.sw.frontend.passes.fuse_clamps import fuse_clamps
from systole.sw.frontend.passes.fuse_cuts import fuse_cuts
from systole.sw.frontend.passes.fuse_pads import fuse_pads
from systole.sw.frontend.passes.fuse_residuals import fuse_residuals
from systole.sw.frontend.passes.graph_pass import Pass
from systole.sw.frontend.passes.lower import lower
from systole.sw.frontend.passes.read import read
from systole.sw.ir.graph import Graph
from systole.sw.ir.text import render

PASSES: dict[str, Pass] = {
    each.__name__: each
    for each in (
        drop_unused,
        fuse_clamps,
        fuse_residuals,
        fuse_activations,
        fuse_pads,
        fuse_cuts,
        check_limits,
    )
}
"""The passes that follow lowering, in order, by name."""
PASS_NAMES = ("lower", *PASSES)
"""All passes after which there is a graph to dump."""

Observer = Callable[[str, Graph, bool], None]
"""Takes the name of a pass, the graph after it, and whether the pass changed the graph."""


def load(path: str | os.PathLike, *, dump_after: str | Observer | None = None) -> Graph:
    """The graph of the model in ``path``.

    ``dump_after`` is the name of a pass, one of PASS_NAMES, after which the graph is printed as
    text, or a function that is called after every pass. Raises
    :class:`~sw.ir.graph.ModelError`, whatever is wrong with the file, in one sentence, and
    ``ValueError`` for an unknown pass."""
    observe = _printer(dump_after) if isinstance(dump_after, str) else dump_after
    graph = lower(read(path))
    if observe is not None:
        observe("lower", graph, True)
    return apply_passes(graph, observe)


def apply_passes(graph: Graph, observe: Observer | None = None) -> Graph:
    """A lowered graph after all PASSES; ``observe`` is called after each of them."""
    for name, each in PASSES.items():
        graph, changed = each(graph)
        if observe is not None:
            observe(name, graph, changed)
    return graph


def _printer(wanted: str) -> Observer:
    """An observer that prints the graph after the pass of that name."""
    if wanted not in PASS_NAMES:
        raise ValueError(f"no pass {wanted!r}: the passes are {', '.join(PASS_NAMES)}")

    def observe(name: str, graph: Graph, changed: bool) -> None:
        if name == wanted:
            note = "" if changed else " (unchanged)"
            print(f"after {name}{note}:\n{render(graph)}", end="")

    return observe
