"""A float ONNX file made ready to quantise.

1. Read; refuse what is quantised already or not float32.
2. Bind the open dimensions of the inputs; bring the opset to 13, the first with per-channel QDQ.
3. onnxruntime's basic graph optimisations, offline: constants folded, Identity and Dropout gone.
4. :func:`sw.quantisation.fold.fold`: batch normalisation and other affine steps into the weights.
5. Infer shapes; name every node.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, version_converter

from systole.sw.ir.graph import ModelError
from systole.sw.quantisation.fold import fold

OPSET = 13
IR_VERSION = 8
"""The least that opset 13 and initialisers that are no inputs need."""

NOT_WANTED = ("ConstantSharing", "TransposeOptimizer")
"""Optimisations that would tie unrelated biases together, or move layout changes through layers."""


def session(
    model: onnx.ModelProto, given: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session of ``model`` as written: no operator is fused, unless the options
    ``given`` say otherwise."""
    options = onnxruntime.SessionOptions() if given is None else given
    if given is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(NOT_WANTED),
    )


def exposed(
    model: onnx.ModelProto, tensors: Sequence[str]
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """A function that runs ``model`` on a sample (inputs by name) and returns the values of
    ``tensors``, inner ones included, in their order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    live = session(copy)
    return lambda feeds: [np.asarray(a) for a in live.run(list(tensors), dict(feeds))]


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of each input of a prepared model, by name; all dimensions are numbers."""
    return {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def prepare(
    path: str | Path,
    dims: Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> onnx.ModelProto:
    """The model in ``path``, opset 13 or later, every input dimension a number.

    ``dims``: values of open dimensions, by their name or as ``INPUT:AXIS``. A first dimension that
    is not given becomes 1; open height and width of a picture become ``image_size``. Raises
    :class:`ModelError`."""
    path = Path(path)
    model = _read(path)
    initialisers = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initialisers]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _check_float(model, path)
    _bind(model, dict(dims or {}), image_size)
    model.ir_version = max(model.ir_version, IR_VERSION)
    model = _upgrade(model, path)
    model = _optimise(model, path)
    fold(model)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    _name_nodes(model.graph)
    return model


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        model = onnx.load(path)
    except Exception as e:
        raise ModelError(f"{path}: not a readable ONNX model: {_first_line(e)}") from None
    if not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model: its graph has no outputs")
    return model


def _check_float(model: onnx.ModelProto, path: Path) -> None:
    for node in model.graph.node:
        kind = node.op_type
        if kind in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QGemm") or (
            kind.startswith("QLinear") or kind.endswith("Integer")
        ):
            raise ModelError(f"{path} is quantised already: it holds {kind} {node.name!r}")
    tensors = [(f"input {i.name!r}", i.type.tensor_type.elem_type) for i in model.graph.input]
    for what, element in tensors:
        if element != TensorProto.FLOAT:
            raise ModelError(f"{path}: {what} is {_type(element)}; a float32 model is needed")
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            raise ModelError(
                f"{path}: initialiser {tensor.name!r} is {_type(tensor.data_type)}; a float32 "
                "model is needed"
            )


def _type(element: int) -> str:
    return TensorProto.DataType.Name(element).lower()


def _bind(model: onnx.ModelProto, dims: dict[str, int], image_size: tuple[int, int] | None) -> None:
    known: set[str] = set()
    missing = None
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        if not value.type.tensor_type.HasField("shape"):
            raise ModelError(f"input {value.name!r} has no shape; one is needed")
        channels_last = len(shape.dim) == 4 and shape.dim[3].dim_value in (1, 3)
        for axis, dim in enumerate(shape.dim):
            if dim.dim_value > 0:
                continue
            names = [n for n in (dim.dim_param, f"{value.name}:{axis}") if n]
            known.update(names)
            number = next((dims[n] for n in names if n in dims), None)
            first = 1 if channels_last else 2
            if number is None and image_size and axis in (first, first + 1):
                number = image_size[axis - first]
            if number is None and axis == 0:
                number = 1
            if number is None:
                missing = missing or (value.name, axis, names[0])
                continue
            if number < 1:
                raise ModelError(f"dimension {names[0]} = {number}: it must be positive")
            dim.dim_value = number
    unknown = sorted(set(dims) - known)
    if unknown:
        have = ", ".join(sorted(known)) or "none"
        raise ModelError(f"no open dimension {unknown[0]}: the model's are {have}")
    if missing:
        name, axis, key = missing
        raise ModelError(f"input {name!r}: dimension {axis} is open; bind it with --dim {key}=N")
    del model.graph.value_info[:]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")


def _upgrade(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if version >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as e:
        raise ModelError(
            f"{path}: its opset {version} cannot be converted to {OPSET}: {_first_line(e)}"
        ) from None


def _optimise(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(file)
        try:
            session(model, options)
        except Exception as e:
            raise ModelError(f"{path}: onnxruntime cannot run it: {_first_line(e)}") from None
        optimised = onnx.load(file)
    used = {node.domain for node in optimised.graph.node} | {""}
    keep = [o for o in optimised.opset_import if o.domain in used]
    del optimised.opset_import[:]
    optimised.opset_import.extend(keep)
    return optimised


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.name or node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
