"""The host's share of a model: segments that onnxruntime runs between the accelerator's."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from systole.sw.compiler.partition import HostSegment
from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.golden import oracle
from systole.sw.golden.oracle import Comparison
from systole.sw.ir.graph import ModelError, first_line


@dataclass
class HostOp:
    """An operator that ran on the host."""

    name: str
    op: str
    reason: str
    seconds: float
    """In onnxruntime's kernel."""
    after_layers: int
    """How many of the accelerator's layers came before."""


def run(
    segment: HostSegment, values: Mapping[str, np.ndarray], after_layers: int
) -> tuple[dict[str, np.ndarray], list[HostOp]]:
    """Run a segment on arrays by value name; return its outputs by value name, and the operators
    that ran. Conversions between int8 and float32 are part of the work, but not listed.
    onnxruntime runs the operators as they are written: its optimiser fuses quantisation into some
    wrongly.

    Raises :class:`ModelError` if onnxruntime fails on these values."""
    graph = segment.model.graph
    names = [info.name for info in graph.output]
    feeds = {info.name: values[info.name] for info in graph.input}
    with tempfile.TemporaryDirectory() as folder:
        try:
            profile = Path(folder) / "host"
            live = oracle.session(segment.model, optimise=False, profile=profile)
            results = live.run(names, feeds)
        except Exception as e:
            raise ModelError(
                f"onnxruntime failed on the host's operators: {first_line(e)}"
            ) from None
        seconds = _kernel_seconds(Path(live.end_profiling()))
    ops = [
        HostOp(p.name, p.op_type, p.rule, seconds[p.value], after_layers)
        for p in segment.placements
        if p.op_type not in CONVERSIONS
    ]
    # Only tensors leave a host segment: partitioning has seen to that.
    return dict(zip(names, map(np.asarray, results), strict=True)), ops


def compare(ours: np.ndarray, reference: np.ndarray) -> Comparison:
    """Compare an output computed on the host with onnxruntime's of the whole model, in the output's
    own units. NaN equals NaN. The difference is None if it is not finite, or if the shapes differ
    (which they may where a shape depends on values); then no element counts as equal."""
    if ours.shape != reference.shape:
        return Comparison(max(ours.size, reference.size), 0, None)
    if reference.dtype.kind not in "biuf":
        equal = ours == reference
        return Comparison(equal.size, int(equal.sum()), int(not equal.all()))
    kind = np.float64 if reference.dtype.kind == "f" else np.int64
    a, b = ours.astype(kind), reference.astype(kind)
    equal = (a == b) | ((a != a) & (b != b))
    rest = np.abs(a[~equal] - b[~equal])
    worst = rest.max().item() if rest.size else 0
    return Comparison(equal.size, int(equal.sum()), worst if math.isfinite(worst) else None)


def _kernel_seconds(profile: Path) -> Counter[str]:
    """Seconds in kernels by node name, from onnxruntime's profile."""
    out: Counter[str] = Counter()
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            out[name.removesuffix("_kernel_time")] += event["dur"] / 1e6
    return out
