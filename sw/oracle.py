"""The oracle: onnxruntime on the CPU, the check on the golden model.

Its integer kernels are the contract (``QLinearConv``, ``QGemm``, ``QLinearMatMul``). A QDQ model
reaches them only by the fusions of ORT_ENABLE_EXTENDED and above, with int8 activations on x86 only
if ``session.qdqisint8allowed`` is set (``test_golden`` checks both). Without, all between
DequantizeLinear and QuantizeLinear runs in float32, which rounds differently.
What onnxruntime cannot fuse runs in float32 at any level: a clamp that the output's range does not
imply, for example.

On x86 processors without VNNI instructions onnxruntime's own kernels saturate 16-bit partial sums
of large weights; there it is no oracle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from sw.golden import dequantise_output
from sw.graph import Port, Tensor


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
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: str | os.PathLike | onnx.ModelProto, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The model's outputs by name for input arrays by name."""
    live = session(model)
    names = [output.name for output in live.get_outputs()]
    return dict(zip(names, live.run(names, dict(inputs)), strict=True))


def compare(port: Port, tensor: Tensor, ours: np.ndarray, reference: np.ndarray) -> Comparison:
    """Our int8 (N, C, H, W) against onnxruntime's array of the model's output. Float outputs are
    compared as multiples of the scale: both are ``(q - zero) * scale``."""
    mine = dequantise_output(port, tensor, ours)
    if mine.shape != reference.shape:
        raise ValueError(f"output {port.name!r}: shape {mine.shape}, expected {reference.shape}")
    if port.dtype == "float32":
        mine, reference = (np.rint(a / np.float64(tensor.scale)) for a in (mine, reference))
    difference = np.abs(mine.astype(np.int64) - reference.astype(np.int64))
    return Comparison(difference.size, int((difference == 0).sum()), int(difference.max()))
