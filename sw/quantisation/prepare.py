"""A float ONNX file made ready to quantise.

1. Read; refuse what is quantised at run time. float16 and bfloat16 become float32.
2. Bind the open dimensions of the inputs; bring the opset to 13, the first with per-channel QDQ.
3. onnxruntime's basic graph optimisations, offline: constants folded, Identity and Dropout gone.
4. :func:`sw.quantisation.recurrent.unroll`: LSTM, GRU and RNN written out, step by step.
5. :func:`sw.quantisation.fold.fold`: batch normalisation and other affine steps into the weights.
   A model that is partly quantised is left as it is by steps 3 and 5.
6. Infer shapes, as onnxruntime sees them; name every node; give every layer a bias of its own.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from systole.sw.frontend.passes.read import check_not_random
from systole.sw.ir.dimensions import bind_dimensions
from systole.sw.ir.graph import ModelError, first_line
from systole.sw.ir.model_file import load_proto
from systole.sw.quantisation.fold import fold
from systole.sw.quantisation.recurrent import unroll

OPSET = 13
IR_VERSION = 8
"""The least that opset 13 and initialisers that are no inputs need."""

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
INPUT_TYPES = (*(TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL),)
"""Element types of inputs: real ones are quantised; token ids, indices and masks stay."""
BIASED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose third operand is a bias."""

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


def input_types(model: onnx.ModelProto) -> dict[str, np.dtype]:
    """Element types of a prepared model's inputs, by name."""
    return {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in model.graph.input
    }


def prepare(
    path: str | Path,
    dims: Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
    exclude: Sequence[str] = (),
) -> onnx.ModelProto:
    """The model in ``path``, opset 13 or later, every input dimension a number.

    ``dims``: values of open dimensions, by their name or as ``INPUT:AXIS``. A first dimension that
    is not given becomes 1; open height and width of a picture become ``image_size``. Raises
    :class:`ModelError`."""
    path = Path(path)
    model = load_proto(path)
    initialisers = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initialisers]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _check_static(model, path)
    _check_not_random(model)
    _to_float32(model)
    _check_types(model, path)
    bind_dimensions(model.graph.input, dims or {}, image_size)
    model.ir_version = max(model.ir_version, IR_VERSION)
    model = _upgrade(model, path)
    partly = is_quantised(model)
    if not partly:
        model = _optimise(model, path)
    _infer_shapes(model, path)
    unroll(model, exclude)
    if not partly:
        fold(model)
    _infer_shapes(model, path)
    _name_nodes(model.graph)
    _unshare_biases(model.graph)
    return model


def _check_static(model: onnx.ModelProto, path: Path) -> None:
    for node in model.graph.node:
        kind = node.op_type
        if kind == "DynamicQuantizeLinear":
            raise ModelError(
                f"{path} is quantised at run time: it holds {kind} {node.name!r}, whose scales "
                "depend on the input; quantise the float model it was made of instead"
            )
        if kind.endswith("Integer"):
            raise ModelError(
                f"{path} is quantised already: it holds {kind} {node.name!r}, whose results have "
                "no scale; quantise the float model it was made of instead"
            )


def _check_not_random(model: onnx.ModelProto) -> None:
    lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    check_not_random(lifted(onnx_ir.from_proto(model)).model)


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether part of a model, or all of it, is quantised."""
    return first_quantised(model) is not None


def first_quantised(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The first node that converts from or to quantised numbers, or computes with them."""
    for node in model.graph.node:
        kind = node.op_type
        if kind in ("QuantizeLinear", "DequantizeLinear", "QGemm") or kind.startswith("QLinear"):
            return node
    return None


def _to_float32(model: onnx.ModelProto) -> None:
    """float16 and bfloat16 become float32, in place: inputs, outputs, constants and casts."""
    _graph_to_float32(model.graph)
    del model.graph.value_info[:]


def _graph_to_float32(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _tensor_to_float32(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _tensor_to_float32(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _graph_to_float32(attribute.g)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT


def _tensor_to_float32(tensor: TensorProto) -> None:
    if tensor.data_type in NARROW:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _check_types(model: onnx.ModelProto, path: Path) -> None:
    for value in model.graph.input:
        element = value.type.tensor_type.elem_type
        if element not in INPUT_TYPES:
            known = ", ".join(_type(each) for each in INPUT_TYPES)
            raise ModelError(
                f"{path}: input {value.name!r} is {_type(element)}; it must be one of {known}"
            )
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            raise ModelError(
                f"{path}: initialiser {tensor.name!r} is {_type(tensor.data_type)}; a float32 "
                "model is needed"
            )


def _type(element: int) -> str:
    return TensorProto.DataType.Name(element).lower()


def _upgrade(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if version >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as e:
        raise ModelError(
            f"{path}: its opset {version} cannot be converted to {OPSET}: {first_line(e)}"
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
            raise ModelError(f"{path}: onnxruntime cannot run it: {first_line(e)}") from None
        optimised = onnx.load(file)
    used = {node.domain for node in optimised.graph.node} | {""}
    keep = [o for o in optimised.opset_import if o.domain in used]
    del optimised.opset_import[:]
    optimised.opset_import.extend(keep)
    return optimised


def _infer_shapes(model: onnx.ModelProto, path: Path) -> None:
    """Writes the type and shape of every value into the model, in place: onnxruntime's, which knows
    the operators of its own domains too."""
    del model.graph.value_info[:]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    own = {value.name: value for value in model.graph.output}
    exposed.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for node in model.graph.node
        for name in node.output
        if name and name not in own
    )
    try:
        values = session(exposed).get_outputs()
    except Exception as e:
        raise ModelError(f"{path}: onnxruntime cannot run it: {first_line(e)}") from None
    for value in values:
        if value.type.startswith("tensor("):
            element = TensorProto.DataType.Value(value.type[7:-1].upper())
            info = helper.make_tensor_value_info(value.name, element, value.shape)
            if value.name in own:
                own[value.name].CopyFrom(info)
            else:
                model.graph.value_info.append(info)


def _unshare_biases(graph: onnx.GraphProto) -> None:
    """A bias that several layers read becomes one for each: their scales differ once quantised."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type in BIASED and bias in constants and uses[bias] > 1:
            own = TensorProto()
            own.CopyFrom(constants[bias])
            own.name = f"{bias}/{node.name}"
            graph.initializer.append(own)
            node.input[2] = own.name


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
