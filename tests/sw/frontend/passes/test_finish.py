"""The last step of lowering an operator: scales, tables and clamps."""

import numpy as np
import onnx_ir as ir
import pytest

from systole.sw.frontend.passes import finish
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.values import Function, Node, Pending, Quant
from systole.sw.ir.graph import Binary, ModelError, Pick

NODE = Node(ir.Node("", "Mul", [], num_outputs=1, name="node"))
SHAPE = (1, 3, 2, 2)
VIEW = OnnxView.contiguous(SHAPE)
QUANT = Quant(np.float32(0.5), 7, unsigned=False)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, 2.0**24])
def test_scales_the_hardware_cannot_hold(scale):
    with pytest.raises(ModelError, match=r"Mul 'node': requantisation scale .* is outside"):
        finish.checked(NODE, np.array([1.0, scale], np.float32))


def test_scale_ratios_of_a_product():
    op = Binary(**NODE.fields(), kind="mul", a="a", b="b", a_ratio=0.25, b_ratio=0.125)
    scaled = finish.scaled_binary(NODE, op, QUANT)
    assert (scaled.a_ratio, scaled.b_ratio) == (0.5, 1.0)
    with pytest.raises(ModelError, match="outside"):
        finish.scaled_binary(NODE, op, Quant(np.float32(1e-9), 0, unsigned=False))


def test_table_of_a_function():
    values = np.linspace(-200, 200, 256)
    values[3] = np.nan
    op = finish.table(NODE, Function("x", VIEW, values, ("Mul", "Exp")), SHAPE, QUANT).op
    assert op.op_type == "Mul+Exp"
    assert (op.values[[0, 3, 255]] == [-128, -128, 127]).all()
    assert op.values[128] == round(values[128] / 0.5) + 7


def test_what_needs_no_scale_of_its_own():
    op = finish.whole(NODE, "x", SHAPE, 0.5)
    settled = finish.unscaled(Pending(op, SHAPE, VIEW, fill=2.0), QUANT)
    assert settled is not None
    assert settled.phases[0][0].scale == 1.0 and settled.fill == 2.0 / 0.5 + 7
    assert finish.unscaled(Pending(op, SHAPE, VIEW, low=0.0), QUANT) is None
    assert (
        finish.unscaled(Pending(finish.whole(NODE, "x", SHAPE, 0.25), SHAPE, VIEW), QUANT) is None
    )


def test_picks_of_mixed_scales():
    both = np.array([0, 1])
    a, b = Pick("a", both, scale=1.0), Pick("b", np.array([-1, 0]), scale=2.0)
    c = Pick("c", np.array([0, -1]), scale=2.0)
    assert finish.of_mixed_scales([a, b]) == {"a", "b"}
    assert finish.of_mixed_scales([b, c]) == set()
