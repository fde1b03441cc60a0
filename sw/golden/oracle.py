"""The oracle: onnxruntime on the CPU, the check on the golden model.

Its integer kernels are the contract (``QLinearConv``, ``QGemm``, ``QLinearMatMul``). A QDQ model
reaches them only by the fusions of ORT_ENABLE_EXTENDED and above, with int8 activations on x86 only
if ``session.qdqisint8allowed`` is set (``test_golden`` checks both). Without, all between
DequantizeLinear and QuantizeLinear runs in float32, which rounds differently.
What onnxruntime cannot fuse runs in float32 at any level: a clamp that the output's range does not
imply, for example.

The results are the same on every processor: onnxruntime optimises the model as far as its choice of
operators goes, not their layout in memory, and ``exact`` replaces the products that its kernels do
not compute exactly everywhere. What is left is then run as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
import onnxruntime

from systole.sw.golden.exact import with_plain_softmax, without_saturation
from systole.sw.golden.model import dequantise_output
from systole.sw.ir.graph import Port, Tensor
from systole.sw.ir.model_file import load_proto


@dataclass(frozen=True)
class Comparison:
    """Element by element, in quantised units unless it is said otherwise."""

    elements: int
    equal: int
    max_abs_diff: float | None

    @property
    def exact(self) -> bool:
        return self.elements == self.equal


def session(
    model: str | os.PathLike | onnx.ModelProto,
    *,
    optimise: bool = True,
    profile: str | os.PathLike | None = None,
) -> onnxruntime.InferenceSession:
    """A session, which runs the integer kernels if it may ``optimise``. ``profile``: prefix of the
    file for onnxruntime's own profile."""
    options = _options("ORT_DISABLE_ALL")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    return _start(final_model(model, optimise=optimise), options)


def final_model(
    model: str | os.PathLike | onnx.ModelProto, *, optimise: bool = True
) -> onnx.ModelProto:
    """The graph whose operators a :func:`session` runs one by one, without further changes."""
    if optimise:
        final = with_plain_softmax(_optimised(model))
    else:
        final = onnx.ModelProto()
        final.CopyFrom(_source(model))
    return without_saturation(final)


def _optimised(model: str | os.PathLike | onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxruntime's optimiser leaves it, layouts in memory unchanged."""
    options = _options("ORT_ENABLE_EXTENDED")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        options.optimized_model_filepath = path
        _start(_source(model), options)
        return onnx.load(path)


def _source(model: str | os.PathLike | onnx.ModelProto) -> onnx.ModelProto:
    return model if isinstance(model, onnx.ModelProto) else load_proto(model)


def _options(level: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 4
    return options


def _start(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    source = model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: str | os.PathLike | onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    *,
    optimise: bool = True,
) -> dict[str, np.ndarray]:
    """The model's outputs by name for input arrays by name: by the integer kernels, or, without
    ``optimise`` or where that fails (1.32 makes invalid operators of int8 without zero points), as
    the graph is written."""
    try:
        live = session(model, optimise=optimise)
    except Exception:
        live = session(model, optimise=False)
    names = [output.name for output in live.get_outputs()]
    arrays = cast("list[np.ndarray]", live.run(names, dict(inputs)))
    return dict(zip(names, arrays, strict=True))


def compare(port: Port, tensor: Tensor, ours: np.ndarray, reference: np.ndarray) -> Comparison:
    """Our int8 (N, C, H, W) against onnxruntime's array of the model's output. Float outputs are
    compared as multiples of the scale: both are ``(q - zero) * scale``. Nothing is equal, and the
    difference None, where the shapes differ."""
    mine = dequantise_output(port, tensor, ours)
    if mine.shape != reference.shape:
        return Comparison(max(mine.size, reference.size), 0, None)
    if port.dtype == "float32":
        mine, reference = (np.rint(a / np.float64(tensor.scale)) for a in (mine, reference))
    difference = np.abs(mine.astype(np.int64) - reference.astype(np.int64))
    return Comparison(difference.size, int((difference == 0).sum()), int(difference.max()))
