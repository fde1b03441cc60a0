"""Multiply-accumulates of single nodes, counted by hand."""

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

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


def test_control_flow_is_not_counted():
    assert counted("Loop", [S, S, (3, 3)], (3, 3)) is None
