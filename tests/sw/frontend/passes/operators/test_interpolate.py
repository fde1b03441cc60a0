"""Linear interpolation, against onnxruntime."""

import numpy as np
import pytest

import systole
from systole.sw.ir.graph import ModelError, Select
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
    compare,
    const,
    ints,
    node,
)

LINEAR = {
    "twice": ((2, 5, 7, 6), (1, 1, 2, 2), "half_pixel"),
    "four times": ((1, 5, 7, 6), (1, 1, 4, 4), "half_pixel"),
    "eight times": ((1, 5, 3, 6), (1, 1, 8, 8), "half_pixel"),
    "three and one": ((1, 5, 7, 6), (1, 1, 3, 1), "pytorch_half_pixel"),
    "asymmetric": ((1, 5, 7, 6), (1, 1, 2, 3), "asymmetric"),
    "corners": ((1, 5, 7, 6), [2, 5, 13, 11], "align_corners"),
    "corners, other": ((1, 5, 9, 6), [2, 5, 17, 16], "align_corners"),
    "by 3/2": ((1, 5, 8, 6), (1, 1, 1.5, 1.5), "half_pixel"),
    "half": ((1, 5, 8, 6), (1, 1, 0.5, 0.5), "half_pixel"),
    "third": ((1, 5, 9, 6), (1, 1, 1 / 3, 1 / 2), "asymmetric"),
    "to sizes": ((1, 5, 9, 6), [1, 5, 18, 9], "half_pixel_symmetric"),
    "to one": ((1, 5, 9, 6), [1, 5, 1, 1], "pytorch_half_pixel"),
    "of one": ((1, 5, 1, 1), [1, 5, 8, 8], "half_pixel"),
    "of one, corners": ((1, 5, 1, 1), [1, 5, 4, 4], "align_corners"),
    "of one column, corners": ((1, 5, 5, 1), [1, 5, 10, 2], "align_corners"),
    "wide": ((1, 3, 4, 150), (1, 1, 2, 2), "half_pixel"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("form", ["qdq", "integers"])
def test_linear_resize(name, form, dtype, tmp_path):
    shape, factors, mode = LINEAR[name]
    if isinstance(factors, list):
        operands = [None, None, ints(shape[0], *factors[1:])]
    else:
        operands = [None, const(*factors)]
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode=mode)
    model = Build(dtype)
    if form == "qdq":
        model = model.end(step(model, model.x("x", shape)))
        graph = check(model, tmp_path)
    else:
        x = model.q(model.node("Neg", [model.x("x", shape)], "n"), 0.0371, model.zero(3), "q")
        graph, (result,) = compare(model.done(step(model, x), dtype), tmp_path)
        # onnxruntime's integer kernel cuts off what we round.
        assert result.max_abs_diff <= 1
    assert isinstance(graph.ops[-1], Select)


UNEVEN = {
    "corners, twice": ((1, 5, 32, 24), [64, 48], "align_corners"),
    "corners, half": ((2, 5, 33, 20), [16, 13], "align_corners"),
    "half pixels": ((1, 5, 13, 17), [29, 31], "half_pixel"),
    "down": ((1, 3, 29, 31), [13, 17], "half_pixel"),
    "largest": ((1, 3, 3, 65), [5, 256], "align_corners"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNEVEN)
def test_one_axis_after_the_other(name, dtype, tmp_path):
    """Too many phases for both axes at once: rounded in between, so off by a step at most."""
    shape, sizes, mode = UNEVEN[name]
    step = node(
        "Resize",
        *(None, None, ints(*shape[:2], *sizes)),
        mode="linear",
        coordinate_transformation_mode=mode,
    )
    model = Build(dtype)
    # A scale that an element has behind it as well: elsewhere results are rounded once more.
    graph, (result,) = compare(model.end(step(model, model.x("x", shape)), 0.0371, 3), tmp_path)
    assert result.max_abs_diff <= 1 and result.equal >= 0.7 * result.elements
    steps = [op.steps for op in graph.ops if isinstance(op, Select)]
    assert len(steps) == len(graph.ops)
    assert steps[0][0] == steps[-1][1] == 1


@pytest.mark.parametrize("name", ["corners, half", "half pixels"])
def test_axes_run_as_the_golden_model_says(name):
    shape, sizes, mode = UNEVEN[name]
    operands = (None, None, ints(*shape[:2], *sizes))
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode=mode)
    model = Build(np.int8)
    x = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    proto = model.end(step(model, model.x("x", shape)), 0.0371, 3)
    report, _ = systole.run(proto, x, simulator="commands")
    assert report.golden_mismatches == 0 and not report.host_ops


def test_one_axis_alone_is_rounded_once(tmp_path):
    model = Build(np.int8)
    operands = [None, None, ints(1, 5, 128, 6)]
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode="align_corners")
    (op,) = check(model.end(step(model, model.x("x", (1, 5, 64, 6)))), tmp_path).ops
    assert isinstance(op, Select) and op.steps == (127, 1)


def test_more_phases_than_a_command_can_step_over(tmp_path):
    model = Build(np.int8)
    operands = [None, None, ints(1, 5, 6, 260)]
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode="align_corners")
    with pytest.raises(ModelError, match="takes 259 phases; 255 is the limit"):
        check(model.end(step(model, model.x("x", (1, 5, 6, 130)))), tmp_path)


def test_old_linear_resize(tmp_path):
    model = Build(np.uint8, opset=10)
    x = model.x("x", (1, 5, 7, 6))
    scales = model.const("s", np.float32([1, 1, 2, 3]))
    model = model.end(model.node("Resize", [x, scales], "r", mode="linear"))
    check(model, tmp_path)
