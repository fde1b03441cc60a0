"""A gain and a shift per channel as a depthwise convolution: its worst error."""

import numpy as np
import onnx_ir as ir
import pytest

from systole.sw.frontend.passes.channels import affine
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.values import Affine, Node

NODE = Node(ir.Node("", "Mul", [], num_outputs=1, name="node"))


def real(gain, shift):
    """What the convolution of :func:`affine` computes of all int8, before it is rounded."""
    gain, shift = np.array(gain, np.float64), np.array(shift, np.float64)
    none = np.zeros(len(gain))
    view = OnnxView.contiguous((1, len(gain), 1, 1))
    x = Affine("first", ("Mul", "Add"), "x", view, np.float32(1), none, none)
    op = affine(NODE, x, gain, shift)
    assert (op.name, op.op_type, op.group) == ("first", "Mul+Add", len(gain))
    q = np.arange(-128, 128)
    sums = op.weights.reshape(-1, 1).astype(np.float64) * q + op.bias[:, None]
    return sums * op.scale[:, None].astype(np.float64), gain[:, None] * q + shift[:, None]


def test_a_shift_costs_a_few_hundredths_of_a_unit():
    rng = np.random.default_rng(0)
    ours, wanted = real(rng.uniform(0.05, 1.5, 200), rng.uniform(-100, 100, 200))
    assert np.abs(ours - wanted).max() < 0.05


def test_a_gain_alone_is_exact_but_for_its_own_rounding():
    ours, wanted = real([0.3, -1.7, 2.0], [0.0, 0.0, 0.0])
    assert ours == pytest.approx(wanted, rel=1e-6)


def test_a_channel_without_a_gain_is_its_shift():
    ours, _ = real([0.0, 1e-12], [12.25, -3.5])
    assert ours[0] == pytest.approx(12.25) and ours[1] == pytest.approx(-3.5)
