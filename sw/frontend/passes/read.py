"""Pass 1, read: an ONNX file to a checked, constant-folded onnx-ir model.

1. Parse, without the file's notes of shapes; refuse external data that is missing, short or outside
   the model's folder.
2. Fix the input shapes: dimensions get the values asked for; an unknown first dimension (the
   batch) becomes 1. All other shapes follow from these.
3. Inline functions, fold constants (quantised weights stay quantised) and what shapes decide, lift
   constants.
4. Sort topologically; refuse cycles and values that nothing defines.
5. Remove what no output depends on; refuse results that are random.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TypeVar

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from systole.sw.golden import oracle
from systole.sw.ir.dimensions import bind_dimensions, check_size
from systole.sw.ir.graph import ModelError, first_line
from systole.sw.ir.model_file import load_proto

T = TypeVar("T")
RANDOM = (
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
    "RandomUniformLike",
)
"""Operators whose results differ from run to run."""
FOLD_LIMIT = 1 << 24
"""Elements of the largest constant that is folded."""

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # What it warns of is refused here.


def read(path: str | os.PathLike, dims: Mapping[str, int] | None = None) -> ir.Model:
    """The model in ``path``, ready to lower; ``dims`` are values of its open dimensions, by
    their name or as ``INPUT:AXIS``. Raises :class:`ModelError`."""
    path = Path(path)
    proto = load_proto(path, external_data=False)
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    bind_dimensions(inputs, dims or {})
    model = _attempt(f"{path}: not a readable ONNX model", lambda: ir.from_proto(proto))
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check_external(model, path)
    _check_defined(model.graph)
    _attempt(f"{path}: its functions cannot be inlined", lambda: common.InlinePass()(model))
    common.RemoveInitializersFromInputsPass()(model)
    _attempt(
        f"{path}: its nodes cannot be sorted",
        lambda: common.TopologicalSortPass()(model),
    )
    _fold(model, path)
    if any(node.op_type in ("Shape", "Size") for node in model.graph):
        # Behind operators that only onnxruntime knows.
        infer_shapes(model, path)
        _fold(model, path)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    check_not_random(model)
    return model


def _fold(model: ir.Model, path: Path) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # onnx prints what fails
        _attempt(
            f"{path}: its constants cannot be folded",
            lambda: optimizer.fold_constants(
                model,
                onnx_shape_inference=True,
                input_size_limit=FOLD_LIMIT,
                output_size_limit=FOLD_LIMIT,
            ),
        )


def infer_shapes(model: ir.Model, path: Path) -> dict[str, str]:
    """Writes onnxruntime's shape of every input and result into the model; onnxruntime's types by
    name, such as ``tensor(int8)``. Raises :class:`ModelError` where it does not accept the model,
    and where a tensor is empty or too large."""
    values = {v.name: v for v in (*model.graph.inputs, *_results(model))}
    try:
        ir.external_data.load_to_model(model)
        proto = ir.to_proto(model)
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in _results(model))
        session = oracle.session(proto, optimise=False)
    except Exception as e:  # onnxruntime's errors have no class of their own in common
        reason = first_line(e)
        raise ModelError(f"{path}: onnxruntime does not accept the model: {reason}") from None
    types = {}
    for info in [*session.get_inputs(), *session.get_outputs()]:
        types[info.name] = info.type
        value, shape = values[info.name], info.shape
        if any(d == 0 for d in shape):
            raise ModelError(f"tensor {info.name!r} has shape {shape}: it is empty")
        if all(isinstance(d, int) for d in shape):
            check_size("tensor", info.name, shape)
        if info.type.startswith("tensor("):
            element = onnx.TensorProto.DataType.Value(info.type[7:-1].upper())
            value.type = ir.TensorType(ir.DataType(element))
            value.shape = ir.Shape(shape)
    return types


def _results(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs if value.name]


def _attempt(what: str, action: Callable[[], T]) -> T:
    """``action()``; whatever the libraries raise on a malformed model becomes a ModelError."""
    try:
        return action()
    except Exception as e:
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)
        raise ModelError(f"{what}: {reason}") from None


def _check_external(model: ir.Model, path: Path) -> None:
    folder = path.parent.resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (folder / tensor.location).resolve()
        if not file.is_relative_to(folder):
            raise ModelError(
                f"initialiser {value.name!r}: external data {str(tensor.location)!r} "
                "is outside the model's folder"
            )
        if not file.is_file():
            raise ModelError(f"initialiser {value.name!r}: external data {file} is missing")
        need = (tensor.offset or 0) + tensor.nbytes
        if file.stat().st_size < need:
            raise ModelError(
                f"initialiser {value.name!r}: external data {file} has "
                f"{file.stat().st_size} bytes, {need} needed"
            )


def _check_defined(graph: ir.Graph) -> None:
    known = set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and value not in known:
                raise ModelError(
                    f"{node.op_type} {node.name or ''!r}: input {value.name!r} is defined by no "
                    "node, input or initialiser"
                )
    for value in graph.outputs:
        if value.producer() is None and value not in known:
            raise ModelError(f"output {value.name!r} is defined by no node, input or initialiser")


def check_not_random(model: ir.Model) -> None:
    """Raises :class:`ModelError` for a node that computes something else with every run. Constants
    must be initialisers."""
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx"):
            _check_not_random(node)


def _check_not_random(node: ir.Node) -> None:
    why = None
    if node.op_type in RANDOM:
        why = "its result is random"
    elif node.op_type == "Dropout" and _drops(node):
        why = "training_mode is not false: its result is random"
    if why is not None:
        name = node.name or node.outputs[0].name or ""
        raise ModelError(
            f"{node.op_type} {name!r}: {why}, so that no run can be compared with another; export "
            "the model in evaluation mode"
        )


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout may leave anything out: in training mode, or one that an input decides."""
    ratio, training = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    if training is None:
        return False
    if training.const_value is not None and not training.const_value.numpy().any():
        return False
    return ratio is None or ratio.const_value is None or bool(ratio.const_value.numpy().any())
