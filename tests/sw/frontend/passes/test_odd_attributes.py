"""Odd attributes and operands, at random: refused in a sentence, or as onnxruntime does it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.defs import get_schema

from systole.sw.ir.graph import ModelError
from tests.helpers.operator_models import DTYPES, Build, compare
from tests.helpers.random_models import random_array

BASE = {
    "AveragePool": {"kernel_shape": [3, 2]},
    "MaxPool": {"kernel_shape": [3, 2]},
    "ConvTranspose": {},
    "GlobalMaxPool": {},
    "ReduceMax": {},
    "Resize": {"mode": "linear"},
    "Concat": {"axis": 1},
    "Transpose": {"perm": [0, 2, 3, 1]},
    "PRelu": {},
    "Pad": {},
    "Reshape": {},
}
"""Operators and the attributes they start from."""

ODD = {
    "kernel_shape": [[0, 2], [3], [3, 2, 2], [-1, 2], [64, 1], [9, 9], 2],
    "strides": [[0, 1], [1], [300, 1], [-1, 1], "a"],
    "pads": [[1], [-1, 0, 0, 0], [3, 3, 3, 3], [0, 0, 0, 9], [2, 1, 2, 1]],
    "dilations": [[0, 1], [9, 9], [2, 2], [300, 1]],
    "auto_pad": ["SAME_UPPER", "SAME_LOWER", "VALID", "same", ""],
    "ceil_mode": [1, 2, -1],
    "count_include_pad": [1, 2, -1],
    "storage_order": [1],
    "group": [0, -1, 2, 3, 4, 6, 100],
    "output_padding": [[1, 1], [5, 5], [-1, 0]],
    "output_shape": [[10, 10], [1, 1], [0, 3], [200, 200]],
    "keepdims": [0, 2],
    "noop_with_empty_axes": [1],
    "mode": ["nearest", "cubic", "x", "edge", "reflect", "wrap", "constant"],
    "coordinate_transformation_mode": [
        "asymmetric", "align_corners", "tf_crop_and_resize", "half_pixel_symmetric", "nonsense",
    ],
    "nearest_mode": ["floor", "ceil", "zzz"],
    "antialias": [1],
    "exclude_outside": [1],
    "keep_aspect_ratio_policy": ["not_larger", "not_smaller"],
    "axes": [[2, 3], [3, 2], [0, 1], [7]],
    "axis": [0, 2, 3, -1, -4, 4, 9, -9],
    "perm": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 2, 3], [0, 0, 1, 2], [0, 1]],
    "allowzero": [1],
}  # fmt: skip
SCALES = [[1, 1, 2, 2], [1, 1, 0.5, 3], [1, 1, 1.3, 0.7], [2, 1, 1, 1], [1, 1, 0, 2], [1, 2]]
SIZES = [[2, 6, 14, 16], [2, 6, 3, 5], [2, 6, 1, 1], [2, 6, 13, 15], [14, 16], [0, 6, 3, 3]]
AXES = [[2, 3], [1], [3], [-1, -2], [2, 2], [9]]
SLOPES = [(6, 1, 1), (1,), (8,), (7, 1), (6, 7, 8), (1, 6, 1, 1), (2, 1, 1, 1), (6,), (3, 1, 1), ()]
SHAPES = [[0, -1], [2, 3, 7, 16], [-1, 7, 6, 8], [0, 0, 8, 7], [-1, -1], [6, 56], [8, 7, 6, -1]]


def odd_model(rng: np.random.Generator) -> tuple[str, onnx.ModelProto]:
    """One node with one to three odd attributes, and what that is."""
    op_type = list(BASE)[rng.integers(len(BASE))]
    attributes = dict(BASE[op_type])
    known = [name for name in ODD if name in get_schema(op_type, 21).attributes]
    for name in rng.permutation(known)[: rng.integers(0, 4)]:
        attributes[str(name)] = ODD[name][rng.integers(len(ODD[name]))]
    model = Build(DTYPES[rng.integers(2)])
    names = [model.x("x", (2, 6, 7, 8)), *_operands(rng, op_type, model)]
    return f"{op_type} {attributes}", model.end(model.node(op_type, names, "r", **attributes))


def _operands(rng: np.random.Generator, op_type: str, model: Build) -> list[str]:
    def one(choices, kind):
        return model.const("k", np.array(choices[rng.integers(len(choices))], kind))

    if op_type == "ConvTranspose":
        shape = [(6, 4, 3, 3), (6, 1, 2, 2), (5, 4, 3, 3), (6, 2, 3)][
            rng.choice([0, 0, 1, 1, 2, 3])
        ]
        return [model.dq(model.const("w", random_array(rng, np.int8, shape)), 0.01, np.int8(0))]
    if op_type == "Resize":
        sizes = bool(rng.integers(2))
        return ["", "", one(SIZES, np.int64)] if sizes else ["", one(SCALES, np.float32)]
    if op_type == "Concat":
        return [
            model.x("z", [(2, 6, 7, 8), (2, 6, 7, 3), (1, 6, 7, 8), (2, 6, 9)][rng.integers(4)])
        ]
    if op_type == "Pad":
        pads = rng.integers(-3, 9, rng.choice([8, 8, 8, 4, 9])) * rng.integers(0, 2)
        more = [model.const("v", np.float32(rng.choice([0, 1, np.inf])))]
        return [model.const("p", pads), *more[: rng.integers(2)]]
    if op_type == "PRelu":
        slope = rng.normal(size=SLOPES[rng.integers(len(SLOPES))])
        return [model.const("s", slope.astype(np.float32))]
    choices = {"ReduceMax": AXES, "Reshape": SHAPES}.get(op_type)
    return [one(choices, np.int64)] if choices else []


@pytest.mark.parametrize("seed", range(0, 400, 40))
def test_odd_attributes(seed, tmp_path):
    taken = 0
    for one in range(seed, seed + 40):
        what, model = odd_model(np.random.default_rng(one))
        if what.startswith("AveragePool") and "dilations" in what:
            continue  # onnxruntime makes an invalid operator of it
        try:
            _, results = compare(model, tmp_path, one)
        except ModelError as e:
            assert len(str(e).splitlines()) == 1, what
            continue
        except Exception as e:
            e.add_note(f"{one}: {what}")
            raise
        taken += 1
        assert all(r.max_abs_diff <= 1 for r in results), f"{one}: {what}: {results}"
    assert taken > 5
