"""The oracle: onnxruntime on the CPU, the check on the golden model.

Its integer kernels are the contract (``QLinearConv``, ``QGemm``, ``QLinearMatMul``). A QDQ model
reaches them only by the fusions of ORT_ENABLE_EXTENDED and above, with int8 activations on x86 only
if ``session.qdqisint8allowed`` is set (``test_golden`` checks both). Without, all between
DequantizeLinear and QuantizeLinear runs in float32, which rounds differently.
What onnxruntime cannot fuse runs in float32 at any level: a clamp that the output's range does not
imply, for example.

On x86 processors without VNNI instructions onnxruntime's kernels for uint8 by int8 saturate partial
sums to 16 bits. Constant weights are made uint8 there, which is exact (``x64quantprecision``); of
products of two activations, and of models that mix int8 and uint8, it is no oracle.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

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


@functools.cache
def saturates() -> bool:
    """Whether this processor is one of those without VNNI."""
    infos = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", TensorProto.UINT8, (4, 64)),
            ("w", TensorProto.INT8, (64, 16)),
            ("y", TensorProto.INT32, (4, 16)),
        )
    ]
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "probe", infos[:2], infos[2:])
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    live = _session(model.SerializeToString(), True, None)
    inputs = {"x": np.full((4, 64), 255, np.uint8), "w": np.full((64, 16), 127, np.int8)}
    return bool((live.run(None, inputs)[0] != 64 * 255 * 127).any())


def session(
    model: str | os.PathLike | onnx.ModelProto,
    *,
    optimise: bool = True,
    profile: str | os.PathLike | None = None,
) -> onnxruntime.InferenceSession:
    """A session, which runs the integer kernels if it may ``optimise``. ``profile``: prefix of the
    file for onnxruntime's own profile."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    if optimise and saturates():
        # It refuses int8 activations, which are exact anyway.
        with contextlib.suppress(Exception):
            return _session(source, optimise, profile, precise=True)
    return _session(source, optimise, profile)


def _session(
    source: bytes | str,
    optimise: bool,
    profile: str | os.PathLike | None,
    *,
    precise: bool = False,
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 4
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: str | os.PathLike | onnx.ModelProto, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The model's outputs by name for input arrays by name; without optimisations where they fail
    (1.32 makes invalid operators of int8 without zero points)."""
    try:
        live = session(model)
    except Exception:
        live = session(model, optimise=False)
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
