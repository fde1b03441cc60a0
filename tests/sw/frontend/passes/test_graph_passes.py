"""The passes on the graph: what each changes, what it leaves alone, and that results stay."""

from dataclasses import replace

import numpy as np
import pytest

from systole.sw.frontend.load import PASSES, apply_passes
from systole.sw.frontend.passes.check_limits import check_limits
from systole.sw.frontend.passes.drop_unused import drop_unused
from systole.sw.frontend.passes.fuse_activations import fuse_activations
from systole.sw.frontend.passes.fuse_clamps import fuse_clamps
from systole.sw.frontend.passes.fuse_pads import fuse_pads
from systole.sw.frontend.passes.fuse_residuals import fuse_residuals
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Binary, Conv, Graph, ModelError, Pick, Port, Select, Table
from tests.helpers.small_graphs import SHAPE, add, clamp, conv, graph, table


def same_results(before: Graph, after: Graph) -> None:
    x = np.random.default_rng(0).integers(-128, 128, SHAPE).astype(np.int8)
    ours, theirs = golden.run(after, {"x": x}), golden.run(before, {"x": x})
    for port in before.outputs:
        assert (ours[port.tensor] == theirs[port.tensor]).all()


def test_unused_operators_are_dropped():
    before = graph([conv("x", "a"), conv("x", "b"), conv("b", "c")], ["a"])
    after, changed = drop_unused(before)
    assert changed and [op.output for op in after.ops] == ["a"]
    assert set(after.tensors) == {"x", "a"}


@pytest.mark.parametrize("name", PASSES)
def test_what_a_pass_does_not_change_is_the_same_graph(name):
    before = graph([conv("x", "a")], ["a"])
    after, changed = PASSES[name](before)
    assert after is before and not changed


@pytest.mark.parametrize("behind", [conv, table])
def test_a_clamp_joins_the_operator_before_it(behind):
    before = graph([behind("x", "a"), clamp("a", "b", -20, 110)], ["b"])
    after, changed = fuse_clamps(before)
    (op,) = after.ops
    assert changed and type(op) is type(behind("x", "a")) and op.output == "b"
    same_results(before, after)


def test_a_clamp_narrows_to_both():
    (op,) = fuse_clamps(graph([conv("x", "a"), clamp("a", "b", -20, 110)], ["b"])).graph.ops
    assert (op.low, op.high) == (-20, 100)


@pytest.mark.parametrize("each", [fuse_clamps, fuse_activations])
def test_a_tensor_that_others_read_stays(each):
    last = clamp("a", "b", 0, 9) if each is fuse_clamps else table("a", "b")
    before = graph([conv("x", "a"), last, conv("a", "c")], ["b", "c"])
    assert not each(before).changed


def test_an_addition_joins_the_later_convolution():
    before = graph([conv("x", "a"), conv("x", "b"), add("a", "b", "c")], ["c"])
    after, changed = fuse_residuals(before)
    first, second = after.ops
    assert isinstance(first, Conv) and isinstance(second, Conv) and second.residual
    assert changed and first.output == "a" and second.output == "c"
    assert (second.residual.other, second.residual.mid_name) == ("a", "b")
    # The convolution's own ratio is that of the addition's second operand.
    assert (second.residual.conv_ratio, second.residual.other_ratio) == (0.75, 0.5)
    same_results(before, after)


def test_an_addition_behind_groups_stays():
    before = graph([conv("x", "a", group=4), add("a", "x", "c")], ["c"])
    assert not fuse_residuals(before).changed


def test_tables_join_what_is_before_them():
    before = graph(
        [add("x", "x", "a"), table("a", "b", offset=3), table("b", "c", offset=-9)], ["c"]
    )
    after, changed = fuse_activations(before)
    (op,) = after.ops
    assert changed and isinstance(op, Binary) and op.activation and op.op_type == "Add+Tanh+Tanh"
    assert (op.activation.mid_name, op.activation.zero) == ("a", 1)
    same_results(before, after)


def test_tables_in_a_row_are_one():
    before = graph([table("x", "a", offset=100), table("a", "b", offset=-50)], ["b"])
    (op,) = fuse_activations(before).graph.ops
    assert isinstance(op, Table)
    same_results(before, fuse_activations(before).graph)


def padded(offsets, size, *, scale=1.0):
    """A Select that pads or crops ``x`` (4, 3, 3), and a 3x3 convolution behind it."""
    pick = Pick("x", np.arange(4), offsets=offsets, scale=scale)
    pad = Select("a_node", "Pad", "a", -128, 127, phases=[[pick]])
    behind = replace(conv("a", "b"), weights=np.full((4, 4, 3, 3), 3, np.int8), pads=(0, 1, 0, 1))
    g = graph([pad, behind], ["b"])
    shapes = {"a": (1, 4, *size), "b": (1, 4, size[0] - 2, size[1])}
    g.tensors.update({n: replace(g.tensors[n], shape=s, zero=0) for n, s in shapes.items()})
    return g


def test_padding_joins_the_convolution_behind_it():
    before = padded((-1, -1), (5, 4))
    after, changed = fuse_pads(before)
    (op,) = after.ops
    assert changed and op.pads == (1, 2, 1, 1) and op.op_type == "Pad+Conv"
    same_results(before, after)


@pytest.mark.parametrize(
    "before",
    [
        padded((-1, -2), (5, 5)),  # three columns of zeros: the kernel lies in padding alone
        padded((1, 0), (4, 3)),  # crops
        padded((-1, -1), (5, 4), scale=0.5),
    ],
    ids=["wide", "crop", "scale"],
)
def test_other_padding_stays(before):
    assert not fuse_pads(before).changed


def test_padding_that_others_read_stays():
    before = padded((-1, -1), (5, 4))
    both = replace(before, outputs=[*before.outputs, Port("a", "a", "int8")])
    assert not fuse_pads(both).changed


def test_limits_are_named():
    before = graph([conv("x", "a")], ["a"])
    object.__setattr__(before.ops[0], "strides", (256, 1))
    with pytest.raises(ModelError, match=r"Conv 'a_node': strides = \[256, 1\] exceeds 255"):
        check_limits(before)


def test_all_passes_are_observed_in_order():
    before = graph([conv("x", "a"), table("a", "b"), conv("x", "c")], ["b"])
    seen = []
    after = apply_passes(before, lambda name, graph, changed: seen.append((name, changed)))
    assert seen == [
        ("drop_unused", True),
        ("fuse_clamps", False),
        ("fuse_residuals", False),
        ("fuse_activations", True),
        ("fuse_pads", False),
        ("fuse_cuts", False),
        ("check_limits", False),
    ]
    assert len(after.ops) == 1
