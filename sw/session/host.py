"""The host's share of a model: segments that onnxruntime runs between the accelerator's."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

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


@dataclass(frozen=True)
class HostRun:
    """One run of a segment."""

    values: dict[str, np.ndarray]
    """Its outputs by value name."""
    ops: list[HostOp]
    """The operators that ran. Conversions between int8 and float32 are not listed."""
    seconds: float
    """All of it in onnxruntime, conversions included."""


Runner = Callable[[HostSegment, Mapping[str, np.ndarray], int], HostRun]
"""Runs a segment on arrays by value name, behind so many of the accelerator's layers."""


def run(segment: HostSegment, values: Mapping[str, np.ndarray], after_layers: int) -> HostRun:
    """The :data:`Runner` that measures. onnxruntime runs the operators as they are written: its
    optimiser fuses quantisation into some wrongly. It runs them twice, the first time to warm up,
    as the frames before would.

    Raises :class:`ModelError` if onnxruntime fails on these values."""
    with tempfile.TemporaryDirectory() as folder:
        live = _session(segment, Path(folder) / "host")
        _results(live, segment, values)
        start = time.perf_counter()
        results = _results(live, segment, values)
        seconds = time.perf_counter() - start
        kernels = _kernel_seconds(Path(live.end_profiling()))
    ops = [
        HostOp(p.name, p.op_type, p.rule, kernels[p.value], after_layers)
        for p in segment.placements
        if p.op_type not in CONVERSIONS
    ]
    return HostRun(results, ops, seconds)


class KeptHost:
    """A :data:`Runner` for many runs of the same segments, whose sessions it keeps. It does not say
    which operators ran, or for how long."""

    def __init__(self) -> None:
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}

    def __call__(
        self, segment: HostSegment, values: Mapping[str, np.ndarray], after_layers: int
    ) -> HostRun:
        key = id(segment)
        if key not in self._sessions:
            self._sessions[key] = _session(segment)
        return HostRun(_results(self._sessions[key], segment, values), [], 0.0)


def _session(segment: HostSegment, profile: Path | None = None) -> onnxruntime.InferenceSession:
    try:
        return oracle.session(segment.model, optimise=False, profile=profile)
    except Exception as e:
        raise _failed(e) from None


def _results(
    live: onnxruntime.InferenceSession, segment: HostSegment, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A segment's outputs by value name."""
    graph = segment.model.graph
    names = [info.name for info in graph.output]
    try:
        results = live.run(names, {info.name: values[info.name] for info in graph.input})
    except Exception as e:
        raise _failed(e) from None
    # Only tensors leave a host segment: partitioning has seen to that.
    return dict(zip(names, map(np.asarray, results), strict=True))


def _failed(error: Exception) -> ModelError:
    return ModelError(f"onnxruntime failed on the host's operators: {first_line(error)}")


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
    """Seconds in kernels by node name in the last run, from onnxruntime's profile."""
    out: Counter[str] = Counter()
    events = json.loads(profile.read_text(encoding="utf-8"))
    last = max(e["ts"] for e in events if e["name"] == "model_run")
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and event["ts"] >= last:
            out[name.removesuffix("_kernel_time")] += event["dur"] / 1e6
    return out
