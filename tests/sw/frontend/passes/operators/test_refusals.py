"""What operators refuse, and the sentence that says so."""

import numpy as np
import pytest

from systole.sw.ir.graph import ModelError
from tests.helpers.operator_models import (
    Build,
    compare,
    const,
    ints,
    node,
)

REFUSED = {
    "irregular": (
        node("Gather", ints(*np.random.default_rng(0).permutation(1100) % 300), axis=3),
        "no regular order",
    ),
    "pad with many": (node("Pad", ints(0, 0, 0, 0, 0, 0, 1, 1), const(1.0, 2.0)), "one constant"),
    "cubic": (node("Resize", None, const(1, 1, 2, 2), mode="cubic"), "mode = 'cubic'"),
    "linear channels": (
        node("Resize", None, const(1, 2, 2, 2), mode="linear"),
        "mode only supports",
    ),
    "linear and smooth": (
        node("Resize", None, const(1, 1, 0.5, 0.5), mode="linear", antialias=1),
        "antialias = 1",
    ),
    "linear by much": (node("Resize", None, const(1, 1, 256, 2), mode="linear"), "256 phases"),
    "linear of a box": (
        node(
            "Resize",
            const(0, 0, 0, 0, 1, 1, 1, 1),
            const(1, 1, 2, 2),
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        "tf_crop_and_resize",
    ),
    "constants": (node("Pow", (np.arange(4, dtype=np.float32).reshape(4, 1, 1),)), "one value"),
    "impossible": (node("Slice", ints(0, 0), ints(1), ints(1)), "onnxruntime refuses it"),
    "rows": (
        node("Mul", (np.linspace(9, 100, 70, dtype=np.float32).reshape(70, 1),)),
        "int8 cannot represent",
    ),
    "mean of everything": (node("ReduceMean", ints(1, 2, 3)), "one or two of the last"),
    "mean of channels and columns": (node("ReduceMean", ints(1, 3)), "cannot both be reduced"),
    "mean of images": (node("ReduceMean", ints(0)), "one or two of the last"),
    "wider": (node("Add", (np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1),)), "does not fit"),
    "not finite": (node("Add", (np.float32([[[0]], [[1]], [[2]], [[np.inf]]]),)), "not finite"),
    "divisor": (node("Div", (np.arange(4, dtype=np.float32).reshape(4, 1, 1),)), "has zeros"),
    "slope": (node("PRelu", (np.arange(70, dtype=np.float32).reshape(70, 1),)), "channels only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    step, match = REFUSED[name]
    model = Build(np.int8)
    with pytest.raises(ModelError, match=match):
        compare(model.end(step(model, model.x("x", (1, 4, 70, 300)))), tmp_path)
