"""Multiply-accumulates of single nodes, counted by hand."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole.sw.frontend.macs import node_macs


def counted(op_type, inputs, output, domain="", **attributes):
    """The count of a node of these shapes; None is an input left out."""
    names = ["" if shape is None else f"x{i}" for i, shape in enumerate(inputs)]
    node = helper.make_node(op_type, names, ["y"], domain=domain, **attributes)
    known = zip(names, inputs, strict=True)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in known if n]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", infos, [out]), opset_imports=opsets)
    return node_macs(next(iter(ir.from_proto(model).graph)))


S = ()
CASES = {
    "grouped convolution": ("Conv", [(1, 8, 9, 9), (16, 4, 3, 3)], (1, 16, 7, 7), 16 * 49 * 36),
    "fused convolution": (
        "QLinearConv",
        [(1, 8, 9, 9), S, S, (16, 8, 3, 3), S, S, S, S],
        (1, 16, 7, 7),
        16 * 49 * 72,
    ),
    "transposed": ("ConvTranspose", [(1, 8, 9, 9), (8, 4, 2, 2)], (1, 4, 18, 18), 8 * 81 * 16),
    "batch of products": ("MatMul", [(2, 3, 5, 7), (2, 3, 7, 4)], (2, 3, 5, 4), 6 * 5 * 7 * 4),
    "vector": ("MatMul", [(7,), (7, 4)], (4,), 28),
    "Gemm": ("Gemm", [(5, 7), (7, 4), (4,)], (5, 4), 140),
    "recurrent": (
        "LSTM",
        [(10, 2, 6), (1, 32, 6), (1, 32, 8), (1, 64)],
        (10, 1, 2, 8),
        20 * 32 * 14,
    ),
    "elementwise": ("Add", [(5, 7), (5, 7)], (5, 7), 0),
    "known when it runs": ("MatMul", [("rows", 7), (7, 4)], ("rows", 4), None),
}


@pytest.mark.parametrize("name", CASES)
def test_counts(name):
    op_type, inputs, output, expected = CASES[name]
    assert counted(op_type, inputs, output) == expected


def test_the_whole_transposed_operand_counts():
    assert counted("Gemm", [(7, 5), (7, 4)], (5, 4), transA=1) == 140


EINSUMS = {
    "product": ("bij,bjk->bik", [(2, 3, 5), (2, 5, 7)], (2, 3, 7), 2 * 3 * 5 * 7),
    "result left out": ("ij,jk", [(3, 5), (5, 7)], (3, 7), 3 * 5 * 7),
    "ellipsis": ("...ij,...jk->...ik", [(2, 4, 3, 5), (4, 5, 7)], (2, 4, 3, 7), 8 * 3 * 5 * 7),
    "three": ("ij,jk,kl->il", [(2, 3), (3, 5), (5, 7)], (2, 7), 2 * 2 * 3 * 5 * 7),
    "broadcast": ("ij, jk -> ik", [(3, 1), (5, 7)], (3, 7), 3 * 5 * 7),
    "elementwise": ("ij,ij->ij", [(3, 5), (3, 5)], (3, 5), 0),
    "transposed": ("ij->ji", [(3, 5)], (5, 3), 0),
    "sums": ("ij->i", [(3, 5)], (3,), 0),
    "unknown": ("ij,jk->ik", [(3, "n"), ("n", 7)], (3, 7), None),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name):
    equation, inputs, output, expected = EINSUMS[name]
    assert counted("Einsum", inputs, output, equation=equation) == expected


def body(op_type, width=4, condition=False, inputs=()):
    """A graph of one operator on ``a`` (3, 4) of the graph around it and ``w``."""
    nodes = [helper.make_node(op_type, ["a", "w"], ["result"])]
    w = numpy_helper.from_array(np.ones((4, width), np.float32), "w")
    outputs = [helper.make_tensor_value_info("result", TensorProto.FLOAT, [3, width])]
    if condition:
        nodes.append(helper.make_node("Identity", ["going"], ["on"]))
        outputs.insert(0, helper.make_tensor_value_info("on", TensorProto.BOOL, []))
    return helper.make_graph(nodes, "body", list(inputs), outputs, [w])


def control(node, constants):
    """The count of a node of control flow in a graph of the input ``a`` and these constants."""
    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, 4])
    out = [helper.make_empty_tensor_value_info(name) for name in node.output]
    known = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    free = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("n", TensorProto.INT64, []), ("c", TensorProto.BOOL, []))
        if name not in constants
    ]
    model = helper.make_model(helper.make_graph([node], "g", [a, *free], out, known))
    return node_macs(next(iter(ir.from_proto(model).graph)))


def loop(op_type, inputs=("n", "c"), **constants):
    given = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
    ]
    own = body(op_type, condition=True, inputs=given)
    return control(helper.make_node("Loop", list(inputs), ["y"], body=own), constants)


def test_control_flow():
    larger, smaller = body("MatMul", 5), body("MatMul", 2)
    branches = {"then_branch": smaller, "else_branch": larger}
    assert control(helper.make_node("If", ["c"], ["y"], **branches), {}) == 3 * 4 * 5
    assert loop("MatMul", n=np.int64(6), c=True) == 6 * 3 * 4 * 4
    assert loop("MatMul", inputs=("n", ""), n=np.int64(6)) == 6 * 3 * 4 * 4
    assert loop("MatMul", n=np.int64(6)) is None  # which the condition may end
    assert loop("MatMul", c=True) is None
    assert loop("Add") == 0


def test_a_scan_runs_its_body_for_every_slice():
    each = [helper.make_tensor_value_info("row", TensorProto.FLOAT, [7])]
    node = helper.make_node(
        "Scan", ["x"], ["y"], body=body("MatMul", inputs=each), num_scan_inputs=1
    )
    for shape, expected in (([6, 7], 6 * 48), (["rows", 7], None)):
        infos = [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, 4]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        ]
        graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("y")])
        assert node_macs(next(iter(ir.from_proto(helper.make_model(graph)).graph))) == expected


def test_what_depends_on_more_than_shapes_is_not_counted():
    assert counted("DeformConv", [(1, 4, 9, 9), (4, 4, 3, 3)], (1, 4, 7, 7)) is None
