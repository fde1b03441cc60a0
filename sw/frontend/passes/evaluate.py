"""Single nodes computed by onnxruntime, on arrays that the lowering makes up: an elementwise
function on the 256 values of an int8, an operator that moves elements on their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper

from systole.sw.frontend.passes.values import Node
from systole.sw.ir.graph import first_line

OPTIONS = onnxruntime.SessionOptions()
OPTIONS.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
OPTIONS.log_severity_level = 4
OPTIONS.intra_op_num_threads = 1
OPTIONS.inter_op_num_threads = 1


def evaluate(
    node: Node,
    arrays: Sequence[np.ndarray | None],
    opsets: Mapping[str, int],
    **changes: Any,
) -> list[np.ndarray]:
    """The outputs of ``node`` for its inputs (None: left out). ``changes`` replace fields of the
    node (``op_type``, ``domain``) or attributes. Raises :class:`sw.ir.graph.ModelError` with
    onnxruntime's reason if it refuses the node."""
    proto = ir.serde.serialize_node(node.raw)
    proto.op_type = changes.pop("op_type", proto.op_type)
    proto.domain = changes.pop("domain", proto.domain)
    kept = [a for a in proto.attribute if a.name not in changes]
    kept += [helper.make_attribute(name, value) for name, value in changes.items()]
    inputs = ["" if array is None else f"x{i}" for i, array in enumerate(arrays)]
    outputs = [f"y{i}" for i in range(len(proto.output))]
    alone = helper.make_node(proto.op_type, inputs, outputs, domain=proto.domain)
    alone.attribute.extend(kept)
    given = {name: array for name, array in zip(inputs, arrays, strict=True) if array is not None}
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in given.items()
    ]
    graph = helper.make_graph(
        [alone], "node", infos, [helper.make_empty_tensor_value_info(name) for name in outputs]
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), OPTIONS, providers=["CPUExecutionProvider"]
        )
        return cast("list[np.ndarray]", session.run(None, given))
    except Exception as e:
        reason = first_line(e)
        raise node.fail(f"onnxruntime refuses it: {reason}") from None
